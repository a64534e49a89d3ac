"""Long texts: other requests go on while they are tokenized, and those that cannot fit are not tokenized."""

import asyncio
import random
import time
from typing import Any

import pytest

from tests.server.conftest import MakeClient
from tests.server.fakes import FakeEngine

LETTERS = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=1 << 20)
LONG = "".join(LETTERS)


async def longest_silence_s(stop: asyncio.Event) -> float:
    """The longest time that the event loop took to come back to this coroutine."""
    longest, last = 0.0, time.perf_counter()
    while not stop.is_set():
        await asyncio.sleep(0.001)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/completions", {"prompt": LONG}),
        ("/v1/completions", {"prompt": [LONG[at : at + 8000] for at in range(0, 1 << 20, 8000)]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}),
        ("/tokenize", {"prompt": LONG}),
    ],
    ids=["one", "many", "chat", "tokenize"],
)
async def test_other_requests_go_on_while_a_long_prompt_is_tokenized(
    make_client: MakeClient, url: str, body: dict[str, Any]
) -> None:
    client = make_client(FakeEngine(max_model_len=1 << 22))
    body = {**body, "max_tokens": 1 << 22}  # refused once the number of tokens is known
    stop = asyncio.Event()
    watching = asyncio.create_task(longest_silence_s(stop))
    await asyncio.sleep(0.01)  # so that it has begun
    begin = time.perf_counter()
    reply = await client.post(url, json=body)
    whole_s = time.perf_counter() - begin
    stop.set()
    assert reply.status_code == (200 if url == "/tokenize" else 400), reply.text[:500]
    assert await watching < whole_s / 2


@pytest.mark.parametrize(
    ("url", "body", "param"),
    [
        ("/v1/completions", {"prompt": ["x", LONG]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
    ],
)
async def test_a_text_that_cannot_fit_is_refused_without_tokenizing_it(
    make_client: MakeClient, url: str, body: dict[str, Any], param: str
) -> None:
    error = (await make_client().post(url, json=body)).json()["error"]
    assert (error["param"], error["code"]) == (param, "context_length_exceeded")
    assert "at least" in error["message"]
    assert (await make_client().post("/tokenize", json={"prompt": LONG})).json()["count"] == len(LONG)


async def test_a_stop_that_is_given_again_counts_once(make_client: MakeClient) -> None:
    engine = FakeEngine()
    body = {"prompt": "x", "stop": ["b", "a", "b"] * 40, "stop_token_ids": [3, 1, 3] * 1000}
    assert (await make_client(engine).post("/v1/completions", json=body)).status_code == 200
    [request] = engine.requests
    assert (request.params.stop, request.params.stop_token_ids) == (("b", "a"), (3, 1))
