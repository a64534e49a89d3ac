"""A closed loop of clients that stream from an OpenAI-compatible server and note when each piece arrived.

The clients share the CPUs with the server they measure, so this is a parser on a socket, and the JSON is looked at
only after the last byte.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import httptools
import uvloop


class RequestFailed(Exception):
    """The server refused a request, broke the connection, or answered fewer tokens than asked for."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answered request. Times are of the machine's monotonic clock, in seconds."""

    start_s: float
    times_s: tuple[
        float, ...
    ]  # when each piece of the answer arrived; a piece is one token unless the server merges
    num_tokens: int


@dataclass(slots=True)
class Progress:
    """What has been answered so far, so that a cell which runs out of time can say how far it came."""

    replies: list[Reply] = field(default_factory=list)


class _Connection(asyncio.Protocol):
    """One request on one connection. `events` holds (arrival, payload) of each server-sent event."""

    def __init__(self, request: bytes, done: asyncio.Future[None]) -> None:
        self._request = request
        self._done = done
        self._parser = httptools.HttpResponseParser(self)
        self._rest = b""
        self._arrival_s = 0.0
        self.events: list[tuple[float, bytes]] = []
        self.body = b""
        self.start_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have the methods of asyncio's classes and do not inherit from them.
        stream = cast(asyncio.WriteTransport, transport)
        self.start_s = time.perf_counter()
        stream.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._arrival_s = time.perf_counter()
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        if self._parser.get_status_code() != 200:
            self.body += body
            return
        *events, self._rest = (self._rest + body).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: "):
                self.events.append((self._arrival_s, event.removeprefix(b"data: ")))

    def on_message_complete(self) -> None:
        if self._done.done():
            return
        status = self._parser.get_status_code()
        if status == 200:
            self._done.set_result(None)
        else:
            text = self.body.decode(errors="replace")
            self._done.set_exception(RequestFailed(f"status {status}: {text[:500]}"))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(RequestFailed(f"the server closed the connection: {exc}"))


async def complete(port: int, body: dict[str, Any]) -> Reply:
    """Send one streaming completion to 127.0.0.1 and wait for its end.

    Raises:
        RequestFailed: also when the answer does not have the `max_tokens` tokens it must have with `ignore_eos`.
    """
    payload = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\n"
        f"Host: 127.0.0.1:{port}\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\n"
        "Connection: close\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    transport, connection = await loop.create_connection(
        lambda: _Connection(head.encode() + payload, done), "127.0.0.1", port
    )
    try:
        await done
    finally:
        transport.abort()
    reply = _reply(connection.start_s, connection.events)
    if reply.num_tokens != body["max_tokens"]:
        raise RequestFailed(f"{reply.num_tokens} tokens came, {body['max_tokens']} were asked for")
    return reply


def _reply(start_s: float, events: Sequence[tuple[float, bytes]]) -> Reply:
    times_s: list[float] = []
    num_tokens = 0
    for arrival_s, payload in events:
        if payload == b"[DONE]":
            continue
        chunk = json.loads(payload)
        if "error" in chunk:
            raise RequestFailed(f"error in the stream: {chunk['error']}")
        if any(choice["text"] for choice in chunk["choices"]):
            times_s.append(arrival_s)
        if chunk.get("usage"):
            num_tokens = chunk["usage"]["completion_tokens"]
    if not times_s:
        raise RequestFailed("the stream ended without a token")
    return Reply(start_s, tuple(times_s), num_tokens)


def completion_body(model: str, prompt: Sequence[int], output_len: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": output_len,
        "temperature": 0,
        "ignore_eos": True,
        # Every token must show in the text, whichever the random weights pick.
        "skip_special_tokens": False,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def run_clients(
    port: int,
    model: str,
    prompts: Sequence[Sequence[int]],
    output_len: int,
    concurrency: int,
    timeout_s: float,
    progress: Progress,
) -> None:
    """`concurrency` clients start together; each sends its share of the prompts one after another.

    Raises:
        TimeoutError: `progress` holds the replies that were complete by then.
        RequestFailed: any request failed; the others were cut off.
    """

    async def client(share: Sequence[Sequence[int]]) -> None:
        for prompt in share:
            progress.replies.append(await complete(port, completion_body(model, prompt, output_len)))

    async def clients() -> None:
        async with asyncio.timeout(timeout_s):
            try:
                async with asyncio.TaskGroup() as group:
                    for index in range(concurrency):
                        group.create_task(client(prompts[index::concurrency]))
            except* (RequestFailed, OSError) as failures:
                raise RequestFailed(str(failures.exceptions[0])) from failures

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(clients())
