"""Hyperparameter search with Optuna: train a recipe many times with different values. Needs the extra `search`.

A search writes to `output_dir`:

    best.yaml          the recipe with the values of the best trial, for `prefix-adapter train --config best.yaml`
    trials.csv         one line per trial
    history.png, importances.png, slice.png, parallel.png
    study.db           Optuna's study, which `resume` continues
    trials/<number>/   the run of each trial

No trial reads the test rows.
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
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.memory import clear_device_cache
from filelock import FileLock, Timeout

from .files import write_text
from .loop import TrainingDiverged, TrainingInterrupted
from .model import adapter_configs, load_tokenizer
from .outputs import CHANGEABLE_KEYS
from .recipe import Recipe, RecipeError
from .run import load_splits, train
from .search_space import Parameter, Point, all_points, choose_point, default_space, parse_space, recipe_values
from .settings import Search
from .tasks import TASK_CLASSES

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial
    from transformers import PreTrainedTokenizerBase

TRIALS, BEST, TABLE = "trials", "best.yaml", "trials.csv"


@dataclass(frozen=True)
class _SearchJob:
    """A search, as each of its processes gets it.

    Attributes:
        recipe: The recipe, with the values that are the same in all trials.
        settings: The settings of the search.
        space: The parameters that are varied.
        metric: The metric on the validation rows that the search optimizes.
        total: The number of trials.
        deadline: The time after which no trial starts, in seconds since the epoch.
    """

    recipe: Recipe
    settings: Search
    space: list[Parameter]
    metric: str
    total: int
    deadline: float

    @property
    def folder(self) -> Path:
        """The output folder of the search."""
        return Path(self.recipe.output_dir)

    def recipe_of(self, point: Point, **values: Any) -> Recipe:
        """The recipe with the values of a point, and further values by key."""
        keys = {parameter.key for parameter in self.space}
        return self.recipe.with_values({**recipe_values(self.space, point), **values}, without=keys)

    def study(self, worker: int = 0) -> Study:
        """Load the study, with a sampler and a pruner for one of the processes (`worker`)."""
        import optuna

        storage = self.storage()
        study = optuna.load_study(study_name=self.settings.study_name, storage=storage)
        # A resumed search must not repeat the random numbers of its start, nor one worker those of another.
        seed = random.Random(f"{self.settings.seed}-{worker}-{len(study.trials)}").getrandbits(32)
        samplers, pruners = optuna.samplers, optuna.pruners
        # A grid search enqueues its points, so its sampler chooses nothing.
        sampler_class = samplers.TPESampler if self.settings.sampler == "tpe" else samplers.RandomSampler
        study.sampler = sampler_class(seed=seed)
        classes = {"median": pruners.MedianPruner, "hyperband": pruners.HyperbandPruner, "none": pruners.NopPruner}
        study.pruner = classes[self.settings.pruner]()
        return study

    def storage(self) -> Any:
        """Open Optuna's storage.

        Raises:
            RecipeError: If it cannot be opened.
        """
        import optuna
        from sqlalchemy import URL
        from sqlalchemy.exc import SQLAlchemyError

        default = URL.create("sqlite", database=str((self.folder / "study.db").absolute()))
        url = self.settings.storage or default.render_as_string()
        # The processes share the SQLite file and can have to wait for each other.
        patience = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
        try:
            return optuna.storages.RDBStorage(url, engine_kwargs=patience)
        except (ImportError, SQLAlchemyError) as error:
            raise RecipeError(f"`storage`: {url!r} cannot be used: {error}") from error


def search(recipe: Recipe, settings: Search, *, resume: bool = False) -> dict[str, Any]:
    """Search for the best values of a recipe's keys, and write the best recipe to `recipe.output_dir`.

    Args:
        recipe: The recipe, with the values that are the same in all trials.
        settings: The keys to vary, and how to search.
        resume: Whether to continue the search in `recipe.output_dir`.

    Returns:
        `metric`, `best_trial` (its number), `best_value`, `best_params` (by the recipe's keys), and the numbers of
        trials that are `complete`, `pruned`, `failed` (diverged or out of memory) and `interrupted` (repeated when the
        search is resumed).

    Raises:
        ImportError: If Optuna is missing.
        RecipeError: If the space, or the recipe of a trial, is invalid, or if no trial could be completed.
        DataError: If the rows are invalid.
        UnsupportedBackboneError: If the base model cannot take a prefix.
        TrainingInterrupted: On SIGINT, and on SIGTERM during training. The message says how to resume.
        OSError: If a file cannot be written.

    Source:
        Akiba et al. 2019, Optuna (arXiv:1907.10902).

    Example:
        >>> report = search(recipe, Search({"learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}}, n_trials=20))
        >>> report["best_params"]
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError('A search needs Optuna: pip install "prefix-adapter[search]"') from error
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RecipeError(
            "A search cannot run under `accelerate launch` with several processes. Start it as one process, and set "
            "`n_jobs` to train several trials at the same time."
        )
    if settings.space is None:
        settings = dataclasses.replace(settings, space=default_space(recipe, settings.fixed))
    else:
        for key, varied in itertools.product(settings.fixed, settings.space):
            if f"{varied}.".startswith(f"{key}.") or f"{key}.".startswith(f"{varied}."):
                raise RecipeError(f"`{key}` is set, and `space` varies `{varied}`. Leave one of them out.")
    space = parse_space(settings.space)
    grid = all_points(space) if settings.sampler == "grid" else None
    tokenizer = load_tokenizer(recipe)
    without_test = recipe.with_values({"data.test": None})
    task = TASK_CLASSES[recipe.task](without_test, tokenizer)
    load_splits(without_test, task)  # checks the rows before the first trial
    job = _SearchJob(
        recipe=recipe,
        settings=settings,
        space=space,
        metric=recipe.metric_for_best_model or task.default_metric,
        total=settings.n_trials if grid is None else min(settings.n_trials, len(grid)),
        deadline=time.time() + (settings.timeout or math.inf),
    )
    _check_space(job, tokenizer)
    _check_output_dir(job, resume)
    job.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(job.folder / ".search.lock", timeout=0):
            study = _resume_study(job) if resume else _create_study(job, job.metric in task.lower_is_better)
            try:
                if grid is not None:
                    random.Random(settings.seed).shuffle(grid)
                    for point in grid:  # a resumed study has some of them
                        study.enqueue_trial(point, skip_if_exists=True)
                _run_trials(job) if settings.n_jobs == 1 else _run_workers(job)
            except (TrainingInterrupted, KeyboardInterrupt) as error:
                reason = str(error) if isinstance(error, _WorkerEnded) else "Stopped."
                raise TrainingInterrupted(
                    f"{reason} {_count_finished(study)} of {job.total} trials are finished. Resume with the same "
                    "command and --resume; with a smaller `n_trials` to get the results so far.",
                    getattr(error, "signal_number", signal.SIGINT),
                ) from error
            return _write_results(job, optuna.load_study(study_name=settings.study_name, storage=job.storage()))
    except Timeout as error:
        raise RecipeError(f"`output_dir`: another search is running in {job.folder}.") from error


def _check_space(job: _SearchJob, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check the recipe of each choice and each end of a range, with the first values of the other parameters.

    Raises:
        RecipeError: If such a recipe is invalid.
    """
    for parameter in job.space:
        for value in parameter.ends:
            chosen = {**parameter.when, parameter.name: value}
            point = choose_point(job.space, lambda each, chosen=chosen: chosen.get(each.name, each.ends[0]))  # type: ignore
            try:
                candidate = job.recipe_of(point)
                adapter_configs(candidate, TASK_CLASSES[candidate.task](candidate, tokenizer))
            except RecipeError as error:
                raise RecipeError(f"`space.{parameter.key}`: {value!r} is invalid: {error}") from error


def _check_output_dir(job: _SearchJob, resume: bool) -> None:
    """Check that the output folder has a search to resume, or is empty for a new one.

    Raises:
        RecipeError: If it does not fit.
    """
    folder, database = job.folder, job.folder / "study.db"
    if resume:
        if job.settings.storage is None and not database.is_file():
            raise RecipeError(f"`output_dir`: there is no search to resume in {folder} (no {database.name}).")
    elif folder.exists() and (not folder.is_dir() or any(_visible_files(folder))):
        problem = "holds a search: resume it (--resume)" if database.is_file() else "is not empty: empty it"
        raise RecipeError(f"`output_dir`: {folder} {problem}, or choose another folder.")


def _visible_files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if not path.name.startswith("."))


def _comparable_settings(job: _SearchJob) -> dict[str, Any]:
    """The recipe and the space as JSON values, to compare them when a search is resumed."""
    return json.loads(json.dumps({"space": job.settings.space, **job.recipe.to_dict()}, default=str))


def _create_study(job: _SearchJob, minimize: bool) -> Study:
    """Create the study.

    Raises:
        RecipeError: If the storage has a study of this name.
    """
    import optuna

    name = job.settings.study_name
    try:
        study = optuna.create_study(
            study_name=name, storage=job.storage(), direction="minimize" if minimize else "maximize"
        )
    except optuna.exceptions.DuplicatedStudyError as error:
        raise RecipeError(
            f"`study_name`: the storage has a study {name!r}. Resume it (--resume), or choose another name."
        ) from error
    study.set_user_attr("search", _comparable_settings(job))
    return study


def _resume_study(job: _SearchJob) -> Study:
    """Load the study of the same search, and enqueue its interrupted trials again.

    Raises:
        RecipeError: If there is no such study, or if the recipe or the space was another one.
    """
    import optuna

    try:
        study = job.study()
        before = study.user_attrs["search"]
    except KeyError as error:
        raise RecipeError(f"`study_name`: the storage has no search {job.settings.study_name!r} to resume.") from error
    for key, value in _comparable_settings(job).items():
        if before.get(key) != value and key not in CHANGEABLE_KEYS:
            raise RecipeError(
                f"`{key}`: the search in {job.folder} was started with {before.get(key)!r}, not {value!r}. Resume it "
                "with the first value, or start a new search."
            )
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        study.enqueue_trial(trial.system_attrs.get("fixed_params") or trial.params)
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        shutil.rmtree(job.folder / TRIALS / str(trial.number), ignore_errors=True)
    return study


def _run_trials(job: _SearchJob, worker: int = 0) -> None:
    """Run trials until there are enough, or until the deadline."""
    import optuna

    study = job.study(worker)
    while time.time() < job.deadline:
        with FileLock(job.folder / ".trial.lock"):  # two workers must not start the same trial
            if _count_finished(study, optuna.trial.TrialState.RUNNING) >= job.total:
                return
            trial = study.ask()
            point = choose_point(job.space, lambda parameter: parameter.suggest(trial))  # noqa: B023
        _run_trial(job, study, trial, point)


def _run_trial(job: _SearchJob, study: Study, trial: Trial, point: Point) -> None:
    """Run a trial. If the search is interrupted, the trial stays RUNNING in the storage."""
    import optuna

    folder = job.folder / TRIALS / str(trial.number)
    candidate = job.recipe_of(point, **{"output_dir": str(folder), "data.test": None})
    evaluations = itertools.count()  # optimizer steps cannot be compared between batch sizes

    def on_evaluation(step: int, metrics: dict[str, float]) -> None:
        trial.report(metrics[job.metric], next(evaluations))
        if trial.should_prune():
            raise optuna.TrialPruned

    try:
        value = train(candidate, quiet=True, on_evaluation=on_evaluation)["validation"][job.metric]
        if math.isnan(value):
            raise TrainingDiverged(f"The best {job.metric} is not a number.")
        study.tell(trial, value)
    except optuna.TrialPruned:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    except (TrainingDiverged, torch.OutOfMemoryError) as error:
        # Optuna's samplers use pruned trials, but not failed ones.
        trial.set_user_attr("error", str(error))
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    finally:
        clear_device_cache(garbage_collection=True)
        if not job.settings.keep_trials:
            shutil.rmtree(folder, ignore_errors=True)
    done = study.trials[trial.number]
    outcome = done.user_attrs.get("error") or f"{job.metric} {_format(done.value)}"
    values = ", ".join(f"{key}={_format(value)}" for key, value in recipe_values(job.space, point).items())
    print(f"Trial {trial.number} {_state(done)}: {outcome} with {values}", flush=True)


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class _WorkerEnded(TrainingInterrupted):
    """A process of the search ended without raising an error, for instance because it was killed."""


def _run_workers(job: _SearchJob) -> None:
    """Run trials in `n_jobs` processes. An error in one of them ends all."""
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // job.settings.n_jobs)
    workers: dict[Any, Any] = {}
    try:
        for number in range(min(job.settings.n_jobs, job.total)):
            receiver, sender = context.Pipe(duplex=False)
            worker = context.Process(target=_work, args=(job, number, threads, sender))
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
            worker.terminate()  # training handles the signal and stops after the current step
        for worker, _ in workers.values():
            worker.join()


def _work(job: _SearchJob, number: int, threads: int, sender: Connection) -> None:
    """Run trials in a worker process, which ends when its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(number % torch.cuda.device_count())
    try:
        _run_trials(job, number)
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


def _count_finished(study: Study, *further: Any) -> int:
    """The number of trials that are complete or pruned, or in one of the `further` states."""
    from optuna.trial import TrialState

    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED, *further)))


def _state(trial: FrozenTrial) -> str:
    """The state of a trial as the results name it: complete, pruned, failed, interrupted, ..."""
    if "error" in trial.user_attrs:
        return "failed"
    return {"FAIL": "interrupted"}.get(trial.state.name, trial.state.name.lower())


def _write_results(job: _SearchJob, study: Study) -> dict[str, Any]:
    """Write the table of trials, the best recipe and the plots; return the report of `search`.

    Raises:
        RecipeError: If no trial is complete.
    """
    trials = [trial for trial in study.trials if trial.state.is_finished()]
    counts = Counter(_state(trial) for trial in trials)
    keys = list(dict.fromkeys(parameter.key for parameter in job.space))
    table = io.StringIO()
    writer = csv.DictWriter(table, ["trial", "state", job.metric, "seconds", *keys, "error"])
    writer.writeheader()
    for trial in trials:
        seconds = trial.duration.total_seconds() if trial.duration else None
        values = {"trial": trial.number, "state": _state(trial), job.metric: trial.value, "seconds": seconds}
        writer.writerow({**values, **recipe_values(job.space, trial.params), "error": trial.user_attrs.get("error")})
    write_text(job.folder / TABLE, table.getvalue())
    if not counts["complete"]:
        raise RecipeError(
            f"`space`: no trial could be completed ({dict(counts)}). {job.folder / TABLE} has the errors."
        )
    best = study.best_trial
    job.recipe_of(best.params, output_dir=str(job.folder / "best")).save(job.folder / BEST)
    _draw_plots(study, job.folder, job.metric)
    return {
        "metric": job.metric,
        "best_trial": best.number,
        "best_value": best.value,
        "best_params": recipe_values(job.space, best.params),
        **{state: counts[state] for state in ("complete", "pruned", "failed", "interrupted")},
    }


def _draw_plots(study: Study, folder: Path, metric: str) -> None:
    """Draw Optuna's plots of a study; those that need more trials are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from optuna.trial import TrialState
    from optuna.visualization import matplotlib as plots

    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    names = sorted({name for trial in complete for name in trial.params})
    with warnings.catch_warnings(), matplotlib.rc_context():  # the plots change the style
        warnings.simplefilter("ignore")  # each plot warns that it is experimental
        for name, plot, width in (
            ("history", plots.plot_optimization_history, 8),
            ("importances", plots.plot_param_importances, 8),
            ("slice", plots.plot_slice, 5 * len(names)),
            ("parallel", plots.plot_parallel_coordinate, 2 + 2 * len(names)),
        ):
            try:
                plot(study, target_name=metric)
            except (ValueError, RuntimeError):  # importances: too few trials, or no differences
                continue
            figure = pyplot.gcf()
            if name == "parallel":  # its labels are truncated
                ticks = figure.axes[0].get_xticks()
                if len(ticks) == len(names) + 1:
                    figure.axes[0].set_xticks(ticks, [metric, *names], rotation=330, horizontalalignment="left")
            figure.set_size_inches(max(width, 6), 5)
            figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
            pyplot.close(figure)
