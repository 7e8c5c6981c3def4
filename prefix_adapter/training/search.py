"""Hyper-parameter search with Optuna: one recipe, trained many times with other values. Needs the extra `search`.

A search leaves in `output_dir`

    best.yaml          the recipe with the best trial's values: `prefix-adapter train --config best.yaml`
    trials.csv         a line for each trial
    history.png, importances.png, slice.png, parallel.png
    study.db           Optuna's study, which `resume` goes on with
    trials/<number>/   the run of each trial

The trials never see the test rows.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache
from filelock import FileLock, Timeout

from .files import write_text
from .loop import TrainingDiverged, TrainingInterrupted
from .model import adapter_config, load_tokenizer
from .outputs import CHANGEABLE_KEYS
from .recipe import Recipe, RecipeError
from .run import load_splits, train
from .settings import Search
from .tasks import TASK_CLASSES

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial
    from transformers import PreTrainedTokenizerBase

TRIALS, BEST, TABLE = "trials", "best.yaml", "trials.csv"
_PROJECTION = "adapter.prefix_projection"
_SPACE: dict[str, Any] = {
    _PROJECTION: [False, True],
    # The settings published with P-Tuning v2 lie between 5e-3 and 6e-2 for a table, and at 1e-4 for an MLP. In few
    # steps a table learns best at 1e-1 (docs/learning.md).
    "learning_rate": [
        {"when": {_PROJECTION: False}, "low": 3e-3, "high": 2e-1, "log": True},
        {"when": {_PROJECTION: True}, "low": 1e-4, "high": 3e-3, "log": True},
    ],
    "adapter.num_virtual_tokens": {"low": 4, "high": 128, "log": True},
    "adapter.prefix_dropout": {"low": 0.0, "high": 0.3},
}
_THE_SAME = ("task", "output_dir", "metric_for_best_model", "mixed_precision", "data")
"""Keys that all trials share: their values could not be compared otherwise."""


Point = dict[str, Any]
"""A point of the space: Optuna's value by the name of the parameter."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of Optuna's: a key of the recipe, perhaps under a condition."""

    name: str
    key: str
    distribution: BaseDistribution
    choices: dict[Any, Any] = field(default_factory=dict)
    """The recipe's values by Optuna's, which has no lists; empty for a range."""
    when: Point = field(default_factory=dict)

    def applies(self, point: Point) -> bool:
        """Whether the parameter exists, given those before it."""
        return all(point.get(name) == value for name, value in self.when.items())

    def suggest(self, trial: Trial) -> Any:
        """Let Optuna choose a value."""
        if self.choices:
            return trial.suggest_categorical(self.name, list(self.choices))
        own: Any = self.distribution
        suggest = trial.suggest_int if isinstance(own.low, int) else trial.suggest_float
        return suggest(self.name, own.low, own.high, step=own.step, log=own.log)

    @property
    def ends(self) -> list[Any]:
        """The choices, or both ends of the range."""
        own: Any = self.distribution
        return list(self.choices) or [own.low, own.high]

    @property
    def grid(self) -> list[Any]:
        """All values, in order.

        Raises:
            RecipeError: if there is no end of them.
        """
        own: Any = self.distribution
        if self.choices:
            return list(self.choices)
        if own.step is None:
            raise RecipeError(f"`space.{self.key}`: a grid needs a list of choices, or a `step`.")
        count = round((own.high - own.low) / own.step)
        return [type(own.low)(f"{own.low + i * own.step:.12g}") for i in range(count + 1)]


def default_space(recipe: Recipe, fixed: Sequence[str] = ()) -> dict[str, Any]:
    """What is varied if the user does not say.

    Args:
        recipe: the recipe.
        fixed: keys that stay as the recipe says.

    Raises:
        RecipeError: if the recipe's adapter is no prefix, or nothing is left to vary.
    """
    kind = recipe.adapter["peft_type"]
    if kind != "PREFIX_TUNING_V2":
        raise RecipeError(
            f"`space`: the default one is for PREFIX_TUNING_V2. Say what is to be varied for {kind}, for instance "
            '{"learning_rate": {"low": 1e-5, "high": 1e-3, "log": true}}.'
        )
    mlp = bool(recipe.adapter.get("prefix_projection"))
    if recipe.init_text or recipe.init_from:  # what it starts from decides on its length, and whether it is a table
        fixed = [*fixed, _PROJECTION, "adapter.num_virtual_tokens"]
    space = {key: value for key, value in _SPACE.items() if key not in fixed}
    width = recipe.adapter.get("encoder_hidden_size")
    if _PROJECTION in space and width:  # a table must not have it
        space["adapter.encoder_hidden_size"] = {"when": {_PROJECTION: True}, "choices": [width]}
    elif _PROJECTION not in space and "learning_rate" in space:
        rates = _SPACE["learning_rate"][mlp]
        space["learning_rate"] = {key: value for key, value in rates.items() if key != "when"}
    if not space:
        raise RecipeError("`space`: all that the default one varies is set by you. Say what is to be varied.")
    return space


def parse_space(space: dict[str, Any] | None) -> list[Parameter]:
    """Read `Search.space`.

    Raises:
        RecipeError: if something is wrong with it; the message names the key.
    """
    if not space:
        raise RecipeError("`space` is empty: name a key of the recipe to vary.")
    parameters: list[Parameter] = []
    for key, entry in space.items():
        several = isinstance(entry, list) and bool(entry) and all(isinstance(e, dict) and "when" in e for e in entry)
        try:
            if key.split(".")[0] in _THE_SAME:
                raise ValueError("it must be the same in all trials.")
            own = [_parse(key, each, several, parameters) for each in (entry if several else [entry])]
            for one, other in itertools.combinations(own, 2):
                if not any(name in other.when and other.when[name] != value for name, value in one.when.items()):
                    raise ValueError(f"{one.when} and {other.when} can apply at once.")
        except (ValueError, TypeError) as error:
            raise RecipeError(f"`space.{key}`: {error}") from error
        parameters += own
    return parameters


def _parse(key: str, entry: Any, several: bool, earlier: list[Parameter]) -> Parameter:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(entry, (list, dict)):
        raise ValueError(f"give a list of choices or a mapping with `low` and `high`, not {entry!r}.")
    entry = {"choices": entry} if isinstance(entry, list) else dict(entry)
    when = entry.pop("when", {})
    for name, value, kind in (("when", when, dict), ("choices", entry.get("choices", []), list)):
        if not isinstance(value, kind):
            raise ValueError(f"`{name}` must be a {'list' if kind is list else 'mapping'}, got {value!r}.")
    for name, value in when.items():
        condition = next((each for each in earlier if each.name == name and each.choices and not each.when), None)
        if condition is None:
            raise ValueError(f"`when`: {name!r} must be a key with a list of choices that stands before this one.")
        if value not in condition.choices:
            raise ValueError(f"`when`: {value!r} is none of the choices of {name!r}, {list(condition.choices)}.")
    known = {"choices"} if "choices" in entry else {"low", "high", "log", "step", "type"}
    for name in entry:
        if name not in known:
            raise ValueError(f"{name!r} has no meaning here; there are {sorted({*known, 'when'})}.")
    note = ", ".join(f"{name.rpartition('.')[2]}={json.dumps(value)}" for name, value in when.items())
    name = f"{key} ({note})" if several else key
    if "choices" in entry:
        choices = {
            each if isinstance(each, (str, int, float, type(None))) else json.dumps(each): each
            for each in entry["choices"]
        }
        if not choices or len(choices) < len(entry["choices"]):
            raise ValueError(f"the choices must be one or more, and differ; got {entry['choices']}.")
        return Parameter(name, key, CategoricalDistribution(list(choices)), choices, when)
    for end in ("low", "high"):
        if type(entry.get(end)) not in (int, float):
            raise ValueError(f"`{end}` must be a number, got {entry.get(end)!r}.")
    whole = all(type(entry[end]) is int for end in ("low", "high"))
    kind = entry.pop("type", "int" if whole else "float")
    if kind not in ("int", "float") or (kind == "int" and not whole):
        raise ValueError(f"`type` must be float, or int with whole `low` and `high`; got {kind!r}.")
    distribution = (IntDistribution if kind == "int" else FloatDistribution)(**entry)
    return Parameter(name, key, distribution, when=when)


def _point(space: list[Parameter], pick: Callable[[Parameter], Any]) -> Point:
    point: Point = {}
    for parameter in space:
        if parameter.applies(point):
            point[parameter.name] = pick(parameter)
    return point


def _grid(space: list[Parameter]) -> list[Point]:
    points: list[Point] = [{}]
    for parameter in space:
        points = [
            longer
            for point in points
            for longer in (
                [{**point, parameter.name: value} for value in parameter.grid] if parameter.applies(point) else [point]
            )
        ]
    return points


def _values(space: list[Parameter], point: Point) -> dict[str, Any]:
    """The recipe's values by key; keys to which nothing applies are missing."""
    found = ((parameter, point[parameter.name]) for parameter in space if parameter.name in point)
    return {parameter.key: parameter.choices.get(value, value) for parameter, value in found}


@dataclass(frozen=True)
class _Job:
    """What the processes of a search need to know."""

    recipe: Recipe
    settings: Search
    space: list[Parameter]
    metric: str
    total: int
    deadline: float

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output_dir)

    def recipe_of(self, point: Point, **values: Any) -> Recipe:
        keys = {parameter.key for parameter in self.space}
        return self.recipe.with_values({**_values(self.space, point), **values}, without=keys)

    def study(self, worker: int = 0) -> Study:
        """Optuna's study, which must exist."""
        import optuna

        storage = self.storage()
        study = optuna.load_study(study_name=self.settings.study_name, storage=storage)
        # A resumed search must not draw the numbers of its beginning again, nor one worker those of another.
        seed = random.Random(f"{self.settings.seed}-{worker}-{len(study.trials)}").getrandbits(32)
        if self.settings.sampler == "tpe":
            study.sampler = optuna.samplers.TPESampler(seed=seed)
        else:
            study.sampler = optuna.samplers.RandomSampler(seed=seed)
        pruners = optuna.pruners
        study.pruner = {
            "median": pruners.MedianPruner,
            "hyperband": pruners.HyperbandPruner,
            "none": pruners.NopPruner,
        }[self.settings.pruner]()
        return study

    def storage(self) -> Any:
        import optuna
        from sqlalchemy import URL
        from sqlalchemy.exc import SQLAlchemyError

        default = URL.create("sqlite", database=str((self.folder / "study.db").absolute()))
        url = self.settings.storage or default.render_as_string()
        # The processes share the file, and may have to wait for each other.
        patience = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs=patience)
        except (ImportError, SQLAlchemyError) as error:
            raise RecipeError(f"`storage`: {url!r} cannot be used: {error}") from error


def search(recipe: Recipe, settings: Search, *, resume: bool = False) -> dict[str, Any]:
    """Train a recipe with many values of some of its keys, and leave the best as a recipe in `recipe.output_dir`.

    Args:
        recipe: the recipe, with what is the same in all trials.
        settings: what is varied, and how.
        resume: go on with the search in `recipe.output_dir`.

    Returns:
        `metric`, `best_trial` (its number), `best_value`, `best_params` (by the recipe's keys), and how many trials
        are `complete`, `pruned`, `failed` (diverged or out of memory) and `interrupted` (cut off, and done again).

    Raises:
        ImportError: if Optuna is missing.
        RecipeError: if the space or the recipe is wrong, in some trial even, or no trial could be completed.
        DataError: if there is something wrong with the rows.
        UnsupportedBackboneError: if the base model cannot take a prefix.
        TrainingInterrupted: on SIGINT, and on SIGTERM in a training; the message says how to go on.
        OSError: if a file cannot be written.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError('A search needs Optuna: pip install "prefix-adapter[search]"') from error
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RecipeError(
            "A search cannot be run by several processes of `accelerate launch`. Run it in one process, and let it "
            "train several trials at a time with `n_jobs`."
        )
    if settings.space is None:
        settings = dataclasses.replace(settings, space=default_space(recipe, settings.fixed))
    else:
        for key, varied in itertools.product(settings.fixed, settings.space):
            if f"{varied}.".startswith(f"{key}.") or f"{key}.".startswith(f"{varied}."):
                raise RecipeError(f"`{key}` is set, and `space` varies `{varied}`: leave one of them out.")
    space = parse_space(settings.space)
    grid = _grid(space) if settings.sampler == "grid" else None
    tokenizer = load_tokenizer(recipe)
    blind = recipe.with_values({"data.test": None})
    task = TASK_CLASSES[recipe.task](blind, tokenizer)
    load_splits(blind, task)
    job = _Job(
        recipe=recipe,
        settings=settings,
        space=space,
        metric=recipe.metric_for_best_model or task.default_metric,
        total=settings.n_trials if grid is None else min(settings.n_trials, len(grid)),
        deadline=time.time() + (settings.timeout or math.inf),
    )
    _check(job, tokenizer)
    _may_claim(job, resume)
    job.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(job.folder / ".search.lock", timeout=0):
            study = _open(job, resume, minimize=job.metric in task.lower_is_better)
            try:
                if grid is not None:
                    random.Random(settings.seed).shuffle(grid)
                    for point in grid:  # some may be there from before an interruption
                        study.enqueue_trial(point, skip_if_exists=True)
                _work(job) if settings.n_jobs == 1 else _in_processes(job)
            except (TrainingInterrupted, KeyboardInterrupt) as error:
                reason = str(error) if isinstance(error, _WorkerEnded) else "Stopped."
                raise TrainingInterrupted(
                    f"{reason} {_finished(study)} of {job.total} trials are finished. Go on with the same command and "
                    "--resume, or with fewer `n_trials` to have the results so far.",
                    getattr(error, "signal_number", signal.SIGINT),
                ) from error
            return _leave(job, optuna.load_study(study_name=settings.study_name, storage=job.storage()))
    except Timeout as error:
        raise RecipeError(f"`output_dir`: another search is running in {job.folder}.") from error


def _check(job: _Job, tokenizer: PreTrainedTokenizerBase) -> None:
    """Try every choice and every end of a range, each in a point of the space with the first values of the others."""
    for parameter in job.space:
        for value in parameter.ends:
            chosen = {**parameter.when, parameter.name: value}
            point = _point(job.space, lambda each, chosen=chosen: chosen.get(each.name, each.ends[0]))  # type: ignore
            try:
                candidate = job.recipe_of(point)
                adapter_config(candidate, TASK_CLASSES[candidate.task](candidate, tokenizer))
            except RecipeError as error:
                raise RecipeError(f"`space.{parameter.key}`: {value!r} is not possible: {error}") from error


def _may_claim(job: _Job, resume: bool) -> None:
    folder, database = job.folder, job.folder / "study.db"
    if resume:
        if job.settings.storage is None and not database.is_file():
            raise RecipeError(f"`output_dir`: there is no search to resume in {folder} (it has no {database.name}).")
    elif folder.exists() and (not folder.is_dir() or any(_visible(folder))):
        found = "holds a search: go on with it (--resume)" if database.is_file() else "is not empty: empty it"
        raise RecipeError(f"`output_dir`: {folder} {found}, or choose another folder.")


def _visible(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if not path.name.startswith("."))


def _open(job: _Job, resume: bool, minimize: bool) -> Study:
    """Make the study, or see that it is of the same search and put the trials that were cut off into its queue."""
    import optuna

    settings = job.settings
    now = json.loads(json.dumps({"space": settings.space, **job.recipe.to_dict()}, default=str))
    if not resume:
        try:
            study = optuna.create_study(
                study_name=settings.study_name,
                storage=job.storage(),
                direction="minimize" if minimize else "maximize",
            )
        except optuna.exceptions.DuplicatedStudyError as error:
            raise RecipeError(
                f"`study_name`: the storage has a study {settings.study_name!r}. Go on with it (--resume), or choose "
                "another name."
            ) from error
        study.set_user_attr("search", now)
        return study
    try:
        study = job.study()
        before = study.user_attrs["search"]
    except KeyError as error:
        raise RecipeError(f"`study_name`: the storage has no search {settings.study_name!r} to resume.") from error
    for key in now:
        if before.get(key) != now[key] and key not in CHANGEABLE_KEYS:
            raise RecipeError(
                f"`{key}`: the search in {job.folder} was begun with {before.get(key)!r}, not {now[key]!r}. Resume it "
                "with what it was begun with, or start a new one."
            )
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.enqueue_trial(trial.system_attrs.get("fixed_params") or trial.params)
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        shutil.rmtree(job.folder / TRIALS / str(trial.number), ignore_errors=True)
    return study


def _work(job: _Job, worker: int = 0) -> None:
    """Train trials until there are enough."""
    import optuna

    study = job.study(worker)
    while time.time() < job.deadline:
        with FileLock(job.folder / ".trial.lock"):  # else two workers could both begin the last trial, or the same
            if _finished(study, optuna.trial.TrialState.RUNNING) >= job.total:
                return
            trial = study.ask()
            point = _point(job.space, lambda parameter: parameter.suggest(trial))  # noqa: B023
        _run_trial(job, study, trial, point)


def _run_trial(job: _Job, study: Study, trial: Trial, point: Point) -> None:
    """Train a trial. It stays RUNNING in the storage if something ends the search."""
    import optuna

    folder = job.folder / TRIALS / str(trial.number)
    candidate = job.recipe_of(point, **{"output_dir": str(folder), "data.test": None})
    evaluations = itertools.count()  # steps of the optimizer would not be comparable between sizes of the batch

    def on_evaluation(step: int, metrics: dict[str, float]) -> None:
        trial.report(metrics[job.metric], next(evaluations))
        if trial.should_prune():
            raise optuna.TrialPruned

    try:
        value = train(candidate, on_evaluation=on_evaluation)["validation"][job.metric]
        if math.isnan(value):
            raise TrainingDiverged(f"The best {job.metric} is not a number.")
        study.tell(trial, value)
    except optuna.TrialPruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    except (TrainingDiverged, torch.OutOfMemoryError) as error:
        # To Optuna it is pruned, for its samplers learn from pruned trials and not from failed ones.
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    finally:
        clear_device_cache(garbage_collection=True)
        if not job.settings.keep_trials:
            shutil.rmtree(folder, ignore_errors=True)
    done = study.trials[trial.number]
    outcome = done.user_attrs.get("error") or f"{job.metric} {_short(done.value)}"
    values = ", ".join(f"{key}={_short(value)}" for key, value in _values(job.space, point).items())
    print(f"Trial {trial.number} {_state(done)}: {outcome} with {values}", flush=True)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class _WorkerEnded(TrainingInterrupted):
    """A process of the search ended without an error of its own."""


def _in_processes(job: _Job) -> None:
    """Train trials in several processes; an error in one ends them all."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // job.settings.n_jobs)
    workers: dict[Any, Any] = {}
    try:
        for number in range(min(job.settings.n_jobs, job.total)):
            receiver, sender = context.Pipe(duplex=False)
            worker = context.Process(target=_worker, args=(job, number, threads, sender))
            worker.start()
            sender.close()
            workers[worker.sentinel] = worker, receiver
        waiting = dict(workers)
        while waiting:
            for sentinel in wait(list(waiting)):
                worker, receiver = waiting.pop(sentinel)
                worker.join()
                if worker.exitcode:
                    try:
                        error = receiver.recv()
                    except EOFError:
                        error = _WorkerEnded(f"A process of the search ended with exit code {worker.exitcode}.", None)
                    raise error
    finally:
        for worker, _ in workers.values():
            worker.terminate()  # in a training that is noted, and it stops after the step
        for worker, _ in workers.values():
            worker.join()


def _worker(job: _Job, number: int, threads: int, sender: Connection) -> None:
    """Train trials in a process of its own, which ends with the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process: the first one passes it on
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(number % torch.cuda.device_count())
    try:
        _work(job, number)
    except TrainingInterrupted:
        raise SystemExit(1) from None
    except Exception as error:
        sender.send(error)
        raise


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _finished(study: Study, *further: Any) -> int:
    """How many trials count."""
    from optuna.trial import TrialState

    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, *further)))


def _state(trial: FrozenTrial) -> str:
    if "error" in trial.user_attrs:
        return "failed"
    return {"FAIL": "interrupted"}.get(trial.state.name, trial.state.name.lower())


def _leave(job: _Job, study: Study) -> dict[str, Any]:
    """Write the results of a search."""
    trials = [trial for trial in study.trials if trial.state.is_finished()]
    counts = Counter(_state(trial) for trial in trials)
    keys = list(dict.fromkeys(parameter.key for parameter in job.space))
    table = io.StringIO()
    writer = csv.DictWriter(table, ["trial", "state", job.metric, "seconds", *keys, "error"])
    writer.writeheader()
    for trial in trials:
        seconds = trial.duration.total_seconds() if trial.duration else None
        told = {"trial": trial.number, "state": _state(trial), job.metric: trial.value, "seconds": seconds}
        writer.writerow({**told, **_values(job.space, trial.params), "error": trial.user_attrs.get("error")})
    write_text(job.folder / TABLE, table.getvalue())
    if not counts["complete"]:
        raise RecipeError(f"`space`: no trial could be completed ({dict(counts)}); {job.folder / TABLE} says more.")
    best = study.best_trial
    job.recipe_of(best.params, output_dir=str(job.folder / "best")).save(job.folder / BEST)
    _draw(study, job.folder, job.metric)
    return {
        "metric": job.metric,
        "best_trial": best.number,
        "best_value": best.value,
        "best_params": _values(job.space, best.params),
        **{state: counts[state] for state in ("complete", "pruned", "failed", "interrupted")},
    }


def _draw(study: Study, folder: Path, metric: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.trial import TrialState
    from optuna.visualization import matplotlib as plots

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    names = sorted({name for trial in complete for name in trial.params})
    with warnings.catch_warnings(), matplotlib.rc_context():  # the plots set a style of their own
        warnings.simplefilter("ignore")  # they are experimental, each says
        for name, plot, width in (
            ("history", plots.plot_optimization_history, 8),
            ("importances", plots.plot_param_importances, 8),
            ("slice", plots.plot_slice, 5 * len(names)),
            ("parallel", plots.plot_parallel_coordinate, 2 + 2 * len(names)),
        ):
            try:
                plot(study, target_name=metric)
            except (ValueError, RuntimeError):  # importances: too few trials, or nothing in which they differ
                continue
            figure = pyplot.gcf()
            if name == "parallel":  # it cuts the names short
                ticks = figure.axes[0].get_xticks()
                if len(ticks) == len(names) + 1:
                    figure.axes[0].set_xticks(ticks, [metric, *names], rotation=330, horizontalalignment="left")
            figure.set_size_inches(max(width, 6), 5)
            figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            pyplot.close(figure)
