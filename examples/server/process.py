"""The model's process. It is one of its own so that Python has a core for the model and another for HTTP.

What passes between the two processes is text, numbers and lists; errors are sentences, as not every exception survives
the way. The server's own process never imports torch.
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
    """What a batch has in a row.

    Attributes:
        adapter: the name of an adapter's folder, `None` for the base model.
        text: what is to be classified or continued.
        max_new_tokens: how many tokens to generate.
        row: its number in the batch that the server has sent.
    """

    adapter: str | None
    text: str
    max_new_tokens: int = 0
    row: int = 0


def new_process(kind: str, name: str, adapters: Path, settings: Settings) -> tuple[ProcessPoolExecutor, Any]:
    """Start a process with a worker.

    Returns:
        The process, for `submit(call, ...)`, and the worker's `gone`, which both processes share.
    """
    context = get_context("spawn")  # CUDA wants a process that is not forked
    gone = context.RawArray("b", settings.max_batch)
    return ProcessPoolExecutor(1, context, _start, (kind, name, adapters, settings, gone)), gone


def call(method: str, *args: Any) -> tuple[Any, dict[str, int]]:
    """In the model's process: what a method of the worker returns, and the adapters in memory."""
    return getattr(_worker, method)(*args), _worker.loaded()


_worker: Any = None


def _start(*args: Any) -> None:
    global _worker
    # The server ends this process once all is answered; a terminal or a service manager would signal both at once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from worker import make_worker

    _worker = make_worker(*args)


def _end_with_parent() -> None:
    """End if the server was killed: nobody else would end this process."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
