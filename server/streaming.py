"""Server-sent events, and noticing that the client has gone. What an event says is decided elsewhere."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hybridgen.server.errors import ApiError, as_api_error, error_body

logger = logging.getLogger(__name__)

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled, and waited for, when the client hangs up.

    Args:
        receive: of a request whose body has been read.

    Raises:
        ClientDisconnect: the client hung up first.
    """
    working = asyncio.create_task(work)
    hang_up = asyncio.create_task(_wait_for_hang_up(receive))
    try:
        await asyncio.wait((working, hang_up), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        hang_up.cancel()
        await asyncio.gather(working, hang_up, return_exceptions=True)


async def _wait_for_hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends `events` as they come and closes them when done, when they fail, and when the client hangs up.

    The headers go out with the first event, so that an error before it still gets its own status. An error
    after it becomes the last event. `[DONE]` ends the stream either way.

    Args:
        events: whole events, each `data: ...` and its empty line.
        keep_alive_s: a comment is sent after so long without an event, also before the first; 0 is never.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], *, keep_alive_s: float) -> None:
        super().__init__(
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
            media_type="text/event-stream",
        )
        del self.headers["content-length"]
        self._events = events
        self._keep_alive_s = keep_alive_s
        self._started = False
        self._last_sent = 0.0
        self._sending = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_disconnect(receive, self._send_all(send))
        except ClientDisconnect:
            return

    async def _send_all(self, send: Send) -> None:
        self._last_sent = asyncio.get_running_loop().time()
        keeping_alive = asyncio.create_task(self._keep_alive(send)) if self._keep_alive_s else None
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    await self._send(send, event)
        except Exception as exc:
            if not self._started:
                raise
            error = as_api_error(exc)
            if not isinstance(exc, ApiError):
                logger.error("a stream ended early: %s", error.detail, exc_info=exc)
            await self._send(send, b"data: " + error_body(error) + b"\n\n")
        finally:
            if keeping_alive is not None:
                keeping_alive.cancel()
        await self._send(send, DONE)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, data: bytes) -> None:
        # The keep-alive comment comes from a task of its own, and the headers must be first.
        async with self._sending:
            if not self._started:
                self._started = True
                headers = self.raw_headers
                await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
            await send({"type": "http.response.body", "body": data, "more_body": True})
        self._last_sent = asyncio.get_running_loop().time()

    async def _keep_alive(self, send: Send) -> None:
        # One timer that looks when the last event went out is cheaper than a timeout for each token.
        clock = asyncio.get_running_loop().time
        while True:
            silent_s = clock() - self._last_sent
            if silent_s >= self._keep_alive_s:
                await self._send(send, KEEP_ALIVE)
                silent_s = 0.0
            await asyncio.sleep(self._keep_alive_s - silent_s)
