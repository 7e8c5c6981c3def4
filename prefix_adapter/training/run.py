"""A training run, from its recipe to the folder with the trained adapter."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from accelerate.utils import set_seed

from ..adapters.saved import fold, has_encoder
from ..files.whole import UNFINISHED
from . import checkpoint, outputs, reports
from .data import divide, load_rows, mix
from .distributed import propagate_errors, tensor_parallel_size
from .files import fsync_path, path_in_errors
from .loop import Loop, training_accelerator
from .model import (
    adapter_configs,
    check_packages,
    initialize_prefix,
    learning_rates,
    load_base,
    load_tokenizer,
    trained_parameters,
    wrap,
)
from .objective import TaskObjective
from .progress import describe_failure, describe_features, describe_steps, describe_task
from .recipe import Recipe, RecipeError, check_streaming, load_recipe, say, values_as_yaml
from .streams import RowStream, check_optional_columns, stream_splits
from .tasks import TASK_CLASSES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from accelerate import Accelerator
    from datasets import Dataset
    from torch import nn

    from .loop import EvaluationCallback
    from .objective import TrainingObjective
    from .tasks import Task


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    on_evaluation: EvaluationCallback | None = None,
) -> dict[str, Any]:
    """Train an adapter, and write it to `recipe.output_dir` with its model card, metrics and checkpoints.

    Under `accelerate launch` the processes share the work.

    Args:
        recipe: the recipe; it is not changed.
        resume: resume the run in `recipe.output_dir` from its last checkpoint. With a larger `num_train_epochs`,
            `max_steps` or `early_stopping_patience` a finished run is trained longer.
        overwrite: replace the run in `recipe.output_dir`.
        dry_run: load and check everything, print the complete recipe and the first encoded rows, and write nothing.
        quiet: show no summary and no progress.
        on_evaluation: called by the main process after every evaluation, with the step and the metrics of the
            validation rows; an exception that it raises ends the run.

    Returns:
        The contents of `results.json`, with the metrics of the validation rows at the best step, the metrics of the
        test rows, and more; empty for a dry run.

    Raises:
        RecipeError: if the recipe cannot be run, or another run uses `recipe.output_dir`.
        DataError: if the rows are invalid.
        UnsupportedBackboneError: if the base model does not support a prefix.
        CheckpointError: if the run to resume has checkpoints, but none is intact.
        TrainingInterrupted: on SIGINT or SIGTERM, after a checkpoint was written.
        TrainingDiverged: if the loss is not finite.
        OSError: if a file cannot be written.

    Example:
        >>> results = train(load_recipe("bert-large-rte", output_dir="runs/rte"))
        >>> results["validation"]["accuracy"]
    """
    recipe = copy.deepcopy(recipe)
    options = RunOptions(resume, overwrite, dry_run, quiet, on_evaluation)
    return TrainingRun(recipe, recipe, {recipe.task: recipe}).execute(options)


@dataclass(frozen=True)
class RunOptions:
    """How a run is started; see the arguments of `train`."""

    resume: bool = False
    overwrite: bool = False
    dry_run: bool = False
    quiet: bool = False
    on_evaluation: EvaluationCallback | None = None


class TrainingRun:
    """A training run.

    The first group of methods is for a run of one task; `multitask.JointRun` overrides them for several tasks.

    Args:
        recipe: the recipe of the run. The run writes the labels and settings that it infers from the rows into it.
        settings: the settings that all tasks share; for one task the recipe itself.
        recipes: the recipe of each task, by the task's name.
    """

    command: ClassVar[str] = "train"
    """The subcommand of `prefix-adapter` that resumes the run."""
    task_folders: Sequence[str] = ()
    """The subfolders of the output folder for the outputs of the tasks."""

    def __init__(self, recipe: outputs.AnyRecipe, settings: Recipe, recipes: dict[str, Recipe]) -> None:
        self.recipe, self.settings, self.recipes = recipe, settings, recipes
        for each in recipes.values():
            check_streaming(each)
        self.folder = Path(recipe.output_dir)
        self.checkpoints = self.folder / outputs.CHECKPOINTS

    # ---- One task or several

    def check_accelerator(self, accelerator: Accelerator) -> None:
        """Raise `RecipeError` if the run does not work with this accelerator."""

    def check_recipe(self, *ignored: str) -> None:
        """Check that the recipe in the output folder is this run's recipe, except for the `ignored` keys.

        Raises:
            RecipeError: if the folder has no recipe, or another one.
        """
        path = outputs.find_recipe(self.folder)
        if _is_part_of_joint_run(self.folder / outputs.RESULTS):
            raise RecipeError(
                f"`output_dir`: the adapter in {self.folder} was trained together with others, and cannot be resumed "
                "alone."
            )
        outputs.check_same_recipe(load_recipe(path), path, self.settings, *ignored)

    def earlier_task_folders(self) -> Sequence[str]:
        """The `task_folders` of the run that is in the output folder now."""
        return ()

    def task_in_errors(self, name: str) -> AbstractContextManager[None]:
        """Add the name of a task to errors about its recipe and its rows."""
        return nullcontext()

    def metric_prefix(self, name: str) -> str:
        """The prefix of a task's metrics among the metrics of the run."""
        return ""

    def join(
        self, models: dict[str, Any], objectives: dict[str, TaskObjective], accelerator: Accelerator
    ) -> tuple[nn.Module, TrainingObjective]:
        """The model to train and its objective, made of the model and the objective of each task."""
        (model,), (objective,) = models.values(), objectives.values()
        return model, objective

    def join_results(self, tasks: dict[str, dict[str, Any]], shared: dict[str, Any], loop: Loop) -> dict[str, Any]:
        """The contents of `results.json`.

        Args:
            tasks: the results of each task.
            shared: the results that are the same for all tasks.
            loop: the finished training loop.
        """
        (results,) = tasks.values()
        return results

    def write_outputs(
        self, models: dict[str, Any], results: dict[str, Any], log: reports.MetricsLog, accelerator: Accelerator
    ) -> None:
        """Write the files of the finished run; every process must call this method.

        Args:
            models: the model of each task, with the weights of the best step.
            results: the contents of `results.json`.
            log: the recorded metrics.
            accelerator: the accelerator.
        """
        if accelerator.is_main_process:
            best = checkpoint.step_folder(self.checkpoints, results["best_step"])
            write_adapter(self.settings, best, log.read(), results)

    # ---- The run

    def execute(self, options: RunOptions) -> dict[str, Any]:
        """Train, and write the outputs; see `train` for arguments, return value and errors."""
        with training_accelerator(self.settings) as accelerator:
            self.check_accelerator(accelerator)
            if options.dry_run:  # The lock is a file.
                return self._execute(accelerator, options)
            with outputs.lock_output_dir(self.folder, accelerator, self.command):
                return self._execute(accelerator, options)

    def _execute(self, accelerator: Accelerator, options: RunOptions) -> dict[str, Any]:
        started, resume = time.perf_counter(), options.resume
        with propagate_errors(accelerator):
            self._check_output_dir(resume, options.overwrite)
            models, objectives = self._load_tasks(accelerator)
            model, objective = self.join(models, objectives, accelerator)
            if not (resume and checkpoint.saved_steps(self.checkpoints)):
                first = next(iter(self.recipes))
                initialize_prefix(self.settings, objectives[first].task, models[first], objectives[first].features)
        # Counted now, before Accelerate shards the model.
        sizes = {name: trained_size(each) for name, each in models.items()}
        log = reports.MetricsLog(self.settings, accelerator, self.recipe.to_dict())
        parts = [describe_task(each, models[name], sizes[name]) for name, each in objectives.items()]
        loop = Loop(
            self.settings,
            objective,
            model,
            accelerator,
            self.checkpoints,
            log,
            self.command,
            options.quiet,
            options.on_evaluation,
        )
        objective.dry_run(loop.unwrapped_model())
        if not options.quiet:
            steps = describe_steps(loop.steps, self.settings.batch_size, loop.eval_steps, accelerator)
            say("\n".join([*parts, steps]))
        if options.dry_run:
            features = map(describe_features, objectives.values())
            say("\n".join([*features, "The complete recipe:", values_as_yaml(self.recipe.to_dict()).rstrip()]))
            return {}
        if resume:
            outputs.check_shared(self.folder, accelerator)
            self.check_recipe()  # Now with the labels and settings inferred from the rows.
            loop.resume()
        self._prepare_output_dir(accelerator, resume)
        log.start(loop.step)
        loop.run()

        if loop.steps:
            best = checkpoint.step_folder(self.checkpoints, loop.state["best_step"])
            checkpoint.load_weights(loop.unwrapped_model(), best)
        results = self._collect_results(loop, models, objectives, sizes)
        if not options.quiet:
            for name, own in objectives.items():
                if failure := describe_failure(own, results["tasks"][name] if "tasks" in results else results):
                    say(failure)
        results["seconds"] = round(time.perf_counter() - started, 1)
        self.write_outputs(models, results, log, accelerator)
        return results

    def _collect_results(
        self, loop: Loop, models: dict[str, Any], objectives: dict[str, TaskObjective], sizes: dict[str, int]
    ) -> dict[str, Any]:
        """The contents of `results.json`, without the time; evaluates the models on the test rows."""
        shared = {
            "best_step": loop.state["best_step"],
            "steps": loop.step,
            "mixed_precision": loop.accelerator.mixed_precision,
            "processes": loop.accelerator.num_processes,
            "versions": reports.versions(),
        }
        tasks: dict[str, dict[str, Any]] = {}
        for (name, own), steps in zip(objectives.items(), loop.batches.task_steps(loop.step), strict=True):
            prefix = self.metric_prefix(name)
            tasks[name] = {
                "validation": select_metrics(loop.state["best_metrics"], prefix),
                "constant_answer": own.constant_metrics(),
                "metric": own.metric,
                "epochs": own.batches.epochs(steps),
                "trained_parameters": sizes[name],
                "learning_rates": learning_rates(own.recipe, models[name]),
                "max_length": own.task.max_length,
                "rows": {
                    split: None if isinstance(rows, RowStream) else len(rows) for split, rows in own.rows.items()
                },
                **shared,
            }
            if "test" in own.rows:
                tasks[name]["test"] = test = own.evaluate(models[name], "test")
                loop.write("test", {f"{prefix}{key}": value for key, value in test.items()})
        return self.join_results(tasks, shared, loop)

    def _check_output_dir(self, resume: bool, overwrite: bool) -> None:
        """Check that the output folder may be used; nothing is changed.

        Raises:
            RecipeError: if it may not.
        """
        if resume:
            self.check_recipe(*outputs.INFERRED_KEYS)
            reports.read_metrics(self.folder / outputs.METRICS)
            for recipe in self.recipes.values():
                reports.read_run_card(recipe)  # The user's text in it stays.
        else:
            earlier = self.earlier_task_folders() if overwrite else ()
            outputs.check_new_output_dir(self.folder, overwrite, earlier)

    def _load_tasks(self, accelerator: Accelerator) -> tuple[dict[str, Any], dict[str, TaskObjective]]:
        """Load the model and the rows of each task.

        Returns:
            The models with their adapters, and the objectives, by the tasks' names.
        """
        tasks, rows, models, objectives = {}, {}, {}, {}
        for name, recipe in self.recipes.items():
            with self.task_in_errors(name):
                # Invalid settings are an error before the rows are loaded.
                check_packages(recipe)
                # Each task has its own tokenizer, because tasks change tokenizer settings.
                tasks[name] = TASK_CLASSES[recipe.task](recipe, load_tokenizer(recipe))
                adapter_configs(recipe, tasks[name])
                rows[name] = load_splits(recipe, tasks[name])
        processes = tensor_parallel_size(accelerator)
        set_seed(self.settings.seed)  # Every process draws the same initial weights.
        for name, recipe in self.recipes.items():
            with self.task_in_errors(name):
                models[name] = wrap(recipe, tasks[name], *load_base(recipe, tasks[name], processes))
                objectives[name] = TaskObjective(recipe, tasks[name], rows[name], accelerator)
        return models, objectives

    def _prepare_output_dir(self, accelerator: Accelerator, resume: bool) -> None:
        """Clear the output folder unless the run is resumed, and write the recipe.

        The recipe is written again for a resumed run, since its `outputs.CHANGEABLE_KEYS` may have changed.
        """
        if accelerator.is_main_process:
            outputs.clear(self.folder, resume)
            outputs.save_recipe(self.recipe)
            for name in self.task_folders:
                outputs.clear(self.folder / name, resume)
        accelerator.wait_for_everyone()
        outputs.check_shared(self.folder, accelerator)


def trained_size(model: nn.Module) -> int:
    """The number of trained parameters of a model."""
    return sum(parameter.numel() for parameter in trained_parameters(model).values())


def _is_part_of_joint_run(results: Path) -> bool:
    """Whether the `results.json` of an output folder, if there is one, is of a task of a joint run."""
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (ValueError, RecursionError) as error:
        found = error
    if not isinstance(found, dict):
        raise RecipeError(
            f"{results} is damaged: it is not a JSON object. Remove it; the resumed run writes it again."
        )
    return bool(found.get("together"))


def select_metrics(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The values whose names start with a prefix, by their names without it."""
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def load_splits(recipe: Recipe, task: Task) -> dict[str, Dataset | RowStream]:
    """Load and check the rows of a recipe, and have the task learn its labels from the training rows.

    Returns:
        The rows by split: `train`, `validation`, and `test` if the recipe has test rows.

    Raises:
        DataError: if the rows are invalid.
    """
    data = recipe.data
    if data.streaming:
        return stream_splits(data, task, recipe.seed)
    parts = [(each.source_of("train"), load_rows(each, "train")) for each in data.sources] if data.mixture else []
    rows = {"train": mix([own for _, own in parts], data, recipe.seed)} if parts else {}
    for split in ("train", "validation", "test"):
        if split not in rows and getattr(data, split):
            rows[split] = load_rows(data, split)
    names = {split: data.source_of(split) for split in rows}
    named = [*parts, *((names[split], own) for split, own in rows.items())]
    check_optional_columns(task, [(name, own.column_names) for name, own in named])
    for name, own in parts:
        task.check(own, name)  # The numbers of rows in a mixture say nothing.
    task.check(rows["train"], names["train"])
    task.learn_labels(rows["train"], names["train"])
    task.check(rows["train"], names["train"])  # Some checks need the labels.
    for split in ("validation", "test"):
        if split in rows:
            task.check(rows[split], names[split])
    recipe.labels = task.labels
    return {**divide(rows, data, recipe.seed)}


def write_adapter(recipe: Recipe, best: Path, lines: list[dict[str, Any]], results: dict[str, Any]) -> None:
    """Write the trained adapter of a task into its output folder, with recipe, results, plot and model card.

    All files are on the disk before the first one is moved into the folder. The weights are moved last, so a folder
    with weights is complete.

    Args:
        recipe: the recipe of the task.
        best: the checkpoint of the best step; there is none if nothing was trained.
        lines: the recorded metrics, for the plot.
        results: the contents of `results.json`.

    Raises:
        OSError: if a file cannot be written; earlier files are unchanged.
    """
    folder = Path(recipe.output_dir)
    with path_in_errors(folder), tempfile.TemporaryDirectory(dir=folder, prefix=UNFINISHED) as scratch:
        export = Path(scratch) / "adapter"
        if has_encoder(best):
            fold(best, export)
        elif results["steps"]:
            left_out = shutil.ignore_patterns(*checkpoint.RESUME_FILES)
            shutil.copytree(best, export, ignore=left_out, copy_function=shutil.copyfile)
        else:
            export.mkdir()
        recipe.save(export / outputs.RECIPE)
        reports.draw_curve(lines, results["metric"], results["best_step"], export / outputs.CURVE)
        (export / outputs.RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        reports.write_run_card(export, recipe, results)
        # The first adapter's weights are the very last.
        paths = [path for path in export.rglob("*") if path.is_file()]
        paths.sort(key=lambda path: (path.suffix == ".safetensors", path.parent == export, path.name))
        for path in paths:
            path.chmod(0o644)  # safetensors creates files that only their owner can read.
            fsync_path(path)
        for path in paths:
            target = folder / path.relative_to(export)
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
        for place in {folder / path.relative_to(export).parent for path in paths}:
            fsync_path(place)
