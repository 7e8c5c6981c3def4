"""The process of the model. A separate process lets Python use one core for the model and another for HTTP.

Only text, numbers and lists pass between the processes. Errors are passed as sentences, because not every exception
can be pickled. The server's own process never imports torch.
"""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from settings import Settings


@dataclass(frozen=True)
class Question:
    """One row of a batch.

    Attributes:
        adapter: The name of an adapter's folder; `None` for the base model.
        text: The text to classify or to continue.
        max_new_tokens: The number of tokens to generate.
        row: The number of the row in the server's batch.
    """

    adapter: str | None
    text: str
    max_new_tokens: int = 0
    row: int = 0


def new_process(kind: str, name: str, adapters: Path, settings: Settings) -> tuple[ProcessPoolExecutor, Any]:
    """Start a process with a worker.

    Returns:
        The process, for `submit(call, ...)`, and the worker's array `abandoned`, which both processes share.
    """
    context = get_context("spawn")  # CUDA does not work in a forked process
    abandoned = context.RawArray("b", settings.max_batch)
    return ProcessPoolExecutor(1, context, _start, (kind, name, adapters, settings, abandoned)), abandoned


def call(method: str, *args: Any) -> tuple[Any, dict[str, int]]:
    """Call a method of the worker, in the model's process; return its result and the adapters in memory."""
    return getattr(_worker, method)(*args), _worker.loaded()


_worker: Any = None


def _start(*args: Any) -> None:
    global _worker
    # The server ends this process after its last answer. A terminal or a service manager signals both processes at
    # once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from worker import make_worker

    _worker = make_worker(*args)


def _end_with_parent() -> None:
    """End this process when the server has ended, even if it was killed."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
