"""A prefix or LoRA, with P-Tuning's virtual tokens beside it: against models put together by hand; its whole life."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import save_base, write_rows
from hub_server import TOKEN, serve
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F

from prefix_adapter import (
    AdapterPool,
    PrefixTuningV2Config,
    PTuningConfig,
    export_kv,
    export_peft,
    fold,
    init_from,
    join,
)
from prefix_adapter.adapters.saved import describe_adapter
from prefix_adapter.cli import main
from prefix_adapter.training import (
    Data,
    JointRecipe,
    Recipe,
    RecipeError,
    evaluate_adapter,
    load_trained,
    predict,
    train,
)
from prefix_adapter.training.checkpoint import CheckpointError
from prefix_adapter.training.search import search
from prefix_adapter.training.settings import Search

TEMPLATE = "{p:2} {text} w60 {p} {mask}"
WORDED = {"no": "w20", "yes": "w22"}
BOTH = {"adapter": {"num_virtual_tokens": 3, "prefix_dropout": 0.0}, "second_adapter": {"peft_type": "ptuning_v1"}}
LORA = {**BOTH, "adapter": {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"]}}
FULL = {"adapter": {"peft_type": "full"}, "second_adapter": {"peft_type": "ptuning_v1"}, "learning_rate": 1e-3}
MLP = {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8, "modules_to_save": ["lm_head"]}
WAYS = {
    "prefix": BOTH,
    "lora": LORA,
    "mlp and head": {"adapter": MLP, "second_adapter": {"encoder_reparameterization_type": None}},
}


def word_rows(count: int, start: int = 0) -> list[dict]:
    return [
        {
            "text": " ".join(f"w{40 * (i % 2) + (i * 7 + j * 3) % 5}" for j in range(3 + i % 4)),
            "label": ("yes", "no")[i % 2],
        }
        for i in range(start, start + count)
    ]


TRAIN, VALIDATION = word_rows(16), word_rows(7, 100)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return save_base(tmp_path_factory.mktemp("base") / "llama", "llama", "AutoModelForCausalLM")


def recipe_of(base, folder, name="out", **changes) -> Recipe:
    folder.mkdir(exist_ok=True)
    files = {"train": TRAIN, "validation": VALIDATION}
    settings = {
        "task": "cloze",
        "model": base,
        "output_dir": str(folder / name),
        "data": Data(**{split: write_rows(folder / f"{split}.jsonl", rows) for split, rows in files.items()}),
        "task_kwargs": {"template": TEMPLATE, "verbalizer": WORDED},
        "learning_rate": 0.03,
        "second_learning_rate": 0.01,
        "batch_size": 8,
        "max_length": 16,
        "max_steps": 4,
        **BOTH,
    }
    return Recipe(**{**settings, **changes})


@pytest.fixture(scope="module", params=WAYS)
def run(request, llama, tmp_path_factory):
    """A finished run: its kind, its recipe and its results."""
    recipe = recipe_of(llama, tmp_path_factory.mktemp(request.param), **WAYS[request.param])
    return request.param, recipe, train(recipe, quiet=True)


def places_of(tokenizer) -> list[int]:
    """The token ids of the three virtual tokens: those behind the tokenizer's own."""
    return list(range(len(tokenizer), len(tokenizer) + 3))


def scores(model, base, rows) -> torch.Tensor:
    """The logarithms of the words' probabilities, row by row, without any code of the task."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    places, words, found = places_of(tokenizer), tokenizer.convert_tokens_to_ids([*WORDED.values()]), []
    for row in rows:
        text = tokenizer.convert_tokens_to_ids([*row["text"].split(), "w60"])
        ids = torch.tensor([[places[0], places[1], *text, places[2]]])
        found.append(model(input_ids=ids).logits[0, -1].log_softmax(-1)[words])
    return torch.stack(found)


def targets(rows) -> torch.Tensor:
    return torch.tensor([[*WORDED].index(row["label"]) for row in rows])


def load_by_hand(folder, base) -> PeftModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    if Path(folder, "trained.safetensors").exists():
        model.load_state_dict(load_file(Path(folder, "trained.safetensors")))
    else:
        model = PeftModel.from_pretrained(model, folder)
    return PeftModel.from_pretrained(model, folder, "second", subfolder="second").eval()


# Training


@pytest.mark.parametrize("way", ["prefix", "lora", "full"])
def test_losses_and_weights_are_those_of_a_loop_by_hand(way, llama, tmp_path):
    recipe = recipe_of(
        llama,
        tmp_path,
        **{**WAYS, "full": FULL}[way],
        init_rows=False if way == "prefix" else None,
        lr_scheduler_type="constant",
        warmup_ratio=0,
        logging_steps=1,
        batch_size=len(TRAIN),
        weight_decay=0.1,
        max_grad_norm=0.5,
    )
    results = train(recipe, quiet=True)
    rate = 1e-3 if way == "full" else 0.03
    assert results["learning_rates"] == [rate, rate if way == "full" else 0.02, 0.01]
    lines = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    recorded = [line for line in lines if line["split"] == "train"]
    assert {recorded[0]["learning_rate/adapter"], recorded[0]["learning_rate/second_adapter"]} == {rate, 0.01}

    torch.manual_seed(recipe.seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    config = PrefixTuningV2Config(num_virtual_tokens=3, prefix_dropout=0.0)
    if way == "lora":
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    inner = model if way == "full" else get_peft_model(model, config)
    first = [parameter for parameter in inner.parameters() if parameter.requires_grad]
    places = places_of(transformers.AutoTokenizer.from_pretrained(llama))
    virtual = PTuningConfig(num_virtual_tokens=3, placeholder_token_ids=places)
    model = get_peft_model(inner, virtual, "second").train()
    for parameter in first:
        parameter.requires_grad_(True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    second = [parameter for parameter in parameters if all(parameter is not each for each in first)]
    assert len(parameters) == len(first) + len(second) > len(second) > 0
    groups = [{"params": first, "lr": rate}, {"params": second, "lr": 0.01}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    for line in recorded:
        loss = F.cross_entropy(scores(model, llama, TRAIN), targets(TRAIN))
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
    assert len(recorded) == 4 and recorded[3]["loss"] < recorded[0]["loss"]
    best = load_by_hand(tmp_path / "out" / "checkpoints" / "step-000004", llama)
    with torch.no_grad():
        expected = scores(model.eval(), llama, VALIDATION)
        torch.testing.assert_close(scores(best, llama, VALIDATION), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", [{"adapter": {"num_virtual_tokens": 3}}, FULL], ids=["prefix", "full"])
def test_a_resumed_run_is_the_same(way, llama, tmp_path):
    changes = {**way, "lr_scheduler_type": "constant", "eval_steps": 2}
    whole = recipe_of(llama, tmp_path, "whole", **changes)
    train(whole, quiet=True)
    part = whole.with_values({"output_dir": str(tmp_path / "part"), "max_steps": 2})
    train(part, quiet=True)
    train(part.with_values({"max_steps": 4}), quiet=True, resume=True)
    weights = "trained.safetensors" if way is FULL else "adapter_model.safetensors"
    for name in (weights, "optimizer.safetensors", "second/adapter_model.safetensors"):
        first, second = (tmp_path / each / "checkpoints" / "step-000004" / name for each in ("whole", "part"))
        assert first.read_bytes() == second.read_bytes(), name

    damaged = tmp_path / "part" / "checkpoints" / "step-000004" / "second" / "adapter_model.safetensors"
    for each in (damaged.parents[2]).glob("step-*/second/adapter_model.safetensors"):
        each.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=f"{re.escape(str(damaged))} is damaged"):
        train(part.with_values({"max_steps": 6}), quiet=True, resume=True)


def test_a_prefix_starts_from_rows_beside_virtual_tokens(llama, tmp_path):
    recipe = recipe_of(llama, tmp_path, init_rows=True, learning_rate=1e-9, second_learning_rate=1e-9, max_steps=1)
    train(recipe, quiet=True)
    alone = recipe.with_values(
        {
            "output_dir": str(tmp_path / "alone"),
            "task_kwargs.template": "{text} w60 {mask}",
            "second_adapter": {},
            "second_learning_rate": None,
        }
    )
    train(alone, quiet=True)
    name = "prefix_tuning_v2.prefix_tuning_v2_embedding.default.weight"
    found, expected = (
        dict(load_trained(tmp_path / each)[2].named_parameters())[f"{root}{name}"]
        for each, root in (("out", "base_model.model.base_model.model."), ("alone", "base_model.model."))
    )
    torch.testing.assert_close(found, expected)


# The finished run


def test_predictions_are_those_of_the_saved_files(run, llama, tmp_path):
    _, recipe, results = run
    assert evaluate_adapter(recipe.output_dir) == pytest.approx(results["validation"])
    source = write_rows(tmp_path / "rows.jsonl", [{"text": row["text"]} for row in VALIDATION])
    predict(recipe.output_dir, source, tmp_path / "answers.jsonl")
    answers = list(map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines()))
    model = load_by_hand(recipe.output_dir, llama)
    with torch.no_grad():
        expected = scores(model, llama, VALIDATION).softmax(-1)
    assert [answer["prediction"] for answer in answers] == [[*WORDED][int(row.argmax())] for row in expected]
    found = torch.tensor([answer["probability"] for answer in answers])
    torch.testing.assert_close(found, expected.max(-1).values, atol=1e-5, rtol=1e-4)


def test_both_are_trained_and_only_the_first_has_the_head(run):
    kind, recipe, results = run
    _, _, model = load_trained(recipe.output_dir)
    tensors = {}
    for name in ("", "second"):
        found = describe_adapter(f"{recipe.output_dir}/checkpoints/step-{results['best_step']:06d}/{name}")
        tensors |= {f"{name} {key}": each for key, each in found["tensors"].items()}
    assert sum(torch.Size(each["shape"]).numel() for each in tensors.values()) == results["trained_parameters"]
    assert [key for key in tensors if "lm_head" in key] == (
        [" base_model.model.lm_head.weight"] if kind == "mlp and head" else []
    )
    if kind == "mlp and head":
        head = model.get_base_model().get_base_model().lm_head
        assert head.active_adapters == ["default"]
        assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)


def test_the_output_folder_is_folded(run, tmp_path, capsys):
    kind, recipe, results = run
    shown = {}
    for name in ("", "second"):
        found = describe_adapter(f"{recipe.output_dir}/{name}")
        shown[name] = found["settings"]
        if name == "second" or kind != "lora":
            own = [key for key in found["tensors"] if "_tuning_v2" in key or "ptuning" in key]
            assert [key.rpartition("_")[2] for key in own] == ["embedding.weight"]
    assert shown["second"]["encoder_reparameterization_type"] is None
    with pytest.raises(ValueError, match="is a table already"):
        fold(recipe.output_dir, tmp_path / "twice")
    main(["info", recipe.output_dir])
    printed = capsys.readouterr().out
    assert printed.index("second adapter, trained together") < printed.index("PTUNING_V1")
    assert "placeholder_token_ids" in printed

    target = tmp_path / "folded"
    main(["fold", f"{recipe.output_dir}/checkpoints/step-{results['best_step']:06d}", str(target)])
    for name in ("", "second"):
        places = (Path(each, name, "adapter_model.safetensors") for each in (target, recipe.output_dir))
        first, second = (place.read_bytes() for place in places)
        assert first == second


def test_the_card_loads_both(run, llama):
    _, recipe, _ = run
    card = Path(recipe.output_dir, "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert (
        "| second adapter | " in card
        and "| learning rate (adapter, head, second adapter) | `0.03, 0.02, 0.01` |" in card
    )
    names = {"base_model": transformers.AutoModelForCausalLM.from_pretrained(llama)}
    for block in blocks[:2]:
        exec(block.replace("<this repository or folder>", recipe.output_dir), names)
    with torch.no_grad():
        found = scores(names["model"].eval(), llama, VALIDATION)
        assert torch.equal(found, scores(load_by_hand(recipe.output_dir, llama), llama, VALIDATION))


def test_what_loads_one_adapter_alone_refuses_the_folder(run, llama, tmp_path):
    kind, recipe, _ = run
    if kind != "prefix":
        pytest.skip("one kind is enough")
    folder, message = recipe.output_dir, "was trained together with a second adapter, in its folder second"
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    for refused in (
        lambda: AdapterPool(base).load(folder),
        lambda: join([folder, folder], tmp_path / "joined"),
        lambda: export_kv(folder, tmp_path / "kv.safetensors"),
        lambda: export_peft(folder, tmp_path / "peft"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    # A prefix can start from the first adapter, whatever stood beside it.
    fresh = get_peft_model(base, PrefixTuningV2Config(num_virtual_tokens=3))
    init_from(fresh, folder)
    # Another adapter that a user has called "second" is none of these.
    fresh.add_adapter("second", PrefixTuningV2Config(num_virtual_tokens=2))
    fresh.save_pretrained(tmp_path / "two")
    AdapterPool(transformers.AutoModelForCausalLM.from_pretrained(llama)).load(tmp_path / "two")


def test_the_whole_model_and_virtual_tokens_are_loaded(llama, tmp_path):
    """By the commands, by the code in the card, and with the virtual tokens folded: an ordinary adapter's folder."""
    table = {"second_adapter": {"encoder_reparameterization_type": "MLP"}}
    recipe = recipe_of(llama, tmp_path, **{**FULL, **table, "second_learning_rate": None}, max_steps=2)
    results = train(recipe, quiet=True)
    folder = Path(recipe.output_dir)
    assert results["learning_rates"] == [1e-3, 1e-3, 1e-3]
    model = load_by_hand(folder, llama)
    assert sum(each.numel() for each in model.parameters()) == results["trained_parameters"]
    with torch.no_grad():
        expected = scores(model, llama, VALIDATION).softmax(-1)
    assert evaluate_adapter(folder) == pytest.approx(results["validation"])
    predict(folder, tmp_path / "validation.jsonl", tmp_path / "answers.jsonl")
    answers = [json.loads(line)["probability"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    torch.testing.assert_close(torch.tensor(answers), expected.max(-1).values, atol=1e-5, rtol=1e-4)

    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "fine-tuned in full, with P-Tuning's virtual tokens" in card and "Load the second adapter" not in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {}
    exec(code.replace("<this repository or folder>", str(folder)), names)
    with torch.no_grad():
        assert torch.equal(scores(names["model"], llama, VALIDATION).softmax(-1), expected)
    fold(folder / "second", folder / "folded")
    (folder / "second").rename(tmp_path / "second")
    with pytest.raises(RecipeError, match="there is no finished adapter to load"):
        load_trained(folder)
    (folder / "folded").rename(folder / "second")
    with torch.no_grad():
        folded = scores(load_trained(folder)[2], llama, VALIDATION).softmax(-1)
    torch.testing.assert_close(folded, expected)


ON_THE_HUB = """
import sys, torch
from prefix_adapter import AdapterPool, push_to_hub
from prefix_adapter.adapters.saved import describe_adapter
from prefix_adapter.training import evaluate_adapter, load_trained

folder, base, rows = sys.argv[1:]
push_to_hub(folder, "user/both")
model = load_trained("user/both", model=base)[2]
own = load_trained(folder)[2].state_dict()
assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
assert evaluate_adapter("user/both", rows, model=base) == evaluate_adapter(folder, rows)
assert describe_adapter("user/both")["second_adapter"]["peft_type"] == "PTUNING_V1"
try:
    AdapterPool(model.get_base_model().get_base_model()).load("user/both")
except ValueError as error:
    assert "trained together with a second adapter" in str(error), error
else:
    raise AssertionError
"""


@pytest.mark.slow
def test_the_hub_has_both(llama, tmp_path):
    recipe = recipe_of(llama, tmp_path, max_steps=1)
    train(recipe, quiet=True)
    tests = Path(__file__).resolve().parents[1]
    with serve() as hub:
        network = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        network |= {"HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
        network |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(tests.parent)}
        command = [sys.executable, "-c", ON_THE_HUB, recipe.output_dir, llama, str(tmp_path / "validation.jsonl")]
        done = subprocess.run(command, env={**os.environ, **network}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        assert hub.unknown == []
        assert {"second/adapter_config.json", "second/adapter_model.safetensors"} <= hub.repos["user/both"].keys()


def test_a_folder_without_its_second_adapter(llama, tmp_path):
    recipe = recipe_of(llama, tmp_path, max_steps=1)
    train(recipe, quiet=True)
    (tmp_path / "out" / "second").rename(tmp_path / "elsewhere")
    with pytest.raises(RecipeError, match="there is no finished adapter to load"):
        load_trained(recipe.output_dir)
    text = (tmp_path / "out" / "recipe.yaml").read_text()
    (tmp_path / "out" / "recipe.yaml").write_text(re.sub(r"second_adapter:\n( .*\n)+", "", text))
    with pytest.raises(RecipeError, match="which PREFIX_TUNING_V2 does not train"):
        load_trained(recipe.output_dir)


@pytest.mark.slow
def test_a_search_varies_the_second_rate(llama, tmp_path):
    recipe = recipe_of(llama, tmp_path, max_steps=1, second_learning_rate=None)
    space = {"second_learning_rate": [1e-3, 1e-2]}
    found = search(recipe, Search(n_trials=2, sampler="grid", space=space))
    assert found["best_params"]["second_learning_rate"] in space["second_learning_rate"]


def test_a_dry_run(llama, tmp_path, capsys):
    recipe = recipe_of(llama, tmp_path, second_learning_rate=None)
    assert train(recipe, dry_run=True) == {}
    shown = capsys.readouterr().err
    assert "(PREFIX_TUNING_V2 and PTUNING_V1)" in shown
    assert "learning rate: 0.03, of the second adapter 0.03" in shown


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"second_adapter": {"peft_type": "LORA"}}, "`second_adapter.peft_type` must be PTUNING_V1, got 'LORA'"),
        ({"second_adapter": {"peft_type": 1}}, "`second_adapter.peft_type` must be the name of a method, got 1"),
        ({"adapter": {"peft_type": "PTUNING_V1"}}, "`second_adapter`: `adapter.peft_type` is PTUNING_V1 too"),
        ({"adapter": {"peft_type": "HEAD"}}, "`second_adapter` stands beside a first one, or .* is HEAD"),
        ({"adapter": {"peft_type": "NONE"}}, "`second_adapter` stands beside a first one, or .* is NONE"),
        (
            {**FULL, "second_adapter": {"modules_to_save": ["lm_head"]}},
            "`second_adapter.modules_to_save`: set `adapter.modules_to_save`; FULL",
        ),
        ({"task": "causal-lm"}, "it is for cloze and fill-mask, not for causal-lm"),
        ({"second_adapter": {}}, "`second_learning_rate` is the rate of `second_adapter`, and there is none"),
        ({"second_learning_rate": 0.0}, "`second_learning_rate` must be above 0"),
    ],
)
def test_invalid_recipes(changes, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        recipe_of("unused", tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"second_adapter": {"numb": 1}}, "`second_adapter.numb`: PTuningConfig has no such setting"),
        ({"second_adapter": {"init_std": -1}}, "`second_adapter`: `init_std` must be above 0"),
        (
            {"second_adapter": {"placeholder_token_ids": [1, 2, 3]}},
            "`second_adapter.placeholder_token_ids`: .*1, 2, 3",
        ),
        ({"adapter": {"peft_type": "PROMPT_TUNING"}}, "`second_adapter`: PEFT's PROMPT_TUNING changes the inputs"),
        ({"task_kwargs": {"template": "{text} {mask}", "verbalizer": WORDED}}, "`task_kwargs.template` has none"),
    ],
)
def test_refused_before_the_rows_are_read(changes, message, llama, tmp_path):
    recipe = recipe_of(llama, tmp_path, **changes)
    recipe.data.train = str(tmp_path / "missing.jsonl")
    with pytest.raises(RecipeError, match=message):
        train(recipe, quiet=True)


def test_a_joint_run_has_none():
    task = {"task": "cloze", "data": {"train": "unused"}, "task_kwargs": {"template": TEMPLATE}}
    values = {"model": "unused", "output_dir": "unused", "tasks": {"a": task, "b": task}, **BOTH}
    with pytest.raises(RecipeError, match="`second_adapter`: tasks can share a prefix only"):
        JointRecipe.from_dict(values)
