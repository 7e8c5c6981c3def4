"""Several tasks learn one prefix, each with a head of its own (Liu et al. 2022, section 3.3).

What is left is an ordinary adapter for each task, all with the same prefix: to be used as they are, or for tasks to go
on alone from it.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import re
import shutil
import time
from bisect import bisect_right
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, set_seed
from torch import nn

from ..files.whole import new_folder
from ..training import checkpoint, outputs
from .data import DataError
from .distributed import start_moments, together
from .evaluation import evaluate
from .lesson import Lesson
from .loop import Loop, accelerating
from .model import adapter_config, learning_rates, load_base, load_tokenizer, start, trained, wrap
from .recipe import Recipe, RecipeError, read_values, write_values
from .run import leave, load_splits
from .tasks import TASK_CLASSES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from accelerate import Accelerator
    from datasets import Dataset
    from torch import Tensor

    from .batches import Batches
    from .tasks import Task

OF_A_TASK = ("task", "data", "task_kwargs", "max_length", "labels", "head_learning_rate", "metric_for_best_model")
"""The keys of a recipe that each task has for itself; it shares all others."""
_NAME = re.compile(r"[A-Za-z0-9][\w-]*")


@dataclass
class JointRecipe:
    """All settings of a run in which several tasks learn one prefix.

    Args:
        output_dir: The folder for the run; each task's adapter is in a folder of the task's name in it.
        recipes: An ordinary recipe for each task, by its name. They differ in the keys `OF_A_TASK` only, and
            in `output_dir`. `num_train_epochs` is in passes over the rows of all tasks together.
        sampling_exponent: The task of a step is drawn with a probability that is proportional to the number of its
            training features to the power of this: 1 for every feature alike, 0 for every task alike.

    Raises:
        RecipeError: if the recipe cannot be run; the message names the key.
    """

    output_dir: str
    recipes: dict[str, Recipe]
    sampling_exponent: float = 1.0

    def __post_init__(self) -> None:
        if len(self.recipes) < 2:
            raise RecipeError(f"`tasks`: there must be two at least, got {list(self.recipes)}.")
        taken = {name.lower() for name in outputs.OURS}
        for name, recipe in self.recipes.items():
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise RecipeError(f"`tasks`: {name!r} names a folder: it must be of letters, digits, - and _.")
            if name.lower() in taken:
                raise RecipeError(f"`tasks.{name}`: a run leaves a file or folder {name!r} too: choose another name.")
            taken.add(name.lower())
            own, shared = recipe.to_dict(), self.settings.to_dict()
            for key in own:
                if own[key] != shared[key] and key not in (*OF_A_TASK, "output_dir"):
                    raise RecipeError(
                        f"`{key}` is shared by all tasks: {own[key]!r} of {name!r} is not {shared[key]!r}."
                    )
        exponent = self.sampling_exponent
        if isinstance(exponent, bool) or not isinstance(exponent, (int, float)) or not 0 <= exponent <= 10:
            raise RecipeError(f"`sampling_exponent` must be a number from 0 to 10, got {exponent!r}.")
        if self.settings.adapter["peft_type"] != "PREFIX_TUNING_V2":
            raise RecipeError("`adapter.peft_type`: tasks can share a prefix, so it must be PREFIX_TUNING_V2.")
        # In the order of the names, so that a run does not depend on that of a file.
        self.recipes = {
            name: dataclasses.replace(recipe, output_dir=os.path.join(self.output_dir, name))
            for name, recipe in sorted(self.recipes.items())
        }

    @property
    def settings(self) -> Recipe:
        """What the tasks share; its keys `OF_A_TASK` mean nothing."""
        return dataclasses.replace(next(iter(self.recipes.values())), output_dir=self.output_dir)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> JointRecipe:
        """The recipe of plain values: the shared keys, `sampling_exponent`, and `tasks` with a mapping for each.

        Raises:
            RecipeError: if a key is unknown, missing or in the wrong place, or has an impossible value; the message
                names it.
        """
        shared = dict(values)
        tasks, exponent = shared.pop("tasks", None), shared.pop("sampling_exponent", 1.0)
        output_dir = shared.pop("output_dir", None)
        if not isinstance(tasks, dict) or not all(isinstance(own, dict) for own in tasks.values()):
            raise RecipeError(f"`tasks` must be a mapping of names to mappings, got {tasks!r}.")
        if not isinstance(output_dir, (str, os.PathLike)):
            raise RecipeError(f"`output_dir` must be the path of a folder, got {output_dir!r}.")
        for key in OF_A_TASK:
            if key in shared:
                raise RecipeError(f"`{key}`: each task has its own: put it under `tasks.<name>`.")
        recipes = {}
        for name, own in tasks.items():
            for key in own:
                if key not in OF_A_TASK:
                    known = ", ".join(OF_A_TASK)
                    raise RecipeError(f"`tasks.{name}.{key}`: a task has no such key of its own; it has {known}.")
            with _naming(name):
                recipes[name] = Recipe.from_dict({**shared, **own, "output_dir": output_dir})
        return cls(os.fspath(output_dir), recipes, exponent)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, for YAML or JSON."""
        own = {name: recipe.to_dict() for name, recipe in self.recipes.items()}
        shared = {key: value for key, value in self.settings.to_dict().items() if key not in OF_A_TASK}
        tasks = {name: {key: values[key] for key in OF_A_TASK} for name, values in own.items()}
        return {**shared, "sampling_exponent": self.sampling_exponent, "tasks": tasks}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as YAML."""
        write_values(self.to_dict(), path)


def load_joint_recipe(path: str | os.PathLike[str], **overrides: Any) -> JointRecipe:
    """Read a recipe of several tasks from YAML.

    Args:
        path: the file.
        **overrides: values that take the place of the file's, for instance `output_dir`, and `trust_remote_code`,
            which a file cannot set.

    Raises:
        RecipeError: if the file is no valid recipe; the message names the key.
    """
    values = read_values(path)
    try:
        return JointRecipe.from_dict({**values, **overrides})
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Have errors about a task's own keys, and about its rows, say whose they are."""
    try:
        yield
    except RecipeError as error:
        text = str(error)
        key = re.match(r"`(\w+)", text)
        if key is None:
            raise RecipeError(f"`tasks.{name}`: {text}") from error
        if key[1] in OF_A_TASK:
            raise RecipeError(f"`tasks.{name}.{text[1:]}") from error
        raise
    except DataError as error:
        raise DataError(f"`tasks.{name}`: {error}") from error


class SharedPrefix(nn.Module):
    """The models of several tasks as one: a backbone and a prefix that are all theirs, and each one's head.

    Args:
        models: prefix models of the same base model, by the tasks' names. All are given the parameters of the first
            one, but for those of their heads, and what else the base model has no weights for.

    Raises:
        RecipeError: if their prefixes are of different shapes: tasks may be given different parts of a base model.
    """

    def __init__(self, models: dict[str, Any]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models.values())
        (first, model), *others = models.items()
        shared, frozen = _prefix(model), _frozen(model)
        self.prefix = list(shared.values())
        for name, other in others:
            prefix = _prefix(other)
            if {key: own.shape for key, own in prefix.items()} != {key: own.shape for key, own in shared.items()}:
                raise RecipeError(
                    f"`tasks`: {first} and {name} do not use the same attention layers of the base model, and cannot "
                    "have the same prefix."
                )
            same = {id(own): shared[key] for key, own in prefix.items()}
            for key, own in _frozen(other).items():
                if key in frozen and frozen[key].dtype == own.dtype and torch.equal(frozen[key], own):
                    same[id(own)] = frozen[key]
            for module in other.modules():
                for key, own in list(module.named_parameters(recurse=False)):
                    if id(own) in same:
                        setattr(module, key, same[id(own)])

    def forward(self, number: int, **inputs: Any) -> Any:
        """The output of the so-manyth model."""
        return self.models[number](**inputs)


def _prefix(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in trained(model).items() if "modules_to_save" not in name}


def _frozen(model: Any) -> dict[str, nn.Parameter]:
    """The frozen parameters by their names in the backbone, whose own name is another one in other classes."""
    base = model.get_base_model()
    return {
        name.removeprefix(f"{base.base_model_prefix}."): parameter
        for name, parameter in base.named_parameters()
        if not parameter.requires_grad
    }


class JointBatches:
    """A task for each step, and its next batch: a function of the seed, as `Batches` is.

    The features of all tasks are numbered on, task by task.

    Args:
        batches: the batches of each task.
        exponent: the weight of a task in the draw is its number of features to the power of this.
        seed: of the draws.
    """

    def __init__(self, batches: Sequence[Batches], exponent: float, seed: int) -> None:
        self.batches = batches
        self.steps_per_epoch = sum(each.steps_per_epoch for each in batches)
        self.starts = [0, *itertools.accumulate(each.size for each in batches)][:-1]
        self.weights = torch.tensor([float(each.size) ** exponent for each in batches], dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed)
        self._turns: list[int] = []
        self._counts: Counter[int] = Counter()
        self._places: list[int] = []

    def turns(self, steps: int) -> list[int]:
        """The numbers of the tasks of the first steps."""
        while len(self._turns) < steps:
            turn = int(torch.multinomial(self.weights, 1, generator=self._generator))
            self._turns.append(turn)
            self._places.append(self._counts[turn])
            self._counts[turn] += 1
        return self._turns[:steps]

    def __getitem__(self, step: int) -> list[int]:
        """The features of a step, all of one task."""
        self.turns(step + 1)
        turn = self._turns[step]
        return [self.starts[turn] + i for i in self.batches[turn][self._places[step]]]


class JointLesson:
    """Several tasks to learn, as `Lesson` is one.

    Metrics are the tasks' own, as `name/metric`, the mean `loss`, and `score`: the mean of the metrics that decide for
    the tasks, taken as negative where less is more.

    Args:
        recipe: the recipe.
        lessons: a lesson for each of its tasks.
        accelerator: the accelerator.
    """

    command = "train-together"
    metric = "score"

    def __init__(self, recipe: JointRecipe, lessons: dict[str, Lesson], accelerator: Accelerator) -> None:
        self.recipe, self.lessons, self.accelerator = recipe, lessons, accelerator
        self.items = [count for lesson in lessons.values() for count in lesson.items]
        batches = [lesson.batches for lesson in lessons.values()]
        self.batches = JointBatches(batches, recipe.sampling_exponent, recipe.settings.seed)
        self._in_order = list(lessons.values())

    def prepare(self, model: Any) -> tuple[Any, Any, torch.optim.Optimizer]:
        """As `Lesson.prepare`."""
        groups = [{"params": model.prefix, "lr": learning_rates(self.recipe.settings)[0], "name": "adapter"}]
        for (name, recipe), own in zip(self.recipe.recipes.items(), model.models, strict=True):
            head = [parameter for key, parameter in trained(own).items() if "modules_to_save" in key]
            if head:
                groups.append({"params": head, "lr": learning_rates(recipe)[1], "name": f"head.{name}"})
        optimizer = torch.optim.AdamW(groups, weight_decay=self.recipe.settings.weight_decay)
        if self.accelerator.ddp_handler is not None:
            self.accelerator.ddp_handler.find_unused_parameters = True  # a step uses one task's head
        for each in model.models:  # they are measured one by one, and in the same precision
            self.accelerator.prepare_model(each, evaluation_mode=True)
        prepared, wrapped = self.accelerator.prepare(model, optimizer)
        start_moments(optimizer)
        return prepared, wrapped, optimizer

    def try_out(self, model: SharedPrefix) -> None:
        """As `Lesson.try_out`."""
        for (name, lesson), own in zip(self.lessons.items(), model.models, strict=True):
            with _naming(name):
                lesson.try_out(own)

    def loss(self, model: Any, features: list[int]) -> Tensor:
        """The model's mean loss on some features, all of one task."""
        turn = bisect_right(self.batches.starts, features[0]) - 1
        own = [i - self.batches.starts[turn] for i in features]
        return self._in_order[turn].loss(partial(model, turn), own)

    def measure(self, model: SharedPrefix) -> dict[str, float]:
        """The metrics of the validation rows of all tasks."""
        found = [lesson.measure(own) for lesson, own in zip(self._in_order, model.models, strict=True)]
        scores = [
            -own[lesson.metric] if lesson.metric in lesson.task.lower_is_better else own[lesson.metric]
            for lesson, own in zip(self._in_order, found, strict=True)
        ]
        return {
            "loss": sum(own["loss"] for own in found) / len(found),
            self.metric: sum(scores) / len(scores),
            **{
                f"{name}/{key}": value
                for name, own in zip(self.lessons, found, strict=True)
                for key, value in own.items()
            },
        }

    def is_better(self, metrics: dict[str, float], best: dict[str, float] | None) -> bool:
        """Whether metrics are better than the best so far."""
        return best is None or metrics[self.metric] > best[self.metric]


def train_together(
    recipe: JointRecipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_evaluation: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """Train one prefix for several tasks, and leave an adapter for each in `recipe.output_dir`.

    Run by `accelerate launch`, the processes share the work.

    Args:
        recipe: the recipe.
        resume: go on with the run in `recipe.output_dir`, from its last checkpoint.
        overwrite: replace the run in `recipe.output_dir`.
        on_evaluation: called by the main process after every evaluation, with the step and the validation rows'
            metrics; what it raises ends the run.

    Returns:
        The contents of `results.json`: the mean score of the best step, and under `tasks` what `train` gives for one.

    Raises:
        RecipeError: if the recipe cannot be run, or under FSDP or DeepSpeed.
        DataError: if there is something wrong with the rows.
        UnsupportedBackboneError: if the base model cannot take a prefix.
        TrainingInterrupted: on SIGINT or SIGTERM, after a checkpoint was written.
        TrainingDiverged: if the loss is not finite.
        OSError: if a file cannot be written.
    """
    recipe = copy.deepcopy(recipe)  # what the rows tell is filled in
    with accelerating(recipe.settings) as accelerator:
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            kind = accelerator.distributed_type.value
            raise RecipeError(
                f"{kind} cannot divide models that share parameters: tasks are trained together without."
            )
        with outputs.held(Path(recipe.output_dir), accelerator, JointLesson.command):
            return _train_together(recipe, accelerator, resume, overwrite, on_evaluation)


def _train_together(
    recipe: JointRecipe,
    accelerator: Accelerator,
    resume: bool,
    overwrite: bool,
    on_evaluation: Callable[[int, dict[str, float]], None] | None,
) -> dict[str, Any]:
    started = time.perf_counter()
    folder = Path(recipe.output_dir)
    checkpoints = folder / outputs.CHECKPOINTS
    tasks: dict[str, Task] = {}
    rows: dict[str, dict[str, Dataset]] = {}
    models: dict[str, Any] = {}
    lessons: dict[str, Lesson] = {}
    with together(accelerator):
        _may_claim(recipe, resume, overwrite)
        for name, own in recipe.recipes.items():
            with _naming(name):
                # A tokenizer each: tasks set them up as they need them.
                tasks[name] = TASK_CLASSES[own.task](own, load_tokenizer(own))
                adapter_config(own, tasks[name])
                rows[name] = load_splits(own, tasks[name])
        settings = recipe.settings
        set_seed(settings.seed)  # the same first weights in every process
        for name, own in recipe.recipes.items():
            with _naming(name):
                models[name] = wrap(own, tasks[name], *load_base(own, tasks[name]))
        model, (first, *_) = SharedPrefix(models), models
        if not (resume and checkpoint.find(checkpoints)):
            start(settings, tasks[first], models[first])
    for name, own in recipe.recipes.items():
        with _naming(name):
            lessons[name] = Lesson(own, tasks[name], rows[name]["train"], rows[name]["validation"], accelerator)
    lesson = JointLesson(recipe, lessons, accelerator)
    log = outputs.Log(settings, accelerator, recipe.to_dict())
    loop = Loop(settings, lesson, model, accelerator, checkpoints, log, on_evaluation)
    loop.try_out()
    if resume:
        outputs.check_shared(folder, accelerator)
        _compare(recipe)
        loop.resume()
    _claim(recipe, resume, accelerator)
    outputs.check_shared(folder, accelerator)
    log.start(loop.step)
    loop.run()

    metrics, best_step = loop.state["best_metrics"], loop.state["best_step"]
    checkpoint.load_weights(model, checkpoint.folder_of(loop.checkpoints, best_step))
    turns = Counter(lesson.batches.turns(loop.step))
    whole = {
        "best_step": best_step,
        "steps": loop.step,
        "mixed_precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "versions": outputs.versions(),
    }
    results: dict[str, Any] = {
        "metric": lesson.metric,
        "validation": {key: value for key, value in metrics.items() if "/" not in key},
        "epochs": loop.step / loop.batches.steps_per_epoch,
        "trained_parameters": sum(parameter.numel() for parameter in trained(model).values()),
        **whole,
        "tasks": {},
    }
    for number, (name, own) in enumerate(recipe.recipes.items()):
        results["tasks"][name] = found = {
            "validation": _of_task(name, metrics),
            "metric": lessons[name].metric,
            "together": [other for other in recipe.recipes if other != name],
            "epochs": turns[number] / lessons[name].batches.steps_per_epoch,
            "trained_parameters": sum(parameter.numel() for parameter in trained(models[name]).values()),
            "learning_rates": list(learning_rates(own)),
            "max_length": tasks[name].max_length,
            "rows": {split: len(each) for split, each in rows[name].items()},
            **whole,
        }
        if "test" in rows[name]:
            test = rows[name]["test"]
            found["test"], _ = evaluate(tasks[name], models[name], test, own.eval_batch_size, accelerator)
            log.write(loop.step, results["epochs"], "test", {f"{name}/{key}": v for key, v in found["test"].items()})
    results["seconds"] = round(time.perf_counter() - started, 1)
    weights = {name: checkpoint.gather_weights(each) for name, each in models.items()}
    if accelerator.is_main_process:
        for name, own in recipe.recipes.items():
            place = Path(own.output_dir) / outputs.CHECKPOINTS
            shutil.rmtree(place, ignore_errors=True)  # what is resumed may have been finished
            best = checkpoint.folder_of(place, best_step)
            with new_folder(best) as scratch:
                checkpoint.save_weights(models[name], weights[name], scratch)
            lines = [{**line, **_of_task(name, line)} for line in log.read() if line["split"] == "validation"]
            leave(own, best, lines, {**results["tasks"][name], "seconds": results["seconds"]})
        outputs.save_recipe(recipe)
        outputs.draw_curve(log.read(), lesson.metric, best_step, folder / outputs.CURVE)
        outputs.write_text(folder / outputs.RESULTS, json.dumps(results, indent=2) + "\n")
    return results


def _of_task(name: str, values: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(f"{name}/"): value for key, value in values.items() if key.startswith(f"{name}/")}


def _may_claim(recipe: JointRecipe, resume: bool, overwrite: bool) -> None:
    """As `outputs.may_claim`."""
    folder = Path(recipe.output_dir)
    if resume:
        _compare(recipe, *outputs.LEARNT)
        outputs.read_metrics(folder / outputs.METRICS)
        return
    more: list[str] = []
    if overwrite and (folder / outputs.RECIPE).is_file():
        tasks = read_values(folder / outputs.RECIPE).get("tasks")
        more = list(tasks) if isinstance(tasks, dict) else []
    outputs.may_fill(folder, overwrite, more)


def _compare(recipe: JointRecipe, *left_out: str) -> None:
    """See that a run is resumed with the recipe that it was started with."""
    earlier = load_joint_recipe(outputs.run_in(Path(recipe.output_dir)))
    for key, old, new in (
        ("tasks", list(earlier.recipes), list(recipe.recipes)),
        ("sampling_exponent", earlier.sampling_exponent, recipe.sampling_exponent),
    ):
        if old != new:
            raise RecipeError(f"`{key}`: the run in {recipe.output_dir} was started with {old!r}, not {new!r}.")
    for name, own in recipe.recipes.items():
        with _naming(name):
            outputs.compare(earlier.recipes[name], own, *left_out)


def _claim(recipe: JointRecipe, resume: bool, accelerator: Accelerator) -> None:
    """As `outputs.claim`."""
    if accelerator.is_main_process:
        outputs.empty(Path(recipe.output_dir), resume)
        outputs.save_recipe(recipe)
        for own in recipe.recipes.values():
            outputs.empty(Path(own.output_dir), resume)
    accelerator.wait_for_everyone()
