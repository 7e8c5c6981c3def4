"""The records of a run: recorded metrics, versions, the plot and the model card."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig

from ..files.card import write_model_card
from .files import atomic_write, path_in_errors, write_text
from .outputs import CARD, METRICS
from .recipe import Recipe, RecipeError

if TYPE_CHECKING:
    from accelerate import Accelerator

_PIPELINES = {
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "causal-lm": "text-generation",
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
            self.accelerator.init_trackers("prefix-adapter", config=flat)
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


_CARD = """
## Training

{description}

| setting | value |
|---|---|
{settings}

### Results

Step {best_step} of {steps} has the best {metric} on the validation rows.

| rows | {names} |
|---|{rules}|
{results}

![Curves](curve.png)

{origin}
To predict new rows, run `prefix-adapter predict <this repository or folder> rows.jsonl answers.jsonl`.

Versions: {versions}.
"""
_SINGLE_RUN = (
    "`recipe.yaml` in this repository repeats the run: `prefix-adapter train --config recipe.yaml --output_dir ...`."
)
_JOINT_RUN = "The prefix was trained together with other tasks, each of which has its own adapter: {names}."


def training_section(recipe: Recipe, results: dict[str, Any]) -> str:
    """The section of a model card on training: data, settings, metrics and versions."""
    data = recipe.data
    source = data.path or "files"
    settings = {
        "task": recipe.task,
        "base model": recipe.model,
        "adapter": yaml.safe_dump(recipe.adapter, default_flow_style=True, width=2**31).strip(),
        "trained parameters": f"{results['trained_parameters']:,}",
        "learning rate (adapter, head)": f"{results['learning_rates'][0]:g}, {results['learning_rates'][1]:g}",
        "schedule": f"{recipe.lr_scheduler_type}, warm-up {recipe.warmup_ratio:g}",
        "batch size": recipe.batch_size,
        "epochs": f"{results['epochs']:g}",
        "maximum length": results["max_length"],
        "seed": recipe.seed,
        "mixed precision": results["mixed_precision"],
    }
    tables = {"validation": results["validation"], **({"test": results["test"]} if "test" in results else {})}
    names = list(results["validation"])
    rows, others = results["rows"], results.get("together")
    return _CARD.format(
        description=f"Trained on {rows['train']:,} rows of {source} ({os.path.basename(data.train)}), "
        f"validated on {rows['validation']:,}" + (f" and tested on {rows['test']:,}." if "test" in rows else "."),
        settings="\n".join(f"| {name} | {value} |" for name, value in settings.items()),
        steps=results["steps"],
        metric="mean score of all tasks" if others else results["metric"],
        origin=_JOINT_RUN.format(names=", ".join(others)) if others else _SINGLE_RUN,
        best_step=results["best_step"],
        names=" | ".join(names),
        rules="---|" * (len(names) - 1) + "---",
        results="\n".join(
            f"| {split} | " + " | ".join(f"{values.get(name, float('nan')):.4f}" for name in names) + " |"
            for split, values in tables.items()
        ),
        versions=", ".join(f"{name} {number}" for name, number in results["versions"].items()),
    )


def write_card(folder: Path, recipe: Recipe, results: dict[str, Any]) -> None:
    """Write the model card of an adapter's folder; a prefix adapter gets a section on loading."""
    data: dict[str, Any] = {
        "library_name": "peft",
        "base_model": None if os.path.isdir(recipe.model) else recipe.model,
        "pipeline_tag": _PIPELINES.get(recipe.task),
        "datasets": recipe.data.path if recipe.data.path and not os.path.exists(recipe.data.path) else None,
        "metrics": sorted(set(results["validation"]) - {"loss"}),
        "tags": ["prefix-adapter"],
    }
    name = Path(recipe.output_dir).resolve().name
    card = ModelCard.from_template(
        ModelCardData(**data),
        template_str="---\n{{ card_data }}\n---\n\n# " + name + "\n" + training_section(recipe, results),
    )
    card.save(folder / CARD)
    if recipe.adapter["peft_type"] == "PREFIX_TUNING_V2":
        config = PeftConfig.from_pretrained(str(folder))
        write_model_card(folder, config.num_virtual_tokens, config.task_type, config.base_model_name_or_path)
