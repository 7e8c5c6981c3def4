"""Multi-task training: several tasks train one prefix."""

import itertools
import json
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from accelerate.utils import DistributedType
from conftest import save_base, topic_rows, write_rows
from safetensors.torch import load_file
from test_loop import Crash, before_step, crash, what_counts
from torch.nn.functional import cross_entropy

from prefix_adapter import PeftModel
from prefix_adapter.cli import main
from prefix_adapter.training import (
    DataError,
    JointRecipe,
    Recipe,
    RecipeError,
    TrainingInterrupted,
    evaluate_adapter,
    load_joint_recipe,
    load_recipe,
    predict,
    train,
    train_together,
)
from prefix_adapter.training import multitask as module
from prefix_adapter.training import run as run_module
from prefix_adapter.training.batches import Batches, JointBatches
from prefix_adapter.training.loop import Loop

PREFIX = "base_model.model.prefix_tuning_v2.prefix_tuning_v2_embedding.weight"
CLASSES = {
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
}


def tag_rows(count: int, start: int = 0) -> list[dict]:
    """Sentences with three tags. The tag follows from the word."""
    rows = []
    for i in range(start, start + count):
        tokens = [f"w{(i * 7 + j * 11) % 60}" for j in range(4 + i % 3)]
        rows.append({"tokens": tokens, "tags": ["XYZ"[int(token[1:]) // 20] for token in tokens]})
    return rows


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """The folder of a tiny BERT with dropout."""
    folder = tmp_path_factory.mktemp("base") / "bert"
    return save_base(folder, "bert", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)


@pytest.fixture
def values(base, tmp_path) -> dict:
    """A recipe of two tasks of different kinds, with 24 and 12 rows."""
    return {
        "model": base,
        "output_dir": str(tmp_path / "out"),
        "adapter": {"num_virtual_tokens": 4},
        "batch_size": 4,
        "max_steps": 12,
        "eval_steps": 6,
        "save_steps": 1,
        "logging_steps": 1,
        "learning_rate": 0.03,
        "tasks": {
            "topics": {
                "task": "sequence-classification",
                "max_length": 16,
                "data": {
                    "train": write_rows(tmp_path / "topics.jsonl", topic_rows(24)),
                    "validation": write_rows(tmp_path / "topics-dev.jsonl", topic_rows(7, 100)),
                    "test": write_rows(tmp_path / "topics-test.jsonl", topic_rows(9, 200)),
                },
            },
            "tags": {
                "task": "token-classification",
                "head_learning_rate": 0.05,
                "data": {
                    "train": write_rows(tmp_path / "tags.jsonl", tag_rows(12)),
                    "validation": write_rows(tmp_path / "tags-dev.jsonl", tag_rows(5, 50)),
                },
            },
        },
    }


def load(folder, task: str, base: str):
    own = load_recipe(folder / "recipe.yaml")
    model = CLASSES[task].from_pretrained(base, num_labels=len(own.labels))
    return PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize("projection", [False, True])
def test_outputs_are_an_adapter_for_each_task_with_one_prefix(values, base, tmp_path, projection):
    values["adapter"]["prefix_projection"] = projection
    results = train_together(JointRecipe.from_dict(values))
    out = tmp_path / "out"
    assert json.loads((out / "results.json").read_text()) == results
    prefixes = {}
    for name, own in values["tasks"].items():
        folder = out / name
        loaded = load(folder, own["task"], base)
        prefixes[name] = load_file(folder / "adapter_model.safetensors")[PREFIX]
        assert torch.equal(loaded.state_dict()[PREFIX.replace(".weight", ".default.weight")], prefixes[name])
        recorded = json.loads((folder / "results.json").read_text())["validation"]
        assert recorded == results["tasks"][name]["validation"]
        assert evaluate_adapter(folder, "validation") == pytest.approx(recorded, abs=1e-6)
    assert torch.equal(prefixes["topics"], prefixes["tags"])
    assert evaluate_adapter(out / "topics") == pytest.approx(results["tasks"]["topics"]["test"], abs=1e-6)
    rows = write_rows(tmp_path / "rows.jsonl", [{"tokens": ["w1", "w30"]}])
    predict(out / "tags", rows, tmp_path / "answers.jsonl")
    assert len(json.loads((tmp_path / "answers.jsonl").read_text())["prediction"]) == 2
    # A next run starts from the shared prefix: a table, or the MLP of the checkpoint.
    source = next((out / "tags" / "checkpoints").iterdir()) if projection else out / "tags"
    alone = {key: value for key, value in values.items() if key != "tasks"} | values["tasks"]["topics"]
    alone |= {"output_dir": str(tmp_path / "alone"), "init_from": str(source), "max_steps": 1, "learning_rate": 1e-12}
    train(Recipe.from_dict(alone))
    prefix = load_file(tmp_path / "alone" / "adapter_model.safetensors")[PREFIX]
    torch.testing.assert_close(prefix, prefixes["tags"], atol=1e-6, rtol=0)
    assert "trained together with other tasks, each of which has its own adapter: `tags`." in (
        out / "topics" / "README.md"
    ).read_text().replace("\n", " ")
    best = max(
        (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if '"validation"' in line),
        key=lambda line: line["score"],
    )
    assert best["score"] == pytest.approx((best["tags/accuracy"] + best["topics/accuracy"]) / 2)
    assert results["validation"] == {"loss": best["loss"], "score": best["score"]}


def watched(monkeypatch) -> list:
    """Record which tensors of the joint model each step changes."""
    seen: list = []
    original = Loop._train_step

    def weights(loop):
        return {name: each.detach().clone() for name, each in loop.model.named_parameters(remove_duplicate=False)}

    def train_step(self, batch):
        before = weights(self)
        result = original(self, batch)
        after = weights(self)
        seen.append({name for name in before if not torch.equal(before[name], after[name])})
        return result

    monkeypatch.setattr(Loop, "_train_step", train_step)
    return seen


def test_a_step_moves_the_prefix_and_the_head_of_its_task_alone(values, monkeypatch):
    seen, models = watched(monkeypatch), []
    original = module.SharedPrefix.__init__
    monkeypatch.setattr(
        module.SharedPrefix, "__init__", lambda self, own: (original(self, own), models.append(self))[0]
    )
    train_together(JointRecipe.from_dict({**values, "weight_decay": 0.1, "warmup_ratio": 0.0, "max_steps": 8}))
    (model,) = models
    turns = []
    for changed in seen:
        prefixes = {name for name in changed if "prefix_tuning_v2" in name}
        assert {name.split(".")[1] for name in prefixes} == {"0", "1"}  # one parameter that both models have
        (turn,) = {name.split(".")[1] for name in changed - prefixes}
        assert all("modules_to_save" in name for name in changed - prefixes)
        turns.append(turn)
    assert set(turns) == {"0", "1"}
    # There is one copy of the backbone. Each model has its own head, and one has a pooler.
    first, second = (dict(own.named_parameters()) for own in model.models)
    own = {name for name, each in second.items() if name not in first or first[name] is not each}
    assert own and all("classifier" in name or "pooler" in name for name in own)


def test_the_prefix_has_the_default_rate_of_the_task_that_bears_the_least(tmp_path):
    """A decoder that learns to write bears a rate of 1e-1, and with a new head 1e-2."""
    write_rows(tmp_path / "topics.jsonl", topic_rows(12))
    write_rows(tmp_path / "texts.jsonl", [{"text": row["text"]} for row in topic_rows(12)])
    tasks = {
        "texts": {"task": "causal-lm", "data": {"train": str(tmp_path / "texts.jsonl")}},
        "topics": {"task": "sequence-classification", "data": {"train": str(tmp_path / "topics.jsonl")}},
    }
    values = {
        "model": save_base(tmp_path / "gpt2", "gpt2"),
        "output_dir": str(tmp_path / "out"),
        "adapter": {"num_virtual_tokens": 2},
        "max_steps": 1,
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "tasks": tasks,
    }
    results = train_together(JointRecipe.from_dict(values))["tasks"]
    assert [results[name]["learning_rates"] for name in ("texts", "topics")] == [[1e-2, 2e-2]] * 2
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert {line["learning_rate/adapter"] for line in lines if line["split"] == "train"} == {1e-2}
    # The recipe still leaves it out, so that a resumed run finds the same again.
    assert load_joint_recipe(tmp_path / "out" / "recipe.yaml").settings.learning_rate is None


def test_as_a_plain_loop(base, values, tmp_path, monkeypatch):
    """The same models in a plain loop: one AdamW, and for each step a drawn task, its next rows, its loss."""
    values = {**values, "adapter": {"num_virtual_tokens": 4, "prefix_dropout": 0.0}, "model_kwargs": {}}
    values["model_kwargs"] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    values |= {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "eval_steps": 12, "max_grad_norm": 0}
    start: list = []
    original = Loop.run

    def run(self):
        start.extend({n: p.detach().clone() for n, p in each.named_parameters()} for each in self.model.models)
        original(self)

    monkeypatch.setattr(Loop, "run", run)
    train_together(JointRecipe.from_dict(values))

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    names = ["tags", "topics"]
    rows = {"tags": tag_rows(12), "topics": topic_rows(24)}
    models = {name: load(tmp_path / "out" / name, values["tasks"][name]["task"], base) for name in names}
    for name, weights in zip(names, start, strict=True):
        own = dict(models[name].named_parameters())
        assert own.keys() == weights.keys()
        for key, each in own.items():
            each.data = weights[key].clone()
    key = PREFIX.replace(".weight", ".default.weight")
    prefix = dict(models["tags"].named_parameters())[key].requires_grad_(True)
    models["topics"].get_submodule(key.rpartition(".")[0]).weight = prefix
    heads = {
        name: [p.requires_grad_(True) for n, p in models[name].named_parameters() if "modules_to_save" in n]
        for name in names
    }
    optimizer = torch.optim.AdamW(
        [
            {"params": [prefix], "lr": 0.03},
            {"params": heads["tags"], "lr": 0.05},
            {"params": heads["topics"], "lr": 0.02},
        ],
        weight_decay=0.0,
    )
    draws = torch.Generator().manual_seed(42)
    taken = Counter()
    for _ in range(12):
        name = names[int(torch.multinomial(torch.tensor([12.0, 24.0], dtype=torch.float64), 1, generator=draws))]
        epoch, place = divmod(taken[name], len(rows[name]) // 4)
        taken[name] += 1
        order = torch.randperm(len(rows[name]), generator=torch.Generator().manual_seed(42 + 7919 * epoch))
        chosen = [rows[name][i] for i in order[4 * place : 4 * place + 4]]
        texts = [" ".join(row["tokens"]) if name == "tags" else row["text"] for row in chosen]
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        logits = models[name](**batch).logits
        if name == "tags":
            picked = [logits[i, 1 : 1 + len(row["tokens"])] for i, row in enumerate(chosen)]  # after [CLS]
            loss = cross_entropy(torch.cat(picked), torch.tensor(["XYZ".index(t) for r in chosen for t in r["tags"]]))
        else:
            loss = cross_entropy(logits, torch.tensor(["ab".index(row["label"]) for row in chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert min(taken.values()) >= 2
    weights = load_file(tmp_path / "out" / "checkpoints" / "step-000012" / "trained.safetensors")
    expected = {"prefix": prefix, **{f"{n}{i}": p for n in names for i, p in enumerate(heads[n])}}
    found = [next(each for key, each in weights.items() if "prefix_tuning_v2" in key)]
    for number in range(2):
        own = {key: each for key, each in weights.items() if f"models.{number}." in key and "modules_to_save" in key}
        found += [own[key] for key in sorted(own, key=lambda key: key.endswith("bias"))]
    for own, (name, each) in zip(found, expected.items(), strict=True):
        torch.testing.assert_close(own, each.detach(), atol=1e-6, rtol=1e-5, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("step", [1, 3, 9])
def test_an_interrupted_run_ends_as_one_that_was_not(values, tmp_path, monkeypatch, step):
    """At step 1 one of the heads has never been trained."""
    values["early_stopping_patience"] = 3
    train_together(JointRecipe.from_dict({**values, "output_dir": str(tmp_path / "reference")}))
    with monkeypatch.context() as patch:
        before_step(patch, step, crash)
        with pytest.raises(Crash):
            train_together(JointRecipe.from_dict(values))
    assert not (tmp_path / "out" / "tags" / "adapter_model.safetensors").exists()
    train_together(load_joint_recipe(tmp_path / "out" / "recipe.yaml"), resume=True)
    reference, found = what_counts(tmp_path / "reference"), what_counts(tmp_path / "out")
    assert len(found) > 6 and found == reference


def test_interruption_message_says_how_to_resume(values, tmp_path, monkeypatch):
    import signal

    before_step(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(TrainingInterrupted, match=f"prefix-adapter train-together --resume {tmp_path / 'out'}"):
        train_together(JointRecipe.from_dict(values))


def test_tasks_of_the_steps():
    joint = JointBatches([Batches(30, 4, 0), Batches(7, 4, 0), Batches(300, 4, 0)], 1.0, seed=5)
    assert joint.steps_per_epoch == 8 + 2 + 75
    steps = [joint[i] for i in range(4000)]
    bounds = [range(0, 30), range(30, 37), range(37, 337)]
    of = [next(t for t, own in enumerate(bounds) if batch[0] in own) for batch in steps]
    assert all(i in bounds[t] for t, batch in zip(of, steps, strict=True) for i in batch)
    shares = [of.count(t) / 4000 for t in range(3)]
    assert shares == pytest.approx([30 / 337, 7 / 337, 300 / 337], abs=0.02)
    # Each task gets its own batches in their order.
    own = [batch for t, batch in zip(of, steps, strict=True) if t == 2]
    assert own == [[37 + i for i in Batches(300, 4, 0)[k]] for k in range(len(own))]
    # A step does not depend on the steps that were read before.
    again = JointBatches([Batches(30, 4, 0), Batches(7, 4, 0), Batches(300, 4, 0)], 1.0, seed=5)
    assert again[3999] == steps[3999] and again[10] == steps[10]
    alike = JointBatches([Batches(30, 4, 0), Batches(300, 4, 0)], 0.0, seed=5).task_steps(2000)
    assert alike[0] / 2000 == pytest.approx(0.5, abs=0.05)


def test_score_of_a_metric_that_is_better_when_lower(values, tmp_path):
    values["tasks"]["topics"]["metric_for_best_model"] = "loss"
    train_together(JointRecipe.from_dict(values))
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["split"] == "validation"]
    assert len(found) == 2
    for line in found:
        assert line["score"] == pytest.approx((line["tags/accuracy"] - line["topics/loss"]) / 2)


def test_tasks_with_other_parts_of_the_base_model_are_refused(values, tmp_path):
    """One task uses the encoder alone, the other also the decoder."""
    t5 = save_base(tmp_path / "t5", "t5")
    rows = write_rows(
        tmp_path / "pairs.jsonl", [{"text": "w1 w2", "target": "w3"}, {"text": "w2", "target": "w4"}] * 3
    )
    values["model"] = t5
    values["tasks"]["topics"] = {"task": "seq2seq-lm", "data": {"train": rows}}
    with pytest.raises(RecipeError, match="tags and topics do not use the same attention layers"):
        train_together(JointRecipe.from_dict(values))
    assert not (tmp_path / "out").exists()


def changed(values: dict, path: str, value) -> dict:
    result = place = json.loads(json.dumps(values))
    *parents, last = path.split(".")
    for parent in parents:
        place = place[parent]
    place[last] = value
    return result


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("tasks", {"a": {"task": "causal-lm"}}, r"`tasks`: at least two tasks are needed, got \['a'\]"),
        ("tasks", ["a"], "`tasks` must be a mapping"),
        ("tasks.tags.model", "other", "`tasks.tags.model`: a task cannot set this key"),
        ("tasks.tags.data.trian", "x", r"`tasks.tags.data.trian`: there is no such key"),
        ("tasks.tags.max_length", 0, "`tasks.tags.max_length` must be at least 1"),
        ("tasks.tags.task", "tagging", "`tasks.tags.task` must be"),
        ("tasks.tags.task_kwargs", {"strid": 1}, "`tasks.tags.task_kwargs.strid`"),
        ("tasks.tags.metric_for_best_model", "f2", "`tasks.tags.metric_for_best_model`: there is no 'f2'"),
        ("tasks.tags.data.train", "none.jsonl", "`tasks.tags`: There is no file 'none.jsonl'"),
        ("tasks.checkpoints", {}, "`tasks.checkpoints`: the run creates another file or folder 'checkpoints'"),
        ("tasks.readme.md", {}, "use letters, digits"),
        ("max_length", 16, "`max_length`: each task has its own"),
        ("learning_rat", 1, "^`learning_rat`: there is no such key"),
        ("learning_rate", -1, "^`learning_rate` must be above 0"),
        ("sampling_exponent", "1", "`sampling_exponent` must be a number"),
        ("output_dir", None, "`output_dir` must be the path"),
        ("adapter", {"peft_type": "LORA"}, "`adapter.peft_type`: tasks can share a prefix"),
    ],
)
def test_errors(values, tmp_path, path, value, message):
    if path == "tasks.readme.md":
        wrong = {**values, "tasks": {**values["tasks"], "readme.md": values["tasks"]["tags"]}}
    elif path == "tasks.checkpoints":
        wrong = changed(values, path, values["tasks"]["tags"])
    else:
        wrong = changed(values, path, value)
    with pytest.raises((RecipeError, DataError), match=message):
        train_together(JointRecipe.from_dict(wrong))
    assert not (tmp_path / "out").exists()


def test_recipes_that_differ_in_what_is_shared(values):
    recipes = JointRecipe.from_dict(values).recipes
    recipes["tags"].batch_size = 8
    with pytest.raises(RecipeError, match="`batch_size` is shared by all tasks: "):
        JointRecipe("out", recipes)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_fsdp_and_deepspeed_are_refused(values, monkeypatch, kind):
    accelerator = SimpleNamespace(distributed_type=kind)
    monkeypatch.setattr(run_module, "training_accelerator", lambda recipe: nullcontext(accelerator))
    with pytest.raises(RecipeError, match=f"^{kind.value} cannot shard models"):
        train_together(JointRecipe.from_dict(values))


def test_the_output_folder(values, tmp_path):
    values |= {"max_steps": 1}
    out = tmp_path / "out"
    first = JointRecipe.from_dict(values)
    train_together(first)
    with pytest.raises(RecipeError, match="is not empty"):
        train_together(first)
    other = JointRecipe.from_dict(changed(values, "tasks.tags.head_learning_rate", 0.1))
    with pytest.raises(RecipeError, match=r"`tasks.tags.head_learning_rate`: the run in .* was started with 0.05"):
        train_together(other, resume=True)
    with pytest.raises(RecipeError, match="`sampling_exponent`: the run in"):
        train_together(JointRecipe.from_dict({**values, "sampling_exponent": 0.5}), resume=True)
    # The adapter of one task cannot be resumed alone.
    with pytest.raises(RecipeError, match="was trained together with others, and cannot be resumed alone"):
        train(load_recipe(out / "tags" / "recipe.yaml"), resume=True)
    (out / "tags" / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match=r"also contains 'tags/notes\.txt'"):
        train_together(first, overwrite=True)
    (out / "tags" / "notes.txt").unlink()
    renamed = json.loads(json.dumps(values).replace('"tags"', '"words"', 1).replace('"words": [', '"tags": ['))
    train_together(JointRecipe.from_dict(renamed), overwrite=True)
    assert not (out / "tags").exists() and (out / "words" / "adapter_model.safetensors").is_file()


def test_the_command(values, tmp_path, capsys):
    (tmp_path / "shared.yaml").write_text(yaml.safe_dump({**values, "max_steps": 3}))
    main(["train-together", "--config", str(tmp_path / "shared.yaml"), "--output_dir", str(tmp_path / "elsewhere")])
    shown = capsys.readouterr().out
    assert str(tmp_path / "elsewhere") in shown
    results = json.loads((tmp_path / "elsewhere" / "results.json").read_text())["tasks"]
    printed = json.loads(shown[shown.index("{") : shown.rindex("}") + 1])
    assert printed["topics"]["test"] == results["topics"]["test"]
    assert printed["tags"] == {"validation": results["tags"]["validation"]}
    (tmp_path / "elsewhere").rename(tmp_path / "moved")
    before = what_counts(tmp_path / "moved")
    main(["train-together", "--resume", str(tmp_path / "moved")])
    after = what_counts(tmp_path / "moved")
    assert {k: v for k, v in after.items() if k != "results"} == {k: v for k, v in before.items() if k != "results"}
    with pytest.raises(SystemExit):
        main(["train-together", "--help"])
    assert "ner: {task: token-classification" in capsys.readouterr().out
    for wrong, message in (([], "either --config"), (["--resume", str(tmp_path / "none")], "there is no run in")):
        with pytest.raises(SystemExit, match=message):
            main(["train-together", *wrong])


def test_every_pair_of_kinds_shares_the_backbone(base, tmp_path):
    """The models have different classes, with different names of the backbone."""
    from prefix_adapter.training.model import load_base, load_tokenizer, wrap
    from prefix_adapter.training.recipe import Recipe
    from prefix_adapter.training.tasks import TASK_CLASSES

    gpt = save_base(tmp_path / "gpt2", "gpt2")
    models = {}
    for kind in ("causal-lm", "sequence-classification", "token-classification", "question-answering"):
        recipe = Recipe(task=kind, model=gpt, output_dir="", labels=["a", "b"], adapter={"num_virtual_tokens": 3})
        task = TASK_CLASSES[kind](recipe, load_tokenizer(recipe))
        models[kind] = wrap(recipe, task, *load_base(recipe, task))
    before = {kind: {n: p.detach().clone() for n, p in model.named_parameters()} for kind, model in models.items()}
    shared = module.SharedPrefix(models)
    for kind, model in models.items():
        own = dict(model.named_parameters())
        assert own.keys() == before[kind].keys()
        assert all(torch.equal(own[n], p) for n, p in before[kind].items() if not own[n].requires_grad)
    sizes = [sum(p.numel() for p in model.parameters()) for model in models.values()]
    heads = sum(
        p.numel() for model in models.values() for n, p in model.named_parameters()
        if "modules_to_save" in n or "original_module" in n
    )  # fmt: skip
    assert sum(p.numel() for p in shared.parameters()) <= sizes[0] + heads
    for one, other in itertools.pairwise(models.values()):
        assert one.get_input_embeddings().weight is other.get_input_embeddings().weight
