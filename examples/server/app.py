"""A small server that answers requests for many adapters in shared batches on one frozen base model.

    pip install "prefix-adapter[serve]"
    python examples/server/app.py --adapters runs --classifier bert-base-cased --generator Qwen/Qwen3-0.6B

    curl localhost:8000/classify --json '{"adapter": "intents", "text": "My card is gone."}'
    curl localhost:8000/generate --json '{"adapter": null, "prompt": "Once upon a time"}'

A request names an adapter by its folder in `--adapters`. The adapter is loaded when it is first requested, and again
when its files have changed. Requests that arrive while a batch is computed form the next batch, whatever their
adapters. GET /adapters lists the adapters; /metrics (Prometheus), /health/live, /health/ready and /docs are for
monitoring. settings.py has all limits.

This example has no authentication, no encryption, no support for several machines, and no streaming.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import prometheus_client as prometheus
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from limits import REGISTRY, Counting, Limits, Protocol
from process import Question, call, new_process
from pydantic import BaseModel, ConfigDict, Field
from settings import Settings

log = logging.getLogger(__name__)

BATCHES = prometheus.Histogram("batch_rows", "Rows of a batch.", buckets=[1, 2, 4, 8, 16, 32, 64], registry=REGISTRY)
ADAPTERS = prometheus.Gauge("adapters", "Adapters in memory.", ["service"], registry=REGISTRY)
ADAPTER_BYTES = prometheus.Gauge("adapter_bytes", "Bytes of the adapters in memory.", ["service"], registry=REGISTRY)
WAITING = prometheus.Gauge("waiting", "Requests waiting for a batch.", ["service"], registry=REGISTRY)
READY = prometheus.Gauge("ready", "Whether the model's process answers.", ["service"], registry=REGISTRY)

# The name of an adapter: a folder directly under `--adapters`, not a path.
NAME = r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$"


def unavailable(detail: str, seconds: int) -> HTTPException:
    """Return a 503 with the time after which to retry."""
    return HTTPException(503, detail, {"Retry-After": str(seconds)})


# ---- A base model


@dataclass(eq=False)
class WaitingRequest:
    """A request that waits for its answer. `row` is its row in the running batch, or `None` if it is not in it."""

    adapter: str | None
    text: str
    max_new_tokens: int
    answer: asyncio.Future
    row: int | None = None


class Service:
    """One base model in a separate process, and the requests that wait for it.

    Args:
        kind: `"classify"` or `"generate"`.
        model: The base model's folder or name on the Hub.
        adapters: The folder that contains the folders of the adapters.
        settings: The limits.
    """

    def __init__(self, kind: str, model: str, adapters: Path, settings: Settings) -> None:
        self.kind, self.model, self.adapters, self.settings = kind, model, adapters, settings
        self.ready = False
        self.pid = 0
        self.loaded: dict[str, int] = {}
        self.waiting: deque[WaitingRequest] = deque()
        self.arrived = asyncio.Event()
        self.process, self.abandoned = new_process(kind, model, adapters, settings)

    # ---- The process

    async def call(self, method: str, *args: Any) -> Any:
        """Call a method of the worker and return its result.

        Raises:
            BrokenExecutor: If the process has ended.
        """
        answer, self.loaded = await asyncio.get_running_loop().run_in_executor(self.process, call, method, *args)
        return answer

    async def start(self) -> None:
        """Wait until the model is loaded.

        Raises:
            RuntimeError: If it cannot be loaded. The process has printed the reason.
        """
        try:
            self.pid = await self.call("ping")
        except BrokenExecutor as error:
            raise RuntimeError(f"{self.model} could not be loaded. The lines above give the reason.") from error
        self.ready = True

    async def watch(self, stop: Callable[[], None]) -> None:
        """Start a new process if the model's process has ended or hangs; stop the server if the new one fails too."""
        while True:
            await asyncio.sleep(0.2)
            try:
                # A batch ends at the latest when its requests have timed out after `answer_seconds`.
                async with asyncio.timeout(2 * self.settings.answer_seconds):
                    await self.call("ping")
            except TimeoutError:
                log.error("The process of %s (%d) hangs, and is killed.", self.model, self.pid)
                os.kill(self.pid, signal.SIGKILL)
            except BrokenExecutor:
                log.error("The process of %s (%d) has ended. A new one starts.", self.model, self.pid)
                self.ready, self.loaded = False, {}
                while self.waiting:
                    fail(self.waiting.popleft(), self.ended())
                self.process, self.abandoned = new_process(self.kind, self.model, self.adapters, self.settings)
                try:
                    await self.start()
                except RuntimeError as error:
                    log.critical("%s The server ends.", error)
                    return stop()

    def ended(self) -> HTTPException:
        """Return the answer to requests that wait when the process ends."""
        return unavailable("The model's process has ended, and a new one starts.", 10)

    # ---- The requests

    async def ask(self, adapter: str | None, text: str, max_new_tokens: int = 0) -> dict[str, Any]:
        """Wait for the batch of a request and return the answer.

        Raises:
            HTTPException: If there is no answer.
        """
        if len(text) > self.settings.max_characters:
            raise HTTPException(422, f"The text is too long: at most {self.settings.max_characters:,} characters.")
        if max_new_tokens > self.settings.max_new_tokens:
            raise HTTPException(422, f"max_new_tokens: at most {self.settings.max_new_tokens}.")
        if not self.ready:
            raise self.ended()
        if len(self.waiting) >= self.settings.max_waiting:
            raise unavailable("Too many requests are waiting.", 1)
        request = WaitingRequest(adapter, text, max_new_tokens, asyncio.get_running_loop().create_future())
        self.waiting.append(request)
        self.arrived.set()
        try:
            async with asyncio.timeout(self.settings.answer_seconds):
                answer = await request.answer
        except TimeoutError:
            raise unavailable("The answer took too long.", 10) from None
        finally:
            if request in self.waiting:
                self.waiting.remove(request)
            if request.row is not None:  # no client waits for this row any more
                self.abandoned[request.row] = 1
        if "status" in answer:
            again = {"Retry-After": "1"} if answer["status"] == 503 else None
            raise HTTPException(answer["status"], answer["detail"], again)
        return answer

    def next_batch(self) -> list[WaitingRequest]:
        """Take the requests that waited longest; only those for one adapter if batches are not mixed."""
        mixed, first = not self.settings.one_adapter_a_batch, self.waiting[0].adapter
        batch = [each for each in self.waiting if mixed or each.adapter == first][: self.settings.max_batch]
        for row, request in enumerate(batch):
            self.waiting.remove(request)
            self.abandoned[row], request.row = 0, row
        return batch

    async def work(self) -> None:
        """Compute one batch after the other while the server runs."""
        while True:
            await self.arrived.wait()
            # Clients that were just answered may send their next request.
            if len(self.waiting) < self.settings.max_batch:
                await asyncio.sleep(self.settings.gather_seconds)
            if self.waiting:
                await self.compute(self.next_batch())
            if not self.waiting:
                self.arrived.clear()

    async def compute(self, batch: list[WaitingRequest]) -> None:
        """Compute a batch and pass the answers to its requests."""
        BATCHES.observe(len(batch))
        questions = [Question(each.adapter, each.text, each.max_new_tokens, row) for row, each in enumerate(batch)]
        try:
            answers = await self.call("answer", questions)
        except BrokenExecutor:
            self.ready = False
            for request in batch:
                fail(request, self.ended())
            return
        except Exception as error:
            log.error("A batch failed.", exc_info=error)
            for request in batch:
                fail(request, HTTPException(500, "The batch of this request failed; see the server's log."))
            return
        for request, answer in zip(batch, answers, strict=True):
            request.row = None
            if not request.answer.done():
                request.answer.set_result(answer)


def fail(request: WaitingRequest, error: Exception) -> None:
    """Answer a waiting request with an error."""
    request.row = None
    if not request.answer.done():
        request.answer.set_exception(error)


# ---- The requests


class Classify(BaseModel):
    """The body of a request to /classify."""

    model_config = ConfigDict(strict=True, extra="forbid")
    adapter: str | None = Field(None, pattern=NAME, max_length=100, description="A folder's name; null: no adapter.")
    text: str = Field(min_length=1)


class Generate(BaseModel):
    """The body of a request to /generate."""

    model_config = ConfigDict(strict=True, extra="forbid")
    adapter: str | None = Field(None, pattern=NAME, max_length=100, description="A folder's name; null: no adapter.")
    prompt: str = Field(min_length=1)
    max_new_tokens: int = Field(32, ge=1)


class StrictRequest(Request):
    """A request whose body must be strict JSON in UTF-8; Python's parser accepts more than the specification."""

    async def json(self) -> Any:
        """Return the parsed body.

        Raises:
            HTTPException: 400, for invalid JSON, duplicate keys, NaN and Infinity.
        """
        try:
            text = (await self.body()).decode()
            return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            why = "it is nested too deeply" if isinstance(error, RecursionError) else printable(error)
            raise HTTPException(400, f"The body is not valid JSON: {why}") from None


class StrictRoute(APIRoute):
    """A route that accepts only JSON."""

    def get_route_handler(self) -> Any:
        """Return FastAPI's handler, called with a `StrictRequest`."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Any:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if request.method == "POST" and kind != "application/json":
                raise HTTPException(415, "Send JSON, with the header Content-Type: application/json.")
            return await handle(StrictRequest(request.scope, request.receive))

        return strict


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key occurs twice in an object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def printable(value: Any) -> str:
    """Return untrusted text, shortened and in ASCII."""
    return str(value)[:200].encode("ascii", "backslashreplace").decode()


async def answer_invalid_request(_: Request, error: Exception) -> Response:
    """Return a 422 with a sentence. FastAPI's own answer repeats the whole input, and fails on invalid Unicode."""
    assert isinstance(error, RequestValidationError)
    problems = [
        f"{printable('.'.join(map(str, each['loc'][1:])) or 'body')}: {printable(each['msg'])}"
        for each in error.errors()[:5]
    ]
    return JSONResponse({"detail": "; ".join(problems)}, 422)


# ---- The application


def create_app(
    classifier: Service | None = None, generator: Service | None = None, stop: Callable[[], None] = lambda: None
) -> Any:
    """Return the ASGI application, with a path for each service.

    Args:
        classifier: The service of /classify.
        generator: The service of /generate.
        stop: Ends the server. Called when a model's process has ended and no new one can be started.
    """
    services = {each.kind: each for each in (classifier, generator) if each is not None}

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> Any:
        for each in services.values():
            await each.start()  # the server starts only if the model can be loaded
        tasks = [asyncio.create_task(task) for each in services.values() for task in (each.work(), each.watch(stop))]
        yield
        for task in tasks:
            task.cancel()
        for each in services.values():
            each.process.shutdown(cancel_futures=True)

    app = FastAPI(title="Many adapters on one base model", lifespan=lifespan)
    app.router.route_class = StrictRoute
    app.add_exception_handler(RequestValidationError, answer_invalid_request)

    if classifier is not None:

        @app.post("/classify")
        async def _classify(body: Classify) -> dict[str, Any]:
            return await classifier.ask(body.adapter, body.text)

    if generator is not None:

        @app.post("/generate")
        async def _generate(body: Generate) -> dict[str, Any]:
            return await generator.ask(body.adapter, body.prompt, body.max_new_tokens)

    @app.get("/adapters")
    def _adapters() -> dict[str, Any]:
        return {kind: {"on_disk": names_in(each.adapters), "loaded": each.loaded} for kind, each in services.items()}

    @app.get("/metrics")
    async def _metrics() -> Response:
        for kind, each in services.items():
            ADAPTERS.labels(kind).set(len(each.loaded))
            ADAPTER_BYTES.labels(kind).set(sum(each.loaded.values()))
            WAITING.labels(kind).set(len(each.waiting))
            READY.labels(kind).set(each.ready)
        return Response(prometheus.generate_latest(REGISTRY), media_type=prometheus.CONTENT_TYPE_LATEST)

    @app.get("/health/live")
    async def _live() -> dict[str, Any]:
        return {"live": True}

    @app.get("/health/ready")
    async def _ready(response: Response) -> dict[str, Any]:
        ready = {kind: each.ready for kind, each in services.items()}
        response.status_code = 200 if all(ready.values()) else 503
        return ready

    settings = next(iter(services.values())).settings
    paths = {f"/{kind}" for kind in services} | {"/adapters", "/metrics", "/health/live", "/health/ready"}
    return Counting(Limits(app, settings), paths)


def names_in(adapters: Path) -> list[str]:
    """Return the names of the adapters on disk."""
    return sorted(
        path.parent.name for path in adapters.glob("*/adapter_config.json") if re.fullmatch(NAME, path.parent.name)
    )


def uvicorn_options(settings: Settings) -> dict[str, Any]:
    """Return the limits that uvicorn has settings for."""
    return {
        "http": partial(Protocol, settings),
        "ws": "none",
        "lifespan": "on",
        "log_level": "warning",
        "server_header": False,
        "proxy_headers": False,
        "h11_max_incomplete_event_size": settings.max_head_bytes,
        "timeout_keep_alive": settings.keep_alive_seconds,
        "timeout_graceful_shutdown": settings.shutdown_seconds,
    }


def main() -> None:
    """Load the base models and serve requests."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapters", type=Path, required=True, help="folder with the folders of the adapters")
    parser.add_argument("--classifier", help="base model of the adapters for sequence classification")
    parser.add_argument("--generator", help="base model of the adapters for causal language modelling")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    Settings.add_to(parser)
    args = parser.parse_args()
    if not args.adapters.is_dir():
        parser.error(f"--adapters: the folder {args.adapters} does not exist")
    if not (args.classifier or args.generator):
        parser.error("pass --classifier or --generator, or both")
    settings = Settings.of(args)
    services = {
        option: Service(kind, name, args.adapters, settings)
        for option, kind, name in (
            ("classifier", "classify", args.classifier),
            ("generator", "generate", args.generator),
        )
        if name
    }
    app = create_app(**services, stop=lambda: setattr(server, "should_exit", True))
    server = uvicorn.Server(uvicorn.Config(app, host=args.host, port=args.port, **uvicorn_options(settings)))
    with contextlib.suppress(KeyboardInterrupt):
        server.run()  # ends the process by itself after SIGTERM
        if not all(each.ready for each in services.values()):
            sys.exit(1)


if __name__ == "__main__":
    main()
