"""The recipe in an adapter's folder is untrusted: what it can set, and that it runs no code."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import yaml
from conftest import save_base, topic_rows, write_rows
from test_run import recipe
from transformers import AutoConfig, AutoTokenizer

from prefix_adapter.cli import main
from prefix_adapter.training import (
    Recipe,
    RecipeError,
    evaluate_adapter,
    load_joint_recipe,
    load_recipe,
    load_trained,
    predict,
    train,
)
from prefix_adapter.training.adapter_recipe import load_adapter_recipe
from prefix_adapter.training.recipe import read_values

CODE = """
open({mark!r}, "w").close()
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
class Config(BertConfig):
    model_type = "stranger"
class Model(BertForSequenceClassification):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def stranger(tmp_path) -> types.SimpleNamespace:
    """A base model whose repository has code, and a folder with an adapter for it."""
    base, mark = Path(save_base(tmp_path / "base", "bert")), tmp_path / "the-code-ran"
    adapter = tmp_path / "adapter"
    rows = write_rows(tmp_path / "rows.jsonl", topic_rows(8))
    train(recipe(str(base), {"train": rows}, adapter, max_steps=1))
    (base / "theirs.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((base / "config.json").read_text())
    models = {"AutoConfig": "theirs.Config", "AutoModelForSequenceClassification": "theirs.Model"}
    (base / "config.json").write_text(json.dumps({**config, "model_type": "stranger", "auto_map": models}))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "theirs.Tokenizer"]}, "tokenizer_class": "Tokenizer"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    return types.SimpleNamespace(base=base, adapter=adapter, rows=rows, mark=mark, out=tmp_path / "out.jsonl")


def change(folder: Path, **values) -> dict:
    """Put values into the recipe of a folder."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}))


@pytest.mark.parametrize(
    "values",
    [{}, {"model_kwargs": {"trust_remote_code": True}}, {"trust_remote_code": True}],
)
def test_nothing_in_a_folder_runs_code(stranger, values, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # nobody may be asked either
    change(stranger.adapter, **values)
    calls = [
        lambda: predict(stranger.adapter, stranger.rows, stranger.out),
        lambda: evaluate_adapter(stranger.adapter, stranger.rows),
        lambda: evaluate_adapter(stranger.adapter),
        lambda: load_trained(stranger.adapter, model=str(stranger.base)),
        lambda: load_trained(stranger.adapter, config=stranger.adapter / "recipe.yaml"),
        lambda: train(load_recipe(stranger.adapter / "recipe.yaml", output_dir=stranger.out)),
        lambda: train(load_recipe(stranger.adapter / "recipe.yaml"), resume=True),
        lambda: main(["train", "--resume", str(stranger.adapter)]),
        lambda: main(["train", "--config", str(stranger.adapter / "recipe.yaml"), "--output_dir", str(stranger.out)]),
        lambda: main(["search", "--config", str(stranger.adapter / "recipe.yaml"), "--output_dir", str(stranger.out)]),
        lambda: main(["predict", str(stranger.adapter), stranger.rows, str(stranger.out)]),
    ]
    for call in calls:
        with pytest.raises((RecipeError, SystemExit)) as error:
            call()
        assert error.type is RecipeError or error.value.code not in (0, None)
        if error.type is RecipeError or error.value.code != 2:  # 2: the parser has printed it
            assert "--trust_remote_code" in str(error.value)
        assert not stranger.mark.exists()


def test_tokenizer_with_code_is_read_without_the_code(stranger):
    """transformers prefers its own class, if it has one."""
    config = json.loads((stranger.base / "config.json").read_text())
    (stranger.base / "config.json").write_text(json.dumps({**config, "model_type": "bert", "auto_map": {}}))
    assert predict(stranger.adapter, stranger.rows, stranger.out) == 8
    assert not stranger.mark.exists()


def test_the_caller_alone_can_trust(stranger):
    """Also for the folder of a run, which does not save the setting."""
    change(stranger.adapter, model_kwargs={"trust_remote_code": True})
    assert predict(stranger.adapter, stranger.rows, stranger.out, trust_remote_code=True) == 8
    assert stranger.mark.exists()
    shutil.rmtree(stranger.adapter)
    made = recipe(str(stranger.base), {"train": stranger.rows}, stranger.adapter, max_steps=1, trust_remote_code=True)
    train(made)
    saved = read_values(stranger.adapter / "recipe.yaml")
    assert saved["trust_remote_code"] is False and "trust_remote_code" not in saved["model_kwargs"]
    results = json.loads((stranger.adapter / "results.json").read_text())["validation"]
    assert evaluate_adapter(stranger.adapter, trust_remote_code=True) == pytest.approx(results, abs=1e-6)
    main(["train", "--resume", str(stranger.adapter), "--trust_remote_code", "true"])


def test_a_file_of_several_tasks_cannot_trust_either(tmp_path):
    tasks = {name: {"task": "sequence-classification"} for name in "ab"}
    shared = {"model": "m", "output_dir": "o", "tasks": tasks}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**shared, "trust_remote_code": True}))
    with pytest.raises(RecipeError, match="--trust_remote_code"):
        load_joint_recipe(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(shared))
    made = load_joint_recipe(tmp_path / "a.yaml", trust_remote_code=True)
    assert all(own.trust_remote_code for own in made.recipes.values())
    made.save(tmp_path / "b.yaml")
    assert not load_joint_recipe(tmp_path / "b.yaml").settings.trust_remote_code


@pytest.mark.parametrize(
    "settings",
    [
        {"attn_implementation": "somebody/kernel"},
        {"allow_all_kernels": True},
        {"use_kernels": True},
        {"kernel_config": {}},
    ],
)
def test_kernels_of_repositories_are_code_too(settings):
    with pytest.raises(RecipeError, match="--trust_remote_code"):
        Recipe("causal-lm", "m", "o", model_kwargs=settings)
    Recipe("causal-lm", "m", "o", model_kwargs=settings, trust_remote_code=True)


FULL = {
    "task": "causal-lm",
    "model": "theirs",
    "output_dir": "/somewhere/else",
    "data": {"path": "p", "train": "/etc/passwd", "test": "/etc/shadow", "columns": {"text": "a"}, "num_proc": 1000},
    "adapter": {"peft_type": "lora", "megatron_core": "theirs"},
    "init_from": "/their/adapter",
    "model_kwargs": {
        "dtype": "bfloat16",
        "attn_implementation": "sdpa",
        "revision": "main",
        "hidden_dropout_prob": 0.5,
    },
    "task_kwargs": {
        "generate": True,
        "max_new_tokens": 8,
        "generation_kwargs": {"temperature": 0.5, "do_sample": True},
    },
    "labels": ["a", "b"],
    "max_length": 77,
    "batch_size": 10**9,
    "eval_batch_size": 9,
    "report_to": ["wandb"],
    "mixed_precision": "bf16",
    "a_key_of_a_later_version": 1,
}


def write_recipe(folder: Path, **values) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**FULL, **values}))
    return path


def test_what_is_taken_from_an_adapters_folder(tmp_path):
    found = load_adapter_recipe(write_recipe(tmp_path))
    kept = ("task", "labels", "max_length", "eval_batch_size", "mixed_precision", "task_kwargs")
    assert {key: found.to_dict()[key] for key in kept} == {key: FULL[key] for key in kept}
    assert found.model_kwargs == {"dtype": "bfloat16", "attn_implementation": "sdpa", "revision": "main"}
    assert found.data.columns == {"text": "a"}
    expected = Recipe(
        "causal-lm", "theirs", str(tmp_path), model_kwargs=found.model_kwargs, adapter={"peft_type": "LORA"}
    )
    rest = {key: value for key, value in found.to_dict().items() if key not in (*kept, "data")}
    assert rest == {key: expected.to_dict()[key] for key in rest}
    assert (found.data.path, found.data.test, found.data.num_proc) == (None, None, None)
    rows = load_adapter_recipe(tmp_path / "recipe.yaml", rows=True).data
    assert (rows.path, rows.test, rows.num_proc) == ("p", "/etc/shadow", None)
    assert load_adapter_recipe(tmp_path / "recipe.yaml", model="mine").model == "mine"


def test_mappings_of_labels_are_taken(tmp_path):
    for task, settings in (
        ("cloze", {"template": "{text} {mask}", "verbalizer": {"a": "x", 1: ["y", "z"]}}),
        ("sequence-classification", {"class_weights": {"a": 0.5, "b": 2}}),
    ):
        path = write_recipe(tmp_path, task=task, task_kwargs=settings)
        assert load_adapter_recipe(path).task_kwargs == settings


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model_kwargs": {"num_hidden_layers": 1}}, "model_kwargs.num_hidden_layers"),
        ({"model_kwargs": {"config": "/etc/passwd"}}, "model_kwargs.config"),
        ({"model_kwargs": {"cache_dir": "/etc"}}, "model_kwargs.cache_dir"),
        ({"model_kwargs": {"token": "x"}}, "model_kwargs.token"),
        ({"model_kwargs": {"code_revision": "x"}}, "model_kwargs.code_revision"),
        ({"model_kwargs": {"device_map": "auto"}}, "model_kwargs.device_map"),
        ({"model_kwargs": {"quantization_config": {}}}, "model_kwargs.quantization_config"),
        ({"model_kwargs": {"attn_implementation": "somebody/kernel"}}, "model_kwargs.attn_implementation"),
        ({"model_kwargs": {"dtype": "float8"}}, "model_kwargs.dtype"),
        ({"model_kwargs": {"revision": ["x"]}}, "model_kwargs.revision"),
        ({"model_kwargs": [1]}, "model_kwargs"),
        ({"max_length": 10**9}, "max_length"),
        ({"eval_batch_size": 10**6}, "eval_batch_size"),
        ({"task_kwargs": {"max_new_tokens": 10**9}}, "task_kwargs.max_new_tokens"),
        ({"task_kwargs": {"num_beams": 1000}}, "task_kwargs.num_beams"),
        ({"task_kwargs": {"stride": float("inf")}}, "task_kwargs.stride"),
        ({"task_kwargs": {"stride": [1]}}, "task_kwargs.stride"),
        ({"task_kwargs": {"stride": {"a": 1}}}, "task_kwargs.stride"),
        ({"task_kwargs": {"verbalizer": {"a": [["x"]]}}}, "task_kwargs.verbalizer.a"),
        ({"task_kwargs": {"class_weights": {"a": 10**9}}}, "task_kwargs.class_weights.a"),
        ({"task_kwargs": 3}, "task_kwargs"),
        (
            {"task_kwargs": {"generation_kwargs": {"assistant_model": "x"}}},
            "task_kwargs.generation_kwargs.assistant_model",
        ),
        (
            {"task_kwargs": {"generation_kwargs": {"compile_config": {}}}},
            "task_kwargs.generation_kwargs.compile_config",
        ),
        ({"task_kwargs": {"generation_kwargs": {"top_k": 10**9}}}, "task_kwargs.generation_kwargs.top_k"),
        ({"task": "os"}, "task"),
        ({"labels": [[1]]}, "labels"),
        ({"data": 3}, "data"),
    ],
)
def test_what_is_refused_in_an_adapters_folder(tmp_path, values, named):
    path = write_recipe(tmp_path, **values)
    if values == {"data": 3}:
        assert load_adapter_recipe(path).data.columns == {}
        return
    with pytest.raises(RecipeError, match=f"`{named}`") as error:
        load_adapter_recipe(path)
    assert str(error.value).startswith(str(path)) and len(str(error.value)) < 500


def test_a_recipe_that_the_caller_names_is_used_in_full(tiny_bert, topics, tmp_path):
    out = tmp_path / "out"
    changed = {"model_kwargs": {"num_hidden_layers": 2}}
    train(recipe(tiny_bert, topics, out, num_train_epochs=1, **changed))
    with pytest.raises(RecipeError, match=r"model_kwargs\.num_hidden_layers.*--config"):
        evaluate_adapter(out)
    recorded = json.loads((out / "results.json").read_text())["validation"]
    assert evaluate_adapter(out, config=out / "recipe.yaml") == pytest.approx(recorded, abs=1e-6)


def test_an_adapters_configuration_imports_nothing(tiny_bert, topics, tmp_path, monkeypatch):
    """PEFT's LoRA imports the module that `megatron_core` names."""
    out = tmp_path / "out"
    train(recipe(tiny_bert, topics, out, adapter={"peft_type": "LORA"}, max_steps=1))
    mark = tmp_path / "the-code-ran"
    (tmp_path / "theirs.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(
        json.dumps({**config, "megatron_config": {"a": 1}, "megatron_core": "theirs"})
    )
    with pytest.raises(RecipeError, match="megatron_core"):
        load_trained(out)
    assert not mark.exists()


def bomb(kind: str) -> str:
    match kind:
        case "aliases":
            lines = [f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 10) if i else 'x'}]" for i in range(12)]
            return "\n".join(lines)
        case "merges":
            lines = [
                "k0: &k0 {a: 1}",
                *(f"k{i}: &k{i} {{<<: [{', '.join([f'*k{i - 1}'] * 10)}]}}" for i in range(1, 12)),
            ]
            return "\n".join(lines)
        case "itself":
            return "labels: &a [*a]"
        case "deep":
            return "labels: " + "[" * 5000 + "]" * 5000
        case "large":
            return "labels: [" + "a, " * 400_000 + "b]"
        case "digits":
            return "seed: " + "9" * 5000
        case "tag":
            return "seed: !!python/object/apply:os.system ['true']"


@pytest.mark.parametrize("kind", ["aliases", "merges", "itself", "deep", "large", "digits", "tag"])
@pytest.mark.timeout(20)
def test_hostile_recipes(kind, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"task: causal-lm\nmodel: m\noutput_dir: o\n{bomb(kind)}\n")
    for read in (load_recipe, load_adapter_recipe):
        with pytest.raises(RecipeError) as error:
            read(path)
        assert str(path) in str(error.value) and len(str(error.value)) < 1000


def test_aliases_may_be_used(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "task: causal-lm\nmodel: &m m\noutput_dir: *m\nadapter: &a {r: 1}\nmodel_kwargs: {<<: *a, x: *a}\n"
    )
    found = load_recipe(path)
    assert (found.output_dir, found.model_kwargs) == ("m", {"r": 1, "x": {"r": 1}})


def test_rows_of_a_recipe_on_the_hub_are_not_used(tmp_path, monkeypatch, tiny_bert, topics):
    out = tmp_path / "out"
    train(recipe(tiny_bert, topics, out, max_steps=1))
    module = sys.modules["prefix_adapter.training.inference"]
    monkeypatch.setattr("prefix_adapter.files.source.hf_hub_download", lambda repo, name, **more: str(out / name))
    original = module.PeftModel.from_pretrained
    for name in ("PeftModel", "PeftConfig"):
        kind = getattr(module, name)
        load = kind.from_pretrained
        monkeypatch.setattr(kind, "from_pretrained", lambda *own, load=load, **more: load(*own[:-1], str(out)))
    assert original is not module.PeftModel.from_pretrained
    for data in (None, "validation"):
        with pytest.raises(RecipeError, match="not taken from an adapter on the Hub"):
            evaluate_adapter("nobody/nothing", data)
    assert evaluate_adapter("nobody/nothing", topics["validation"]).rows == 19


# ---- The rows that are evaluated


@pytest.mark.parametrize(
    ("splits", "limits", "expected"),
    [
        (
            ("train", "validation", "test"),
            {},
            {None: ("test", 12), "validation": ("validation", 19), "train": ("train", 48)},
        ),
        (
            ("train", "validation", "test"),
            {"max_train_rows": 10, "max_validation_rows": 11, "max_test_rows": 7},
            {None: ("test", 7), "validation": ("validation", 11), "train": ("train", 10)},
        ),
        (("train",), {"validation_fraction": 0.3}, {None: ("validation", 14), "train": ("train", 34)}),
        (
            ("train",),
            {"max_validation_rows": 3, "max_train_rows": 9},
            {None: ("validation", 3), "train": ("train", 9)},
        ),
        (("train", "test"), {"max_test_rows": 5}, {None: ("test", 5), "validation": ("validation", 5)}),
    ],
)
def test_evaluate_takes_the_rows_that_the_run_took(tiny_bert, tmp_path, splits, limits, expected):
    names = {"train": topic_rows(48), "validation": topic_rows(19, 100), "test": topic_rows(12, 300)}
    for rows in names.values():  # labels without a rule: other rows, other metrics
        for number, row in enumerate(rows):
            row["label"] = "ab"[(number * number + number // 3) % 2]
    files = {name: write_rows(tmp_path / f"{name}.jsonl", names[name]) for name in splits}
    out = tmp_path / "out"
    results = train(recipe(tiny_bert, {**files, **limits}, out, seed=7, num_train_epochs=1, eval_batch_size=4))
    for asked, (split, count) in expected.items():
        found = evaluate_adapter(out, asked, batch_size=4)
        assert (found.split, found.rows) == (split, count) and found.rows == results["rows"][split]
        if split in results:
            assert found == results[split]
        held_out = "validation" not in splits and split != "test"
        source = files.get(split) if not held_out else files["train"]
        assert (
            found.source
            == {"validation": "held out of ", "train": "not held out of "}.get(split, "") * held_out + source
        )
    other = evaluate_adapter(out, files["train"])
    assert (other.split, other.source, other.rows) == (None, files["train"], 48)


def test_evaluated_rows_are_printed(tiny_bert, topics, tmp_path, capsys):
    train(recipe(tiny_bert, topics, tmp_path / "out", max_steps=1))
    capsys.readouterr()
    main(["evaluate", str(tmp_path / "out")])
    shown = json.loads(capsys.readouterr().out)
    assert (shown["split"], shown["source"], shown["rows"]) == ("validation", topics["validation"], 19)
    main(["evaluate", str(tmp_path / "out"), topics["train"]])
    shown = json.loads(capsys.readouterr().out)
    assert (shown["split"], shown["source"], shown["rows"]) == (None, topics["train"], 48)


def test_the_fixture_is_a_model_with_code(stranger):
    """With trust the code runs, so the tests above would notice it."""
    AutoConfig.from_pretrained(stranger.base, trust_remote_code=True)
    assert stranger.mark.exists()
    stranger.mark.unlink()
    assert type(AutoTokenizer.from_pretrained(stranger.base, trust_remote_code=True)).__module__.endswith("theirs")
