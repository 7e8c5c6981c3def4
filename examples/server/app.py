"""A small server: requests for many adapters, computed together on one frozen base model.

    pip install "prefix-adapter[serve]"
    python examples/server/app.py --adapters runs --classifier bert-base-cased --generator Qwen/Qwen3-0.6B

    curl localhost:8000/classify --json '{"adapter": "intents", "text": "My card is gone."}'
    curl localhost:8000/generate --json '{"adapter": null, "prompt": "Once upon a time"}'

Every folder in `--adapters` that holds an adapter can be asked for by its name, and is loaded when it first is.
Requests that arrive while a batch is computed make up the next one, whatever adapters they ask for
(`--one-adapter-a-batch` is for comparison: see load_test.py). GET /adapters, /metrics (Prometheus) and /docs say what
there is and what happens.

What this example leaves to a server of yours: who may ask, encryption, several machines, streaming.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import time
from collections import deque
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import prometheus_client as prometheus
import transformers
from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, Field
from worker import Question, call, load_tokenizer, new_process

MAX_WAITING, MAX_NEW_TOKENS = 1024, 256
GATHERING = 0.01  # seconds that a batch waits for more requests: those that were answered just now ask again


@dataclass
class Request:
    """A request that waits for its batch."""

    question: Question
    answer: asyncio.Future


class Service:
    """One base model in a process of its own, and the requests that wait for it.

    Args:
        kind: `"classify"` or `"generate"`.
        model: the base model's folder or name on the Hub.
        adapters: the folder whose folders are adapters.
        max_bytes: of the adapters in memory.
        mixed: whether a batch may mix adapters.
        max_batch: its rows at most.
        threads: torch's in the model's process.
    """

    def __init__(
        self,
        kind: str,
        model: str,
        adapters: Path,
        max_bytes: int | None = None,
        mixed: bool = True,
        max_batch: int = 64,
        threads: int | None = None,
    ) -> None:
        self.new_process = partial(new_process, kind, model, max_bytes, threads)
        self.process = self.new_process()
        self.tokenizer, self.adapters = load_tokenizer(model), adapters
        self.mixed, self.max_batch = mixed, max_batch
        config = transformers.AutoConfig.from_pretrained(model)
        self.limit = getattr(config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        self.waiting: deque[Request] = deque()
        self.arrived = asyncio.Event()
        self.tried: dict[str, asyncio.Future] = {}

    async def call(self, method: str, *args: Any) -> Any:
        """What a method of the worker returns."""
        process = self.process
        try:
            return await asyncio.get_running_loop().run_in_executor(process, call, method, *args)
        except BrokenExecutor as error:
            if self.process is process:
                self.process, self.tried = self.new_process(), {}
            raise HTTPException(
                503, "The model's process has ended; a new one starts.", {"Retry-After": "10"}
            ) from error

    def folder(self, adapter: str | None) -> str | None:
        """The folder of an adapter; only names of folders right under `adapters` mean one."""
        if adapter is None:
            return None
        folder = self.adapters / adapter
        if not re.fullmatch(r"[\w-][\w.-]*", adapter) or not (folder / "adapter_config.json").is_file():
            raise HTTPException(404, f"There is no adapter {adapter!r}; GET /adapters lists them.")
        return str(folder)

    async def ask(self, adapter: str | None, text: str, max_new_tokens: int = 0) -> Any:
        """The answer to a request, when its batch is done."""
        folder = self.folder(adapter)
        input_ids = self.tokenizer(text)["input_ids"]
        if not input_ids or len(input_ids) + max_new_tokens > self.limit:
            raise HTTPException(
                422, f"{len(input_ids)} tokens and {max_new_tokens} new ones; the model takes 1 to {self.limit}."
            )
        if len(self.waiting) >= MAX_WAITING:
            raise HTTPException(503, "Too many requests are waiting.", {"Retry-After": "1"})
        if folder is not None:
            await self.try_out(folder)
        request = Request(Question(folder, input_ids, max_new_tokens), asyncio.get_running_loop().create_future())
        self.waiting.append(request)
        self.arrived.set()
        answer = await request.answer
        if "error" in answer:
            raise HTTPException(500, answer["error"])
        return answer

    async def try_out(self, folder: str) -> None:
        """Load an adapter by itself: one that cannot be used is the trouble of those who ask for it alone."""
        if folder not in self.tried:
            self.tried[folder] = asyncio.ensure_future(self.call("load", folder))
        loading = self.tried[folder]
        try:
            why = await asyncio.shield(loading)
        except HTTPException:
            self.tried.pop(folder, None)
            raise
        if why:
            self.tried.pop(folder, None)  # it may be mended
            raise HTTPException(422, f"Adapter {Path(folder).name!r} cannot be used: {why}")

    def next_batch(self) -> list[Request]:
        """The requests that waited longest; of one adapter alone if batches are not mixed."""
        first = self.waiting[0].question.adapter
        batch = [each for each in self.waiting if self.mixed or each.question.adapter == first][: self.max_batch]
        taken = {id(each) for each in batch}
        self.waiting = deque(each for each in self.waiting if id(each) not in taken)
        return [each for each in batch if not each.answer.cancelled()]

    async def work(self) -> None:
        """Have batch after batch computed, as long as the server runs."""
        while True:
            await self.arrived.wait()
            while self.waiting:
                if len(self.waiting) < self.max_batch:
                    await asyncio.sleep(GATHERING)
                batch = self.next_batch()
                BATCHES.observe(len(batch))
                try:
                    answers = await self.call("answer", [each.question for each in batch])
                except Exception as error:
                    answers = [error] * len(batch)
                for request, answer in zip(batch, answers, strict=True):
                    if request.answer.done():
                        continue
                    if isinstance(answer, Exception):
                        request.answer.set_exception(answer)
                    else:
                        request.answer.set_result(answer)
            self.arrived.clear()


REGISTRY = prometheus.CollectorRegistry()
REQUESTS = prometheus.Counter("requests", "Requests by path and status.", ["path", "status"], registry=REGISTRY)
SECONDS = prometheus.Histogram("request_seconds", "Seconds until the answer.", ["path"], registry=REGISTRY)
BATCHES = prometheus.Histogram("batch_rows", "Rows of a batch.", buckets=[1, 2, 4, 8, 16, 32, 64], registry=REGISTRY)
ADAPTERS = prometheus.Gauge("adapters", "Adapters in memory.", ["service"], registry=REGISTRY)
ADAPTER_BYTES = prometheus.Gauge("adapter_bytes", "Bytes of them.", ["service"], registry=REGISTRY)


class Counting:
    """Counts requests and their seconds; plain ASGI, as starlette's own way costs each request a task."""

    def __init__(self, app: Any, paths: set[str]) -> None:
        self.app, self.paths = app, paths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        started = time.perf_counter()
        path = scope.get("path") if scope.get("path") in self.paths else "other"

        async def count(message: Any) -> None:
            if message["type"] == "http.response.start":
                REQUESTS.labels(path, message["status"]).inc()
                SECONDS.labels(path).observe(time.perf_counter() - started)
            await send(message)

        await self.app(scope, receive, count)


class Classify(BaseModel):
    """What /classify takes."""

    adapter: str | None = Field(None, description="A folder's name; null for the base model alone.")
    text: str = Field(min_length=1, max_length=100_000)


class Generate(BaseModel):
    """What /generate takes."""

    adapter: str | None = Field(None, description="A folder's name; null for the base model alone.")
    prompt: str = Field(min_length=1, max_length=100_000)
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] = 32


def create_app(classifier: Service | None = None, generator: Service | None = None) -> FastAPI:
    """The application, with a path for each service that there is."""
    services = {name: each for name, each in (("classify", classifier), ("generate", generator)) if each is not None}

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> Any:
        for each in services.values():
            await each.call("loaded")  # the model is, or the server does not start
        tasks = [asyncio.create_task(each.work()) for each in services.values()]
        yield
        for task, each in zip(tasks, services.values(), strict=True):
            task.cancel()
            each.process.shutdown(cancel_futures=True)

    app = FastAPI(title="Many adapters on one base model", lifespan=lifespan)

    app.add_middleware(Counting, paths={f"/{name}" for name in services})

    if classifier is not None:

        @app.post("/classify")
        async def _classify(body: Classify) -> dict[str, Any]:
            return await classifier.ask(body.adapter, body.text)

    if generator is not None:

        @app.post("/generate")
        async def _generate(body: Generate) -> dict[str, Any]:
            return await generator.ask(body.adapter, body.prompt, body.max_new_tokens)

    @app.get("/adapters")
    async def _adapters() -> dict[str, Any]:
        return {
            name: {
                "on_disk": sorted(path.parent.name for path in each.adapters.glob("*/adapter_config.json")),
                "loaded": await each.call("loaded"),
            }
            for name, each in services.items()
        }

    @app.get("/metrics")
    async def _metrics() -> Response:
        for name, each in services.items():
            loaded = await each.call("loaded")
            ADAPTERS.labels(name).set(len(loaded))
            ADAPTER_BYTES.labels(name).set(sum(loaded.values()))
        return Response(prometheus.generate_latest(REGISTRY), media_type=prometheus.CONTENT_TYPE_LATEST)

    return app


def main() -> None:
    """Load the base models, and serve."""
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapters", type=Path, required=True, help="folder whose folders are adapters")
    parser.add_argument("--classifier", help="base model of the adapters for sequence classification")
    parser.add_argument("--generator", help="base model of the adapters for causal language modelling")
    parser.add_argument("--max-bytes", type=int, default=2**30, help="of the adapters in memory, for each base model")
    parser.add_argument("--max-batch", type=int, default=64, help="rows of a batch at most")
    parser.add_argument("--one-adapter-a-batch", action="store_true", help="for comparison")
    parser.add_argument("--threads", type=int, help="of torch, for each model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    if not args.adapters.is_dir():
        parser.error(f"--adapters: there is no folder {args.adapters}")
    services = {}
    for option, kind in (("classifier", "classify"), ("generator", "generate")):
        name, mixed = getattr(args, option), not args.one_adapter_a_batch
        if name:
            services[option] = Service(kind, name, args.adapters, args.max_bytes, mixed, args.max_batch, args.threads)
    if not services:
        parser.error("give --classifier or --generator, or both")
    uvicorn.run(create_app(**services), host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
