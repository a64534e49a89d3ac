"""Streams: keep-alive, errors midway, and what happens when the client hangs up, over real sockets too."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from hybridgen.engine.client import EngineDead
from hybridgen.engine.request import Output
from hybridgen.server.lifecycle import Lifecycle
from tests.server.conftest import MakeApp, MakeClient
from tests.server.fakes import FakeEngine, events, forever, say, until

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
BODIES = {COMPLETIONS: {"prompt": "x"}, CHAT: {"messages": MESSAGES}}


@asynccontextmanager
async def served(app: FastAPI) -> AsyncIterator[str]:
    """The address of a uvicorn that serves `app` in this loop."""
    listener = socket.create_server(("127.0.0.1", 0))
    # Connections inherit it: a client that stops reading is felt after kilobytes, not megabytes.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    serving = asyncio.create_task(server.serve([listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving


async def test_comments_keep_a_silent_stream_alive_before_and_between_tokens(make_client: MakeClient) -> None:
    engine = FakeEngine(lambda _: [0.25, *say("a", finish=None), 0.25, *say("b", finish="length")])
    client = make_client(engine, sse_keep_alive_interval=0.1)
    reply = await client.post(COMPLETIONS, json={"prompt": "x", "stream": True})
    blocks = reply.content.split(b"\n\n")
    kinds = "".join("." if block == b": keep-alive" else "d" for block in blocks[:-1])
    assert kinds in ("..d..dd", "..d.dd", ".d..dd", ".d.dd")  # the last is [DONE]
    assert [chunk["choices"][0]["text"] for chunk in events(reply.content)] == ["a", "b"]


async def test_an_interval_of_zero_sends_no_comments(make_client: MakeClient) -> None:
    engine = FakeEngine(lambda _: [0.05, *say("a")])
    reply = await make_client(engine, sse_keep_alive_interval=0).post(
        COMPLETIONS, json={"prompt": "x", "stream": True}
    )
    assert b": keep-alive" not in reply.content


async def test_a_stream_that_flows_needs_no_comments(make_client: MakeClient) -> None:
    steps = [item for output in say("abcdefghij") for item in (0.02, output)]
    client = make_client(FakeEngine(lambda _: steps), sse_keep_alive_interval=0.1)
    reply = await client.post(COMPLETIONS, json={"prompt": "x", "stream": True})
    assert b": keep-alive" not in reply.content


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (EngineDead("gone"), "engine_dead"),
        (RuntimeError("secret"), "internal_error"),
        (Output(id="", finish_reason="error", error="NaN logits"), "engine_error"),
    ],
)
async def test_a_failure_midway_is_the_last_event_before_done(
    make_client: MakeClient, failure: Exception | Output, code: str
) -> None:
    engine = FakeEngine(lambda _: [*say("ab", finish=None), failure])
    reply = await make_client(engine).post(COMPLETIONS, json={"prompt": "x", "stream": True})
    assert reply.status_code == 200
    *chunks, last = events(reply.content)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "b"]
    assert last["error"]["code"] == code
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in reply.text


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
async def test_hanging_up_aborts_the_request(
    make_app: MakeApp, lifecycle: Lifecycle, url: str, stream: bool
) -> None:
    engine = FakeEngine(forever)
    async with served(make_app(engine)) as address, httpx.AsyncClient() as client:
        posted = asyncio.create_task(client.post(address + url, json={**BODIES[url], "stream": stream}))
        await until(lambda: engine.num_open == 1)
        assert lifecycle.num_answering == 1
        posted.cancel()
        await asyncio.gather(posted, return_exceptions=True)
        await until(lambda: engine.num_open == 0)
        assert engine.num_aborted == 1
        await until(lambda: lifecycle.num_answering == 0)


async def test_hanging_up_aborts_every_prompt_of_a_request(make_app: MakeApp) -> None:
    engine = FakeEngine(forever)
    async with served(make_app(engine)) as address, httpx.AsyncClient() as client:
        body = {"prompt": ["a", "b", "c"], "stream": True}
        posted = asyncio.create_task(client.post(address + COMPLETIONS, json=body))
        await until(lambda: engine.num_open == 3)
        posted.cancel()
        await asyncio.gather(posted, return_exceptions=True)
        await until(lambda: engine.num_open == 0)
        assert engine.num_aborted == 3


async def test_hanging_up_before_the_first_token_aborts_too(make_app: MakeApp) -> None:
    engine = FakeEngine(lambda _: [60.0])
    async with served(make_app(engine)) as address, httpx.AsyncClient() as client:
        body = {"prompt": "x", "stream": True}
        posted = asyncio.create_task(client.post(address + COMPLETIONS, json=body))
        await until(lambda: engine.num_open == 1)
        posted.cancel()
        await asyncio.gather(posted, return_exceptions=True)
        await until(lambda: engine.num_open == 0)


async def test_a_client_that_stops_reading_and_leaves_is_noticed(make_app: MakeApp) -> None:
    """The stream then waits in a send to a full socket, not for the engine."""
    num_made = 0

    def flood(_: object) -> Iterator[Output]:
        nonlocal num_made
        while True:
            num_made += 1
            yield Output(id="", tokens=(ord("a"),) * 20_000)

    engine = FakeEngine(flood)
    async with served(make_app(engine)) as address:
        host, port = address.removeprefix("http://").split(":")
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        slow.connect((host, int(port)))
        reader, writer = await asyncio.open_connection(sock=slow, limit=1000)
        body = b'{"prompt": "x", "stream": true}'
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "
        )
        writer.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
        await reader.read(100)
        before = -1
        while before != num_made:
            before = num_made
            await asyncio.sleep(0.1)
        assert engine.num_open == 1
        writer.transport.abort()
        await until(lambda: engine.num_open == 0)
        assert engine.num_aborted == 1


async def test_tokens_arrive_one_by_one(make_app: MakeApp) -> None:
    gate = asyncio.Event()

    class Gated(FakeEngine):
        async def generate(self, request):  # type: ignore[no-untyped-def]
            yield Output(id=request.id, tokens=(97,))
            await gate.wait()
            yield Output(id=request.id, tokens=(98,), finish_reason="length")

    async with served(make_app(Gated())) as address, httpx.AsyncClient() as client:
        request = client.stream("POST", address + COMPLETIONS, json={"prompt": "x", "stream": True})
        async with request as reply:
            lines = reply.aiter_lines()
            first = await asyncio.wait_for(anext(lines), 5)
            assert '"text":"a"' in first
            gate.set()
            assert any('"text":"b"' in line for line in [line async for line in lines])


async def test_many_streams_at_once_all_arrive_whole(make_app: MakeApp, lifecycle: Lifecycle) -> None:
    texts = [f"number {index}: " + "€" * (index % 7) for index in range(40)]
    engine = FakeEngine(lambda request: say(texts[request.prompt[0]]))
    limits = httpx.Limits(max_connections=50)
    async with served(make_app(engine)) as address, httpx.AsyncClient(limits=limits) as client:

        async def ask(index: int) -> str:
            body = {"prompt": [index], "stream": True}
            reply = await client.post(address + COMPLETIONS, json=body)
            return "".join(chunk["choices"][0]["text"] for chunk in events(reply.content))

        assert await asyncio.gather(*map(ask, range(len(texts)))) == texts
    assert lifecycle.num_answering == 0
