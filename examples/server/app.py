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
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import prometheus_client as prometheus
import torch
import transformers
import yaml
from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, Field

from prefix_adapter import AdapterPool

MAX_BATCH, MAX_WAITING, MAX_NEW_TOKENS = 64, 1024, 256
GATHERING = 0.01  # seconds that a batch waits for more requests: those that were answered just now ask again


@dataclass
class Request:
    """A request that waits for its batch."""

    adapter: str | None
    input_ids: list[int]
    max_new_tokens: int
    answer: asyncio.Future


class Service:
    """One base model, its adapters, and the requests that wait for it.

    Args:
        model: the base model.
        tokenizer: its tokenizer.
        adapters: the folder whose folders are adapters.
        compute: from the pool, the tokenizer and a batch of requests to an answer for each.
        max_bytes: of the adapters in memory.
        mixed: whether a batch may mix adapters.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        adapters: Path,
        compute: Callable[[AdapterPool, Any, list[Request]], list[Any]],
        max_bytes: int | None = None,
        mixed: bool = True,
    ) -> None:
        self.pool, self.tokenizer, self.adapters = AdapterPool(model, max_bytes), tokenizer, adapters
        self.compute, self.mixed = compute, mixed
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.limit = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
        self.waiting: deque[Request] = deque()
        self.arrived = asyncio.Event()
        self.tried: set[str] = set()

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
        if folder is not None and folder not in self.tried:
            try:  # by itself: an adapter that cannot be used is the trouble of those who ask for it alone
                await asyncio.to_thread(self.pool.load, folder)
            except (ValueError, OSError) as error:
                raise HTTPException(422, f"Adapter {adapter!r} cannot be used: {error}") from error
            self.tried.add(folder)
        request = Request(folder, input_ids, max_new_tokens, asyncio.get_running_loop().create_future())
        self.waiting.append(request)
        self.arrived.set()
        return await request.answer

    def next_batch(self) -> list[Request]:
        """The requests that waited longest; of one adapter alone if batches are not mixed."""
        first = self.waiting[0].adapter
        batch = [each for each in self.waiting if self.mixed or each.adapter == first][:MAX_BATCH]
        taken = {id(each) for each in batch}
        self.waiting = deque(each for each in self.waiting if id(each) not in taken)
        return [each for each in batch if not each.answer.cancelled()]

    async def work(self) -> None:
        """Compute batch after batch, as long as the server runs."""
        while True:
            await self.arrived.wait()
            while self.waiting:
                if len(self.waiting) < MAX_BATCH:
                    await asyncio.sleep(GATHERING)
                batch = self.next_batch()
                try:
                    answers = await asyncio.to_thread(self.compute, self.pool, self.tokenizer, batch)
                except Exception as error:
                    if len(batch) > 1:  # one of them is to blame: each by itself
                        answers = [await asyncio.to_thread(self.alone, each) for each in batch]
                    else:
                        answers = [error]
                BATCHES.observe(len(batch))
                for request, answer in zip(batch, answers, strict=True):
                    if not request.answer.done():
                        (request.answer.set_exception if isinstance(answer, Exception) else request.answer.set_result)(
                            answer
                        )
            self.arrived.clear()

    def alone(self, request: Request) -> Any:
        """The answer to a request in a batch of its own, or what went wrong."""
        try:
            return self.compute(self.pool, self.tokenizer, [request])[0]
        except Exception as error:
            return error


def classify(pool: AdapterPool, tokenizer: Any, batch: list[Request]) -> list[Any]:
    """Label and probabilities for each request."""
    inputs = tokenizer.pad({"input_ids": [each.input_ids for each in batch]}, return_tensors="pt")
    logits = pool([each.adapter for each in batch], **inputs.to(pool.model.device)).logits
    answers = []
    for request, row in zip(batch, logits.float().softmax(-1).tolist(), strict=True):
        labels = labels_of(request.adapter) or list(range(pool.model.config.num_labels))
        best = max(range(len(labels)), key=row.__getitem__)
        answers.append({"label": labels[best], "probability": row[best]})
    return answers


LABELS: dict[str, list[Any]] = {}


def labels_of(folder: str | None) -> list[Any] | None:
    """The labels that an adapter was trained with, if its folder has the recipe."""
    if folder is None or not (Path(folder) / "recipe.yaml").is_file():
        return None
    if folder not in LABELS:
        LABELS[folder] = yaml.safe_load((Path(folder) / "recipe.yaml").read_text(encoding="utf-8")).get("labels") or []
    return LABELS[folder]


def generate(pool: AdapterPool, tokenizer: Any, batch: list[Request]) -> list[Any]:
    """The greedy continuation for each request."""
    ids = {"input_ids": [each.input_ids for each in batch]}
    inputs = tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(pool.model.device)
    count = max(each.max_new_tokens for each in batch)
    tokens = pool.generate(
        [each.adapter for each in batch],
        **inputs,
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return [
        {"text": tokenizer.decode(row[: each.max_new_tokens], skip_special_tokens=True)}
        for each, row in zip(batch, new, strict=True)
    ]


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
        workers = [asyncio.create_task(each.work()) for each in services.values()]
        yield
        for worker in workers:
            worker.cancel()

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
    def _adapters() -> dict[str, Any]:
        return {
            name: {
                "on_disk": sorted(path.parent.name for path in each.adapters.glob("*/adapter_config.json")),
                "loaded": {Path(key).name: found.num_bytes for key, found in each.pool.loaded.items()},
            }
            for name, each in services.items()
        }

    @app.get("/metrics")
    def _metrics() -> Response:
        for name, each in services.items():
            ADAPTERS.labels(name).set(len(each.pool.loaded))
            ADAPTER_BYTES.labels(name).set(each.pool.num_bytes)
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
    parser.add_argument("--one-adapter-a-batch", action="store_true", help="for comparison")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    if not args.adapters.is_dir():
        parser.error(f"--adapters: there is no folder {args.adapters}")
    if args.threads:
        torch.set_num_threads(args.threads)
    sys.setswitchinterval(5e-4)  # a request that arrives need not wait long for the thread that computes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    services = {}
    for kind, auto_class, compute in (
        ("classifier", transformers.AutoModelForSequenceClassification, classify),
        ("generator", transformers.AutoModelForCausalLM, generate),
    ):
        name = getattr(args, kind)
        if name:
            model = auto_class.from_pretrained(name).to(device)
            tokenizer = transformers.AutoTokenizer.from_pretrained(name)
            services[kind] = Service(
                model, tokenizer, args.adapters, compute, args.max_bytes, not args.one_adapter_a_batch
            )
    if not services:
        parser.error("give --classifier or --generator, or both")
    uvicorn.run(create_app(**services), host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
