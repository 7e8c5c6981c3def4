"""`prefix-adapter run -m lm_eval` on tasks in a folder: its figures are those of plain forwards and of `generate`."""

import functools
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
import transformers as tr
from peft import PeftModel

from prefix_adapter import PrefixTuningV2Config, get_peft_model
from prefix_adapter.cli import main

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("lm_eval.tasks")

CHOICES = """
task: some_choices
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ANSWERS = """
task: some_answers
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.json}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {max_gen_toks: 6, do_sample: false, until: ["w999"]}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base model, an adapter, and two tasks. Half of the answers of the second one are those of the adapter."""
    root = tmp_path_factory.mktemp("evaluated")
    base = tiny.save(root / "base", "llama", [f"w{i}" for i in range(tiny.VOCAB - 6)], "AutoModelForCausalLM")
    model = tr.AutoModelForCausalLM.from_pretrained(base)
    model = get_peft_model(model, PrefixTuningV2Config(task_type="CAUSAL_LM", num_virtual_tokens=4))
    tiny.randomize(model, 1.0)
    model.save_pretrained(root / "adapter")

    ids = tiny.ids(12, 9).tolist()
    words = [[f"w{i - 5}" for i in row] for row in ids]
    rows = [
        {"question": " ".join(row[: 2 + i % 4]), "choices": [row[6], " ".join(row[6:]), row[7]], "label": i % 3}
        for i, row in enumerate(words)
    ]
    for i, row in enumerate(rows):
        row["answer"] = generated(root, "adapter", row["question"]) if i % 2 else "w1"
    (root / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (root / "choices.yaml").write_text(CHOICES.replace("FOLDER", str(root)))
    (root / "answers.yaml").write_text(ANSWERS.replace("FOLDER", str(root)))
    return root


@functools.cache
def load(root: Path, name: str):
    model = tr.AutoModelForCausalLM.from_pretrained(root / "base")
    model = PeftModel.from_pretrained(model, root / name) if name == "adapter" else model
    return model.eval(), tr.AutoTokenizer.from_pretrained(root / "base")


def generated(root: Path, name: str, text: str) -> str:
    model, tokenizer = load(root, name)
    inputs = tokenizer(text, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


@torch.no_grad()
def log_likelihood(root: Path, name: str, text: str, answer: str) -> float:
    """The sum over the answer's tokens, in one plain forward without padding."""
    model, tokenizer = load(root, name)
    before, ids = len(tokenizer(text)["input_ids"]), tokenizer(f"{text} {answer}", return_tensors="pt")["input_ids"]
    scores = model(input_ids=ids).logits[0, before - 1 : -1].log_softmax(-1)
    return scores.gather(1, ids[0, before:, None]).sum().item()


@pytest.mark.parametrize("name", ["adapter", "base"])
def test_figures_are_those_of_plain_forwards(folder, name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    model = f"pretrained={folder / 'base'},dtype=float32" + (f",peft={folder / name}" if name == "adapter" else "")
    # The harness would read 13,000 files of its own tasks first.
    quick = functools.partialmethod(lm_eval.tasks.TaskManager.__init__, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks.TaskManager, "__init__", quick)
    options = f"--model hf --tasks some_choices,some_answers --include_path {folder} --output_path {tmp_path}"
    command = f"run -m lm_eval {options} --device cpu --batch_size 4 --log_samples"
    main([*command.split(), "--model_args", model])
    (figures,) = (json.loads(path.read_text())["results"] for path in tmp_path.rglob("results_*.json"))
    samples = {
        task: [json.loads(line) for path in tmp_path.rglob(f"samples_{task}_*") for line in path.open()]
        for task in ("some_choices", "some_answers")
    }
    assert {task: len(rows) for task, rows in samples.items()} == {"some_choices": 12, "some_answers": 12}

    right = []
    for sample in samples["some_choices"]:
        row = sample["doc"]
        expected = [log_likelihood(folder, name, row["question"], choice) for choice in row["choices"]]
        assert [float(each[0][0]) for each in sample["resps"]] == pytest.approx(expected, abs=1e-3)
        right.append(max(range(3), key=expected.__getitem__) == row["label"])
    assert figures["some_choices"]["acc,none"] == sum(right) / 12 and 0 < sum(right) < 12

    right = []
    for sample in samples["some_answers"]:
        expected = generated(folder, name, sample["doc"]["question"])
        assert sample["resps"] == [[expected]]
        right.append(expected == sample["doc"]["answer"])
    assert figures["some_answers"]["exact_match,none"] == sum(right) / 12
    assert sum(right) == (6 if name == "adapter" else 0)
