"""The output folder of a run: its files, its lock, and the checks before a run uses it.

adapter_model.safetensors, adapter_config.json   the best adapter, folded into a table: the files to publish
second/             the second adapter, in the same two files
README.md           the model card: data, settings, metrics, how to load the adapter
recipe.yaml         the exact recipe with its labels, which `predict` and `evaluate` read
results.json        metrics, steps, versions, time
metrics.jsonl       every recorded loss and metric, a line each
curve.png           a plot of these metrics
checkpoints/        the last and the best checkpoint; an MLP is saved as trained
logs/               the trackers' files
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from ..files.card import CARD
from ..files.contents import SECOND
from ..files.whole import UNFINISHED
from .distributed import propagate_errors
from .files import LOCK_FILES, atomic_write, lock_folder
from .recipe import Recipe, RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from accelerate import Accelerator

RECIPE, METRICS, RESULTS, CURVE = "recipe.yaml", "metrics.jsonl", "results.json", "curve.png"
CHECKPOINTS, LOGS = "checkpoints", "logs"
_WEIGHTS = {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, "trained.safetensors"}
RUN_FILES = {RECIPE, METRICS, RESULTS, CURVE, CARD, CHECKPOINTS, LOGS, SECOND, *_WEIGHTS}
"""All files and folders that a run creates."""
INFERRED_KEYS = ("labels", "task_kwargs")
"""The keys of a recipe that a run fills in from the rows if the user does not set them."""
LENGTH_KEYS = ("num_train_epochs", "max_steps", "early_stopping_patience")
"""The keys of a recipe that make a resumed run longer."""
CHANGEABLE_KEYS = ("output_dir", "report_to", "eval_batch_size", "logging_steps", "trust_remote_code", *LENGTH_KEYS)
"""The keys of a recipe that may have another value when a run is resumed."""


class AnyRecipe(Protocol):
    """A recipe of one task or of several: `Recipe` or `JointRecipe`."""

    output_dir: str

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe as YAML."""


def find_recipe(folder: Path) -> Path:
    """The path of the recipe in an output folder.

    Raises:
        RecipeError: if the folder has no recipe.
    """
    if not (folder / RECIPE).is_file():
        raise RecipeError(f"`output_dir`: there is no run to resume in {folder} (it has no {RECIPE}).")
    return folder / RECIPE


def check_new_output_dir(folder: Path, overwrite: bool, task_folders: Sequence[str] = ()) -> None:
    """Check that a new run may use a folder.

    Args:
        folder: the folder.
        overwrite: whether an earlier run in the folder may be removed.
        task_folders: subfolders with the outputs of the earlier run's tasks.

    Raises:
        RecipeError: if the folder is in use and may not be emptied.
    """
    if not folder.exists() or (folder.is_dir() and not _entries(folder)):
        return
    if not overwrite:
        raise RecipeError(
            f"`output_dir`: {folder} is not empty. Choose another folder, resume the run in it (--resume), or "
            "replace that run (--overwrite)."
        )
    if not (folder / RECIPE).is_file():
        raise RecipeError(f"`output_dir`: {folder} contains no earlier run (no {RECIPE}) and is not overwritten.")
    others = sorted(_entries(folder) - {*RUN_FILES, *task_folders})
    for name in task_folders:
        if (folder / name).is_dir():
            others += sorted(f"{name}/{other}" for other in _entries(folder / name) - RUN_FILES)
    if others:
        raise RecipeError(
            f"`output_dir`: {folder} also contains {others[0]!r}, which no run created, and is not overwritten. Move "
            "it, or choose another folder."
        )


def _entries(folder: Path) -> set[str]:
    """The names in a folder, except the lock and temporary files of killed processes."""
    return {path.name for path in folder.iterdir() if not path.name.startswith((UNFINISHED, *LOCK_FILES))}


@contextmanager
def lock_output_dir(folder: Path, accelerator: Accelerator, command: str) -> Iterator[None]:
    """Reserve an output folder for the processes of one run.

    Args:
        folder: the folder.
        accelerator: the accelerator; its main process holds the lock.
        command: the subcommand of `prefix-adapter` that resumes the run.

    Raises:
        RecipeError: if another run uses the folder; see `files.lock_folder`.
        KeyboardInterrupt: on a Ctrl-C that `Loop.run` does not handle; the message says how to resume.
        OSError: if the folder cannot be written to.
    """
    with ExitStack() as stack:
        with propagate_errors(accelerator):
            if accelerator.is_main_process:
                stack.enter_context(lock_folder(folder))
        try:
            yield
        except KeyboardInterrupt as error:
            resumable = (folder / RECIPE).is_file()
            hint = how_to_resume(folder, command) if resumable else f"There is no run in {folder} yet."
            raise KeyboardInterrupt(f"Stopped. {hint}") from error


def how_to_resume(folder: str | os.PathLike[str], command: str) -> str:
    """A sentence with the command that resumes the run in a folder."""
    path = os.fspath(folder)
    quoted = subprocess.list2cmdline([path]) if os.name == "nt" else shlex.quote(path)
    return f"Resume with: prefix-adapter {command} --resume {quoted}"


def check_shared(folder: Path, accelerator: Accelerator) -> None:
    """Check that every process sees the recipe that the main process has written or found.

    Raises:
        RecipeError: if a process does not.
    """
    with propagate_errors(accelerator):
        if not (folder / RECIPE).is_file():
            raise RecipeError(f"`output_dir`: {folder} must be in a file system that all nodes share.")


def clear(folder: Path, resume: bool) -> None:
    """Create a folder, or remove its contents; for a resumed run remove only unfinished files."""
    folder.mkdir(parents=True, exist_ok=True)
    # The recipe goes last: it marks the folder as a run, which may be overwritten.
    for path in sorted(folder.iterdir(), key=lambda path: path.name == RECIPE):
        if path.name in LOCK_FILES or (resume and not path.name.startswith(UNFINISHED)):
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def check_same_recipe(earlier: Recipe, path: Path, now: Recipe, *ignored: str) -> None:
    """Check that a run is resumed with its own recipe, except for `CHANGEABLE_KEYS` and the `ignored` keys.

    Args:
        earlier: the recipe of the run.
        path: its file. One that was cut off may still be a valid recipe.
        now: the recipe to resume with.
        *ignored: keys that may differ.

    Raises:
        RecipeError: if a key has another value; the message names the key and the file.
    """
    old, new = earlier.to_dict(), now.to_dict()
    for key in old:
        if old[key] != new[key] and key not in (*CHANGEABLE_KEYS, *ignored):
            raise RecipeError(
                f"`{key}`: the run in {now.output_dir} was started with {old[key]!r}, not {new[key]!r} (see "
                f"{path}). Resume it with its own recipe, or start a new run."
            )


def save_recipe(recipe: AnyRecipe) -> None:
    """Write a recipe into its output folder."""
    with atomic_write(Path(recipe.output_dir) / RECIPE) as scratch:
        recipe.save(scratch)
