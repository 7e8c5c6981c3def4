"""Limits on connections and bodies, and a count of every answer.

uvicorn bounds the size of headers, idle connections and the time to shut down. It does not bound the time until
headers or a body are there, nor the time that a client may leave an answer unread, and its own answers (400, 503) are
seen by no application. `Protocol` and `Limits` add what is missing.
"""

from __future__ import annotations

import asyncio
import json
import time
from http import HTTPStatus
from typing import Any

import anyio
import prometheus_client as prometheus
from fastapi.responses import JSONResponse
from settings import Settings
from uvicorn.protocols.http.h11_impl import H11Protocol

REGISTRY = prometheus.CollectorRegistry()
REQUESTS = prometheus.Counter("requests", "Answers by path and status.", ["path", "status"], registry=REGISTRY)
SECONDS = prometheus.Histogram("request_seconds", "Seconds until the answer.", ["path"], registry=REGISTRY)
OTHER = "other"  # the label of all paths that the server does not have
VANISHED = 499  # counted where a client closed its connection before the answer, as nginx does


class Protocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with three more limits: connections, seconds for headers, seconds for reading.

    A subclass of an internal class: uvicorn offers no setting for these. `expect_head` relies on
    `on_response_complete` and `cycle`; the tests with real connections fail if uvicorn changes them.
    """

    def __init__(self, settings: Settings, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.settings = settings
        self.head_timer: asyncio.TimerHandle | None = None
        self.write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Refuse the connection if there are too many, and start to wait for its first request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # `pause_writing` is called as soon as the client reads too slowly
        if len(self.connections) > self.settings.max_connections:
            self.refuse(503, "There are too many connections.")
        self.expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        super().connection_lost(exc)
        for timer in (self.head_timer, self.write_timer):
            if timer is not None:
                timer.cancel()

    def expect_head(self) -> None:
        """Close the connection if no further request has begun when `head_seconds` are over."""
        if self.head_timer is not None:
            self.head_timer.cancel()
        earlier = self.cycle

        def late() -> None:
            if self.cycle is earlier:
                self.refuse(408, "The headers of the request took too long.")

        self.head_timer = self.loop.call_later(self.settings.head_seconds, late)

    def on_response_complete(self) -> None:
        """Start to wait for the next request; with pipelining it may already be there."""
        self.expect_head()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Drop a client that does not read."""
        super().pause_writing()
        self.write_timer = self.loop.call_later(self.settings.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads."""
        super().resume_writing()
        if self.write_timer is not None:
            self.write_timer.cancel()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn does with invalid HTTP, also in the middle of an answer."""
        self.refuse(400, msg)

    def refuse(self, status: int, detail: str) -> None:
        """Answer without the application, and close the connection."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            REQUESTS.labels(OTHER, status).inc()
            body = json.dumps({"detail": detail})
            start = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
            headers = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
            again = "Retry-After: 1\r\n" if status == 503 else ""
            self.transport.write(f"{start}{headers}{again}\r\n{body}".encode())
        self.transport.close()


class Limits:
    """ASGI middleware: bounds the size of headers and the size and time of a body, and cancels work for a client that
    has gone.
    """

    def __init__(self, app: Any, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        # uvicorn's limit is for headers that arrive in several pieces.
        if sum(map(len, [scope["raw_path"], scope["query_string"], *sum(scope["headers"], ())])) > (
            self.settings.max_head_bytes
        ):
            return await self.refuse(431, "The headers of the request are too large.", receive, send)
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                body = await self.read(scope, receive)
        except TimeoutError:
            return await self.refuse(408, "The body of the request took too long.", receive, send)
        except ValueError as error:
            return await self.refuse(413, str(error), receive, send)
        if body is None:
            return None
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return messages.pop() if messages else {"type": "http.disconnect"}

        async with anyio.create_task_group() as group:

            async def cancel_if_gone() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(cancel_if_gone)
            await self.app(scope, replay, send)
            group.cancel_scope.cancel()

    async def read(self, scope: Any, receive: Any) -> bytes | None:
        """The body; `None` if the client has gone.

        Raises:
            ValueError: if it is too large, at once if the headers say so.
        """
        body = bytearray()
        self.check_size(next((int(value) for name, value in scope["headers"] if name == b"content-length"), 0))
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            self.check_size(len(body))
            more = message.get("more_body", False)
        return bytes(body)

    def check_size(self, size: int) -> None:
        """Raise a ValueError if a body is too large."""
        if size > self.settings.max_body_bytes:
            raise ValueError(f"The body of a request may have {self.settings.max_body_bytes:,} bytes.")

    async def refuse(self, status: int, detail: str, receive: Any, send: Any) -> None:
        """Answer without the application, and close the connection.

        Many clients read no answer while they send. What they send is thrown away for a while, since a connection
        that is closed with unread bytes is reset, and a reset can destroy the answer.
        """
        answer = JSONResponse({"detail": detail}, status, {"Connection": "close"})
        await send({"type": "http.response.start", "status": status, "headers": answer.raw_headers})
        await send({"type": "http.response.body", "body": answer.body, "more_body": True})
        if status == 413:
            with anyio.move_on_after(self.settings.body_seconds):
                more = True
                while more:
                    message = await receive()
                    more = message["type"] == "http.request" and message.get("more_body", False)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Counting:
    """ASGI middleware: counts answers and their seconds. It is around the application, so that it sees a 500 too."""

    def __init__(self, app: Any, paths: set[str]) -> None:
        self.app, self.paths = app, paths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, answered = time.perf_counter(), False
        path = scope["path"] if scope["path"] in self.paths else OTHER

        async def count(message: Any) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                REQUESTS.labels(path, message["status"]).inc()
                SECONDS.labels(path).observe(time.perf_counter() - started)
            await send(message)

        await self.app(scope, receive, count)
        if not answered:
            REQUESTS.labels(path, VANISHED).inc()
