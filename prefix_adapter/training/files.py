"""Files that are written whole or not at all, and folders that one run works in at a time."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from .recipe import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator

UNFINISHED = ".unfinished-"
"""What the names of files and folders begin with that are not written to the end."""
_LOCK, _NOTE = ".run.lock", ".run.json"
LOCKS = (_LOCK, _NOTE)
"""The lock of a folder, and the note that says which process holds the lock."""
_WINDOWS = os.name == "nt"


def to_disk(path: Path) -> None:
    """Wait until a file's contents, or a folder's list of names, are on the disk."""
    if path.is_dir():
        if _WINDOWS:  # folders cannot be opened there, and their lists of names need no flush
            return
        flags = os.O_RDONLY
    else:
        flags = os.O_RDWR  # Windows flushes only what is open for writing
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have an error in writing name the file or folder.

    Raises:
        OSError: for every `OSError`, and for the error that safetensors has of its own for a full disk.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        text = str(error)
        raise OSError(text if text.startswith(f"{path}: ") else f"{path}: {text}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file to, which takes the place of `path` once the file is whole and on the disk.

    Raises:
        OSError: if the file cannot be written; `path` is as it was before.
    """
    scratch = path.with_name(UNFINISHED + path.name)
    try:
        with naming(path):
            yield scratch
            to_disk(scratch)
            scratch.replace(path)
    except BaseException:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes, and other runs of this process, from working in a folder.

    The folder is made. If nothing is in it at the end, it is removed, with the parents that were made for it. The
    operating system releases the lock of a process that dies, however it dies.

    Raises:
        RecipeError: if the folder is in use; the message names the process.
        OSError: if nothing can be written there.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"`output_dir`: {folder} is a file. Choose another folder.")
    lock, note = FileLock(folder / _LOCK), folder / _NOTE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RecipeError(
                f"`output_dir`: {_holder(note)} is working in {folder}. Wait until it is done or stop it, or choose "
                "another folder."
            ) from error
        try:
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            with naming(note):
                note.write_text(json.dumps(holder) + "\n", encoding="utf-8")
            yield
        finally:
            # Removed while the lock is held: who waits for it finds that the file has gone, and makes a new one.
            for name in LOCKS:
                with suppress(OSError):
                    (folder / name).unlink()
            lock.release()
    finally:
        with suppress(OSError):  # it is not empty
            for each in made:
                each.rmdir()


def _holder(note: Path) -> str:
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        return f"process {int(found['pid'])} on {found['host']} (since {found['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # it is just being written, or the lock is not a run's
        return "another process"


def check_new(path: Path, overwrite: bool) -> None:
    """See whether a file may be written.

    Raises:
        FileExistsError: if it exists and may not be replaced.
        IsADirectoryError: if it is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder, and must be the name of a file", str(path))
    if path.is_file() and not overwrite:
        raise FileExistsError(f"{path} exists. Choose another name, or replace it (--overwrite).")
