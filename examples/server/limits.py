"""Limits on connections and bodies, and a count of every answer.

uvicorn limits the size of headers, idle connections and the time to shut down. It does not limit the time until
headers or a body have arrived, nor the time that a client may leave an answer unread. The application does not see
uvicorn's own answers (400, 503). `Protocol` and `Limits` add the missing limits.
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
OTHER = "other"  # the label of all unknown paths
DISCONNECTED = 499  # counted if a client closes its connection before the answer, as in nginx


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
        """Reject the connection if there are too many, and start the timer for its first request."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # `pause_writing` is called as soon as the client reads too slowly
        if len(self.connections) > self.settings.max_connections:
            self.reject(503, "There are too many connections.")
        self.expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        super().connection_lost(exc)
        for timer in (self.head_timer, self.write_timer):
            if timer is not None:
                timer.cancel()

    def expect_head(self) -> None:
        """Close the connection if no new request has begun after `head_seconds`."""
        if self.head_timer is not None:
            self.head_timer.cancel()
        earlier = self.cycle

        def late() -> None:
            if self.cycle is earlier:
                self.reject(408, "The headers of the request took too long.")

        self.head_timer = self.loop.call_later(self.settings.head_seconds, late)

    def on_response_complete(self) -> None:
        """Start the timer for the next request; with pipelining it may have arrived already."""
        self.expect_head()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """Start the timer that drops a client that does not read."""
        super().pause_writing()
        self.write_timer = self.loop.call_later(self.settings.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the timer, because the client reads."""
        super().resume_writing()
        if self.write_timer is not None:
            self.write_timer.cancel()

    def send_400_response(self, msg: str) -> None:
        """Answer invalid HTTP; uvicorn calls this even in the middle of an answer."""
        self.reject(400, msg)

    def reject(self, status: int, detail: str) -> None:
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
    """ASGI middleware that limits the size of headers and the size and time of a body.

    It also cancels the work for a client that has disconnected.
    """

    def __init__(self, app: Any, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        # uvicorn's own limit applies only to headers that arrive in several pieces.
        if sum(map(len, [scope["raw_path"], scope["query_string"], *sum(scope["headers"], ())])) > (
            self.settings.max_head_bytes
        ):
            return await self.reject(431, "The headers of the request are too large.", receive, send)
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                body = await self.read(scope, receive)
        except TimeoutError:
            return await self.reject(408, "The body of the request took too long.", receive, send)
        except ValueError as error:
            return await self.reject(413, str(error), receive, send)
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
        """Return the body, or `None` if the client has disconnected.

        Raises:
            ValueError: If the body is too large; at once if the headers announce that.
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
            raise ValueError(f"The body is too large: at most {self.settings.max_body_bytes:,} bytes.")

    async def reject(self, status: int, detail: str, receive: Any, send: Any) -> None:
        """Answer without the application, and close the connection.

        Many clients read no answer while they send. Their data is read and discarded for `body_seconds`: closing a
        connection with unread bytes resets it, and a reset can destroy the answer.
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
    """ASGI middleware that counts answers and their seconds. It wraps the application, so that it also sees a 500."""

    def __init__(self, app: Any, paths: set[str]) -> None:
        self.app, self.paths = app, paths

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request."""
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
            REQUESTS.labels(path, DISCONNECTED).inc()
