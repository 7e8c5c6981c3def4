"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# The names of temporary files and folders start with this.
UNFINISHED = ".unfinished-"


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file. At the end it replaces what is at `path` (also a link or a pipe).

    Raises:
        OSError: If the file cannot be written; `path` is then unchanged.
    """
    scratch = path.with_name(UNFINISHED + path.name)
    scratch.unlink(missing_ok=True)  # never write through a link that another program left there
    try:
        yield scratch
        scratch.replace(path)
    except BaseException:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


def check_free(folder: str | os.PathLike[str]) -> Path:
    """Return the path of a folder that is to be written.

    Raises:
        FileExistsError: If it exists.
    """
    path = Path(folder)
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another folder for the new adapter, or remove it.")
    return path


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a scratch folder, and rename it to `target` at the end. After an error nothing is left.

    Raises:
        OSError: If the folder cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=UNFINISHED, ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch, target.name)
        folder.mkdir()
        yield folder
        folder.rename(target)
