"""`class_weights`: the training loss weighs labels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_rows
from datasets import Dataset
from sklearn.utils.class_weight import compute_class_weight
from test_run import recipe
from transformers import AutoTokenizer

from prefix_adapter.training import JointRecipe, RecipeError, train, train_together
from prefix_adapter.training.model import load_base
from prefix_adapter.training.tasks import TASK_CLASSES

ROWS = [{"text": f"w{i} w{i + 1}", "label": "rare" if i % 6 == 0 else "b" if i % 2 else "c"} for i in range(24)]
TAGGED = [{"tokens": ["w1", "w2", "w3"], "tags": ["B-x", "O", "O"]}, {"tokens": ["w4"], "tags": ["O"]}]


def task_of(base, tmp_path, name="sequence-classification", **settings):
    made = recipe(base, {"train": "rows.jsonl"}, tmp_path / "out", task=name, task_kwargs=settings)
    return made, TASK_CLASSES[name](made, AutoTokenizer.from_pretrained(base))


def learned(base, tmp_path, rows, name="sequence-classification", **settings):
    made, task = task_of(base, tmp_path, name, **settings)
    task.learn_labels(Dataset.from_list(rows), "rows.jsonl")
    return made, task


def batch_of(task, rows):
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    features = task.features(columns, list(range(len(rows))), with_targets=True)
    return task.collate([dict(zip(features, values, strict=True)) for values in zip(*features.values(), strict=True)])


@pytest.mark.parametrize(("name", "rows"), [("sequence-classification", ROWS), ("token-classification", TAGGED)])
def test_balanced_weights_are_scikit_learns(name, rows, tiny_bert, tmp_path):
    made, task = learned(tiny_bert, tmp_path, rows, name, class_weights="balanced")
    model = load_base(made, task)[0].eval()
    batch = batch_of(task, rows)
    loss, output = task.loss(model, batch)
    logits, labels = output.logits.flatten(0, -2), batch["labels"].flatten()
    kept = labels != -100
    present = np.unique(labels[kept])
    weights = torch.ones(len(task.labels))
    weights[present] = torch.tensor(
        compute_class_weight("balanced", classes=present, y=labels[kept].numpy()), dtype=torch.float32
    )
    by_hand = [weights[y] * F.cross_entropy(x, y) for x, y in zip(logits[kept], labels[kept], strict=True)]
    torch.testing.assert_close(loss, torch.stack(by_hand).mean())
    with torch.no_grad():
        plain = task.loss(model, batch)[0]
    torch.testing.assert_close(plain, F.cross_entropy(logits[kept], labels[kept]))
    assert abs(plain - loss) > 1e-4


def test_a_mapping_weighs_the_labels_that_it_names(tiny_bert, tmp_path):
    made, task = learned(tiny_bert, tmp_path, ROWS, class_weights={"rare": 3, "b": 0})
    model = load_base(made, task)[0].eval()
    rows = [row for row in ROWS if row["label"] in ("rare", "c")][:2]
    assert [row["label"] for row in rows] == ["rare", "c"]
    loss, output = task.loss(model, batch_of(task, rows))
    one, other = F.cross_entropy(output.logits, torch.tensor([task.labels.index("rare"), 1]), reduction="none")
    torch.testing.assert_close(loss, (3 * one + other) / 2)
    loss.backward()
    none = [row for row in ROWS if row["label"] == "b"]
    assert task.loss(model, batch_of(task, none))[0] == 0


def test_a_run_learns_a_rare_label_with_weights(tiny_bert, tmp_path):
    """Texts that say nothing: without weights the frequent label wins, with a high weight the rare one."""
    rows = [{"text": "w1", "label": "rare" if i % 4 == 0 else "often"} for i in range(32)]
    data = {split: write_rows(tmp_path / f"{split}.jsonl", rows) for split in ("train", "validation")}
    accuracy = {}
    for weight in (1, 20):
        made = recipe(tiny_bert, data, tmp_path / str(weight), task_kwargs={"class_weights": {"rare": weight}})
        accuracy[weight] = train(made, quiet=True)["validation"]["accuracy"]
    assert accuracy == {1: 0.75, 20: 0.25}
    tasks = {
        name: {
            "task": "sequence-classification",
            "max_length": 8,
            "data": data,
            "task_kwargs": {"class_weights": each},
        }
        for name, each in (("plain", None), ("weighted", {"rare": 20}))
    }
    joint = {"model": tiny_bert, "output_dir": str(tmp_path / "joint"), "max_steps": 40, "batch_size": 8}
    joint |= {"adapter": {"num_virtual_tokens": 4}, "learning_rate": 0.03, "tasks": tasks}
    results = train_together(JointRecipe.from_dict(joint), quiet=True)["tasks"]
    assert {name: own["validation"]["accuracy"] for name, own in results.items()} == {"plain": 0.75, "weighted": 0.25}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("even", "must be `balanced`"),
        ({"rare": -1}, "must be `balanced`"),
        ({"rare": True}, "must be `balanced`"),
        ({"other": 2}, "the label 'other' is not among the labels"),
        ({"rare": 0, "b": 0, "c": 0}, "nothing to learn"),
    ],
)
def test_bad_weights(weights, message, tiny_bert, tmp_path):
    with pytest.raises(RecipeError, match=message):
        learned(tiny_bert, tmp_path, ROWS, class_weights=weights)


def test_weights_are_for_one_label_a_row(tiny_bert, tmp_path):
    rows = [{"text": "w1", "label": ["a"]}, {"text": "w2", "label": ["b"]}]
    with pytest.raises(RecipeError, match="rows with one label each, not multi_label_classification"):
        learned(tiny_bert, tmp_path, rows, class_weights="balanced")
