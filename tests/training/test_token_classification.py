"""Token classification: windows, pieces, the loss of batches of unequal sentences, and metrics."""

import json
import random
from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from conftest import WORDS, write_rows
from datasets import Dataset
from peft import AutoPeftModelForTokenClassification
from seqeval import metrics as seqeval
from sklearn.metrics import accuracy_score, f1_score
from tiny import randomize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from prefix_adapter.training import Data, DataError, Recipe, RecipeError, load_recipe, train
from prefix_adapter.training.batches import Batches
from prefix_adapter.training.evaluation import answer_rows, evaluate
from prefix_adapter.training.model import load_base, trained_parameters, wrap
from prefix_adapter.training.run import load_splits
from prefix_adapter.training.tasks import TASK_CLASSES


def make_recipe(base, output="unused", data=None, **changes) -> Recipe:
    return Recipe(
        **{
            "task": "token-classification",
            "model": base,
            "output_dir": output,
            "data": Data(**(data or {"train": "unused"})),
            "adapter": {"num_virtual_tokens": 4},
            "batch_size": 8,
            "learning_rate": 0.03,
            "head_learning_rate": 0.02,
            "max_length": 32,
            **changes,
        }
    )


def make_task(base, tokenizer=None, **changes):
    return TASK_CLASSES["token-classification"](
        make_recipe(base, **changes), tokenizer or AutoTokenizer.from_pretrained(base)
    )


def entity_rows(count: int, seed: int) -> list[dict]:
    """Sentences of 2 to 9 words. `w0` and `w1` begin an entity, `w5` and `w6` continue it."""
    chance, rows = random.Random(seed), []
    for _ in range(count):
        numbers = [chance.choice([0, 1, 5, 6, 40, 41, 42]) for _ in range(chance.randrange(2, 10))]
        tags = []
        for number in numbers:
            inside = number in (5, 6) and bool(tags) and tags[-1] != "O"
            tags.append("B-X" if number < 2 else "I-X" if inside else "O")
        rows.append({"tokens": [f"w{number}" for number in numbers], "tags": tags})
    return rows


def part_rows(count: int, seed: int) -> list[dict]:
    """The same sentences, with a tag that depends on the word alone."""
    rows = entity_rows(count, seed)
    return [{**row, "tags": [("V", "N")[int(token[1:]) < 40] for token in row["tokens"]]} for row in rows]


@pytest.fixture(scope="module")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like RoBERTa's and GPT-2's: a space belongs to the piece after it."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False)
    tokenizer.train_from_iterator(["the weather in Seoul is fine , the winter was not"] * 20, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), add_prefix_space=False)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


SENTENCES = [
    ["the", "weather", "in", "Seoul", "is", "fine"],
    ["Antidisestablishmentarianism", ",", "the", "winter", "weather"],
    ["don't", "naïve", "서울", "😀", "...", "U.S.A."],
    ["x" * 60, "the", "end"],
    [f"{i}th" for i in range(70)],
    ["", "the", "\u200d", "end", ""],
    ["two words", " in ", "one token"],
    ["\n"],
]


def by_word_ids(tokenizer, tokens: list[str]) -> list[list[int]]:
    """The ids of the pieces of each token, as transformers itself finds them."""
    encoded = tokenizer(tokens, is_split_into_words=True, add_special_tokens=False, verbose=False)
    pieces = [[] for _ in tokens]
    for piece, word in zip(encoded.input_ids, encoded.word_ids(), strict=True):
        pieces[word].append(piece)
    return pieces


@pytest.mark.parametrize(("max_length", "stride"), [(512, 32), (12, 4), (12, 0), (9, 100), (4, 1), (3, 32)])
def test_each_token_has_one_first_piece(minilm, max_length, stride):
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    task = make_task(minilm, tokenizer, max_length=max_length, task_kwargs={"stride": stride})
    features = task.features({"tokens": SENTENCES}, list(range(10, 10 + len(SENTENCES))), False)
    windows = list(zip(features["input_ids"], features["first_piece_of"], features["row"], strict=True))
    assert [row for _, _, row in windows] == sorted(row for _, _, row in windows)
    for number, tokens in enumerate(SENTENCES, start=10):
        expected = by_word_ids(tokenizer, tokens)
        found = {}
        for ids, firsts, row in windows:
            assert len(ids) == len(firsts) <= max_length
            for piece, word in zip(ids, firsts, strict=True):
                if row == number and word >= 0:
                    assert word not in found, "a token is tagged once"
                    found[word] = piece
        assert found == {word: pieces[0] for word, pieces in enumerate(expected) if pieces}
        shared = sum(len(ids) - 2 for ids, _, row in windows if row == number) - sum(map(len, expected))
        count = sum(row == number for _, _, row in windows)
        assert shared == (count - 1) * min(stride, (max_length - 2) // 2)


def test_windows_come_in_order_whatever_the_tokenizer_truncates(tiny_bert):
    task = make_task(tiny_bert, AutoTokenizer.from_pretrained(tiny_bert, truncation_side="left"), max_length=8)
    features = task.features({"tokens": [WORDS[:20]]}, [0], False)
    firsts = [word for first in features["first_piece_of"] for word in first if word >= 0]
    assert firsts == list(range(20)) and len(features["row"]) > 2


def test_pieces_are_those_of_running_text(bytes_tokenizer):
    """Words that are tokenized one by one lose the space between them: `the` and `weather` become `theweather`."""
    task = make_task("unused", bytes_tokenizer)
    tokens = SENTENCES[0]
    features = task.features({"tokens": [tokens]}, [0], False)
    assert features["input_ids"][0] == bytes_tokenizer(" ".join(tokens)).input_ids
    assert "Ġweather" in bytes_tokenizer.convert_ids_to_tokens(features["input_ids"][0])
    for i, token in enumerate(tokens):
        # The pieces from the first one of a token to the first one of the next give the token.
        firsts = features["first_piece_of"][0]
        end = firsts.index(i + 1) if i + 1 < len(tokens) else len(firsts) - 1
        assert bytes_tokenizer.decode(features["input_ids"][0][firsts.index(i) : end]).strip() == token


def test_tokens_that_the_tokenizer_drops(minilm):
    made = make_recipe(minilm, labels=["B-X", "I-X", "O"])
    task = TASK_CLASSES[made.task](made, AutoTokenizer.from_pretrained(minilm))
    model = load_base(made, task)[0].eval()
    tokens = ["\u200d", "Seoul", "", "in", "\u200b\u00ad"]
    kept = answer_rows(task, model, {"tokens": [["Seoul", "in"]]}, 4, torch.device("cpu"))[0]["prediction"]
    assert answer_rows(task, model, {"tokens": [tokens, ["\u200d"]]}, 1, torch.device("cpu")) == [
        {"prediction": ["O", kept[0], "O", kept[1], "O"]},
        {"prediction": ["O"]},
    ]


def run(base, rows, tmp_path, **changes) -> dict:
    """Train on rows of `rows`, and return the answers of plain forwards, sentence by sentence."""
    files = {
        name: write_rows(tmp_path / f"{name}.jsonl", rows(count, seed))
        for name, count, seed in (("train", 48, 0), ("validation", 15, 1))
    }
    results = train(make_recipe(base, tmp_path / "out", files, **{"num_train_epochs": 10, **changes}))
    labels = load_recipe(tmp_path / "out" / "recipe.yaml").labels
    model = AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "out", num_labels=len(labels)).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    validation, logits = rows(15, 1), []
    for row in validation:
        encoded = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")
        with torch.no_grad():
            logits.append(model(**encoded).logits[0, 1:-1])  # one piece for each word
    true = [row["tags"] for row in validation]
    targets = torch.tensor([labels.index(tag) for tags in true for tag in tags])
    return {
        "found": results["validation"],
        "metric": results["metric"],
        "labels": labels,
        "true": true,
        "guess": [[labels[i] for i in each.argmax(-1).tolist()] for each in logits],
        "loss": cross_entropy(torch.cat(logits), targets).item(),
    }


def flat(tags: list[list[str]]) -> list[str]:
    return [tag for each in tags for tag in each]


def loss_of_guessing(tags: list[list[str]]) -> float:
    """The entropy of the tags: the lowest loss without reading the tokens."""
    counts = torch.tensor(list(Counter(flat(tags)).values())).float()
    return torch.distributions.Categorical(counts).entropy().item()


def test_entities(tiny_bert, tmp_path):
    got = run(tiny_bert, entity_rows, tmp_path, eval_batch_size=4)
    assert got["labels"] == ["B-X", "I-X", "O"] and got["metric"] == "f1"
    expected = {
        "loss": got["loss"],
        "accuracy": accuracy_score(flat(got["true"]), flat(got["guess"])),
        "precision": seqeval.precision_score(got["true"], got["guess"]),
        "recall": seqeval.recall_score(got["true"], got["guess"]),
        "f1": seqeval.f1_score(got["true"], got["guess"]),
    }
    assert got["found"] == pytest.approx(expected, abs=1e-5)
    assert 0.3 < got["found"]["f1"] != got["found"]["accuracy"]
    assert got["loss"] < 0.8 * loss_of_guessing(got["true"])


def test_parts_of_speech(tiny_bert, tmp_path):
    got = run(tiny_bert, part_rows, tmp_path, num_train_epochs=6)
    assert got["labels"] == ["N", "V"] and got["metric"] == "accuracy"
    true, guess = flat(got["true"]), flat(got["guess"])
    expected = {
        "loss": got["loss"],
        "accuracy": accuracy_score(true, guess),
        "f1_macro": f1_score(true, guess, average="macro"),
    }
    assert got["found"] == pytest.approx(expected, abs=1e-5)
    assert got["loss"] < 0.8 * loss_of_guessing(got["true"])


def test_the_same_answer_for_every_row(tiny_bert):
    entities, parts = entity_rows(30, 1), part_rows(30, 1)
    tags = [tag for row in entities for tag in row["tags"]]
    task = make_task(tiny_bert, labels=["O", "B-X", "I-X"])
    found = task.metrics(task.constant_answers(entities), [row["tags"] for row in entities])
    assert found == {"accuracy": tags.count("O") / len(tags), "precision": 0.0, "recall": 0.0, "f1": 0.0}
    tags = [tag for row in parts for tag in row["tags"]]
    task = make_task(tiny_bert, labels=["N", "V"])
    found = task.metrics(task.constant_answers(parts), [row["tags"] for row in parts])
    assert found["accuracy"] == tags.count("N") / len(tags) > 0.5


def test_tags_that_are_numbers(tiny_bert, tmp_path):
    def rows(count, seed):
        return [{**row, "tags": [{"N": 10, "V": 9}[tag] for tag in row["tags"]]} for row in part_rows(count, seed)]

    got = run(tiny_bert, rows, tmp_path, num_train_epochs=1)
    assert got["labels"] == [9, 10]
    assert got["found"]["accuracy"] == accuracy_score(flat(got["true"]), flat(got["guess"]))


def test_the_loss_of_long_sentences(tiny_bert):
    """A window counts by its own tokens. A window with only later pieces of an earlier token counts nothing."""
    made = make_recipe(tiny_bert, max_length=8, labels=["N", "V"], task_kwargs={"stride": 0})
    task = TASK_CLASSES[made.task](made, AutoTokenizer.from_pretrained(tiny_bert))
    model = wrap(made, task, *load_base(made, task)).eval()
    randomize(model)
    rows = [{"tokens": [f"w{i % 80}" for i in range(start, start + n)]} for start, n in ((0, 3), (7, 23), (30, 1))]
    # One token has 9 pieces, so the second window has no token of its own.
    rows.append({"tokens": ["w1", " ".join(WORDS[:9])]})
    rows = [{**row, "tags": ["N" if i % 3 else "V" for i in range(len(row["tokens"]))]} for row in rows]
    losses, predictions = [], []
    for row in rows:
        pieces = [(i, piece) for i, token in enumerate(row["tokens"]) for piece in token.split()]
        own = []
        for start in range(0, len(pieces), 6):
            window = pieces[start : start + 6]
            ids = task.tokenizer(" ".join(piece for _, piece in window), return_tensors="pt")
            with torch.no_grad():
                logits = model(**ids).logits[0, 1:-1]
            for place, (i, _) in enumerate(window):
                if i == len(own):  # its first piece
                    target = torch.tensor(task.labels.index(row["tags"][i]))
                    losses.append(cross_entropy(logits[place], target))
                    own.append(task.labels[logits[place].argmax()])
        predictions.append(own)
    for batch_size in (1, 2, 32):
        found, answers = evaluate(task, model, Dataset.from_list(rows), batch_size, Accelerator(cpu=True))
        assert found["loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)
        assert [answer["prediction"] for answer in answers] == predictions


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_the_gradient_is_that_of_the_mean_over_all_tokens(tiny_bert, tmp_path, monkeypatch, parts):
    """The loss does not depend on how a batch of unequal sentences is divided."""
    rows, got = entity_rows(20, 3), {}
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = {"train": path, "validation": path}
    adapter = {"num_virtual_tokens": 4, "prefix_dropout": 0.0}
    settings = {"adapter": adapter, "max_steps": 1, "max_grad_norm": 0.0, "logging_steps": 1}
    original = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        for group in self.param_groups:
            got.setdefault(group["name"], [parameter.grad.clone() for parameter in group["params"]])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    made = make_recipe(tiny_bert, tmp_path / "out", data, gradient_accumulation_steps=parts, **settings)
    train(made)
    monkeypatch.undo()

    made = load_recipe(tmp_path / "out" / "recipe.yaml")  # with the labels
    set_seed(made.seed)
    task = TASK_CLASSES[made.task](made, AutoTokenizer.from_pretrained(tiny_bert))
    model = wrap(made, task, *load_base(made, task))
    batch = [rows[i] for i in Batches(20, 8, made.seed)[0]]
    lengths = {len(row["tokens"]) for row in batch}
    assert len(lengths) > 2
    total = torch.zeros(())
    for row in batch:
        logits = model(**task.tokenizer(" ".join(row["tokens"]), return_tensors="pt")).logits[0, 1:-1]
        total = total + cross_entropy(
            logits, torch.tensor([made.labels.index(t) for t in row["tags"]]), reduction="sum"
        )
    loss = total / sum(len(row["tokens"]) for row in batch)
    loss.backward()
    expected = {"adapter": [], "head": []}
    for name, parameter in trained_parameters(model).items():
        expected["head" if "modules_to_save" in name else "adapter"].append(parameter.grad)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
    line = next(each for each in read_log(tmp_path / "out") if each["split"] == "train")
    assert line["loss"] == pytest.approx(loss.item(), abs=1e-5)


def read_log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("tags", "labels"),
    [
        (["O", "B-X"], ["B-X", "I-X", "O"]),
        (["O", "I-X"], ["B-X", "I-X", "O"]),
        (["B-X", "I-Y", "O"], ["B-X", "B-Y", "I-X", "I-Y", "O"]),
        (["NOUN", "VERB"], ["NOUN", "VERB"]),
        ([10, 9, 100], [9, 10, 100]),
    ],
)
def test_labels(tiny_bert, tags, labels):
    task = make_task(tiny_bert)
    rows = Dataset.from_list([{"tokens": ["w1"] * len(tags), "tags": tags}] * 2)
    task.learn_labels(rows, "rows")
    assert task.labels == labels
    assert task.default_metric == ("f1" if "O" in labels else "accuracy")


GOOD = [{"tokens": ["w1", "w2"], "tags": ["O", "B-X"]}] * 5


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"tokens": None}, r"row 6: 'tokens' must be a list of strings, got None"),
        ({"tokens": "w1 w2"}, r"row 6: 'tokens' must be a list of strings, got 'w1 w2'"),
        ({"tokens": ["w1", None]}, r"row 6: 'tokens' must be a list of strings, got \['w1', None\]"),
        ({"tokens": ["w1", 2]}, r"row 6: 'tokens' must be a list of strings, got \['w1', 2\]"),
        ({"tokens": [], "tags": []}, r"row 6: 'tokens' is empty"),
        ({"tags": ["O"]}, r"row 6: there are 2 tokens and 1 tags"),
        ({"tags": None}, r"row 6: there are 2 tokens and None tags"),
        ({"tags": ["O", None]}, r"row 6: a tag in 'tags' is missing"),
        ({"tags": ["O", 1]}, r"row 6: the label 1 is a int; labels must be strings in all rows"),
    ],
)
def test_bad_rows_are_an_error_before_training(tiny_bert, tmp_path, row, said):
    path = write_rows(tmp_path / "rows.jsonl", [*GOOD, {**GOOD[0], **row}, *GOOD])
    with pytest.raises(DataError, match=said) as error:
        train(make_recipe(tiny_bert, tmp_path / "out", {"train": path}))
    assert str(error.value).startswith(path)
    assert not (tmp_path / "out").exists()


def test_bad_tags(tiny_bert, tmp_path):
    good = write_rows(tmp_path / "good.jsonl", GOOD)
    other = write_rows(tmp_path / "other.jsonl", [*GOOD, {"tokens": ["w1"], "tags": ["B-Y"]}])
    with pytest.raises(
        DataError, match=r"other.jsonl, row 6: the label 'B-Y' is not among the labels of the training rows"
    ):
        train(make_recipe(tiny_bert, tmp_path / "out", {"train": good, "validation": other}))
    alike = write_rows(tmp_path / "alike.jsonl", [{"tokens": ["w1", "w2"], "tags": ["O", "O"]}] * 5)
    with pytest.raises(DataError, match=r"alike.jsonl: all tokens have the same tag, \{'O'\}"):
        train(make_recipe(tiny_bert, tmp_path / "out", {"train": alike}))
    nothing = write_rows(tmp_path / "nothing.jsonl", [{"tokens": ["", ""], "tags": ["O", "B-X"]}] * 5)
    with pytest.raises(DataError, match="No training row contributes to the loss"):
        train(make_recipe(tiny_bert, tmp_path / "nothing", {"train": nothing}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_length": 2}, r"`max_length` must be above 2, the number of special tokens, got 2"),
        ({"task_kwargs": {"stride": -1}}, r"`task_kwargs.stride` must be an integer of at least 0, got -1"),
        ({"task_kwargs": {"stride": 0.5}}, r"`task_kwargs.stride` must be an integer of at least 0, got 0.5"),
    ],
)
def test_bad_settings(tiny_bert, changes, said):
    with pytest.raises(RecipeError, match=said):
        make_task(tiny_bert, **changes)


@pytest.mark.parametrize("name", ["ud-ewt-pos", "wnut17-ner"])
def test_real_sentences(minilm, shared, tmp_path, name):
    """All real sentences pass the checks, and each token gets one tag."""
    folder = shared / "data" / name
    made = make_recipe(minilm, tmp_path / "out", {"train": str(folder / "dev.jsonl.gz")}, max_length=24)
    task = TASK_CLASSES[made.task](made, AutoTokenizer.from_pretrained(minilm))
    rows = load_splits(made, task)["train"]
    features = task.features(rows[:], list(range(len(rows))), True)
    assert len(features["row"]) > len(rows)
    tagged = [[] for _ in range(len(rows))]
    for row, firsts in zip(features["row"], features["first_piece_of"], strict=True):
        tagged[row] += [word for word in firsts if word >= 0]
    for tokens, words in zip(rows["tokens"], tagged, strict=True):
        pieces = by_word_ids(task.tokenizer, tokens)
        assert words == [i for i in range(len(tokens)) if pieces[i]]
