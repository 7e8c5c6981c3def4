"""Raising at any step of something, as a failing disk, a signal or Ctrl-C would."""

import inspect
import sys
from pathlib import Path

import peft
import safetensors
import torch

import prefix_adapter

# The steps are the calls of functions in these packages, and of the following ones of modules.
PLACES = tuple(f"{Path(module.__file__).parent}/" for module in (prefix_adapter, peft, safetensors))
MODULES = torch.nn.modules.module.__file__
OF_MODULES = {"add_module", "load", "load_state_dict", "_load_from_state_dict"}


class Steps:
    """Count the steps of what is done inside, and raise at one of them.

    Args:
        at: the step to raise at; never if `None`.
        error: what to raise.
    """

    def __init__(self, at: int | None = None, error: type[BaseException] = KeyboardInterrupt):
        self.at, self.error, self.count = at, error, 0
        self.last: dict = {}
        self.where = ""

    def points(self, number: int) -> list[int]:
        """At most so many steps of those that were seen, spread over all: of each function the last call."""
        points = sorted(self.last.values())
        return points[:: -(-len(points) // number)]

    def __enter__(self) -> "Steps":
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame, event, argument):
        code = frame.f_code
        if event != "call" or code.co_flags & inspect.CO_GENERATOR or code.co_name.startswith(("__get", "<")):
            return
        of_modules = code.co_filename == MODULES and code.co_name in OF_MODULES
        if not of_modules and not code.co_filename.startswith(PLACES):
            return
        self.last[code] = self.count
        self.count += 1
        if self.last[code] == self.at:
            self.where = f"{code.co_filename}:{code.co_name}"
            raise self.error(self.where)
