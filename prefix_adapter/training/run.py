"""A training run from its recipe to a published adapter's folder."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import set_seed

from ..adapters.saved import fold
from ..training import checkpoint, outputs
from .data import DataError, divide, load_rows
from .distributed import together
from .evaluation import evaluate
from .files import UNFINISHED, naming, to_disk
from .lesson import Lesson
from .loop import Loop, accelerating
from .model import adapter_config, learning_rates, load_base, load_tokenizer, start, trained, wrap
from .recipe import load_recipe
from .tasks import TASK_CLASSES

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate import Accelerator
    from datasets import Dataset

    from .recipe import Recipe
    from .tasks import Task


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_evaluation: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train an adapter as a recipe says, and leave it in `recipe.output_dir` with its card, metrics and checkpoints.

    Run by `accelerate launch`, the processes share the work.

    Args:
        recipe: the recipe.
        resume: go on with the run in `recipe.output_dir`, from its last checkpoint. With a larger
            `num_train_epochs`, `max_steps` or `early_stopping_patience` a finished run is trained longer.
        overwrite: replace the run in `recipe.output_dir`.
        on_evaluation: called by the main process after every evaluation, with the step and the validation rows'
            metrics; what it raises ends the run.

    Returns:
        The contents of `results.json`: metrics of the validation rows at the best step and of the test rows, and more.

    Raises:
        RecipeError: if the recipe cannot be run, or another run works in `recipe.output_dir`.
        DataError: if there is something wrong with the rows.
        UnsupportedBackboneError: if the base model cannot take a prefix.
        CheckpointError: if the run that is to be resumed has checkpoints, and none that is whole.
        TrainingInterrupted: on SIGINT or SIGTERM, after a checkpoint was written.
        TrainingDiverged: if the loss is not finite.
        OSError: if a file cannot be written.
    """
    recipe = copy.deepcopy(recipe)  # what the rows tell is filled in
    folder = Path(recipe.output_dir)
    with accelerating(recipe) as accelerator, outputs.held(folder, accelerator, Lesson.command):
        return _train(recipe, accelerator, resume, overwrite, on_evaluation)


def _train(
    recipe: Recipe,
    accelerator: Accelerator,
    resume: bool,
    overwrite: bool,
    on_evaluation: Callable[[int, dict[str, float]], None] | None,
) -> dict[str, Any]:
    started = time.perf_counter()
    folder = Path(recipe.output_dir)
    checkpoints = folder / outputs.CHECKPOINTS
    with together(accelerator):
        outputs.may_claim(recipe, resume, overwrite)
        tokenizer = load_tokenizer(recipe)
        task = TASK_CLASSES[recipe.task](recipe, tokenizer)
        adapter_config(recipe, task)
        rows = load_splits(recipe, task)
        set_seed(recipe.seed)  # the same first weights in every process
        model = wrap(recipe, task, *load_base(recipe, task))
        if not (resume and checkpoint.find(checkpoints)):
            start(recipe, task, model)
    log = outputs.Log(recipe, accelerator)
    parameters = sum(parameter.numel() for parameter in trained(model).values())
    lesson = Lesson(recipe, task, rows["train"], rows["validation"], accelerator)
    loop = Loop(recipe, lesson, model, accelerator, checkpoints, log, on_evaluation)
    loop.try_out()
    if resume:
        outputs.check_shared(folder, accelerator)
        outputs.compare(load_recipe(folder / outputs.RECIPE), recipe)
        loop.resume()
    outputs.claim(recipe, resume, accelerator)
    outputs.check_shared(folder, accelerator)
    log.start(loop.step)
    loop.run()

    best_step = loop.state["best_step"]
    best = checkpoint.folder_of(loop.checkpoints, best_step)
    checkpoint.load_weights(accelerator.unwrap_model(loop.model), best)
    results: dict[str, Any] = {
        "validation": loop.state["best_metrics"],
        "metric": loop.metric,
        "best_step": best_step,
        "steps": loop.step,
        "epochs": loop.step / loop.batches.steps_per_epoch,
        "trained_parameters": parameters,
        "learning_rates": learning_rates(recipe),
        "max_length": task.max_length,
        "mixed_precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "rows": {split: len(own) for split, own in rows.items()},
        "versions": outputs.versions(),
    }
    if "test" in rows:
        results["test"], _ = evaluate(task, loop.model, rows["test"], recipe.eval_batch_size, accelerator)
        log.write(loop.step, results["epochs"], "test", results["test"])
    results["seconds"] = round(time.perf_counter() - started, 1)
    if accelerator.is_main_process:
        leave(recipe, best, log.read(), results)
    return results


def load_splits(recipe: Recipe, task: Task) -> dict[str, Dataset]:
    """The rows of a recipe, checked, and the task's labels learnt from those to train on.

    Raises:
        DataError: if there is something wrong with the rows.
    """
    data = recipe.data
    rows = {split: load_rows(data, split) for split in ("train", "validation", "test") if getattr(data, split)}
    for name in task.optional_columns:
        lacking = [getattr(data, split) for split, own in rows.items() if name not in own.column_names]
        if 0 < len(lacking) < len(rows):
            raise DataError(f"{lacking[0]} has no column {name!r}, and others have: they would be another task.")
    task.check(rows["train"], data.train)
    task.learn_labels(rows["train"], data.train)
    task.check(rows["train"], data.train)  # again, for what only the labels tell
    for split in ("validation", "test"):
        if split in rows:
            task.check(rows[split], getattr(data, split))
    recipe.labels = task.labels
    return divide(rows, data, recipe.seed)


def leave(recipe: Recipe, best: Path, lines: list[dict[str, Any]], results: dict[str, Any]) -> None:
    """Write what a run leaves.

    All files are written and on the disk before the first one gets its place. The weights come last, so that a folder
    that has them has everything.

    Args:
        recipe: the recipe.
        best: the best checkpoint.
        lines: what was recorded on the way.
        results: the contents of `results.json`.

    Raises:
        OSError: if a file cannot be written; what was there before is untouched.
    """
    folder = Path(recipe.output_dir)
    with naming(folder), tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as scratch:
        export = Path(scratch) / "adapter"
        if recipe.adapter["peft_type"] == "PREFIX_TUNING_V2" and recipe.adapter.get("prefix_projection"):
            fold(best, export)
        else:
            export.mkdir()
            for path in best.iterdir():
                if path.name not in checkpoint.NOT_THE_ADAPTER:
                    shutil.copyfile(path, export / path.name)
        recipe.save(export / outputs.RECIPE)
        outputs.draw_curve(lines, results["metric"], results["best_step"], export / outputs.CURVE)
        (export / outputs.RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        outputs.write_card(export, recipe, results)
        paths = sorted(export.iterdir(), key=lambda path: (path.suffix == ".safetensors", path.name))
        for path in paths:
            path.chmod(0o644)  # safetensors makes files that only their owner can read
            to_disk(path)
        for path in paths:
            path.replace(folder / path.name)
        to_disk(folder)
