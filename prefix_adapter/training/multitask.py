"""Multi-task training: several tasks train one prefix, each with a head of its own (Liu et al. 2022, section 3.3).

The result is an ordinary adapter for each task, all with the same prefix. Each can be used as it is, or its prefix can
be trained further on one task (`init_from`).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import shutil
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, extract_model_from_parallel
from torch import nn

from ..files.whole import new_folder
from . import checkpoint, outputs, reports
from .batches import JointBatches
from .data import DataError
from .distributed import initialize_optimizer_state
from .files import write_text
from .model import learning_rates, trained_parameters
from .recipe import Recipe, RecipeError, read_values, write_values
from .run import RunOptions, TrainingRun, select_metrics, trained_size, write_adapter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from accelerate import Accelerator
    from torch import Tensor

    from .loop import EvaluationCallback, Loop
    from .objective import TaskObjective

TASK_KEYS = ("task", "data", "task_kwargs", "max_length", "labels", "head_learning_rate", "metric_for_best_model")
"""The keys of a recipe that each task sets for itself; the tasks share all others."""
_NAME = re.compile(r"[A-Za-z0-9][\w-]*")


@dataclass
class JointRecipe:
    """All settings of a run that trains one prefix for several tasks.

    Args:
        output_dir: The folder for the run; it has a subfolder for each task's adapter, with the task's name.
        recipes: An ordinary recipe for each task, by the task's name. They may differ in `TASK_KEYS` and `output_dir`
            only. `num_train_epochs` counts passes over the rows of all tasks together.
        sampling_exponent: The task of a step is drawn with a probability proportional to its number of training
            features to the power of this exponent: with 1 each feature is equally likely, with 0 each task.

    Raises:
        RecipeError: if the recipe cannot be run; the message names the key.

    Example:
        >>> shared = {"model": "bert-base-cased", "adapter": {"num_virtual_tokens": 20}}
        >>> ner = Recipe("token-classification", output_dir="", data=Data(train="ner.jsonl"), **shared)
        >>> topics = Recipe("sequence-classification", output_dir="", data=Data(train="topics.jsonl"), **shared)
        >>> recipe = JointRecipe("runs/shared", {"ner": ner, "topics": topics})
    """

    output_dir: str
    recipes: dict[str, Recipe]
    sampling_exponent: float = 1.0

    def __post_init__(self) -> None:
        if len(self.recipes) < 2:
            raise RecipeError(f"`tasks`: at least two tasks are needed, got {list(self.recipes)}.")
        taken = {name.lower() for name in outputs.RUN_FILES}
        for name, recipe in self.recipes.items():
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise RecipeError(
                    f"`tasks`: {name!r} is used as the name of a folder: use letters, digits, - and _ only."
                )
            if name.lower() in taken:
                raise RecipeError(
                    f"`tasks.{name}`: the run creates another file or folder {name!r}: choose another name."
                )
            taken.add(name.lower())
            if recipe.data.streaming:
                raise RecipeError(
                    f"`tasks.{name}.data.streaming`: tasks that are trained together cannot be streamed."
                )
            own, shared = recipe.to_dict(), self.settings.to_dict()
            for key in own:
                if own[key] != shared[key] and key not in (*TASK_KEYS, "output_dir"):
                    raise RecipeError(
                        f"`{key}` is shared by all tasks: {own[key]!r} of {name!r} is not {shared[key]!r}."
                    )
        exponent = self.sampling_exponent
        if isinstance(exponent, bool) or not isinstance(exponent, (int, float)) or not 0 <= exponent <= 10:
            raise RecipeError(f"`sampling_exponent` must be a number from 0 to 10, got {exponent!r}.")
        if self.settings.adapter["peft_type"] != "PREFIX_TUNING_V2":
            raise RecipeError("`adapter.peft_type`: tasks can share a prefix only, so it must be PREFIX_TUNING_V2.")
        if self.settings.second_adapter:
            raise RecipeError("`second_adapter`: tasks can share a prefix only. Leave it out.")
        # Sorted, so that a run does not depend on the order of the tasks in a file.
        self.recipes = {
            name: dataclasses.replace(recipe, output_dir=os.path.join(self.output_dir, name))
            for name, recipe in sorted(self.recipes.items())
        }

    @property
    def settings(self) -> Recipe:
        """The settings that the tasks share; ignore its `TASK_KEYS`."""
        return dataclasses.replace(next(iter(self.recipes.values())), output_dir=self.output_dir)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> JointRecipe:
        """Make a recipe of plain values: the shared keys, `sampling_exponent`, and a mapping for each task in `tasks`.

        Raises:
            RecipeError: if a key is unknown, missing or misplaced, or its value is invalid; the message names the key.
        """
        shared = dict(values)
        tasks, exponent = shared.pop("tasks", None), shared.pop("sampling_exponent", 1.0)
        output_dir = shared.pop("output_dir", None)
        if not isinstance(tasks, dict) or not all(isinstance(own, dict) for own in tasks.values()):
            raise RecipeError(f"`tasks` must be a mapping of names to mappings, got {tasks!r}.")
        if not isinstance(output_dir, (str, os.PathLike)):
            raise RecipeError(f"`output_dir` must be the path of a folder, got {output_dir!r}.")
        for key in TASK_KEYS:
            if key in shared:
                raise RecipeError(f"`{key}`: each task has its own: move it to `tasks.<name>`.")
        recipes = {}
        for name, own in tasks.items():
            for key in own:
                if key not in TASK_KEYS:
                    known = ", ".join(TASK_KEYS)
                    raise RecipeError(f"`tasks.{name}.{key}`: a task cannot set this key; it can set {known}.")
            with task_in_errors(name):
                recipes[name] = Recipe.from_dict({**shared, **own, "output_dir": output_dir})
        return cls(os.fspath(output_dir), recipes, exponent)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, for YAML or JSON."""
        own = {name: recipe.to_dict() for name, recipe in self.recipes.items()}
        shared = {key: value for key, value in self.settings.to_dict().items() if key not in TASK_KEYS}
        tasks = {name: {key: values[key] for key in TASK_KEYS} for name, values in own.items()}
        return {**shared, "sampling_exponent": self.sampling_exponent, "tasks": tasks}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as YAML."""
        write_values(self.to_dict(), path)


def load_joint_recipe(path: str | os.PathLike[str], **overrides: Any) -> JointRecipe:
    """Read a recipe of several tasks from YAML.

    Args:
        path: the file.
        **overrides: values that replace the file's, for instance `output_dir`; also `trust_remote_code`, which a file
            cannot set.

    Raises:
        RecipeError: if the file is not a valid recipe; the message names the key.

    Example:
        >>> recipe = load_joint_recipe("shared.yaml", output_dir="runs/shared")
    """
    values = read_values(path)
    try:
        return JointRecipe.from_dict({**values, **overrides})
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


@contextmanager
def task_in_errors(name: str) -> Iterator[None]:
    """Add the name of a task to errors about its own keys and its rows."""
    try:
        yield
    except RecipeError as error:
        text = str(error)
        key = re.match(r"`(\w+)", text)
        if key is None:
            raise RecipeError(f"`tasks.{name}`: {text}") from error
        if key[1] in TASK_KEYS:
            raise RecipeError(f"`tasks.{name}.{text[1:]}") from error
        raise
    except DataError as error:
        raise DataError(f"`tasks.{name}`: {error}") from error


class SharedPrefix(nn.Module):
    """The models of several tasks as one module, with one backbone and one prefix.

    Each model receives the parameters of the first model. A model keeps only its task head, and backbone parameters
    that are not equal to those of the first model, for instance new ones.

    Args:
        models: prefix models of the same base model, by the tasks' names.

    Raises:
        RecipeError: if the prefixes have different shapes, because the tasks use different parts of the base model.
    """

    def __init__(self, models: dict[str, Any]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models.values())
        (first, model), *others = models.items()
        shared, frozen = _prefix_parameters(model), _frozen_parameters(model)
        self.prefix = list(shared.values())
        for name, other in others:
            prefix = _prefix_parameters(other)
            if {key: own.shape for key, own in prefix.items()} != {key: own.shape for key, own in shared.items()}:
                raise RecipeError(
                    f"`tasks`: {first} and {name} do not use the same attention layers of the base model, and cannot "
                    "share a prefix."
                )
            replacements = {id(own): shared[key] for key, own in prefix.items()}
            for key, own in _frozen_parameters(other).items():
                if key in frozen and frozen[key].dtype == own.dtype and torch.equal(frozen[key], own):
                    replacements[id(own)] = frozen[key]
            for module in other.modules():
                for key, own in list(module.named_parameters(recurse=False)):
                    if id(own) in replacements:
                        setattr(module, key, replacements[id(own)])

    def forward(self, task: int, **inputs: Any) -> Any:
        """The output of the model of a task, by its position."""
        return self.models[task](**inputs)


class TaskModel:
    """The model of one task of a `SharedPrefix`, called through Accelerate's wrapper.

    Args:
        model: the `SharedPrefix`, which Accelerate may have wrapped.
        task: the position of the task.

    Attributes:
        module: the model of the task, without a wrapper.
    """

    def __init__(self, model: Any, task: int) -> None:
        self.model, self.task = model, task
        self.module = extract_model_from_parallel(model).models[task]

    def __call__(self, **inputs: Any) -> Any:
        """The output of the model of the task."""
        return self.model(self.task, **inputs)


def _prefix_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in trained_parameters(model).items() if "modules_to_save" not in name}


def _head_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in trained_parameters(model).items() if "modules_to_save" in name]


def _frozen_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The frozen parameters by their names inside the backbone, whose attribute name depends on the model class."""
    base = model.get_base_model()
    return {
        name.removeprefix(f"{base.base_model_prefix}."): parameter
        for name, parameter in base.named_parameters()
        if not parameter.requires_grad
    }


class JointObjective:
    """The training objective of several tasks; see `TrainingObjective` for the methods.

    The metrics are those of each task, as `name/metric`, the mean `loss`, and `score`: the mean of the metrics that
    choose each task's best checkpoint. A metric that is better when lower counts negatively.

    Args:
        recipe: the recipe.
        objectives: the objective of each task, by its name.
        accelerator: the accelerator.
    """

    metric, lower_is_better = "score", False

    def __init__(self, recipe: JointRecipe, objectives: dict[str, TaskObjective], accelerator: Accelerator) -> None:
        self.recipe, self.objectives, self.accelerator = recipe, objectives, accelerator
        self.items = [count for objective in objectives.values() for count in objective.items]
        batches: Any = [objective.batches for objective in objectives.values()]  # `JointRecipe` allows no streams
        self.batches = JointBatches(batches, recipe.sampling_exponent, recipe.settings.seed)
        self._in_order = list(objectives.values())

    def prepare(self, model: Any) -> tuple[Any, Any, torch.optim.Optimizer]:
        """See `TrainingObjective.prepare`."""
        rates = [learning_rates(each.recipe, own) for each, own in zip(self._in_order, model.models, strict=True)]
        # That of the prefix is the same for all tasks (`JointRun.join`).
        groups = [{"params": model.prefix, "lr": rates[0][0], "name": "adapter"}]
        for name, own, (_, head_rate) in zip(self.objectives, model.models, rates, strict=True):
            head = _head_parameters(own)
            if head:
                groups.append({"params": head, "lr": head_rate, "name": f"head.{name}"})
        optimizer = torch.optim.AdamW(groups, weight_decay=self.recipe.settings.weight_decay)
        if self.accelerator.ddp_handler is not None:
            self.accelerator.ddp_handler.find_unused_parameters = True  # A step uses the head of one task.
        for each in model.models:  # Evaluation calls each model directly, and needs the same precision.
            self.accelerator.prepare_model(each, evaluation_mode=True)
        prepared, wrapped = self.accelerator.prepare(model, optimizer)
        initialize_optimizer_state(optimizer)
        return prepared, wrapped, optimizer

    def dry_run(self, model: SharedPrefix) -> None:
        """See `TrainingObjective.dry_run`."""
        for (name, objective), own in zip(self.objectives.items(), model.models, strict=True):
            with task_in_errors(name):
                objective.dry_run(own)

    def loss(self, model: Any, features: list[int]) -> Tensor:
        """See `TrainingObjective.loss`; the features must be of one task."""
        task, own = self.batches.split_index(features)
        return self._in_order[task].loss(TaskModel(model, task), own)

    def evaluate(self, model: SharedPrefix) -> dict[str, float]:
        """See `TrainingObjective.evaluate`."""
        losses, scores, metrics = [], [], {}
        for (name, objective), own in zip(self.objectives.items(), model.models, strict=True):
            found = objective.evaluate(own)
            losses.append(found["loss"])
            scores.append(-found[objective.metric] if objective.lower_is_better else found[objective.metric])
            metrics.update({f"{name}/{key}": value for key, value in found.items()})
        return {"loss": sum(losses) / len(losses), self.metric: sum(scores) / len(scores), **metrics}


def train_together(
    recipe: JointRecipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    on_evaluation: EvaluationCallback | None = None,
) -> dict[str, Any]:
    """Train one prefix for several tasks, and write an adapter for each task to `recipe.output_dir`.

    Under `accelerate launch` the processes share the work.

    Args:
        recipe: the recipe; it is not changed.
        resume: resume the run in `recipe.output_dir` from its last checkpoint.
        overwrite: replace the run in `recipe.output_dir`.
        dry_run: load and check everything, print the complete recipe and the first encoded rows, and write nothing.
        quiet: show no summary and no progress.
        on_evaluation: called by the main process after every evaluation, with the step and the metrics of the
            validation rows; an exception that it raises ends the run.

    Returns:
        The contents of `results.json`, with the mean score of the best step, and under `tasks` the results of each
        task, as `train` returns them.

    Raises:
        RecipeError: if the recipe cannot be run, or under FSDP or DeepSpeed.
        DataError: if the rows are invalid.
        UnsupportedBackboneError: if the base model does not support a prefix.
        CheckpointError: if the run to resume has checkpoints, but none is intact.
        TrainingInterrupted: on SIGINT or SIGTERM, after a checkpoint was written.
        TrainingDiverged: if the loss is not finite.
        OSError: if a file cannot be written.

    Example:
        >>> results = train_together(load_joint_recipe("shared.yaml"))
        >>> results["tasks"]["ner"]["validation"]["f1"]
    """
    return JointRun(copy.deepcopy(recipe)).execute(RunOptions(resume, overwrite, dry_run, quiet, on_evaluation))


class JointRun(TrainingRun):
    """A run that trains one prefix for several tasks; see `TrainingRun` for the methods.

    Args:
        recipe: the recipe.
    """

    command = "train-together"
    recipe: JointRecipe

    def __init__(self, recipe: JointRecipe) -> None:
        super().__init__(recipe, recipe.settings, recipe.recipes)
        self.task_folders = list(recipe.recipes)

    def check_accelerator(self, accelerator: Accelerator) -> None:
        """See `TrainingRun.check_accelerator`."""
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            kind = accelerator.distributed_type.value
            raise RecipeError(f"{kind} cannot shard models that share parameters: train the tasks without {kind}.")

    def check_recipe(self, *ignored: str) -> None:
        """See `TrainingRun.check_recipe`."""
        path = outputs.find_recipe(self.folder)
        earlier = load_joint_recipe(path)
        for key, old, new in (
            ("tasks", list(earlier.recipes), list(self.recipes)),
            ("sampling_exponent", earlier.sampling_exponent, self.recipe.sampling_exponent),
        ):
            if old != new:
                raise RecipeError(f"`{key}`: the run in {self.folder} was started with {old!r}, not {new!r}.")
        for name, own in self.recipes.items():
            with task_in_errors(name):
                outputs.check_same_recipe(earlier.recipes[name], path, own, *ignored)

    def earlier_task_folders(self) -> Sequence[str]:
        """See `TrainingRun.earlier_task_folders`."""
        path = self.folder / outputs.RECIPE
        tasks = read_values(path).get("tasks") if path.is_file() else None
        return list(tasks) if isinstance(tasks, dict) else []

    def task_in_errors(self, name: str) -> AbstractContextManager[None]:
        """See `TrainingRun.task_in_errors`."""
        return task_in_errors(name)

    def metric_prefix(self, name: str) -> str:
        """See `TrainingRun.metric_prefix`."""
        return f"{name}/"

    def join(
        self, models: dict[str, Any], objectives: dict[str, TaskObjective], accelerator: Accelerator
    ) -> tuple[SharedPrefix, JointObjective]:
        """See `TrainingRun.join`."""
        # The prefix of all tasks has the default rate of the task that bears the least.
        rate = min(learning_rates(each.recipe, models[name])[0] for name, each in objectives.items())
        for each in objectives.values():
            each.recipe = dataclasses.replace(each.recipe, learning_rate=rate)
        return SharedPrefix(models), JointObjective(self.recipe, objectives, accelerator)

    def join_results(self, tasks: dict[str, dict[str, Any]], shared: dict[str, Any], loop: Loop) -> dict[str, Any]:
        """See `TrainingRun.join_results`."""
        for name, own in tasks.items():
            own["together"] = [other for other in tasks if other != name]
        return {
            "metric": loop.objective.metric,
            "validation": {key: value for key, value in loop.state["best_metrics"].items() if "/" not in key},
            "epochs": loop.batches.epochs(loop.step),
            "trained_parameters": trained_size(loop.unwrapped_model()),
            **shared,
            "tasks": tasks,
        }

    def write_outputs(
        self, models: dict[str, Any], results: dict[str, Any], log: reports.MetricsLog, accelerator: Accelerator
    ) -> None:
        """See `TrainingRun.write_outputs`."""
        weights = {name: checkpoint.gather_weights(model) for name, model in models.items()}
        if not accelerator.is_main_process:
            return
        lines = log.read()
        validation = [line for line in lines if line["split"] == "validation"]
        for name, own in self.recipes.items():
            checkpoints = Path(own.output_dir) / outputs.CHECKPOINTS
            shutil.rmtree(checkpoints, ignore_errors=True)  # A finished run that is resumed has one.
            best = checkpoint.step_folder(checkpoints, results["best_step"])
            with new_folder(best) as scratch:
                checkpoint.save_weights(models[name], weights[name], scratch)
            own_lines = [{**line, **select_metrics(line, self.metric_prefix(name))} for line in validation]
            write_adapter(own, best, own_lines, {**results["tasks"][name], "seconds": results["seconds"]})
        reports.draw_curve(lines, results["metric"], results["best_step"], self.folder / outputs.CURVE)
        write_text(self.folder / outputs.RESULTS, json.dumps(results, indent=2) + "\n")
