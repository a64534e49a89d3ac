"""Where the server is in its life and how many requests it is answering. No HTTP and no engine here."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

LifecycleState = Literal["starting", "ready", "draining", "failed"]


class Lifecycle:
    """Shared by the supervisor, which moves `state`, and the application, which answers by it.

    | state    | new requests                                    | /ready | /health |
    |----------|-------------------------------------------------|--------|---------|
    | starting | 503 + Retry-After                               | 503    | 503     |
    | ready    | served                                          | 200    | 200     |
    | draining | 503 + Retry-After + Connection: close           | 503    | 200     |
    | failed   | 503; `failure` says what ended the engine       | 503    | 503     |

    The application holds `with lifecycle.answering():` around each request that needs the engine, from
    the last byte of its body until the last byte of its answer. For use on the event loop's thread.
    """

    def __init__(self, state: LifecycleState = "starting") -> None:
        self.state: LifecycleState = state
        self.failure: str | None = None  # set with state "failed"
        self.num_answering = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def fail(self, message: str) -> None:
        self.state = "failed"
        self.failure = message

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count one request for as long as its answer is being produced."""
        self.num_answering += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.num_answering -= 1
            if self.num_answering == 0:
                self._idle.set()

    async def wait_idle(self) -> None:
        """Return once no request is being answered; at once when there is none."""
        await self._idle.wait()
