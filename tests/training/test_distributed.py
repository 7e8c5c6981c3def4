"""Two processes on the CPU give the results of one: data parallel (DDP), sharded (FSDP2, DeepSpeed), two machines.

A fixture starts each launcher once for all its tests. The launcher runs `distributed_worker.py`. Most of them are
Accelerate's launcher in this process, with forks in place of torchrun's processes, which would import everything.
"""

import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed.run
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import save_base, topic_rows, write_rows
from safetensors import safe_open
from safetensors.torch import load_file

from prefix_adapter.training import (
    Data,
    JointRecipe,
    Recipe,
    RecipeError,
    checkpoint,
    load_trained,
    reports,
    train,
    train_together,
)
from prefix_adapter.training.distributed import check_launch
from prefix_adapter.training.loop import new_accelerator

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "accelerate"
WORKER = str(Path(__file__).with_name("distributed_worker.py"))
FROZEN = ("attention.self", "word_embeddings", "LayerNorm", "lm_head", "shared", "SelfAttention")


def tag_rows(count: int, start: int = 0) -> list[dict]:
    """Sentences of 1 to 22 tokens, so that the two processes have very different numbers of tokens."""
    rows = []
    for i in range(start, start + count):
        words = [(i * 5 + j * 3) % 80 for j in range(1 + (i * 7) % 22)]
        tags = ["B-X" if word < 30 else "I-X" if word < 40 else "O" for word in words]
        rows.append({"tokens": [f"w{word}" for word in words], "tags": tags})
    return rows


def pair_rows(count: int) -> list[dict]:
    return [
        {
            "text": " ".join(f"w{(i * 3 + j) % 20}" for j in range(2 + i % 5)),
            "target": " ".join(f"w{(i + j) % 9}" for j in range(1 + i % 3)),
        }
        for i in range(count)
    ]


def distil_rows(count: int) -> list[dict]:
    return [
        {"context": "w3 w60 w17 w5 w44 w2", "prompt": row["text"], "text": row["target"]} for row in pair_rows(count)
    ]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> dict[str, dict]:
    """The recipes of the runs with one and with two processes, without `output_dir`."""
    folder = tmp_path_factory.mktemp("data")
    topics = {
        "train": write_rows(folder / "train.jsonl", topic_rows(48)),
        "validation": write_rows(folder / "validation.jsonl", topic_rows(19, 100)),
        "test": write_rows(folder / "test.jsonl", topic_rows(1, 200)),
    }
    tags = {
        "train": write_rows(folder / "tags.jsonl", tag_rows(24)),
        "validation": write_rows(folder / "more_tags.jsonl", tag_rows(9, 24)),
    }
    pairs = {
        "train": write_rows(folder / "pairs.jsonl", pair_rows(16)),
        "validation": write_rows(folder / "more_pairs.jsonl", pair_rows(5)),
    }
    distilled = {
        "train": write_rows(folder / "distilled.jsonl", distil_rows(16)),
        "validation": write_rows(folder / "more_distilled.jsonl", distil_rows(5)),
    }
    bert, llama = save_base(folder / "bert", "bert"), save_base(folder / "llama", "llama", "AutoModelForCausalLM")
    adapter = {"num_virtual_tokens": 4, "prefix_dropout": 0.0}
    rates = {"learning_rate": 0.03, "head_learning_rate": 0.005, "logging_steps": 1}
    topic = {
        "task": "sequence-classification",
        "model": bert,
        "data": topics,
        "adapter": adapter,
        "batch_size": 8,
        "eval_batch_size": 3,
        "num_train_epochs": 4,
        "max_length": 16,
        **rates,
    }
    return {
        "topic": topic,
        "accumulated": {**topic, "gradient_accumulation_steps": 2},
        "tags": {
            **topic,
            "task": "token-classification",
            "data": tags,
            "adapter": {**adapter, "prefix_projection": True, "encoder_hidden_size": 8, "lora_r": 2},
            "num_train_epochs": 2,
            "gradient_accumulation_steps": 2,
        },
        "generated": {
            **topic,
            "task": "seq2seq-lm",
            "model": save_base(folder / "t5", "t5"),
            "data": pairs,
            "task_kwargs": {"max_new_tokens": 4},
            "eval_batch_size": 1,
            "num_train_epochs": 1,
        },
        "random": {
            **topic,
            "adapter": {"num_virtual_tokens": 4, "prefix_dropout": 0.3},
            "num_train_epochs": 3,
            "eval_steps": 5,
        },
        "words": {
            **topic,
            "task": "cloze",
            "model": save_base(folder / "words", "bert", "AutoModelForMaskedLM"),
            "task_kwargs": {"template": "{text} w60 {mask}", "verbalizer": {"a": "w20", "b": "w22"}},
        },
        "bart": {**topic, "task": "seq2seq-lm", "model": save_base(folder / "bart", "bart"), "data": pairs},
        "text": {
            **topic,
            "task": "causal-lm",
            "model": llama,
            "data": pairs,
        },
        "distilled": {
            **topic,
            "task": "distil",
            "model": llama,
            "data": distilled,
            "adapter": {**adapter, "num_frozen_tokens": 1},
        },
        "both": {
            **topic,
            "task": "cloze",
            "model": llama,
            "task_kwargs": {"template": "{p:2} {text} w60 {p} {mask}", "verbalizer": {"a": "w20", "b": "w22"}},
            "second_adapter": {"peft_type": "PTUNING_V1"},
            "second_learning_rate": 0.01,
            "num_train_epochs": 1,
            "eval_steps": 2,
        },
        "joint": {
            "model": bert,
            "adapter": adapter,
            "batch_size": 4,
            "max_steps": 12,
            "eval_steps": 6,
            "learning_rate": 0.03,
            "tasks": {
                "topics": {"task": "sequence-classification", "max_length": 16, "data": topics},
                "tags": {"task": "token-classification", "head_learning_rate": 0.05, "data": tags},
            },
        },
    }


@pytest.fixture(scope="module")
def one(recipes, tmp_path_factory) -> Path:
    """The folder with the runs of one process, by the names of the recipes."""
    folder = tmp_path_factory.mktemp("one")
    torch.set_num_threads(1)
    with mock.patch.object(reports, "draw_curve"):  # takes longer than a tiny run
        for name in ("topic", "tags", "generated", "both"):
            own = recipes[name]
            train(Recipe(**{**own, "data": Data(**own["data"]), "output_dir": folder / name}))
        train_together(JointRecipe.from_dict({**recipes["joint"], "output_dir": str(folder / "joint")}))
    return folder


ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "true",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def options_of(config: str, *arguments: str) -> list[str]:
    return ["--config_file", str(EXAMPLES / config), "--num_processes", "2", "--mixed_precision", "no", *arguments]


def launch(config: str, *arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "accelerate.commands.launch", *options_of(config, *arguments)]
    return subprocess.Popen(
        command,
        env={**os.environ, **ENVIRONMENT},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


def process(rank: int, processes: int, port: str, jobs: list[str]) -> None:
    """What a process of torchrun's is given, and does."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    AcceleratorState._reset_state(reset_partial_state=True)  # of this process's own runs
    sys.argv = [WORKER, *jobs]
    runpy.run_path(WORKER, run_name="__main__")


def forks(arguments) -> None:
    """In place of torchrun. If one process fails, torch ends the others and raises its error."""
    processes = int(arguments.nproc_per_node)
    torch.multiprocessing.start_processes(
        process,
        (processes, arguments.master_port, arguments.training_script_args),
        nprocs=processes,
        start_method="fork",
    )


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def finish(process: subprocess.Popen, seconds: float = 120) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, _ = process.communicate()
        pytest.fail(f"the processes hang:\n{output}")
    return process.returncode, output


def work(config: str, folder: Path, jobs: list[dict]) -> dict[str, list[dict]]:
    """Run jobs in two processes, and return the reports of both by the names of the jobs."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    options = options_of(config, "--main_process_port", "0", WORKER, str(folder / "jobs.json"))
    with mock.patch.dict(os.environ, ENVIRONMENT), mock.patch.object(torch.distributed.run, "run", forks):
        launch_command(launch_command_parser().parse_args(options))
    return {
        job["name"]: [json.loads((folder / f"{job['name']}-{rank}.json").read_text()) for rank in (0, 1)]
        for job in jobs
    }


def job(name: str, recipe: dict, **options) -> dict:
    return {"name": name, "recipe": {"output_dir": name, **recipe}, **options}


def stopped_and_resumed(name: str, recipe: dict, step: int) -> list[dict]:
    """Two jobs: a run whose second process gets a signal, and the rest of it, `resumed_NAME`."""
    resumed = {**recipe, "output_dir": name}
    return [job(name, recipe, interrupt=[1, step]), job(f"resumed_{name}", resumed, resume=True)]


@pytest.fixture(scope="module")
def ddp(recipes, tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "elsewhere").mkdir()
    topic = recipes["topic"]
    jobs = [job(name, recipes[name]) for name in ("topic", "accumulated", "tags", "generated", "random", "joint")]
    missing = {"data": {**topic["data"], "train": "missing.jsonl"}}
    jobs += [
        job("missing", topic, only={1: missing}),
        job("apart", topic, folder={1: str(folder / "elsewhere")}),
        job("disk_full", topic, disk_full=True),
        *stopped_and_resumed("both", recipes["both"], 2),
    ]
    return SimpleNamespace(folder=folder, seen=work("cpu_two_processes.yaml", folder, jobs))


def divided(config: str, folder: Path, recipes: dict[str, dict]) -> SimpleNamespace:
    jobs = [job(name, recipes[name]) for name in ("topic", "tags", "generated", "random")]
    jobs += [
        *stopped_and_resumed("stopped", recipes["random"], 7),
        *stopped_and_resumed("both", recipes["both"], 2),
        job("bart", recipes["bart"]),
        job("words", recipes["words"]),
    ]
    return SimpleNamespace(folder=folder, seen=work(config, folder, jobs))


@pytest.fixture(scope="module")
def fsdp2(recipes, tmp_path_factory) -> SimpleNamespace:
    return divided("fsdp2.yaml", tmp_path_factory.mktemp("fsdp2"), recipes)


@pytest.fixture(scope="module")
def deepspeed_zero2(recipes, tmp_path_factory) -> SimpleNamespace:
    pytest.importorskip("deepspeed")
    return divided("deepspeed_zero2.yaml", tmp_path_factory.mktemp("zero2"), recipes)


@pytest.fixture(scope="module")
def deepspeed_zero3(recipes, tmp_path_factory) -> SimpleNamespace:
    pytest.importorskip("deepspeed")
    return divided("deepspeed_zero3.yaml", tmp_path_factory.mktemp("zero3"), recipes)


@pytest.fixture(scope="module")
def tensor_parallel(recipes, tmp_path_factory) -> SimpleNamespace:
    """Tensor parallelism; BERT has no plan for it."""
    folder, text = tmp_path_factory.mktemp("tensor_parallel"), recipes["text"]
    mlp = {"num_virtual_tokens": 4, "prefix_dropout": 0.3, "prefix_projection": True, "lora_r": 2}
    random = {**text, "adapter": mlp, "learning_rate": 0.001, "eval_steps": 5}
    topic, distilled = {**recipes["topic"], "model": text["model"]}, recipes["distilled"]
    runs = {"text": text, "topic": topic, "random": random, "distilled": distilled}
    jobs = [
        *(job(name, recipe) for name, recipe in runs.items()),
        *stopped_and_resumed("stopped", random, 3),
        job("bert", recipes["topic"]),
        job("lora", {**text, "adapter": {"peft_type": "LORA"}}),
    ]
    return SimpleNamespace(folder=folder, recipes=runs, seen=work("tensor_parallel.yaml", folder, jobs))


DIVIDED = ("fsdp2", "deepspeed_zero2", "deepspeed_zero3")


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(folder: Path, reference: Path, atol: float = 1e-4) -> None:
    """Assert the same losses, metrics and adapter up to rounding.

    Adam's steps have the size of the rate (0.03) even for gradients near zero, where rounding matters most.
    """
    found, expected = lines(folder), lines(reference)
    assert [line.pop("split") for line in found] == [line.pop("split") for line in expected]
    assert found == [pytest.approx(line, rel=1e-4, abs=1e-4) for line in expected]
    found, expected = (json.loads((each / "results.json").read_text()) for each in (folder, reference))
    for split in {"validation", "test"} & set(expected):
        assert found[split] == pytest.approx(expected[split], rel=1e-4, abs=1e-4)
    assert (found["best_step"], found["trained_parameters"]) == (expected["best_step"], expected["trained_parameters"])
    found, expected = (load_file(each / "adapter_model.safetensors") for each in (folder, reference))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)


def assert_same_bits(folder: Path, reference: Path) -> None:
    found, expected = (load_file(each / "adapter_model.safetensors") for each in (folder, reference))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "reference"),
    [("topic", "topic"), ("accumulated", "topic"), ("tags", "tags"), ("generated", "generated")],
)
def test_ddp_is_the_same_run(ddp, one, name, reference):
    assert_same_run(ddp.folder / name, one / reference)
    assert [each["results"]["processes"] for each in ddp.seen[name]] == [2, 2]


def test_ddp_is_the_same_run_of_several_tasks(ddp, one):
    found, expected = (json.loads((each / "joint" / "results.json").read_text()) for each in (ddp.folder, one))
    assert found["processes"] == 2
    for name in ("topics", "tags"):
        assert found["tasks"][name]["validation"] == pytest.approx(expected["tasks"][name]["validation"], abs=1e-5)
        own, reference = (load_file(each / "joint" / name / "adapter_model.safetensors") for each in (ddp.folder, one))
        torch.testing.assert_close(own, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", DIVIDED)
@pytest.mark.parametrize("name", ["topic", "tags", "generated"])
def test_a_divided_model_is_the_same_run(kind, one, name, request):
    run = request.getfixturevalue(kind)
    assert "results" in run.seen[name][0], run.seen[name][0]["error"]
    assert_same_run(run.folder / name, one / name, atol=2e-3 if name == "generated" else 1e-4)


@pytest.mark.parametrize("kind", ["ddp", *DIVIDED])
def test_two_adapters_stopped_and_resumed_are_the_same_run(kind, one, request):
    """A prefix and P-Tuning's virtual tokens on a decoder, whose head FSDP leaves gathered behind a forward."""
    run = request.getfixturevalue(kind)
    processes = run.seen["resumed_both"]
    assert run.seen["both"][0]["error"][0] == "TrainingInterrupted"
    assert "results" in processes[0], processes[0]["error"]
    assert processes[0]["trained"] == processes[1]["trained"]
    found, expected = lines(run.folder / "both"), lines(one / "both")
    assert [line.pop("split") for line in found] == [line.pop("split") for line in expected]
    assert found == [pytest.approx(line, rel=0, abs=1e-5) for line in expected]
    for name in ("", "second"):
        own, reference = (load_file(each / "both" / name / "adapter_model.safetensors") for each in (run.folder, one))
        torch.testing.assert_close(own, reference, rtol=0, atol=1e-5)
    load_trained(run.folder / "both")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text", "topic", "random", "distilled"])
def test_tensor_parallelism_is_the_same_run(tensor_parallel, tmp_path, name):
    run = tensor_parallel
    assert "results" in run.seen[name][0], run.seen[name][0]["error"]
    own = run.recipes[name]
    train(Recipe(**{**own, "data": Data(**own["data"]), "output_dir": tmp_path}))
    # Dropout draws the same numbers too: all processes compute the same rows.
    assert_same_run(run.folder / name, tmp_path)


@pytest.mark.slow
def test_tensor_parallelism_is_resumed_exactly(tensor_parallel):
    for seen in tensor_parallel.seen["stopped"]:
        assert seen["error"][0] == "TrainingInterrupted", seen["error"]
    assert "results" in tensor_parallel.seen["resumed_stopped"][0], tensor_parallel.seen["resumed_stopped"][0]["error"]
    assert lines(tensor_parallel.folder / "stopped") == lines(tensor_parallel.folder / "random")
    assert_same_bits(tensor_parallel.folder / "stopped", tensor_parallel.folder / "random")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "message"), [("bert", "has no `tp_plan`"), ("lora", "LORA cannot")])
def test_what_tensor_parallelism_refuses(tensor_parallel, name, message):
    for seen in tensor_parallel.seen[name]:
        assert seen["error"][0] == "RecipeError" and message in seen["error"][1], seen["error"]


def test_reference_runs_are_not_trivial(one):
    """The runs must have a best step before the last, and wrong answers. Otherwise the tests could miss a mistake."""
    results = json.loads((one / "topic" / "results.json").read_text())
    assert results["best_step"] < results["steps"]
    assert any(0 < line["accuracy"] < 1 for line in lines(one / "topic") if "accuracy" in line)


def test_only_what_is_trained_is_reduced(ddp):
    saved = load_file(ddp.folder / "topic" / "adapter_model.safetensors")
    steps = ddp.seen["topic"][0]["results"]["steps"]
    for seen in ddp.seen["topic"]:
        assert sum(seen["reduced_bytes"]) == steps * sum(tensor.nbytes for tensor in saved.values())


def test_accumulation_reduces_once_a_step(ddp):
    assert ddp.seen["accumulated"][0]["reduced_bytes"] == ddp.seen["topic"][0]["reduced_bytes"]


@pytest.mark.parametrize("kind", ["ddp", *DIVIDED])
@pytest.mark.parametrize("name", ["topic", "generated"])
def test_only_what_is_trained_is_saved(kind, name, request):
    run = request.getfixturevalue(kind)
    checkpoints = run.folder / name / "checkpoints"
    files = list(checkpoints.rglob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as contents:
            shapes = {key: tuple(contents.get_slice(key).get_shape()) for key in contents.keys()}  # noqa: SIM118
        tables = [shape for key, shape in shapes.items() if "prefix_tuning_v2" in key and not key.endswith("/step")]
        assert all(shape[0] == 4 for shape in tables)  # all rows of the prefix
        assert tables and not [key for key in shapes if any(part in key for part in FROZEN)]
    parts = list(checkpoints.rglob("*model_states.pt"))
    for part in parts:
        weights = torch.load(part, weights_only=False)["module"]
        assert not [key for key in weights if any(part in key for part in FROZEN)]
    names = {file.name for file in files} | {"DeepSpeed's" for _ in parts}
    assert len(names) == 2  # the adapter and the optimizer state


def test_fsdp_keeps_a_part_in_each_process(fsdp2):
    first, second = fsdp2.seen["topic"]
    assert first["numel"] == second["numel"] == first["kept_numel"] + second["kept_numel"]
    assert max(first["kept_numel"], second["kept_numel"]) < 0.55 * first["numel"]


@pytest.mark.parametrize("kind", DIVIDED)
def test_a_divided_model_is_resumed_exactly(kind, request):
    run = request.getfixturevalue(kind)
    for seen in run.seen["stopped"]:
        assert seen["error"][0] == "TrainingInterrupted" and "after step 9 of 18" in seen["error"][1]
    assert "results" in run.seen["resumed_stopped"][0], run.seen["resumed_stopped"][0]["error"]
    assert lines(run.folder / "stopped") == lines(run.folder / "random")
    assert_same_bits(run.folder / "stopped", run.folder / "random")


def test_fsdp_names_what_it_does_not_support(fsdp2):
    for seen in fsdp2.seen["bart"]:
        assert seen["error"][0] == "RecipeError" and "fsdp_cpu_ram_efficient_loading" in seen["error"][1]
    for seen in fsdp2.seen["words"]:
        assert seen["error"][0] == "RecipeError" and "predictions.decoder.bias are one weight" in seen["error"][1]


@pytest.mark.slow
def test_signals_and_two_machines_that_go_on(ddp, recipes, tmp_path):
    """A run gets a signal, saves one checkpoint, and is resumed on two machines with the same result."""
    (tmp_path / "jobs.json").write_text(json.dumps([job("random", recipes["random"], wait=7)]))
    process = launch("cpu_two_processes.yaml", "--main_process_port", "0", WORKER, str(tmp_path / "jobs.json"))
    waiting = [tmp_path / "waiting-0", tmp_path / "waiting-1"]
    deadline = time.monotonic() + 240  # it starts while other tests keep all cores busy
    while not all(path.exists() and path.read_text() for path in waiting) and time.monotonic() < deadline:
        time.sleep(0.1)
    # A cluster signals every process of a job. The launcher passes its signal on, so each process gets two.
    for path in waiting:
        os.kill(int(path.read_text()), signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    status, output = finish(process)
    assert status != 0
    # The loop reads a signal one step after it came.
    assert output.count("Stopped after step 9 of 18") == 2, output
    folder = tmp_path / "random"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000005", "step-000009"]

    # One process can resume the run too, with other dropout.
    alone = shutil.copytree(folder, tmp_path / "alone")
    recipe = {**recipes["random"], "data": Data(**recipes["random"]["data"]), "output_dir": alone}
    assert train(Recipe(**recipe), resume=True)["steps"] == 18
    before = [line for line in lines(alone) if line["step"] <= 9]
    assert before == lines(folder) == [line for line in lines(ddp.folder / "random") if line["step"] <= 9]

    port = free_port()
    machines = [
        launch(
            "multi_node.yaml",
            *("--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", port),
            *("-m", "prefix_adapter", "train", "--resume", "random"),
            cwd=tmp_path,
        )
        for rank in (0, 1)
    ]
    for status, output in [finish(machine) for machine in machines]:
        assert status == 0, output
    assert lines(folder) == lines(ddp.folder / "random")
    assert_same_bits(folder, ddp.folder / "random")


def test_a_checkpoint_of_deepspeeds_goes_on_under_deepspeed(tmp_path):
    (tmp_path / "deepspeed").mkdir()
    state = {"best_step": None, "best_metrics": None, "evaluations_since_best": 0, "loss_sum": 0.0, "loss_count": 0}
    state |= {"step": 3, "scheduler": {"last_epoch": 3}, "scaler": None}
    state["generators"] = [checkpoint._get_rng_states()] * 2
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(RecipeError, match="written under DeepSpeed by 2 processes"):
        checkpoint.restore(tmp_path, Accelerator(), None, None)


def test_an_error_in_one_process_ends_all(ddp):
    main, other = (seen["error"] for seen in ddp.seen["missing"])
    assert other[0] == "DataError" and "missing.jsonl" in other[1]
    assert main[0] == "RecipeError" and main[1].startswith("Process 1 of 2 has stopped. DataError: ")
    assert not (ddp.folder / "missing").exists()


def test_a_folder_that_one_machine_alone_sees(ddp):
    main, other = (seen["error"] for seen in ddp.seen["apart"])
    assert main[0] == other[0] == "RecipeError"
    assert "must be in a file system that all nodes share" in main[1]


def test_a_full_disk_ends_all(ddp):
    for kind, message in (seen["error"] for seen in ddp.seen["disk_full"]):
        assert kind == "OSError" and "No space left" in message and "was not written" in message


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    return Recipe(
        task="sequence-classification",
        model="none",
        output_dir=tmp_path / "out",
        batch_size=4,
        gradient_accumulation_steps=2,
    )


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("WORLD_SIZE", "2", "ACCELERATE_USE_CPU"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP, which Accelerate has only on GPUs"),
    ],
)
def test_settings_that_accelerate_ignores_are_an_error(recipe, monkeypatch, variable, value, message):
    monkeypatch.setenv(variable, value)
    with pytest.raises(RecipeError, match=message):
        new_accelerator(recipe)


@pytest.mark.parametrize(
    ("variable", "fsdp2", "message"),
    [(None, False, "fsdp_version: 2"), ("FSDP_AUTO_WRAP_POLICY", True, "TRANSFORMER_BASED_WRAP")],
)
def test_fsdp_that_cannot_work_is_refused(recipe, monkeypatch, variable, fsdp2, message):
    if variable:
        monkeypatch.setenv(variable, "SIZE_BASED_WRAP")
    accelerator = SimpleNamespace(num_processes=1, distributed_type=DistributedType.FSDP, is_fsdp2=fsdp2)
    with pytest.raises(RecipeError, match=message):
        check_launch(accelerator, recipe)


def test_batch_size_must_be_divisible(recipe, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 3))
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RecipeError, match=r"`batch_size`.*3 processes in 2 parts.*a multiple of 6"):
        new_accelerator(recipe)


def test_accumulation_is_the_recipes(recipe, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert new_accelerator(recipe).gradient_accumulation_steps == 2


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ddp", "MULTI_GPU"),
        ("fsdp2", "FSDP"),
        ("multi_node", "MULTI_GPU"),
        ("cpu_two_processes", "MULTI_GPU"),
        ("tensor_parallel", "MULTI_GPU"),
        ("deepspeed_zero2", "DEEPSPEED"),
        ("deepspeed_zero3", "DEEPSPEED"),
    ],
)
def test_accelerate_reads_the_examples(name, kind):
    assert load_config_from_file(str(EXAMPLES / f"{name}.yaml")).distributed_type == kind
