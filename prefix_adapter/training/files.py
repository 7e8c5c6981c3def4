"""Atomic writes, file errors that name the path, and the lock of an output folder."""

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

from ..files.whole import new_file
from .recipe import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOCK, _OWNER = ".run.lock", ".run.json"
LOCK_FILES = (_LOCK, _OWNER)
"""The lock of a folder, and the file that names the process that holds it."""
_WINDOWS = os.name == "nt"


def fsync_path(path: Path) -> None:
    """Flush a file's contents, or the entries of a folder, to the disk."""
    if path.is_dir():
        if _WINDOWS:  # Windows cannot open folders and needs no flush for their entries.
            return
        flags = os.O_RDONLY
    else:
        flags = os.O_RDWR  # Windows flushes only files that are open for writing.
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def path_in_errors(path: Path) -> Iterator[None]:
    """Add the path of a file or folder to the message of a write error.

    Raises:
        OSError: for every `OSError`, and for the error that safetensors raises when the disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        text = str(error)
        raise OSError(text if text.startswith(f"{path}: ") else f"{path}: {text}") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file, which replaces `path` once it is complete and on the disk.

    Raises:
        OSError: if the file cannot be written; `path` is unchanged.
    """
    with path_in_errors(path), new_file(path) as scratch:
        yield scratch
        fsync_path(scratch)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes, and against other runs of this process.

    The folder is created if it does not exist. A folder that is empty at the end is removed, together with the
    parents that were created for it. The operating system releases the lock when the process dies.

    Raises:
        RecipeError: if the folder is locked; the message names the process that holds the lock.
        OSError: if the folder cannot be written to.
    """
    created = [each for each in (folder, *folder.parents) if not each.exists()]
    if folder.exists() and not folder.is_dir():
        raise RecipeError(f"`output_dir`: {folder} is a file. Choose another folder.")
    lock, owner_file = FileLock(folder / _LOCK), folder / _OWNER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RecipeError(
                f"`output_dir`: {_lock_owner(owner_file)} is working in {folder}. Wait until it ends, stop it, or "
                "choose another folder."
            ) from error
        try:
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            with path_in_errors(owner_file):
                owner_file.write_text(json.dumps(owner) + "\n", encoding="utf-8")
            yield
        finally:
            # Removed before the lock is released: a process that waits for the lock then creates a new file.
            for name in LOCK_FILES:
                with suppress(OSError):
                    (folder / name).unlink()
            lock.release()
    finally:
        with suppress(OSError):  # The folder is not empty.
            for each in created:
                each.rmdir()


def _lock_owner(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return f"process {int(found['pid'])} on {found['host']} (since {found['since']})"
    except (OSError, ValueError, KeyError, TypeError):  # The file is being written, or another program holds the lock.
        return "another process"


def check_new(path: Path, overwrite: bool) -> None:
    """Check that a file may be written.

    Raises:
        FileExistsError: if the file exists and `overwrite` is false.
        IsADirectoryError: if the path is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder, and must be the name of a file", str(path))
    if path.is_file() and not overwrite:
        raise FileExistsError(f"{path} exists. Choose another name, or replace it (--overwrite).")
