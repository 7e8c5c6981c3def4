"""Fill-mask: the loss and the candidates against the logits of single rows, bad rows, and a run."""

import json

import pytest
import torch
from conftest import save_base, write_rows
from torch.nn import functional as F

from prefix_adapter.training import Data, Recipe, RecipeError, evaluate_adapter, predict, train
from prefix_adapter.training.evaluation import rows_of
from prefix_adapter.training.model import load_base, load_tokenizer
from prefix_adapter.training.tasks.fill_mask import FillMask

CLASSES = {"bert": "AutoModelForMaskedLM", "gpt2": "AutoModelForCausalLM", "t5": "AutoModelForSeq2SeqLM"}
TEMPLATES = {"bert": "{mask} w60 {text} w61", "gpt2": "w60 {text} w61 {mask} w62", "t5": "{text}"}
ROWS = [{"text": "w1 w2 w3", "label": "w10"}, {"text": "w4", "label": "w11"}]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: save_base(folder / kind, kind, auto_class) for kind, auto_class in CLASSES.items()}


def new_task(model, template, **changes) -> FillMask:
    settings = {"task": "fill-mask", "model": model, "output_dir": "unused", "task_kwargs": {"template": template}}
    recipe = Recipe(**{**settings, **changes})
    return FillMask(recipe, load_tokenizer(recipe))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_loss_and_the_candidates(kind, bases):
    task = new_task(bases[kind], TEMPLATES[kind])
    assert not any(task.problem(row, True) for row in ROWS)
    model, tokenizer = load_base(task.recipe, task)[0].eval(), task.tokenizer
    columns = {key: [row[key] for row in ROWS] for key in ROWS[0]}
    batch = task.collate(rows_of(task.features(columns, [0, 1], True)))
    losses, best = [], []
    with torch.no_grad():
        for row in ROWS:
            text = {"bert": f"[MASK] w60 {row['text']} w61", "gpt2": f"w60 {row['text']} w61"}[kind]
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            logits = model(input_ids=ids).logits[0, 1 if kind == "bert" else -1]
            losses.append(F.cross_entropy(logits, torch.tensor(tokenizer.convert_tokens_to_ids(row["label"]))))
            ids = logits.topk(10).indices.tolist()
            best.append(
                [token or str(number) for token, number in zip(tokenizer.convert_ids_to_tokens(ids), ids, strict=True)]
            )
        loss, output = task.loss(model, batch)
        records = task.outputs(model, batch, output)
        assert records == task.outputs(model, batch, None)
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    answers = [task.answer(row, [], [record]) for row, record in zip(ROWS, records, strict=True)]
    assert [answer["tokens"] for answer in answers] == best
    known = [(answer["prediction"], tokens[0]) for answer, tokens in zip(answers, best, strict=True)]
    assert all(text == token for text, token in known if not token.isdigit())


def test_metrics(bases):
    task = new_task(bases["gpt2"], TEMPLATES["gpt2"])
    answers = [{"tokens": ["w1", "w2"]}, {"tokens": ["w3", "w4"]}]
    assert task.metrics(answers, ["w1", "w4"]) == {"accuracy": 0.5, "accuracy_at_10": 1.0}
    assert task.metrics(answers, ["w2", "w9"]) == {"accuracy": 0.0, "accuracy_at_10": 0.5}


def test_bad_rows_and_settings(bases):
    task = new_task(bases["gpt2"], TEMPLATES["gpt2"])
    for label, message in (
        ("w1 w2", "'w1 w2' has 2 tokens"),
        ("never", "does not know the word"),
        (3, "must be a text"),
    ):
        assert message in task.problem({"text": "w1", "label": label}, True)
    assert "there is no text" in task.problem({"text": " "}, False)
    with pytest.raises(RecipeError, match=r"reads the text before .* only"):
        new_task(bases["gpt2"], "w1 {mask} {text}")
    with pytest.raises(RecipeError, match="is an encoder-decoder"):
        new_task(bases["t5"], TEMPLATES["t5"])


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_run_with_virtual_tokens(kind, bases, tmp_path):
    """Facts in LAMA's form: the capital of each country."""
    facts = [{"sub_label": f"w{i % 4}", "obj_label": f"w{20 + i % 4}", "predicate_id": "P36"} for i in range(32)]
    rows = write_rows(tmp_path / "train.jsonl", facts)
    template = {"bert": "{p:3}{mask}{p:3} {sub_label}{p:3}", "gpt2": "{p:3} {sub_label}{p:3} {mask}"}[kind]
    adapter = {"peft_type": "PTUNING_V1", "encoder_reparameterization_type": None, "init_std": 1.0}
    recipe = Recipe(
        task="fill-mask",
        model=bases[kind],
        output_dir=str(tmp_path / "out"),
        data=Data(train=rows, validation=rows, columns={"label": "obj_label"}),
        adapter=adapter,
        task_kwargs={"template": template},
        learning_rate=0.1,
        batch_size=8,
        num_train_epochs=4,
    )
    plain = {"output_dir": str(tmp_path / "plain"), "adapter": {"peft_type": "NONE"}}
    plain["task_kwargs"] = {"template": template.replace("{p:3}", "") if kind == "bert" else "{sub_label} {mask}"}
    before = train(recipe.with_values(plain, without=["adapter", "task_kwargs"]), quiet=True)["validation"]
    results = train(recipe, quiet=True)
    assert results["metric"] == "accuracy"
    assert results["validation"]["loss"] < 0.9 * before["loss"]
    metrics = evaluate_adapter(tmp_path / "out")
    assert metrics == pytest.approx(results["validation"])
    source = write_rows(tmp_path / "rows.jsonl", [{"sub_label": row["sub_label"]} for row in facts])
    predict(tmp_path / "out", source, tmp_path / "answers.jsonl")
    answers = list(map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines()))
    right = [answer["tokens"][0] == row["obj_label"] for answer, row in zip(answers, facts, strict=True)]
    assert sum(right) / len(right) == pytest.approx(metrics["accuracy"])
