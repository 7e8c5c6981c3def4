"""What a run leaves in its folder.

adapter_model.safetensors, adapter_config.json   the best adapter, folded: what is published
README.md           its model card: data, settings, metrics, how to load it
recipe.yaml         the exact recipe, labels included: `predict` and `evaluate` read it
results.json        metrics, steps, versions, time
metrics.jsonl       every loss and metric recorded on the way, a line each
curve.png           the same as a picture
checkpoints/        the last and the best checkpoint, with an MLP as it was trained
logs/               the trackers' files
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..files.card import write_model_card
from .distributed import together
from .files import LOCKS, UNFINISHED, locked, naming, replacing, write_text
from .recipe import Recipe, RecipeError, load_recipe

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from accelerate import Accelerator

    from .multitask import JointRecipe

RECIPE, METRICS, RESULTS, CURVE, CARD = "recipe.yaml", "metrics.jsonl", "results.json", "curve.png", "README.md"
CHECKPOINTS, LOGS = "checkpoints", "logs"
_WEIGHTS = {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, "trained.safetensors"}
OURS = {RECIPE, METRICS, RESULTS, CURVE, CARD, CHECKPOINTS, LOGS, *_WEIGHTS}
"""All that a run leaves."""
_PIPELINES = {
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "causal-lm": "text-generation",
}
LEARNT = ("labels", "task_kwargs")
"""What training fills in, from the rows, where the user does not say."""
MAY_GROW = ("num_train_epochs", "max_steps", "early_stopping_patience")
"""The keys that make a run longer when it is resumed with another value."""
MAY_DIFFER = ("output_dir", "report_to", "eval_batch_size", "logging_steps", "trust_remote_code", *MAY_GROW)
"""The keys that a run may be resumed with another value of."""


def may_claim(recipe: Recipe, resume: bool, overwrite: bool) -> None:
    """See whether the output folder may be used; nothing is changed.

    Args:
        recipe: the recipe.
        resume: whether the run in it is to go on.
        overwrite: whether an earlier run in it may be removed.

    Raises:
        RecipeError: if it is in use, and neither applies.
    """
    folder = Path(recipe.output_dir)
    if resume:
        earlier = run_in(folder)
        if _trained_together(folder / RESULTS):
            raise RecipeError(
                f"`output_dir`: the adapter in {folder} was trained together with others, and cannot be resumed alone."
            )
        compare(load_recipe(earlier), recipe, *LEARNT)
        read_metrics(folder / METRICS)
    else:
        may_fill(folder, overwrite)


def _trained_together(results: Path) -> bool:
    """Whether a run's `results.json`, if there is one, says that the run is a part of a larger one."""
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (ValueError, RecursionError) as error:
        found = error
    if not isinstance(found, dict):
        raise RecipeError(
            f"{results} is damaged: it is no JSON object. Remove it; the run writes it anew when it is resumed."
        )
    return bool(found.get("together"))


def run_in(folder: Path) -> Path:
    """The recipe of the run in a folder.

    Raises:
        RecipeError: if there is none.
    """
    if not (folder / RECIPE).is_file():
        raise RecipeError(f"`output_dir`: there is no run to resume in {folder} (it has no {RECIPE}).")
    return folder / RECIPE


def may_fill(folder: Path, overwrite: bool, more: Iterable[str] = ()) -> None:
    """See whether a folder may be used for a new run.

    Args:
        folder: the folder.
        overwrite: whether an earlier run in it may be removed.
        more: folders in it that hold the same as a run's do.

    Raises:
        RecipeError: if it is in use, and may not be emptied.
    """
    if folder.exists() and (not folder.is_dir() or _entries(folder)):
        if not overwrite:
            raise RecipeError(
                f"`output_dir`: {folder} is not empty. Choose another folder, go on with the run in it (--resume), or "
                "replace that run (--overwrite)."
            )
        if not (folder / RECIPE).is_file():
            raise RecipeError(f"`output_dir`: {folder} holds no run of ours (no {RECIPE}) and is left alone.")
        others = sorted(_entries(folder) - {*OURS, *more})
        for name in more:
            if (folder / name).is_dir():
                others += sorted(f"{name}/{other}" for other in _entries(folder / name) - OURS)
        if others:
            raise RecipeError(
                f"`output_dir`: {folder} holds {others[0]!r} too, which is of no run, and is left alone. Move it, or "
                "choose another folder."
            )


def _entries(folder: Path) -> set[str]:
    """The names in a folder, without the lock, and without what a process that was killed had not finished."""
    return {path.name for path in folder.iterdir() if not path.name.startswith((UNFINISHED, *LOCKS))}


@contextmanager
def held(folder: Path, accelerator: Accelerator, command: str) -> Iterator[None]:
    """Have the processes of one run, and no others, work in an output folder.

    Args:
        folder: the folder.
        accelerator: the accelerator; the main process holds the lock.
        command: the command that resumes the run.

    Raises:
        RecipeError: if another run works in it; see `files.locked`.
        KeyboardInterrupt: on a Ctrl-C that is not noted by `Loop.run`; the message says what there is.
        OSError: if nothing can be written there.
    """
    with ExitStack() as stack:
        with together(accelerator):
            if accelerator.is_main_process:
                stack.enter_context(locked(folder))
        try:
            yield
        except KeyboardInterrupt as error:
            there = (folder / RECIPE).is_file()
            raise KeyboardInterrupt(
                f"Stopped. {how_to_resume(folder, command)}" if there else f"Stopped. There is no run in {folder} yet."
            ) from error


def how_to_resume(folder: str | os.PathLike[str], command: str) -> str:
    """The sentence that says how to go on with the run in a folder."""
    path = os.fspath(folder)
    quoted = subprocess.list2cmdline([path]) if os.name == "nt" else shlex.quote(path)
    return f"Resume with: prefix-adapter {command} --resume {quoted}"


def claim(recipe: Recipe, resume: bool, accelerator: Accelerator) -> None:
    """Make the output folder ready for the run, after `may_claim`: an earlier run in it is removed unless resumed.

    The recipe is written even if the run is resumed, as it may be a longer one now (`MAY_GROW`).
    """
    if accelerator.is_main_process:
        empty(Path(recipe.output_dir), resume)
        save_recipe(recipe)
    accelerator.wait_for_everyone()


def check_shared(folder: Path, accelerator: Accelerator) -> None:
    """See that every process finds the recipe in the folder that the main process has claimed.

    Raises:
        RecipeError: if one does not.
    """
    with together(accelerator):
        if not (folder / RECIPE).is_file():
            raise RecipeError(f"`output_dir`: {folder} must be in a file system that all nodes share.")


def empty(folder: Path, resume: bool) -> None:
    """Make a folder and remove what is in it; of a run that is resumed, only what it had not finished."""
    folder.mkdir(parents=True, exist_ok=True)
    # The recipe, by which the folder is known as ours, goes last.
    for path in sorted(folder.iterdir(), key=lambda path: path.name == RECIPE):
        if path.name in LOCKS or (resume and not path.name.startswith(UNFINISHED)):
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def compare(earlier: Recipe, now: Recipe, *left_out: str) -> None:
    """See that a run is resumed with the recipe that it was started with, but for `MAY_DIFFER` and `left_out`.

    Raises:
        RecipeError: if it is not; the message names the key.
    """
    old, new = earlier.to_dict(), now.to_dict()
    for key in old:
        if old[key] != new[key] and key not in (*MAY_DIFFER, *left_out):
            raise RecipeError(
                f"`{key}`: the run in {now.output_dir} was started with {old[key]!r}, not {new[key]!r}. Resume it "
                "with its own recipe, or start a new run."
            )


def save_recipe(recipe: Recipe | JointRecipe) -> None:
    """Write the recipe into its output folder."""
    with replacing(Path(recipe.output_dir) / RECIPE) as scratch:
        recipe.save(scratch)


class Log:
    """The record of a run: `metrics.jsonl`, and Accelerate's trackers.

    Args:
        recipe: the recipe.
        accelerator: the accelerator.
        settings: what the trackers are told of the run; the whole recipe by default.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, settings: dict[str, Any] | None = None) -> None:
        self.settings = recipe.to_dict() if settings is None else settings
        self.recipe, self.accelerator, self.path = recipe, accelerator, Path(recipe.output_dir) / METRICS

    def start(self, step: int) -> None:
        """Begin after a step. What was recorded later, and of the test rows, is forgotten: it is computed again."""
        if self.recipe.report_to:
            flat = {
                key: value if isinstance(value, (int, float, str)) else json.dumps(value)
                for key, value in self.settings.items()
            }
            self.accelerator.init_trackers("prefix-adapter", config=flat)
        if self.accelerator.is_main_process and self.path.is_file():
            kept = [line for line in read_metrics(self.path) if line["step"] <= step and line["split"] != "test"]
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, step: int, epoch: float, split: str, values: dict[str, float]) -> None:
        """Record values of a step."""
        if self.accelerator.is_main_process:
            line = {"step": step, "epoch": round(epoch, 4), "split": split, **values}
            with naming(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())  # a checkpoint relies on the lines before it
        self.accelerator.log({f"{split}/{name}": value for name, value in values.items()}, step=step)

    def read(self) -> list[dict[str, Any]]:
        """The lines recorded so far; see `read_metrics`."""
        return read_metrics(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; none if there is no such file.

    The last line is left out if it cannot be read: a process that dies, or a machine, may have written a part of it.

    Raises:
        RecipeError: if an earlier line is damaged; the message names it.
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
            problem = f"it is no JSON ({error})"
        if not problem:
            lines.append(line)
        elif number < len(texts):
            raise RecipeError(f"{path}, line {number}: {problem}. Mend or remove the line, or remove the file.")
    return lines


def _problem_of_line(line: Any) -> str | None:
    if not isinstance(line, dict):
        return "it is no JSON object"
    for name, kinds in (("step", (int,)), ("epoch", (int, float)), ("split", (str,))):
        if type(line.get(name)) not in kinds:
            return f"its `{name}` is {line.get(name)!r}"
    values = {name: value for name, value in line.items() if name != "split"}
    wrong = [name for name, value in values.items() if type(value) not in (int, float)]
    return f"its `{wrong[0]}` is no number" if wrong else None


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    packages = (
        "prefix-adapter",
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "datasets",
        "safetensors",
        "tokenizers",
    )
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except Exception:
            found[package] = "not installed"
    return found


def draw_curve(lines: list[dict[str, Any]], metric: str, best_step: int | None, path: Path) -> None:
    """Draw the training loss and the metric of the validation rows."""
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
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=120)
    pyplot.close(figure)


_CARD = """
## Training

{description}

| setting | value |
|---|---|
{settings}

### Results

The best of {steps} steps by {metric} on the validation rows: step {best_step}.

| rows | {names} |
|---|{rules}|
{results}

![Curves](curve.png)

{origin} New
rows are answered with `prefix-adapter predict <this repository or folder> rows.jsonl answers.jsonl`.

Versions: {versions}.
"""


_REPEATS = (
    "`recipe.yaml` in this repository repeats the run: `prefix-adapter train --config recipe.yaml --output_dir ...`."
)
_TOGETHER = "The prefix was trained together with other tasks, for each of which there is an adapter with it: {names}."


def training_section(recipe: Recipe, results: dict[str, Any]) -> str:
    """The part of a model card that says how the adapter was trained and how good it is."""
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
        "maximal length": results["max_length"],
        "seed": recipe.seed,
        "mixed precision": results["mixed_precision"],
    }
    tables = {"validation": results["validation"], **({"test": results["test"]} if "test" in results else {})}
    names = list(results["validation"])
    rows, others = results["rows"], results.get("together")
    return _CARD.format(
        description=f"Trained on {rows['train']:,} rows of {source} ({os.path.basename(data.train)}), "
        f"chosen on {rows['validation']:,}"
        + (f", measured on {rows['test']:,} that it never saw." if "test" in rows else "."),
        settings="\n".join(f"| {name} | {value} |" for name, value in settings.items()),
        steps=results["steps"],
        metric="the mean over all tasks" if others else results["metric"],
        origin=_TOGETHER.format(names=", ".join(others)) if others else _REPEATS,
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
    """Write the model card of an adapter's folder, with a section on loading if it is a prefix."""
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
