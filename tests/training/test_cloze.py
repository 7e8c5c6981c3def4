"""Cloze tasks: the words' scores against plain log-probabilities row by row, bad settings, and runs."""

import json
from functools import partial

import pytest
import tiny
import torch
import transformers
from conftest import WORDS, save_base, write_rows
from datasets import Dataset
from torch.nn import functional as F

from prefix_adapter import PrefixTuningV2Config, get_peft_model
from prefix_adapter.training import (
    Data,
    JointRecipe,
    Recipe,
    RecipeError,
    evaluate_adapter,
    predict,
    train,
    train_together,
)
from prefix_adapter.training.evaluation import rows_of
from prefix_adapter.training.model import load_base, load_tokenizer, trained_parameters, wrap
from prefix_adapter.training.tasks.cloze import Cloze
from prefix_adapter.training.tasks.template_task import logits_at

CLASSES = {
    "bert": "AutoModelForMaskedLM",
    "roberta": "AutoModelForMaskedLM",
    "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM",
    "t5": "AutoModelForSeq2SeqLM",
    "bart": "AutoModelForSeq2SeqLM",
}
TEMPLATE = "{text} w60 w61 {mask} w62"
VERBALIZER = {"a": "w10", "b": ["w11", "w12 w13"], "c": "w11 w14 w15"}
ROWS = [
    {"text": "w1 w2 w3 w4 w5 w6 w7", "label": "a"},
    {"text": "w8", "label": "b"},
    {"text": "w20 w21 w22", "label": "c"},
    {"text": "w23 w24 w25 w26 w27 w28 w29 w30 w31 w32 w33 w34", "label": "b"},
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    found = {kind: save_base(folder / kind, kind, auto_class) for kind, auto_class in CLASSES.items()}
    # As many decoders have it; padding on the left would move the positions of gpt2.
    tokenizer = transformers.AutoTokenizer.from_pretrained(found["gpt2"], padding_side="left")
    tokenizer.save_pretrained(found["gpt2"])
    assert load_tokenizer(Recipe(task="cloze", model=found["gpt2"], output_dir="unused")).padding_side == "left"
    return found


def new_task(model, template=TEMPLATE, verbalizer=VERBALIZER, learn=True, **changes) -> Cloze:
    kwargs = {"template": template, "verbalizer": verbalizer, **changes.pop("task_kwargs", {})}
    recipe = Recipe(**{"task": "cloze", "model": model, "output_dir": "unused", "task_kwargs": kwargs, **changes})
    task = Cloze(recipe, load_tokenizer(recipe))
    if learn:
        task.learn_labels(Dataset.from_list(ROWS), "rows")
    return task


def batch_of(task, rows, with_targets=True):
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    return task.collate(rows_of(task.features(columns, list(range(len(rows))), with_targets)))


def spell(tokenizer, text):
    """The token ids of words between spaces."""
    ids = tokenizer.convert_tokens_to_ids(text.split())
    assert tokenizer.unk_token_id not in ids
    return ids


def log_probability(model, kind, tokenizer, before, word, after, cut=64):
    """The log-probability of a word between two texts: one sequence, no padding, all logits."""
    before, word, after = (spell(tokenizer, text) for text in (before, word, after))
    before = before[: cut - len(word) - len(after)]
    if kind in ("bert", "roberta"):
        start, end, mask = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id
        ids = [start, *before, *[mask] * len(word), *after, end]
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(logits[1 + len(before) + i, token] for i, token in enumerate(word))
    if kind in ("gpt2", "llama"):
        logits = model(input_ids=torch.tensor([[*before, *word, *after]])).logits[0].log_softmax(-1)
        scored = [*word, *after]
        return sum(logits[len(before) + i - 1, token] for i, token in enumerate(scored))
    # A T5 or BART without a mask: the decoder writes the word and the end token.
    end, start = tokenizer.eos_token_id, model.config.decoder_start_token_id
    written = torch.tensor([[start, *word]])
    text = torch.tensor([[*before, *after, end]])
    logits = model(input_ids=text, decoder_input_ids=written).logits[0].log_softmax(-1)
    return sum(logits[i, token] for i, token in enumerate([*word, end]))


def expected_scores(model, kind, tokenizer, rows, before="w60 w61", after="w62", **options):
    return torch.stack(
        [
            torch.stack(
                [
                    sum(
                        log_probability(model, kind, tokenizer, f"{row['text']} {before}", word, after, **options)
                        for word in words
                    )
                    / len(words)
                    for words in (each if isinstance(each, list) else [each] for each in VERBALIZER.values())
                ]
            )
            for row in rows
        ]
    )


# The scores


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "prefix"])
@pytest.mark.parametrize("kind", CLASSES)
def test_scores_are_log_probabilities(kind, adapter, bases):
    template = TEMPLATE if "LM" in CLASSES[kind] and kind not in ("t5", "bart") else "{text} w60 w61 w62"
    task = new_task(bases[kind], template, adapter={"num_virtual_tokens": 3})
    model, new = load_base(task.recipe, task)
    assert type(model).__name__.lower().startswith(kind) and not new
    if adapter:
        model = wrap(task.recipe, task, model, new)
        tiny.randomize(model)
    model.double().eval()  # T5's logits are large: in fp32 their rounding would depend on the CPU
    with torch.no_grad():
        expected = expected_scores(model, kind, task.tokenizer, ROWS).float()
        loss, scores = task.loss(model, batch_of(task, ROWS))
        torch.testing.assert_close(scores, expected, atol=2e-5, rtol=5e-5)
        labels = torch.tensor(["abc".index(row["label"]) for row in ROWS])
        torch.testing.assert_close(loss, F.cross_entropy(expected, labels))
        probabilities = task.outputs(model, batch_of(task, ROWS, False), None)
    torch.testing.assert_close(torch.tensor(probabilities), expected.softmax(-1), atol=1e-5, rtol=1e-5)
    assert expected.argmax(-1).unique().numel() > 1 or expected.std(0).min() > 1e-2
    answer = task.answer(ROWS[0], [], [probabilities[0]])
    assert answer["prediction"] == "abc"[expected[0].argmax()]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_cut_texts_and_mean_scores(kind, bases):
    task = new_task(bases[kind], max_length=12, task_kwargs={"score": "mean"})
    model = load_base(task.recipe, task)[0].eval()
    room = 12 - (2 if kind == "bert" else 0)
    longest = 3  # all words see the same text, cut for the longest word
    before = {row["text"]: " ".join(row["text"].split()[: room - 3 - longest]) + " w60 w61" for row in ROWS}
    expected = []
    for row in ROWS:
        own = []
        for words in (["w10"], ["w11", "w12 w13"], ["w11 w14 w15"]):
            scores = []
            for word in words:
                found = log_probability(model, kind, task.tokenizer, before[row["text"]], word, "w62")
                scores.append(found / (len(word.split()) + (kind == "gpt2")))
            own.append(sum(scores) / len(scores))
        expected.append(torch.stack(own))
    with torch.no_grad():
        found = task.loss(model, batch_of(task, ROWS))[1]
    torch.testing.assert_close(found, torch.stack(expected), atol=2e-5, rtol=1e-5)


def test_t5_fills_a_gap_between_sentinels(tmp_path):
    base = tiny.save(tmp_path / "t5", "t5", [*WORDS, "<extra_id_0>", "<extra_id_1>"], CLASSES["t5"])
    task = new_task(base)
    model, tokenizer = load_base(task.recipe, task)[0].eval(), task.tokenizer
    gap, following = tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>"])
    with torch.no_grad():
        found = task.loss(model, batch_of(task, ROWS))[1]
        for row, scores in zip(ROWS, found, strict=True):
            text = [*spell(tokenizer, f"{row['text']} w60 w61"), gap, *spell(tokenizer, "w62"), tokenizer.eos_token_id]
            for label, word in ((0, "w10"), (2, "w11 w14 w15")):
                target = torch.tensor([[gap, *spell(tokenizer, word), following]])
                losses = F.cross_entropy(
                    model(input_ids=torch.tensor([text]), labels=target).logits[0], target[0], reduction="none"
                )
                assert scores[label].item() == pytest.approx(-losses[1:].sum().item(), rel=1e-4)


def test_bart_writes_the_whole_text(tmp_path):
    base = tiny.save(tmp_path / "bart", "bart", WORDS, CLASSES["bart"])
    transformers.AutoTokenizer.from_pretrained(base, mask_token="[MASK]").save_pretrained(base)
    task = new_task(base)
    model, tokenizer = load_base(task.recipe, task)[0].eval(), task.tokenizer
    end = tokenizer.eos_token_id
    with torch.no_grad():
        found = task.loss(model, batch_of(task, ROWS))[1]
        for row, scores in zip(ROWS, found, strict=True):
            before, after = spell(tokenizer, f"{row['text']} w60 w61"), [*spell(tokenizer, "w62"), end]
            text = torch.tensor([[*before, tokenizer.mask_token_id, *after]])
            for label, word in ((0, "w10"), (2, "w11 w14 w15")):
                target = torch.tensor([[*before, *spell(tokenizer, word), *after]])
                losses = F.cross_entropy(model(input_ids=text, labels=target).logits[0], target[0], reduction="none")
                assert scores[label].item() == pytest.approx(-losses[len(before) :].sum().item(), rel=1e-4)


@pytest.mark.parametrize("kind", CLASSES)
def test_only_the_logits_that_are_needed(kind, bases):
    task = new_task(bases[kind], TEMPLATE if kind not in ("t5", "bart") else "{text}")
    model = load_base(task.recipe, task)[0].eval()
    batch, seen = batch_of(task, ROWS), []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    task.loss(model, batch)
    longest = batch["decoder_input_ids" if kind in ("t5", "bart") else "input_ids"].shape[1]
    assert seen == [longest if kind in ("t5", "bart") else batch["positions"].shape[1]]
    assert seen[0] < longest or kind in ("t5", "bart")


def test_places_are_read_from_the_right_row(bases):
    model = load_base(*(lambda task: (task.recipe, task))(new_task(bases["gpt2"])))[0].eval()
    ids, positions = tiny.ids(3, 9), torch.tensor([[0, 8], [5, 2], [3, 3]])
    everywhere = model(input_ids=ids).logits
    found = logits_at(model, {"input_ids": ids}, positions, "input_ids")
    torch.testing.assert_close(found, torch.stack([row[at] for row, at in zip(everywhere, positions, strict=True)]))
    assert not model.base_model._forward_hooks


def test_one_input_serves_words_that_begin_alike(bases):
    columns = {"text": ["w1 w2"], "label": ["a"]}
    end = "{text} w60 {mask}"
    causal = new_task(bases["gpt2"], end).features(columns, [0], True)
    # After "w1 w2 w60" nothing, "w12" and "w11 w14": the first is the beginning of the others, "w11" of the last.
    assert [len(ids) for ids in causal["input_ids"][0]] == [5, 4]
    assert causal["variants"][0] == [0, 0, 1, 0]
    masked = new_task(bases["bert"], end).features(columns, [0], True)
    assert sorted(len(ids) for ids in masked["input_ids"][0]) == [6, 7, 8]


def test_an_adapter_around_another_one(bases):
    task = new_task(bases["gpt2"], "{text} {p:2} {mask}", adapter={"peft_type": "PTUNING_V1"})
    model = wrap(task.recipe, task, *load_base(task.recipe, task))
    model = get_peft_model(model, PrefixTuningV2Config(num_virtual_tokens=2), "outer").eval()
    batch = batch_of(task, ROWS)
    every = torch.arange(batch["input_ids"].shape[1]).expand(len(batch["input_ids"]), -1)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = model(**inputs).logits
        found = logits_at(model, inputs, every.flip(1), "input_ids")
    torch.testing.assert_close(found, expected.flip(1))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_trainable_words_start_from_the_plain_text(kind, bases):
    template, plain = '{text} {p:"w60"} w61 {mask} w62', TEMPLATE
    trained = new_task(bases[kind], template, adapter={"peft_type": "PTUNING_V1"})
    model = wrap(trained.recipe, trained, *load_base(trained.recipe, trained)).eval()
    expected = new_task(bases[kind], plain)
    base = load_base(expected.recipe, expected)[0].eval()
    config = model.active_peft_config
    assert (config.encoder_reparameterization_type, config.init_token_ids) == (None, spell(trained.tokenizer, "w60"))
    with torch.no_grad():
        found = trained.loss(model, batch_of(trained, ROWS))[1]
        torch.testing.assert_close(found, expected.loss(base, batch_of(expected, ROWS))[1])
    assert trained_parameters(model)


# Labels, words and settings


def test_labels_come_from_the_verbalizer(bases):
    rows = Dataset.from_list([{"text": "w1", "label": 3}, {"text": "w1", "label": 1}])
    task = new_task(bases["gpt2"], verbalizer={1: "w1", "2": "w2", 3: ["w3", "w4"]}, learn=False)
    assert task.labels is None
    task.learn_labels(rows, "rows")
    assert task.labels == [1, 2, 3]  # the label that no row has is known too
    assert task.problem({"text": "w1", "label": 4}, True).startswith("the label 4 is not among")
    by_name = new_task(bases["gpt2"], verbalizer=None, labels=["w7", "w5"], learn=False)
    assert by_name.words == [spell(by_name.tokenizer, "w7"), spell(by_name.tokenizer, "w5")]


def test_class_weights(bases):
    weighted, plain = (
        new_task(bases["gpt2"], task_kwargs={"class_weights": each}) for each in ({"a": 3, "b": 0}, None)
    )
    model = load_base(plain.recipe, plain)[0].eval()
    scores = plain.loss(model, batch_of(plain, ROWS))[1]
    losses = F.cross_entropy(scores, torch.tensor([0, 1, 2, 1]), reduction="none")
    found = weighted.loss(model, batch_of(weighted, ROWS))[0]
    torch.testing.assert_close(found, (3 * losses[0] + losses[2]) / 4)
    with torch.no_grad():
        torch.testing.assert_close(weighted.loss(model, batch_of(weighted, ROWS))[0], losses.mean())


@pytest.mark.parametrize(
    ("kind", "template", "verbalizer", "changes", "message"),
    [
        ("gpt2", None, VERBALIZER, {}, "`task_kwargs.template` is missing"),
        ("gpt2", "{text} {mask", VERBALIZER, {}, r"`task_kwargs.template`: character 8 .*not closed"),
        ("gpt2", "{text}", VERBALIZER, {}, r"a causal language model needs one `\{mask\}`"),
        ("gpt2", "{mask}", VERBALIZER, {}, r"needs a token before `\{mask\}`"),
        ("bert", "{text}", VERBALIZER, {}, r"a masked language model needs one `\{mask\}`"),
        ("bart", "{text} {mask}", VERBALIZER, {}, "has no mask token. Leave out"),
        ("gpt2", TEMPLATE, "w1", {}, "must be a mapping from labels to words, got 'w1'"),
        ("gpt2", TEMPLATE, {"a": True, "b": "w1"}, {}, "`task_kwargs.verbalizer.a` must be a word .*YAML"),
        ("gpt2", TEMPLATE, {True: "w1", "b": "w1"}, {}, "a label must be a text or an integer.*YAML"),
        ("gpt2", TEMPLATE, {"a": [], "b": "w1"}, {}, "`task_kwargs.verbalizer.a` must be a word"),
        ("gpt2", TEMPLATE, {"a": "w1", "b": "w2 w1", "c": ["w4", "w1"]}, {}, "'w1' of the label 'c' .* a word of 'a'"),
        ("gpt2", TEMPLATE, {"a": "w1", "b": "never", "c": "w2"}, {}, "does not know the word 'never'"),
        ("gpt2", TEMPLATE, VERBALIZER, {"labels": ["a", "b"]}, r"has words for \['a', 'b', 'c'\], and the labels are"),
        ("gpt2", TEMPLATE, VERBALIZER, {"max_length": 5}, "the template has 6 tokens without the texts of a row"),
        ("gpt2", TEMPLATE, VERBALIZER, {"task_kwargs": {"score": "max"}}, "`task_kwargs.score` must be sum or mean"),
        (
            "gpt2",
            TEMPLATE,
            VERBALIZER,
            {"task_kwargs": {"language_model": "big"}},
            "`task_kwargs.language_model` must",
        ),
        ("gpt2", TEMPLATE, VERBALIZER, {"task_kwargs": {"language_model": "masked"}}, "has no mask token"),
    ],
)
def test_bad_settings(kind, template, verbalizer, changes, message, bases):
    with pytest.raises(RecipeError, match=message):
        new_task(bases[kind], template, verbalizer, **changes)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None}, "'text' must be a text"),
        ({"text": "  "}, "'text': there is no text"),
        ({"text": "w1 " * 20}, "more than the maximum of 12"),
        ({"text": "w1", "label": None}, "'label' is missing"),
        ({"text": "w1", "label": "d"}, "'d' is not among the labels"),
    ],
)
def test_bad_rows(row, message, bases):
    task = new_task(bases["gpt2"], "{text:whole} w60 {mask}", max_length=12)
    assert task.problem({"text": "w1 w2", "label": "a"}, True) is None
    assert message in task.problem({"label": "a", **row}, True)


def test_a_text_before_the_answer_of_a_decoder(bases):
    task = new_task(bases["gpt2"], "{a}{mask} {b}")
    assert "no token before `{mask}`" in task.problem({"a": "", "b": "w1"}, False)
    assert task.problem({"a": "w1", "b": ""}, False) is None


def test_a_head_that_was_not_trained(tiny_bert):
    task = new_task(tiny_bert)
    with pytest.raises(RecipeError, match=r"lacks cls\.predictions.*trains no head of its own"):
        load_base(task.recipe, task)


@pytest.mark.parametrize("kind", ["PREFIX_TUNING_V2", "LORA", "FULL", "NONE"])
def test_virtual_tokens_need_an_adapter_that_trains_them(kind, bases):
    task = new_task(bases["gpt2"], "{text} {p:2} {mask}", adapter={"peft_type": kind})
    assert task.placeholder_token_ids == [len(task.tokenizer), len(task.tokenizer) + 1]
    with pytest.raises(RecipeError, match=rf"virtual tokens .*which {kind} does not train"):
        wrap(task.recipe, task, *load_base(task.recipe, task))


# Runs


def word_rows(count: int, start: int = 0) -> list[dict]:
    """Texts of words `w0` to `w4` with the label `yes`, and of `w40` to `w44` with the label `no`."""
    return [
        {
            "text": " ".join(f"w{40 * (i % 2) + (i * 7 + j * 3) % 5}" for j in range(3 + i % 4)),
            "label": ("yes", "no")[i % 2],
        }
        for i in range(start, start + count)
    ]


@pytest.fixture
def words(tmp_path):
    return {
        "train": write_rows(tmp_path / "train.jsonl", word_rows(48)),
        "validation": write_rows(tmp_path / "validation.jsonl", word_rows(19, 100)),
    }


WORDED = {"no": "w20 w21", "yes": ["w22", "w23"]}
ADAPTERS = {
    "prefix": ({"num_virtual_tokens": 4, "init_std": 0.5}, 0.1),
    "lora": ({"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}, 1e-2),
    "full": ({"peft_type": "FULL"}, 3e-3),
    "none": ({"peft_type": "NONE"}, None),
    "ptuning": ({"peft_type": "PTUNING_V1", "encoder_reparameterization_type": None, "init_std": 1.0}, 0.1),
}
TEMPLATES = {"t5": "{text} w60", "ptuning": "{p:2} {text} {p:2} w60 {p} {mask}"}


def run_recipe(base, words, output, **changes) -> Recipe:
    settings = {
        "task": "cloze",
        "model": base,
        "output_dir": str(output),
        "data": Data(**words),
        "task_kwargs": {"template": "{text} w60 {mask}", "verbalizer": WORDED},
        "batch_size": 8,
        "max_length": 16,
        "num_train_epochs": 6,
    }
    return Recipe(**{**settings, **changes})


@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        ("gpt2", "prefix"),
        ("bert", "prefix"),
        ("t5", "prefix"),
        ("gpt2", "lora"),
        ("bert", "full"),
        ("gpt2", "none"),
        ("gpt2", "ptuning"),
    ],
)
def test_a_run(kind, adapter, bases, words, tmp_path):
    settings, rate = ADAPTERS[adapter]
    changes = {"adapter": settings, "learning_rate": rate}
    template = TEMPLATES.get(adapter) or TEMPLATES.get(kind)
    if template:
        changes["task_kwargs"] = {"template": template, "verbalizer": WORDED}
    recipe = run_recipe(bases[kind], words, tmp_path / "out", **changes)
    results = train(recipe, quiet=True)
    assert results["metric"] == "accuracy" and set(results["validation"]) >= {"loss", "f1_macro"}
    if adapter == "none":
        assert results["trained_parameters"] == 0
    elif kind != "t5":  # the tiny T5 has weights that are too large to learn in a few steps
        assert results["validation"]["accuracy"] > 0.9
    metrics = evaluate_adapter(tmp_path / "out")
    assert metrics == pytest.approx(results["validation"])
    rows = word_rows(19, 100)
    source = write_rows(tmp_path / "rows.jsonl", [{"text": row["text"]} for row in rows])
    assert predict(tmp_path / "out", source, tmp_path / "answers.jsonl") == 19
    answers = list(map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines()))
    assert all(0 <= answer["probability"] <= 1 for answer in answers)
    right = [answer["prediction"] == row["label"] for answer, row in zip(answers, rows, strict=True)]
    assert sum(right) / 19 == pytest.approx(metrics["accuracy"])
    saved = {path.name for path in (tmp_path / "out").iterdir()}
    weights = {"none": set(), "full": {"trained.safetensors"}}.get(adapter, {"adapter_model.safetensors"})
    assert {name for name in saved if name.endswith("safetensors")} == weights
    if adapter == "none":
        assert (results["steps"], results["best_step"]) == (0, 0)
        assert train(recipe, quiet=True, resume=True)["validation"] == results["validation"]


def test_a_run_without_training_is_the_base_model(bases, words, tmp_path):
    made = run_recipe(bases["bert"], words, tmp_path / "out", adapter={"peft_type": "NONE"})
    found = train(made, quiet=True)["validation"]["loss"]
    task = Cloze(made, load_tokenizer(made))
    model = load_base(made, task)[0].eval()
    losses = []
    with torch.no_grad():
        for row in word_rows(19, 100):
            score = partial(log_probability, model, "bert", task.tokenizer, f"{row['text']} w60", after="")
            scores = torch.stack([score("w20 w21"), (score("w22") + score("w23")) / 2])
            losses.append(F.cross_entropy(scores, torch.tensor(row["label"] == "yes", dtype=torch.long)))
    assert found == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_a_new_head_cannot_be_evaluated_without_training(tiny_bert, topics, tmp_path):
    recipe = Recipe("sequence-classification", tiny_bert, str(tmp_path), Data(**topics), {"peft_type": "none"})
    recipe.output_dir = str(tmp_path / "out")
    with pytest.raises(RecipeError, match="with NONE nothing is trained, and classifier"):
        train(recipe, quiet=True)


def test_a_resumed_run_is_the_same(bases, words, tmp_path):
    whole = run_recipe(bases["gpt2"], words, tmp_path / "whole", adapter={"num_virtual_tokens": 2}, max_steps=4)
    changes = {"lr_scheduler_type": "constant", "eval_steps": 2}
    whole = whole.with_values(changes)
    train(whole, quiet=True)
    part = whole.with_values({"output_dir": str(tmp_path / "part"), "max_steps": 2})
    train(part, quiet=True)
    train(part.with_values({"max_steps": 4}), quiet=True, resume=True)
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "part"))
    assert first == second


def test_a_prefix_for_two_tasks(bases, words, tmp_path):
    task = {"data": words, "max_length": 16}
    recipe = JointRecipe.from_dict(
        {
            "model": bases["bert"],
            "output_dir": str(tmp_path / "out"),
            "adapter": {"num_virtual_tokens": 2},
            "max_steps": 4,
            "tasks": {
                "cloze": {**task, "task": "cloze", "task_kwargs": {"template": "{text} {mask}", "verbalizer": WORDED}},
                "head": {**task, "task": "sequence-classification"},
            },
        }
    )
    results = train_together(recipe, quiet=True)["tasks"]
    assert evaluate_adapter(tmp_path / "out" / "cloze") == pytest.approx(results["cloze"]["validation"])


def test_a_dry_run_shows_the_texts(bases, words, tmp_path, capsys):
    made = run_recipe(bases["bert"], words, tmp_path / "out", adapter={"num_virtual_tokens": 2})
    assert train(made, dry_run=True) == {} and not (tmp_path / "out").exists()
    shown = capsys.readouterr().err
    assert "labels: no, yes" in shown and "w60 [MASK] [SEP]" in shown and "w60 [MASK] [MASK] [SEP]" in shown
