"""Compare ways to classify with few labelled rows: cloze tasks, a task head, P-Tuning, prefixes and LoRA.

    python benchmarks/few_shot.py --data FOLDER --models FOLDER
    python benchmarks/few_shot.py --report

The data folder contains `banking77` and `klue-nli`, the folder of models `smollm2-135m` and `gemma3-270m`. A draw
takes as many training rows of each label as `rows` says, and as many validation rows if there are so many. Every arm
has the same rows, steps, batches and number of tried learning rates. The rate is chosen on the validation rows of the
draw, and the test rows are evaluated once, with that rate. Evaluation is after the last step only.

The work is resumable: finished cells are in `--results` and are not repeated. The order is rows, set, draw, arm, so
that the cells that exist after a stop are comparable.
"""

import os
import random
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import runs
from learning import mean_and_spread, read_rows

BATCH, EVAL_BATCH, WARMUP = 8, 32, 0.1
ROWS, DRAWS = (16, 32, 128), (0, 1, 2, 3, 4)
DEFAULT = {"peft_type": "PREFIX_TUNING_V2", "num_virtual_tokens": 10}
# The first cells have this dropout, which was the default. A decoder has none now, and learns more without it.
PREFIX = {**DEFAULT, "prefix_dropout": 0.1}
WORDS = {"peft_type": "PTUNING_V1"}


@dataclass(frozen=True)
class Arm:
    """A way to classify.

    Attributes:
        title: Its name in the tables.
        adapters: The settings of its adapters, P-Tuning last; none for a model that is not trained.
        rates: The learning rates that are tried.
        task: The task.
        head_rate: The learning rate of a task head; `None` for the default.
    """

    title: str
    adapters: tuple[dict[str, Any], ...]
    rates: tuple[float, ...]
    task: str = "cloze"
    head_rate: float | None = None


ARMS = {
    "zero": Arm("cloze, nothing trained (zero-shot)", (), ()),
    "head": Arm("task head and prefix of 10 tokens", (DEFAULT,), (3e-3, 1e-2), "sequence-classification"),
    "head-dropout": Arm(
        "task head at a rate of 2e-2 and prefix of 10 tokens with dropout",
        (PREFIX,),
        (3e-3, 1e-2),
        "sequence-classification",
        2e-2,
    ),
    "v1": Arm("cloze with P-Tuning v1, (3, 3, 3), LSTM", (WORDS,), (1e-3, 3e-3)),
    "v2": Arm("cloze with a prefix of 10 tokens", (DEFAULT,), (1e-2, 3e-2)),
    "v2-dropout": Arm("cloze with a prefix of 10 tokens with dropout", (PREFIX,), (3e-3, 1e-2)),
    "both": Arm("cloze with both, the prefix with dropout", (PREFIX, WORDS), (3e-3, 1e-2)),
    "lora": Arm("cloze with LoRA, r = 8", ({"peft_type": "LORA", "r": 8, "lora_alpha": 16},), (1e-3, 3e-3)),
}


@dataclass(frozen=True)
class Set:
    """A data set with a model, and its template and words.

    Attributes:
        title: Its name in the tables.
        model: A folder in `--models`.
        data: A folder in `--data`.
        test: The file of the test rows in it.
        words: The word of each label.
        template: The template, with `{p}` in the places of P-Tuning's virtual tokens.
        columns: The columns of the data for a task head.
        max_length: The maximum number of tokens.
        test_rows: The number of test rows, drawn once.
        steps: The number of steps for each number of rows.
    """

    title: str
    model: str
    data: str
    test: str
    words: dict[str, str]
    template: str
    columns: dict[str, str] = field(default_factory=dict)
    max_length: int = 64
    test_rows: int = 300
    steps: dict[int, int] = field(default_factory=dict)


SETS = {
    "intents": Set(
        title="Six intents of banking77, SmolLM2-135M",
        model="smollm2-135m",
        data="banking77",
        test="test",
        words={
            "card_arrival": "delivery",
            "exchange_rate": "exchange",
            "lost_or_stolen_card": "stolen",
            "request_refund": "refund",
            "age_limit": "age",
            "cash_withdrawal_charge": "fee",
        },
        template="{p:3}{text}{p:3}\nThis question is about the{p:3} {mask}",
        steps={16: 40, 32: 60, 128: 120},
    ),
    "klue-nli": Set(
        title="KLUE-NLI, Gemma 3 270M",
        model="gemma3-270m",
        data="klue-nli",
        test="dev",
        words={"entailment": "예", "contradiction": "아니", "neutral": "아마"},
        template="{p:3}{premise}{p:3}\n질문: {hypothesis:strip}?\n답:{p:3} {mask}",
        columns={"text": "premise", "text_pair": "hypothesis"},
        max_length=96,
        steps={16: 40, 32: 60, 128: 120},
    ),
}


def read(path, words):
    """Return the rows of a file by label, without those of other labels."""
    rows = {label: [] for label in words}
    for row in read_rows(path):
        if row["label"] in rows:
            rows[row["label"]].append(row)
    return rows


def splits_of(args, name, count, draw):
    """Return the training, validation and test rows of a draw; the test rows are the same for all draws."""
    own, folder = SETS[name], args.data / SETS[name].data
    train, validation = [], []
    chance = random.Random(f"{name} {count} {draw}")
    for label, rows in read(folder / "train.jsonl.gz", own.words).items():
        if len(rows) <= count:
            raise SystemExit(f"{name} has {len(rows)} rows of {label}, too few for {count} and others to validate.")
        drawn = chance.sample(rows, min(2 * count, len(rows)))
        train, validation = train + drawn[:count], validation + drawn[count:]
    test = [row for rows in read(folder / f"{own.test}.jsonl.gz", own.words).values() for row in rows]
    test = random.Random(0).sample(test, min(own.test_rows, len(test)))
    return {"train": train, "validation": validation, "test": test}


def recipe_of(args, name, arm, adapter, draw):
    """Return the recipe of a run, which has its settings and no files."""
    from prefix_adapter.training import Recipe

    own, way = SETS[name], ARMS[arm]
    template = own.template if adapter == WORDS else own.template.replace("{p:3}", "")
    cloze = {"template": template, "verbalizer": own.words}
    return Recipe(
        task=way.task,
        model=str(args.models / own.model),
        output_dir="unused",
        adapter=adapter,
        task_kwargs=cloze if way.task == "cloze" else {},
        model_kwargs={"attn_implementation": "eager"},
        max_length=own.max_length,
        batch_size=BATCH,
        head_learning_rate=way.head_rate,
        warmup_ratio=WARMUP,
        seed=draw,
        mixed_precision=args.mixed_precision,
        labels=list(own.words),
    )


def features_of(task, rows, columns):
    """Return the features of rows for a task."""
    from datasets import Dataset

    from prefix_adapter.training.data import rename

    data = rename(Dataset.from_list(rows), columns, "rows")
    task.check(data, "rows")
    return Dataset.from_dict(task.features(data[:], list(range(len(data))), with_targets=True))


def build(recipes, tasks, features):
    """Return the model with the adapters of an arm, one for each recipe."""
    import torch
    from torch import nn

    from prefix_adapter.api import get_peft_model
    from prefix_adapter.training import model as training

    torch.manual_seed(recipes[0].seed)
    base, new = training.load_base(recipes[0], tasks[0])
    model = training.wrap(recipes[0], tasks[0], base, new)
    training.initialize_prefix(recipes[0], tasks[-1], model, features)  # the task that made the features
    for recipe, task in zip(recipes[1:], tasks[1:], strict=True):
        model = get_peft_model(model, training.adapter_configs(recipe, task)[0], "second")
    # Autocast casts frozen weights in each forward. Casting them once gives the same numbers in less time.
    for module in model.modules() if recipes[0].mixed_precision == "bf16" else ():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            module.weight = nn.Parameter(module.weight.bfloat16(), requires_grad=False)
            if module.bias is not None:
                module.bias = nn.Parameter(module.bias.bfloat16(), requires_grad=False)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def loss_of(model, task, features):
    """Return the batch of some features on the model's device, its loss and the model's output."""
    import torch

    batch = {key: value.to(model.device) for key, value in task.collate([dict(each) for each in features]).items()}
    with torch.autocast(model.device.type, torch.bfloat16, enabled=task.recipe.mixed_precision == "bf16"):
        return batch, *task.loss(model, batch)


def evaluate(model, task, features, rows):
    """Return the accuracy and the mean loss on some rows."""
    import torch

    model.eval()
    order = sorted(range(len(features)), key=lambda index: len(str(features[index]["input_ids"])))
    answers, loss = [None] * len(features), 0.0
    with torch.no_grad():
        for start in range(0, len(order), EVAL_BATCH):
            part = order[start : start + EVAL_BATCH]
            batch, own, output = loss_of(model, task, [features[index] for index in part])
            loss += own.item() * len(part)
            for index, record in zip(part, task.outputs(model, batch, output), strict=True):
                answers[index] = task.answer(rows[index], [features[index]], [record])
    metrics = task.metrics(answers, [row["label"] for row in rows])
    return {"accuracy": metrics["accuracy"], "loss": loss / len(rows)}


def fit(model, task, features, recipe, steps):
    """Train a model for some steps."""
    import torch

    from prefix_adapter.training.model import new_optimizer, new_scheduler

    optimizer = new_optimizer(recipe, model)
    scheduler = new_scheduler(recipe, optimizer, steps, steps)
    parameters = [each for each in model.parameters() if each.requires_grad]
    chance, waiting = random.Random(recipe.seed), []
    model.train()
    for _ in range(steps):
        if len(waiting) < BATCH:
            waiting = chance.sample(range(len(features)), len(features))
        part, waiting = waiting[:BATCH], waiting[BATCH:]
        _, loss, _ = loss_of(model, task, [features[index] for index in part])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def run(args, name, count, draw, arm):
    """Do one cell: train with each rate, choose by the validation rows, evaluate the test rows once."""
    import datasets
    import torch

    from prefix_adapter.training.model import load_tokenizer, trained_parameters
    from prefix_adapter.training.tasks import TASK_CLASSES

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    own, way, started = SETS[name], ARMS[arm], (time.perf_counter(), time.process_time())
    splits = splits_of(args, name, count, draw)
    recipes = [recipe_of(args, name, arm, adapter, draw) for adapter in way.adapters or ({"peft_type": "NONE"},)]
    tokenizer = load_tokenizer(recipes[0])
    tasks = [TASK_CLASSES[way.task](recipe, tokenizer) for recipe in recipes]
    task, columns = tasks[-1], own.columns if way.task != "cloze" else {}
    features = {split: features_of(task, rows, columns) for split, rows in splits.items() if rows}
    best, tried = None, {}
    for rate in way.rates or (None,):
        model = build(recipes, tasks, features.get("train"))
        if rate is not None:
            fit(model, task, features["train"], replace(recipes[-1], learning_rate=rate), own.steps[count])
            tried[rate] = evaluate(model, task, features["validation"], splits["validation"])
        score = (tried[rate]["accuracy"], -tried[rate]["loss"]) if tried else (0.0, 0.0)
        if best is None or score > best[0]:
            best = (score, rate, model)
    _, rate, model = best
    test = evaluate(model, task, features["test"], splits["test"])
    return {
        "test": test,
        "rate": rate,
        "tried": {f"{each:g}": scores for each, scores in tried.items()},
        "parameters": sum(each.numel() for each in trained_parameters(model).values()),
        "steps": own.steps[count] if tried else 0,
        "seconds": round(time.perf_counter() - started[0], 1),
        "cpu_seconds": round(time.process_time() - started[1], 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }


def cells(args):
    """Yield the cells in their order. A model that is not trained has one cell for each set."""
    yield from ((name, 0, 0, "zero") for name in args.sets)
    trained = [arm for arm in args.arms if ARMS[arm].adapters]
    for count in args.rows:
        for name in args.sets:
            yield from ((name, count, draw, arm) for draw in args.draws for arm in trained)


def study(args):
    """Do all cells that `--results` does not have yet."""
    runs.run_all(args.results, args.jobs, lambda _: cells(args), lambda cell: (run, args, *cell))


def report(args):
    """Print the tables of the finished cells, in Markdown."""
    known = runs.read(args.results)
    for name, own in SETS.items():
        counts = sorted({count for other, count, *_ in known if other == name and count})
        print(f"**{own.title}**\n\n| | trained | {' | '.join(f'{count} rows a label' for count in counts)} |")
        print(f"|---|---|{'---|' * len(counts)}")
        for arm, way in ARMS.items():
            row, size = [], 0
            for count in counts if way.adapters else [0]:
                found = [known[name, count, draw, arm] for draw in DRAWS if (name, count, draw, arm) in known]
                size = max([size, *(each["parameters"] for each in found)])
                text = mean_and_spread([each["test"]["accuracy"] for each in found]) if found else ""
                partial = f" (draws: {len(found)})" if 0 < len(found) < len(DRAWS) and count else ""
                losses = f", {statistics.mean(each['test']['loss'] for each in found):.2f}" if found else ""
                row.append(text + losses + partial)
            if not any(row):
                continue
            print(f"| {way.title} | {size:,} | {' | '.join(row if way.adapters else row * len(counts))} |")
        print()


def main():
    """Run the command."""
    parser = runs.new_parser(__doc__, Path(__file__).with_name("few_shot_results.jsonl"))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rows", nargs="+", type=int, choices=ROWS, default=list(ROWS))
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--draws", nargs="+", type=int, choices=DRAWS, default=list(DRAWS))
    runs.study_or_report(parser, study, report)


if __name__ == "__main__":
    main()
