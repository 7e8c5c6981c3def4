"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a text file, and replace what was at `path` (also a link or a pipe).

    Raises:
        OSError: If the file cannot be written; `path` is then unchanged.
    """
    scratch = path.with_name(f".unfinished-{path.name}")
    try:
        scratch.unlink(missing_ok=True)
        with open(scratch, "x", encoding="utf-8", newline="") as file:
            file.write(text)
        os.replace(scratch, path)
    except BaseException:
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
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        folder = Path(scratch, target.name)
        folder.mkdir()
        yield folder
        folder.rename(target)
