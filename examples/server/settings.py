"""The limits of the server. Each is an option of app.py."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from typing import Any


def _setting(default: Any, description: str) -> Any:
    return field(default=default, metadata={"help": description})


@dataclass(frozen=True)
class Settings:
    """Limits on connections, requests, batches and adapters."""

    # A connection.
    max_connections: int = _setting(500, "open connections; keep it below the limit on open files (`ulimit -n`)")
    max_head_bytes: int = _setting(16_384, "bytes of a request's first line and headers")
    head_seconds: float = _setting(10.0, "seconds until the headers of a request have arrived")
    write_seconds: float = _setting(10.0, "seconds that a client may leave an answer unread")
    keep_alive_seconds: int = _setting(5, "seconds a connection may be idle between requests; below head_seconds")
    # A request.
    max_body_bytes: int = _setting(262_144, "bytes of a request's body")
    body_seconds: float = _setting(10.0, "seconds until the body of a request has arrived")
    max_characters: int = _setting(20_000, "characters of a text")
    max_new_tokens: int = _setting(256, "tokens that a request may generate")
    answer_seconds: float = _setting(60.0, "seconds until a request is answered, or rejected with a 503")
    # Waiting requests and batches.
    max_waiting: int = _setting(256, "requests that may wait for a batch; more are rejected with a 503")
    max_batch: int = _setting(64, "rows of a batch")
    gather_seconds: float = _setting(0.01, "seconds that a batch waits for more requests")
    one_adapter_a_batch: bool = _setting(False, "do not mix adapters in a batch; for comparison")
    # The adapters and the models.
    max_bytes: int = _setting(2**30, "bytes of the adapters in memory, for each base model")
    max_virtual_tokens: int = _setting(1024, "virtual tokens of an adapter; each row of a batch computes them")
    threads: int = _setting(0, "threads of torch, for each base model; 0 keeps torch's default")
    shutdown_seconds: int = _setting(30, "seconds for requests in flight after SIGTERM")

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Add an option for each setting."""
        for each in fields(cls):
            kind: dict[str, Any] = {"type": type(each.default)}
            if isinstance(each.default, bool):
                kind = {"action": "store_true"}
            description = f"{each.metadata['help']} (default: {each.default})"
            parser.add_argument(f"--{each.name.replace('_', '-')}", default=each.default, help=description, **kind)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Settings:
        """Return the settings from parsed options."""
        return cls(**{each.name: getattr(args, each.name) for each in fields(cls)})
