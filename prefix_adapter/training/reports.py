"""The records of a run: recorded metrics, versions, the plot and the model card."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from peft import PeftConfig
from peft.utils import CONFIG_NAME

from ..files.card import (
    CARD,
    PLACE,
    OwnCard,
    adapter_card,
    config_card,
    new_card,
    read_card,
    second_part,
    write_card,
)
from ..files.markdown import code, file_name, hub_name, link, table, without_paths
from ..tuner.config import AdapterConfig
from .files import atomic_write, path_in_errors, write_text
from .outputs import CURVE, LOGS, METRICS
from .recipe import Data, Recipe, RecipeError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from huggingface_hub import ModelCard

_PIPELINES = {
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "causal-lm": "text-generation",
    "chat": "text-generation",
}
_PACKAGES = (
    "prefix-adapter",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
)


class MetricsLog:
    """Records losses and metrics in `metrics.jsonl` and in Accelerate's trackers.

    Args:
        settings: the settings of the run, with its output folder and trackers.
        accelerator: the accelerator.
        values: the recipe as plain values, for the trackers.
    """

    def __init__(self, settings: Recipe, accelerator: Accelerator, values: dict[str, Any]) -> None:
        self.settings, self.accelerator, self.values = settings, accelerator, values
        self.path = Path(settings.output_dir) / METRICS

    def start(self, step: int) -> None:
        """Start the trackers, and drop records of later steps and of the test rows: both are computed again."""
        if self.settings.report_to:
            flat = {
                key: value if isinstance(value, (int, float, str)) else json.dumps(value)
                for key, value in self.values.items()
            }
            logs = self.path.with_name(LOGS)
            if self.accelerator.is_main_process:
                logs.mkdir(exist_ok=True)
            # Accelerate tells all trackers but this one where to write.
            own = {"wandb": {"dir": str(logs)}}
            self.accelerator.init_trackers("prefix-adapter", config=flat, init_kwargs=own)
        if self.accelerator.is_main_process and self.path.is_file():
            kept = [line for line in read_metrics(self.path) if line["step"] <= step and line["split"] != "test"]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, epoch: float, split: str, values: dict[str, float]) -> None:
        """Record the values of a step."""
        if self.accelerator.is_main_process:
            line = {"step": step, "epoch": round(epoch, 4), "split": split, **values}
            with path_in_errors(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())  # A checkpoint requires the lines of the steps before it.
        self.accelerator.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def read(self) -> list[dict[str, Any]]:
        """The lines recorded so far; see `read_metrics`."""
        return read_metrics(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a run's `metrics.jsonl`; the list is empty if the file does not exist.

    An unreadable last line is skipped: a process that died may have written only a part of it.

    Raises:
        RecipeError: if an earlier line is damaged; the message names the line.
    """
    if not path.is_file():
        return []
    texts = path.read_bytes().splitlines()
    lines = []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            problem = _problem_of_line(line)
        except (ValueError, RecursionError) as error:
            problem = f"it is not JSON ({error})"
        if not problem:
            lines.append(line)
        elif number < len(texts):
            raise RecipeError(f"{path}, line {number}: {problem}. Correct or remove the line, or remove the file.")
    return lines


def _problem_of_line(line: Any) -> str | None:
    if not isinstance(line, dict):
        return "it is not a JSON object"
    for name, kinds in (("step", (int,)), ("epoch", (int, float)), ("split", (str,))):
        if type(line.get(name)) not in kinds:
            return f"its `{name}` is {line.get(name)!r}"
    values = {name: value for name, value in line.items() if name != "split"}
    wrong = [name for name, value in values.items() if type(value) not in (int, float)]
    return f"its `{wrong[0]}` is not a number" if wrong else None


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that affect results."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def draw_curve(lines: list[dict[str, Any]], metric: str, best_step: int | None, path: Path) -> None:
    """Plot the losses, and the metric of the validation rows with its best step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, split, name in ((left, "train", "loss"), (left, "validation", "loss"), (right, "validation", metric)):
        points = [(line["step"], line[name]) for line in lines if line["split"] == split and name in line]
        marker = "o" if split == "validation" else None
        if points:
            axes.plot(*zip(*points, strict=True), marker=marker, markersize=3, label=f"{split} {name}")
        best = [value for step, value in points if step == best_step]
        if axes is right and best:
            axes.plot(
                best_step, best[0], "o", markersize=10, fillstyle="none", color="tab:red", label=f"best: {best[0]:.4g}"
            )
    left.set_ylim(bottom=0)
    for axes, title in ((left, "Loss"), (right, metric)):
        axes.set(title=title, xlabel="optimizer step")
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_write(path) as scratch:
        figure.savefig(scratch, dpi=120)
    pyplot.close(figure)


_TRAINING = """## Training

{description}

{settings}

### Results

Step {best_step} of {steps} has the best {metric} on the validation rows.

{results}
{curve}
{origin}
To predict new rows, run `prefix-adapter predict "{place}" rows.jsonl answers.jsonl`.

Versions: {versions}."""
_SINGLE_RUN = (
    "`recipe.yaml` in this repository repeats the run: `prefix-adapter train --config recipe.yaml --output_dir ...`."
)
_LOAD_WITHOUT_PEFT = f"""There is no PEFT adapter in this folder. The package `prefix-adapter` loads what it has:

```bash
pip install "prefix-adapter[train]"
```

```python
from prefix_adapter.training import load_trained

recipe, task, model = load_trained("{PLACE}")
```"""
_JOINT_RUN = "The prefix was trained together with other tasks, each of which has its own adapter: {names}."


def training_part(recipe: Recipe, results: dict[str, Any], curve: bool) -> str:
    """The part of a model card on training: data, settings, metrics and versions.

    Args:
        recipe: the recipe.
        results: the contents of `results.json`.
        curve: whether the run has drawn its curve.
    """
    data = recipe.data
    sources = [
        _describe_source(source, f", weight {each['weight']:g}" if "weight" in each else "")
        for each, source in zip(data.mixture or [{}], data.sources, strict=True)
    ]
    settings = {
        "task": recipe.task,
        "adapter": _as_text(recipe.adapter),
        **({"second adapter": _as_text(recipe.second_adapter)} if recipe.second_adapter else {}),
        "trained parameters": f"{results['trained_parameters']:,}",
        f"learning rate (adapter, head{', second adapter' if recipe.second_adapter else ''})": ", ".join(
            f"{rate:g}" for rate in results["learning_rates"]
        ),
        "schedule": f"{recipe.lr_scheduler_type}, warm-up {recipe.warmup_ratio:g}",
        "batch size": str(recipe.batch_size),
        "epochs": f"{results['epochs']:g}",
        "maximum length": str(results["max_length"]),
        "seed": str(recipe.seed),
        "mixed precision": results["mixed_precision"],
    }
    if recipe.load_in_4bit:
        settings["base model in 4 bits"] = "bitsandbytes, nf4, double quantization"
    rows, others = results["rows"], results.get("together")
    tables = {split: results[split] for split in ("validation", "test") if split in results}
    names = list(results["validation"])
    cells = [
        [split, f"{rows[split]:,}", *(f"{values.get(name, float('nan')):.4f}" for name in names)]
        for split, values in tables.items()
    ]
    if constant := results.get("constant_answer"):
        numbers = (f"{constant[name]:.4f}" if name in constant else "" for name in names)
        cells.insert(1, ["validation, the same answer for every row", f"{rows['validation']:,}", *numbers])
    return _TRAINING.format(
        description=f"Trained on {'streamed' if rows['train'] is None else format(rows['train'], ',')} rows of "
        f"{', '.join(sources)}, "
        f"validated on {rows['validation']:,}" + (f" and tested on {rows['test']:,}." if "test" in rows else "."),
        settings=table(["setting", "value"], [(name, code(value, 1000)) for name, value in settings.items()]),
        steps=results["steps"],
        metric="mean score of all tasks" if others else results["metric"],
        origin=_JOINT_RUN.format(names=", ".join(map(code, others))) if others else _SINGLE_RUN,
        best_step=results["best_step"],
        results=table(["split", "rows", *names], cells),
        curve="\n![Loss and metric of each evaluation](curve.png)\n" if curve else "",
        place=PLACE,
        versions=", ".join(f"{name} {number}" for name, number in results["versions"].items()),
    )


def _as_text(settings: dict[str, Any]) -> str:
    """The settings of an adapter on one line."""
    return yaml.safe_dump(without_paths(settings), default_flow_style=True, width=2**31).strip()


def _describe_source(data: Data, more: str) -> str:
    source = link(data.path, "datasets/") if data.path else "files"
    parts = [data.name, data.train] if data.path and data.name else [file_name(data.train)]
    return f"{source} ({', '.join(map(code, parts))}{more})"


def write_run_card(folder: Path, recipe: Recipe, results: dict[str, Any]) -> None:
    """Write the model card of a finished run.

    Args:
        folder: the folder with the adapter.
        recipe: the recipe. The user's own text in the card of its output folder, if there is one, stays.
        results: the contents of `results.json`.

    Raises:
        RecipeError: if the card in the output folder is damaged (see `read_run_card`).
        OSError: if the card cannot be written.
    """
    ours = _card_without_training(folder, recipe)
    paths = [recipe.data.path, *(source.path for source in recipe.data.sources)]
    data: dict[str, Any] = {
        **ours.data,
        "pipeline_tag": _PIPELINES.get(recipe.task),
        "datasets": sorted({name for path in paths if path and (name := hub_name(path))}) or None,
        "metrics": sorted(set(results["validation"]) - {"loss"}),
    }
    apart = recipe.second_adapter and recipe.adapter["peft_type"] != "FULL"  # `load_trained` loads both
    second = {"second adapter": second_part()} if apart else {}
    parts = {**ours.parts, **second, "training": training_part(recipe, results, (folder / CURVE).is_file())}
    write_card(folder / CARD, OwnCard(ours.title, data, parts), read_run_card(recipe) or new_card())


def read_run_card(recipe: Recipe) -> ModelCard | None:
    """Read the model card in the output folder of a run; `None` if there is none.

    Raises:
        RecipeError: if it is damaged.
    """
    try:
        return read_card(Path(recipe.output_dir) / CARD)
    except ValueError as error:
        raise RecipeError(f"`output_dir`: {error}") from error


def _card_without_training(folder: Path, recipe: Recipe) -> OwnCard:
    labels = None if recipe.labels is None else [str(label) for label in recipe.labels]
    kind = recipe.adapter["peft_type"]
    if not (folder / CONFIG_NAME).is_file():  # PEFT's file of a prompt method would lack the task head
        methods = {
            "FULL": "A model that was fine-tuned in full",
            "HEAD": "A trained task head",
            "NONE": "The base model without an adapter",
        }
        method = methods.get(kind, f"The weights of a {kind} adapter")
        method += ", with P-Tuning's virtual tokens" if recipe.second_adapter else ""
        return adapter_card(recipe.model, method, _LOAD_WITHOUT_PEFT, labels=labels, of_peft=False)
    config = PeftConfig.from_pretrained(str(folder))
    return config.make_card() if isinstance(config, AdapterConfig) else config_card(config, labels)
