"""Examples run as programs, in the process of the test, where everything is imported already."""

import contextlib
import io
import runpy
import sys
from pathlib import Path
from unittest import mock

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name, *arguments) -> str:
    """Run an example of the folder `examples`; what it printed."""
    path, printed = str(EXAMPLES / name), io.StringIO()
    with mock.patch.object(sys, "argv", [path, *map(str, arguments)]), contextlib.redirect_stdout(printed):
        runpy.run_path(path, run_name="__main__")
    return printed.getvalue()
