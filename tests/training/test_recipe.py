"""Recipes: those of the package, and the errors for bad ones."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from conftest import WORDS
from datasets import ClassLabel, Dataset, Features, List, Value
from jsonargparse import ArgumentError, ArgumentParser
from transformers import AutoTokenizer

from prefix_adapter import PrefixTuningV2Config, PTuningConfig
from prefix_adapter.templates import Field, Mask, Template, Text
from prefix_adapter.training import Data, Recipe, RecipeError, load_recipe, recipe_names, train
from prefix_adapter.training.model import adapter_configs, learning_rates, load_base, new_scheduler, wrap
from prefix_adapter.training.recipe import TASKS, add_recipe_arguments, recipe_from, recipe_path
from prefix_adapter.training.tasks import TASK_CLASSES

WITH_LORA = ["sequence-classification-lora", "question-answering-lora"]
# Transcribed from https://github.com/THUDM/P-tuning, PT-Fewshot/data_utils/task_pvps.py: the text with a word and with
# one virtual token (`the` there), for the fields A, B and C, and the words in the order of the labels.
CLOZE = {
    "cloze-rte": ("A Question: B? <p> Answer: Yes.", {"entailment": "Yes", "not_entailment": "No"}),
    "cloze-boolq": ("A. <p> Question: B? Answer: Yes.", {"False": "No", "True": "Yes"}),
    "cloze-cb": (
        "A [SEP] B? <p> answer: Yes",
        {"entailment": "Yes", "contradiction": "No", "neutral": "Maybe"},
    ),
    "cloze-wic": ("A [SEP] B <p> *C *? Yes", {"False": "No", "True": "Yes"}),
}
KLUE_CLOZE, PTUNING, LAMA, BOTH = "klue-nli-cloze", "cloze-ptuning", "lama", "cloze-both"
# Transcribed from the run scripts of https://github.com/THUDM/P-tuning-v2: length, rate, epochs, batch, dropout.
PUBLISHED = {
    "bert-large-boolq": (40, 5e-3, 100, 32, 0.1),
    "bert-large-copa": (16, 1e-2, 80, 16, 0.1),
    "bert-large-rte": (20, 1e-2, 60, 32, 0.1),
    "bert-large-wic": (20, 1e-4, 80, 16, 0.1),
    "bert-large-wsc": (20, 5e-3, 80, 16, 0.1),
    "bert-large-conll04": (128, 2e-2, 40, 32, 0.2),
    "bert-large-ontonotes": (16, 1e-2, 30, 16, 0.1),
    "roberta-large-boolq": (8, 7e-3, 100, 32, 0.1),
    "roberta-large-copa": (8, 9e-3, 120, 16, 0.1),
    "roberta-large-rte": (128, 5e-3, 100, 32, 0.1),
    "roberta-large-wic": (8, 1e-2, 50, 32, 0.1),
    "roberta-large-wsc": (8, 1e-2, 10, 16, 0.1),
    "roberta-large-conll03": (11, 3e-2, 30, 16, 0.1),
    "roberta-large-conll04": (144, 6e-2, 80, 32, 0.1),
    "roberta-large-ontonotes": (48, 7e-3, 60, 16, 0.1),
    "roberta-large-conll05": (224, 6e-3, 15, 16, 0.1),
    "roberta-large-conll12": (64, 5e-3, 45, 32, 0.1),
    "roberta-large-squad": (16, 5e-3, 30, 8, 0.2),
    "roberta-large-squad2": (8, 5e-3, 10, 8, 0.2),
}
# Transcribed from https://github.com/kobongsoo/BERT/tree/master/p-tuning: prefix length, width of the MLP, accuracy.
KLUE_NLI = {
    "klue-nli-full": (None, None, "0.743"),
    "klue-nli-prefix-20": (20, None, "0.531"),
    "klue-nli-prefix-20-mlp": (20, 512, "0.692"),
    "klue-nli-prefix-100": (100, None, "0.548"),
    "klue-nli-prefix-100-mlp": (100, 512, "0.695"),
    "klue-nli-prefix-200-mlp": (200, 512, "0.694"),
    "klue-nli-prefix-200-mlp-768": (200, 768, "0.698"),
}
DOCUMENTATION = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
KINDS = {
    "causal-lm": "gpt2",
    "chat": "gpt2",
    "distil": "gpt2",
    "seq2seq-lm": "t5",
    "cloze": "gpt2",
    "fill-mask": "gpt2",
    "lama": "bert",
}
# Of recipes that leave the rate to the adapter and the model.
OWN_RATES = {
    "sequence-classification": 3e-2,
    "sequence-classification-lora": 3e-2,
    "token-classification": 1e-1,
    "question-answering": 3e-2,
    "question-answering-lora": 3e-2,
    "multiple-choice": 3e-2,
    "causal-lm": 1e-1,
    "chat": 1e-1,
}
CLOZE_WORDS = ["Yes", "No", "Maybe", "예", "아니요", "아마"]
BASE = "task: sequence-classification\nmodel: m\noutput_dir: o\n"


def comment_of(name: str) -> str:
    lines = Path(recipe_path(name)).read_text(encoding="utf-8").splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def without_what_is_learnt(saved: Recipe, recipe: Recipe) -> Recipe:
    """A saved recipe, with the values of the given recipe instead of those inferred from the rows."""
    return saved.with_values({"labels": recipe.labels, "task_kwargs": recipe.task_kwargs})


@pytest.fixture
def recipe_file(tmp_path):
    def write(text: str, start: str = BASE) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(start + text, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    found = {kind: tiny.save(folder / kind, kind, [*WORDS, *CLOZE_WORDS]) for kind in ("bert", "gpt2", "t5")}
    found["wide gpt2"] = tiny.save(folder / "wide-gpt2", "gpt2", WORDS, n_embd=600)
    found["wide bert"] = tiny.save(folder / "wide-bert", "bert", WORDS, hidden_size=600)
    tokenizer = AutoTokenizer.from_pretrained(found["gpt2"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"  # for the task chat
    tokenizer.save_pretrained(found["gpt2"])
    return found


def test_names_of_the_recipes():
    assert set(recipe_names()) == {
        *(*PUBLISHED, *KLUE_NLI, *TASKS, *WITH_LORA, *CLOZE, KLUE_CLOZE, PTUNING, LAMA, BOTH)
    }


@pytest.mark.parametrize("name", recipe_names())
def test_each_recipe_can_be_used(name, bases):
    recipe = load_recipe(name)
    assert Path(recipe.output_dir) == Path("runs") / name
    recipe.model = bases[KINDS.get(name if recipe.task in ("cloze", "fill-mask") else recipe.task, "bert")]
    task = TASK_CLASSES[recipe.task](recipe, AutoTokenizer.from_pretrained(recipe.model))
    assert task.max_length == recipe.max_length
    assert set(recipe.data.columns) <= {*task.columns, *task.optional_columns, task.target}
    config, *more = adapter_configs(recipe, task) or [None]
    assert [type(each) for each in more] == ([PTuningConfig] if name == BOTH else [])
    if recipe.adapter["peft_type"] == "FULL":
        assert config is None
    elif name in (PTUNING, LAMA):
        assert isinstance(config, PTuningConfig) and config.num_virtual_tokens == 9
    else:
        assert isinstance(config, PrefixTuningV2Config)
        assert config.to_dict().items() >= recipe.adapter.items()
        # The published recipes start like the authors' code. A table beside a new head starts where it learned more.
        assert config.init_std == (0.5 if name in [*TASKS, *WITH_LORA] and task.has_head else 0.02)
    if name in [*TASKS, *WITH_LORA] and task.has_head:  # so another adapter or model gets its own
        assert recipe.learning_rate is recipe.head_learning_rate is None
    if name in TASKS:
        recipe.adapter |= {"prefix_projection": True, "num_frozen_tokens": 0}
        assert adapter_configs(recipe, task)[0].init_std == 0.02
    # The first step uses the rate, and the last step a lower one.
    parameter = torch.nn.Parameter(torch.zeros(1))
    rate = recipe.learning_rate or OWN_RATES[name]
    optimizer = torch.optim.SGD([parameter], lr=rate)
    scheduler = new_scheduler(recipe, optimizer, 100, 10)
    for _ in range(100):
        optimizer.step()
        scheduler.step()
    assert 0 <= scheduler.get_last_lr()[0] < rate


@pytest.mark.parametrize(
    ("name", "kind", "adapter", "rates"),
    [
        ("sequence-classification", "bert", {}, [3e-2, 2e-2]),
        ("sequence-classification-lora", "bert", {}, [3e-2, 2e-2]),
        ("question-answering", "bert", {}, [3e-2, 2e-2]),
        ("question-answering", "gpt2", {}, [1e-2, 2e-2]),
        ("question-answering", "bert", {"peft_type": "LORA"}, [2e-3, 2e-2]),
        ("multiple-choice", "bert", {}, [3e-2, 2e-2]),
        ("token-classification", "bert", {}, [1e-1, 2e-2]),
        ("token-classification", "gpt2", {}, [1e-2, 2e-2]),
        ("token-classification", "bert", {"prefix_projection": True}, [1e-3, 2e-2]),
        ("token-classification", "bert", {"num_virtual_tokens": 100}, [3e-2, 2e-2]),
        ("causal-lm", "gpt2", {"num_virtual_tokens": 100}, [3e-2, 2e-2]),
        ("sequence-classification", "gpt2", {}, [1e-2, 2e-2]),
        ("sequence-classification", "wide bert", {}, [3e-2, 2e-2]),
        ("sequence-classification", "wide bert", {"peft_type": "LORA"}, [2e-3, 2e-2]),
        ("sequence-classification", "wide gpt2", {}, [1e-2, 5e-3]),
        ("sequence-classification", "wide gpt2", {"prefix_projection": True}, [1e-3, 5e-3]),
        ("sequence-classification", "wide gpt2", {"peft_type": "LORA"}, [2e-3, 5e-3]),
        ("sequence-classification", "wide gpt2", {"peft_type": "FULL"}, [3e-5, 3e-5]),
        ("token-classification", "wide gpt2", {}, [1e-2, 5e-3]),
        ("causal-lm", "gpt2", {}, [1e-1, 2e-2]),
        ("chat", "gpt2", {}, [1e-1, 2e-2]),
        ("distil", "gpt2", {}, [3e-2, 2e-2]),
        ("distil", "gpt2", {"num_virtual_tokens": 20}, [1e-1, 2e-2]),
        ("cloze", "gpt2", {}, [3e-2, 2e-2]),
        ("seq2seq-lm", "t5", {}, [3e-2, 2e-2]),
        ("causal-lm", "gpt2", {"peft_type": "LORA"}, [2e-3, 2e-2]),
        ("causal-lm", "gpt2", {"prefix_projection": True}, [1e-3, 2e-2]),
        ("sequence-classification", "bert", {"peft_type": "LORA"}, [2e-3, 2e-2]),
        ("sequence-classification", "bert", {"peft_type": "FULL"}, [3e-5, 3e-5]),
    ],
)
def test_a_rate_that_a_recipe_leaves_out_follows_adapter_and_model(bases, name, kind, adapter, rates):
    recipe = load_recipe(name, model=bases[kind], labels=["a", "b"] if "classification" in name else None)
    if name in OWN_RATES:
        assert recipe.learning_rate is recipe.head_learning_rate is None
    recipe.learning_rate = None
    if adapter.get("peft_type"):
        recipe.adapter = adapter
    recipe.adapter |= adapter
    task = TASK_CLASSES[recipe.task](recipe, AutoTokenizer.from_pretrained(recipe.model))
    assert learning_rates(recipe, wrap(recipe, task, *load_base(recipe, task))) == rates


def test_lama():
    """Transcribed from https://github.com/THUDM/P-tuning: the query of p_tuning/modeling.py, the options of cli.py."""
    recipe = load_recipe(LAMA)
    pieces = [getattr(piece, "index", piece) for piece in Template(recipe.task_kwargs["template"]).pieces]
    assert pieces == [0, 1, 2, Mask(), 3, 4, 5, Text(" "), Field("sub_label"), 6, 7, 8]
    assert recipe.data.columns == {"label": "obj_label"} and recipe.lr_scheduler_kwargs == {"gamma": 0.98}
    options = (recipe.learning_rate, recipe.weight_decay, recipe.batch_size, recipe.early_stopping_patience)
    assert (*options, recipe.num_train_epochs, recipe.seed) == (1e-5, 5e-4, 8, 20, 100, 34)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    recipe = load_recipe(name)
    length, rate, epochs, batch, dropout = PUBLISHED[name]
    assert recipe.adapter["num_virtual_tokens"] == length
    assert (recipe.learning_rate, recipe.head_learning_rate) == (rate, rate)
    assert (recipe.num_train_epochs, recipe.batch_size) == (epochs, batch)
    # The original has one dropout setting for the layers (0.1), the head and the prefix.
    assert recipe.adapter["prefix_dropout"] == recipe.model_kwargs.get("hidden_dropout_prob", 0.1) == dropout
    assert recipe.adapter["shift_positions"] is True
    assert recipe.adapter.get("encoder_hidden_size") == (512 if name == "bert-large-wic" else None)
    assert recipe.adapter.get("prefix_projection", False) == (name == "bert-large-wic")
    decays = recipe.task in ("token-classification", "question-answering")
    assert recipe.lr_scheduler_type == ("exponential" if decays else "linear")
    assert recipe.lr_scheduler_kwargs == ({"gamma": 0.95} if decays else {})
    assert (recipe.warmup_ratio, recipe.weight_decay, recipe.max_grad_norm) == (0, 0, 1)
    lengths = {"roberta-large-conll03": 152, "roberta-large-squad": 384, "roberta-large-squad2": 384}
    assert recipe.max_length == lengths.get(name, 128)
    size, _, corpus = name.rpartition("-")
    cased = "uncased" if corpus in ("conll04", "ontonotes") else "cased"
    assert recipe.model == ("roberta-large" if size == "roberta-large" else f"bert-large-{cased}")
    script = {"squad2": "squad_v2"}.get(corpus, corpus)
    assert f"run_script/run_{script}_{size.removesuffix('-large')}.sh" in comment_of(name)
    assert "arXiv:2110.07602" in comment_of(name)


@pytest.mark.parametrize("name", CLOZE)
def test_cloze_recipes_have_the_published_templates(name):
    recipe = load_recipe(name)
    text, words = CLOZE[name]
    assert recipe.task_kwargs["verbalizer"] == words
    for given, expected in (
        (re.search(r"#   (\{.*)", Path(recipe_path(name)).read_text())[1], text),
        (recipe.task_kwargs["template"], text.replace(" <p>", "")),
    ):
        letters = iter("ABC")
        fields = {field: next(letters) for field in Template(given).fields}
        for field, letter in (*fields.items(), ("mask", "Yes"), ("sep", "[SEP]"), ("p", "<p>")):
            given = re.sub(rf"\{{{field}(:\w+)?\}}", letter, given)
        assert given == expected
    assert (recipe.data.max_train_rows, recipe.data.max_validation_rows, recipe.max_length) == (32, 32, 256)
    assert "arXiv:2103.10385" in comment_of(name) and "This project has not run it." in comment_of(name)


@pytest.mark.parametrize("name", KLUE_NLI)
def test_klue_nli_settings(name):
    recipe = load_recipe(name)
    length, width, accuracy = KLUE_NLI[name]
    assert (recipe.model, recipe.task) == ("bert-base-multilingual-cased", "sequence-classification")
    assert (recipe.num_train_epochs, recipe.batch_size, recipe.max_length) == (50, 32, 128)
    assert (recipe.learning_rate, recipe.head_learning_rate) == (3e-5, 3e-5)
    assert (recipe.data.path, recipe.data.name) == ("klue/klue", "nli")
    assert recipe.data.columns == {"text": "premise", "text_pair": "hypothesis"}
    assert (recipe.adapter["peft_type"] == "FULL") == (length is None)
    assert recipe.adapter.get("num_virtual_tokens") == length
    assert recipe.adapter.get("prefix_projection", False) == (width is not None)
    assert recipe.adapter.get("encoder_hidden_size") == width
    assert f"Accuracy reported there: {accuracy}." in comment_of(name)


@pytest.mark.parametrize("name", TASKS)
def test_default_settings(name):
    recipe = load_recipe(name)
    assert recipe.task == name
    assert "shift_positions" not in recipe.adapter
    assert recipe.data == Data(train="train.jsonl")


@pytest.mark.parametrize("name", WITH_LORA)
def test_a_recipe_with_low_rank_matrices_differs_in_the_adapter_alone(name):
    plain, ours = load_recipe(name.removesuffix("-lora")), load_recipe(name)
    assert ours.adapter == {**plain.adapter, "num_virtual_tokens": 10, "lora_r": 2}
    assert replace(ours, adapter=plain.adapter, output_dir=plain.output_dir) == plain


def test_each_recipe_is_in_the_documentation():
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in DOCUMENTATION.splitlines()]
    documented = {row[0].strip("`"): row for row in rows if len(row) > 4 and row[0].startswith("`")}
    assert set(documented) == set(recipe_names())
    for name, (_, model, length, rate, epochs, batch, *_) in documented.items():
        recipe = load_recipe(name)
        assert model == recipe.model
        assert length == str(recipe.adapter.get("num_virtual_tokens", "none")), name
        assert float(rate) == (recipe.learning_rate or OWN_RATES[name]), name
        assert (float(epochs), int(batch)) == (recipe.num_train_epochs, recipe.batch_size), name


def test_the_documentation_s_examples(recipe_file):
    blocks = re.findall(r"```yaml\n(.*?)```", DOCUMENTATION, re.DOTALL)
    assert len(blocks) > 2
    for block in blocks:
        recipe = load_recipe(recipe_file(block, start=""))
        assert recipe.to_dict().items() >= {key: yaml.safe_load(block)[key] for key in ("task", "model")}.items()


def test_hidden_dropout_of_the_base(bases):
    """The `model_kwargs` of the recipes for SQuAD reach the layers of the base model."""
    recipe = load_recipe("roberta-large-squad2", model=bases["bert"], **{"adapter.num_virtual_tokens": 3})
    task = TASK_CLASSES[recipe.task](recipe, AutoTokenizer.from_pretrained(recipe.model))
    model = wrap(recipe, task, *load_base(recipe, task))
    rates = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    hidden = {name: rate for name, rate in rates.items() if "attention.self" not in name}
    assert len(hidden) > 3 and set(hidden.values()) == {0.2}


def test_a_default_recipe_trains(tiny_bert, topics, tmp_path):
    out = tmp_path / "out"
    files = {"data.train": topics["train"], "data.validation": Path(topics["validation"])}
    recipe = load_recipe("sequence-classification", model=tiny_bert, output_dir=out, max_steps=2, **files)
    results = train(recipe)
    assert results["steps"] == 2
    saved = load_recipe(out / "recipe.yaml")
    assert saved.labels == ["a", "b"]
    assert without_what_is_learnt(saved, recipe) == recipe


_TEXT = Value("string")
_NLI = {"premise": _TEXT, "hypothesis": _TEXT}
_SQUAD = {"context": _TEXT, "question": _TEXT, "answers": {"text": List(_TEXT), "answer_start": List(Value("int32"))}}
# The columns of the Hub's data sets that the recipes read.
HUB = {
    "bert-large-boolq": {"question": _TEXT, "passage": _TEXT, "label": ClassLabel(names=["False", "True"])},
    "bert-large-rte": {**_NLI, "label": ClassLabel(names=["entailment", "not_entailment"])},
    "bert-large-copa": {
        **dict.fromkeys(("premise", "choice1", "choice2", "question"), _TEXT),
        "label": ClassLabel(names=["choice1", "choice2"]),
    },
    "roberta-large-squad": _SQUAD,
    "roberta-large-squad2": _SQUAD,
    "klue-nli-full": {**_NLI, "label": ClassLabel(names=["entailment", "neutral", "contradiction"])},
    "klue-nli-prefix-20-mlp": {**_NLI, "label": ClassLabel(names=["entailment", "neutral", "contradiction"])},
}


@pytest.mark.parametrize("name", HUB)
def test_rows_as_on_the_hub(name, bases, tmp_path):
    """The recipes for data sets of the Hub take rows like theirs, and train."""
    rows = [
        {column: f"{WORDS[i]} {WORDS[(3 * i + 1) % 20]}" for column, kind in HUB[name].items() if kind == _TEXT}
        for i in range(24)
    ]
    for i, row in enumerate(rows):
        if "answers" in HUB[name]:
            none = name == "roberta-large-squad2" and i % 2
            row["answers"] = {"text": [], "answer_start": []} if none else {"text": [WORDS[i]], "answer_start": [0]}
        else:
            row["label"] = i % HUB[name]["label"].num_classes
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "validation"):
        Dataset.from_list(rows, features=Features(HUB[name])).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    place = {"data.path": folder, "data.name": None, "model": bases["bert"], "output_dir": tmp_path / "out"}
    length = {"adapter.num_virtual_tokens": 5} if "num_virtual_tokens" in load_recipe(name).adapter else {}
    recipe = load_recipe(name, **place, **length, max_steps=2, max_length=24)
    results = train(recipe)
    assert results["rows"] == {"train": 24, "validation": 24}
    assert ("no_answer_f1" in results["validation"]) == (name == "roberta-large-squad2")
    saved = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert without_what_is_learnt(saved, recipe) == recipe
    if saved.labels is not None:
        assert set(saved.labels) == set(HUB[name]["label"].names)


@pytest.mark.parametrize("name", recipe_names())
def test_saved_and_read_again(name, tmp_path):
    recipe = load_recipe(name)
    recipe.save(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml").to_dict() == recipe.to_dict()


TEXTS = [
    *("no", "yes", "true", "null", "~", "", "1", "1e5", "1e-3", "1.0", "0x10", "3:25", "=", "2020-01-01"),
    *("a: b", "{a}", "[1, 2]", "#", "- a", "'", '"', "가나다", "é\u2028", "😀", "two\nlines\t", " spaces "),
    "x" * 200 + ": " + "y" * 200,
]
VALUES = [5, 1e-05, 3e-5, 1e22, 0.1, True, None, [1, "1", 1.0], {"a": {"b": ["1e5"]}}]


@pytest.mark.parametrize("value", [*TEXTS, *VALUES])
def test_values_saved_and_read_again(value, tmp_path):
    settings = {"value": value, "list": [value], "inner": {"value": value}}
    recipe = Recipe("causal-lm", "m", "o", task_kwargs=settings, adapter=settings, model_kwargs=settings)
    if isinstance(value, str):
        recipe.labels, recipe.model, recipe.data = [value], value, Data(value, value, columns={value: value})
    if isinstance(value, float):
        recipe.learning_rate, recipe.weight_decay = value, value
    recipe.save(tmp_path / "saved.yaml")
    found = load_recipe(tmp_path / "saved.yaml").to_dict()
    assert found == recipe.to_dict()
    assert repr(found) == repr(recipe.to_dict())  # 1, 1.0 and True are equal
    if not isinstance(value, float):  # other readers follow an older rule of YAML, by which 1e22 is a text
        assert yaml.safe_load((tmp_path / "saved.yaml").read_text(encoding="utf-8")) == found


def test_numbers_and_dates(recipe_file):
    recipe = load_recipe(recipe_file("learning_rate: 5e-3\nweight_decay: 1\ndata: {name: 2020-01-01}\n"))
    assert (recipe.learning_rate, recipe.weight_decay, recipe.data.name) == (0.005, 1, "2020-01-01")
    assert recipe.adapter == {"peft_type": "PREFIX_TUNING_V2"}


def test_overrides(recipe_file):
    path = recipe_file("adapter: {peft_type: lora, r: 8}\ndata: {columns: {text: a, text_pair: b}, test: t}\n")
    assert load_recipe(path).adapter == {"peft_type": "LORA", "r": 8}
    overrides = {
        "adapter.r": 4,
        "data.columns.text": "z",
        "data.test": None,
        "data.train": "a b=c: 가.jsonl",
        "task_kwargs.inner.key": "1e5",
        "model": Path("x/y"),
        "labels": ["1", "no"],
        "mixed_precision": "no",
        "learning_rate": 1e-5,
    }
    recipe = load_recipe(path, **overrides)
    assert recipe.adapter == {"peft_type": "LORA", "r": 4}
    assert recipe.data == Data(train="a b=c: 가.jsonl", columns={"text": "z", "text_pair": "b"})
    assert recipe.task_kwargs == {"inner": {"key": "1e5"}}
    assert (recipe.model, recipe.labels, recipe.mixed_precision) == (str(Path("x/y")), ["1", "no"], "no")
    assert (recipe.learning_rate, recipe.output_dir) == (1e-5, "o")


def test_a_mapping_replaces_the_whole_mapping(recipe_file):
    path = recipe_file("adapter: {peft_type: lora, r: 8}\ndata: {columns: {text: a, text_pair: b}, test: t}\n")
    assert load_recipe(path, adapter={"peft_type": "FULL"}).adapter == {"peft_type": "FULL"}
    assert (
        load_recipe(path, data=Data(train="x")).data == load_recipe(path, data={"train": "x"}).data == Data(train="x")
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("foo", 1), ("data.foo", 1), ("model.x", 1), ("batch_size", "7"), ("model", None), ("data", 3), ("seed.x", 3)],
)
def test_a_bad_override_is_named(key, value, recipe_file):
    path = recipe_file("seed: 3\n")
    with pytest.raises(RecipeError, match=re.escape(f"{path}: `{key}`")):
        load_recipe(path, **{key: value})


BAD = {
    "foo: 1": "`foo`: there is no such key",
    "1: 1": "`1`: there is no such key",
    "data: {trian: a.jsonl}": "`data.trian`: there is no such key",
    "data: {trian: b.jsonl}": "shuffle_buffer. Did you mean train?",
    "learnin_rate: 1": "Did you mean learning_rate?",
    "data.train: a.jsonl": "`data.train`: there is no such key",
    "data: 3": "`data` must be a mapping, got 3",
    "data: [1]": "`data` must be a mapping, got [1]",
    "data:": "`data` must be a mapping, got None",
    "data: {train: null}": "`data.train` must be",
    "data: {train: 3}": "`data.train` must be",
    "data: {columns: [a]}": "`data.columns` must be",
    "data: {columns: {text: 3}}": "`data.columns` must be",
    "data: {max_train_rows: 0}": "`data.max_train_rows` must be at least 1",
    "data: {validation_fraction: 1}": "`data.validation_fraction` must be below 1",
    "adapter: [1]": "`adapter` must be",
    "adapter: lora": "`adapter` must be",
    "adapter:": "`adapter` must be",
    "adapter: {1: 2}": "`adapter` must be",
    "adapter: {peft_type: no}": "`adapter.peft_type` must be",
    "adapter: {peft_type: null}": "`adapter.peft_type` must be",
    "adapter: {r: 1, r: 2}": "`r` occurs twice",
    "model: other": "`model` occurs twice",
    "task_kwargs: [a, b]": "`task_kwargs` must be",
    "model_kwargs: {a: [{b: 1, b: 1}]}": "`b` occurs twice",
    "batch_size: x": "`batch_size` must be int, got 'x'",
    "batch_size: 8.0": "`batch_size` must be int, got 8.0",
    "batch_size: yes": "`batch_size` must be int, got True",
    "batch_size:": "`batch_size` must be int, got None",
    "batch_size: 0": "`batch_size` must be at least 1",
    "max_length: 0": "`max_length` must be at least 1",
    "seed: -1": "`seed` must be at least 0",
    "learning_rate: high": "`learning_rate` must be",
    "learning_rate: '1e-2'": "`learning_rate` must be",
    "learning_rate: .nan": "`learning_rate` must be a finite number",
    "learning_rate: .inf": "`learning_rate` must be a finite number",
    "learning_rate: 0": "`learning_rate` must be above 0",
    "warmup_ratio: 2": "`warmup_ratio` must be at most 1",
    "gradient_checkpointing: 1": "`gradient_checkpointing` must be bool",
    "report_to: tensorboard": "`report_to` must be",
    "mixed_precision: fp8": "`mixed_precision` must be",
    "mixed_precision: no": "put them in quotes",
    "labels: abc": "`labels` must be",
    "labels: [no, yes]": "got [False, True] (YAML reads no, yes, off and on as truth values: put them in quotes)",
    "labels: [1.5, 2.5]": "`labels` must be",
    "labels: [a, null]": "`labels` must be",
    "labels: [a, 1]": "`labels` must be all strings or all integers",
    "labels: [a, a]": "`labels` must be different",
    "labels: []": "`labels` must be different",
    "labels: {a: 1}": "`labels` must be",
    "adapter: {": "cannot be read",
    "\tseed: 3": "cannot be read",
    "seed: !!python/name:os.system": "cannot be read",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_value_is_named(line, recipe_file):
    path = recipe_file(line + "\n")
    with pytest.raises(RecipeError, match=re.escape(BAD[line])) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no recipe"),
        ("- task\n", "is no recipe"),
        ("task\n", "is no recipe"),
        ("seed: 3\n", "There must be a value for `task`, `model`, `output_dir`."),
        ("task: causal-lm\nmodel: m\n", "There must be a value for `output_dir`."),
        ("task: causal\nmodel: m\noutput_dir: o\n", "`task` must be Literal['sequence-classification', "),
        ("task: causal-lm\nmodel: null\noutput_dir: o\n", "`model` must be str, got None"),
        ("task: causal-lm\nmodel: 3\noutput_dir: o\n", "`model` must be str, got 3"),
    ],
)
def test_required_keys(text, message, recipe_file):
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(recipe_file(text, start=""))


def test_files_that_are_no_recipes(tmp_path):
    with pytest.raises(RecipeError, match=r"no file 'bert-large-bolq' and no recipe of that name; there are .*boolq"):
        load_recipe("bert-large-bolq")
    with pytest.raises(RecipeError, match="no file"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("model: é".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin.yaml cannot be read.*utf-8"):
        load_recipe(tmp_path / "latin.yaml")


def test_recipes_made_in_python_are_checked_too():
    recipe = Recipe("causal-lm", Path("m"), Path("o"), data=Data(train=Path("t.jsonl")), num_train_epochs=2)
    assert (recipe.model, recipe.output_dir, recipe.data.train) == ("m", "o", "t.jsonl")
    for key, value in (("model", 3), ("batch_size", "8"), ("labels", [True]), ("data", None), ("adapter", None)):
        with pytest.raises(RecipeError, match=f"`{key}` must be"):
            Recipe(**{"task": "causal-lm", "model": "m", "output_dir": "o", key: value})
    with pytest.raises(RecipeError, match=r"`data.num_proc` must be"):
        Data(num_proc="two")


@pytest.mark.parametrize("task", TASKS)
def test_an_unknown_setting_of_a_task_is_named(task, bases):
    base = bases[KINDS.get(task, "bert")]
    recipe = load_recipe(task, model=base, **{"task_kwargs.treshold": 0.3})
    known = TASK_CLASSES[task].settings
    with pytest.raises(RecipeError, match=r"`task_kwargs\.treshold`: ") as caught:
        TASK_CLASSES[task](recipe, AutoTokenizer.from_pretrained(base))
    assert all(name in str(caught.value) for name in known)


def parse(*arguments: str) -> Recipe:
    parser = ArgumentParser(exit_on_error=False)
    add_recipe_arguments(parser)
    return recipe_from(parser.parse_args(list(arguments)))


def test_on_the_command_line(recipe_file):
    options = {
        "output_dir": ("out", "out"),
        "data.train": ("a b.jsonl", "a b.jsonl"),
        "data.path": ("null", None),
        "data.columns": ("{text: question}", {"text": "question"}),
        "adapter.num_virtual_tokens": ("7", 7),
        "labels": ("[a, b]", ["a", "b"]),
        "mixed_precision": ("no", "no"),
        "learning_rate": ("2e-2", 0.02),
    }
    found = parse("--config", "bert-large-boolq", *(f"--{key}={text}" for key, (text, _) in options.items()))
    assert found == load_recipe("bert-large-boolq", **{key: value for key, (_, value) in options.items()})
    # Later options override, and a file may lack required keys.
    path = recipe_file("seed: 5\nlabels: ['1e5', 'no']\nmixed_precision: 'no'\n", start="model: m\noutput_dir: o\n")
    found = parse("--seed", "4", "--task", "causal-lm", "--config", str(path))
    assert (found.seed, found.labels, found.mixed_precision) == (5, ["1e5", "no"], "no")
    assert parse("--config", str(path), "--task", "causal-lm", "--seed", "4").seed == 4
    assert parse("--config", "bert-large-boolq", "--config", str(path)).num_train_epochs == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nonesuch"], "nonesuch"),
        (["--config", "bert-large-boolq", "--nonesuch", "3"], "nonesuch"),
        (["--config", "bert-large-boolq", "--data.nonesuch", "3"], "nonesuch"),
        (["--config", "bert-large-boolq", "--batch_size", "x"], "batch_size"),
        (["--config", "bert-large-boolq", "--batch_size", "0"], "batch_size"),
        (["--task", "causal-lm"], "model, output_dir"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises((ArgumentError, RecipeError), match=message):
        parse(*arguments)


def test_bad_values_of_a_file_are_named_on_the_command_line(recipe_file):
    for line in ("data: 3", "foo: 1", "batch_size: x", "seed: 1\nseed: 2"):
        path = recipe_file(line + "\n")
        with pytest.raises((ArgumentError, RecipeError), match=line.split(":")[0]):
            parse("--config", str(path))
