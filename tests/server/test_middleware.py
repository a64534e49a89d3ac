"""API keys, the size of bodies, request ids, CORS."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hybridgen.engine.request import Request
from hybridgen.server.lifecycle import Lifecycle
from tests.server.conftest import MakeClient
from tests.server.fakes import FakeEngine, Step, say

COMPLETIONS = "/v1/completions"
BODY = {"prompt": "x"}


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer", "Basic one", "one", "Bearer one two", "Bearer ö"]
)
async def test_without_a_right_key_the_answer_is_401(make_client: MakeClient, header: str | None) -> None:
    client = make_client(api_key=("one", "two"))
    headers = [(b"authorization", header.encode("latin-1"))] if header else []
    for method, url in (
        ("POST", COMPLETIONS),
        ("GET", "/v1/models"),
        ("POST", "/tokenize"),
        ("GET", "/nowhere"),
    ):
        reply = await client.request(method, url, headers=headers)
        assert reply.status_code == 401
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", ["one", "two", "three", "four"])
async def test_each_key_is_accepted_also_from_the_file(
    make_client: MakeClient, tmp_path: Path, key: str
) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\nthree\n\n  four  \n")
    client = make_client(api_key=("one", "two"), api_key_file=path)
    reply = await client.post(COMPLETIONS, json=BODY, headers={"authorization": f"bearer {key}"})
    assert reply.status_code == 200


async def test_probes_and_scrapers_need_no_key(make_client: MakeClient) -> None:
    client = make_client(api_key=("one",))
    for url in ("/health", "/ready", "/ping", "/metrics"):
        assert (await client.get(url)).status_code == 200


async def test_without_keys_everybody_is_let_in(make_client: MakeClient) -> None:
    assert (await make_client().post(COMPLETIONS, json=BODY)).status_code == 200


async def chunked(num_bytes: int) -> AsyncIterator[bytes]:
    for _ in range(num_bytes // 10):
        yield b" " * 10


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize("url", [COMPLETIONS, "/v1/chat/completions", "/tokenize"])
async def test_a_body_over_the_limit_is_a_413(make_client: MakeClient, url: str, is_chunked: bool) -> None:
    engine = FakeEngine()
    client = make_client(engine, max_request_bytes=100)
    headers = {"content-type": "application/json"}
    reply = await client.post(url, content=chunked(110) if is_chunked else b" " * 110, headers=headers)
    assert reply.status_code == 413
    assert reply.json()["error"]["code"] == "request_too_large"
    assert "100" in reply.json()["error"]["message"]
    assert engine.requests == []


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_of_exactly_the_limit_is_read(make_client: MakeClient, is_chunked: bool) -> None:
    body = b'{"prompt": "x"}'.ljust(100)
    parts = [body[:50], body[50:]]

    async def content() -> AsyncIterator[bytes]:
        for part in parts:
            yield part

    client = make_client(max_request_bytes=100)
    headers = {"content-type": "application/json"}
    reply = await client.post(COMPLETIONS, content=content() if is_chunked else body, headers=headers)
    assert reply.status_code == 200


async def test_a_request_counts_once_its_body_is_there(make_client: MakeClient, lifecycle: Lifecycle) -> None:
    counts = []

    async def content() -> AsyncIterator[bytes]:
        yield b'{"prompt": '
        counts.append(lifecycle.num_answering)
        yield b'"x"}'

    def script(_: Request) -> list[Step]:
        counts.append(lifecycle.num_answering)
        return [*say("a")]

    headers = {"content-type": "application/json"}
    reply = await make_client(FakeEngine(script)).post(COMPLETIONS, content=content(), headers=headers)
    assert reply.status_code == 200
    assert counts == [0, 1]
    assert lifecycle.num_answering == 0


async def test_a_body_that_is_there_only_when_the_server_drains_is_refused(
    make_client: MakeClient, lifecycle: Lifecycle
) -> None:
    async def content() -> AsyncIterator[bytes]:
        yield b'{"prompt": '
        lifecycle.state = "draining"
        yield b'"x"}'

    headers = {"content-type": "application/json"}
    reply = await make_client().post(COMPLETIONS, content=content(), headers=headers)
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "draining"


async def test_the_clients_request_id_ends_ours(make_client: MakeClient) -> None:
    client = make_client(enable_request_id_headers=True)
    reply = await client.post(COMPLETIONS, json=BODY, headers={"x-request-id": "job-7"})
    assert reply.json()["id"] == "cmpl-job-7"
    assert reply.headers["x-request-id"] == "job-7"


@pytest.mark.parametrize("given", ["", "has space", "x" * 129, "ö"])
async def test_a_harmful_request_id_is_replaced(make_client: MakeClient, given: str) -> None:
    client = make_client(enable_request_id_headers=True)
    headers = [(b"x-request-id", given.encode("latin-1"))]
    reply = await client.post(COMPLETIONS, json=BODY, headers=headers)
    assert reply.status_code == 200
    assert len(reply.headers["x-request-id"]) == 32


async def test_two_requests_of_one_id_do_not_meet_in_the_engine(make_client: MakeClient) -> None:
    engine = FakeEngine()
    client = make_client(engine)
    for _ in range(2):
        await client.post(COMPLETIONS, json=BODY, headers={"x-request-id": "same"})
    assert len({request.id for request in engine.requests}) == 2


async def test_request_ids_are_not_sent_back_unless_asked_for(make_client: MakeClient) -> None:
    reply = await make_client().post(COMPLETIONS, json=BODY, headers={"x-request-id": "job-7"})
    assert "x-request-id" not in reply.headers


async def test_pages_of_allowed_origins_may_call(make_client: MakeClient) -> None:
    client = make_client(api_key=("one",), allowed_origins=("https://ui.example",))
    preflight = {"origin": "https://ui.example", "access-control-request-method": "POST"}
    reply = await client.options(COMPLETIONS, headers=preflight)
    assert reply.headers["access-control-allow-origin"] == "https://ui.example"
    reply = await client.post(COMPLETIONS, json=BODY, headers={"origin": "https://ui.example"})
    assert reply.status_code == 401
    assert reply.headers["access-control-allow-origin"] == "https://ui.example"


async def test_no_origin_is_allowed_by_default(make_client: MakeClient) -> None:
    reply = await make_client().post(COMPLETIONS, json=BODY, headers={"origin": "https://ui.example"})
    assert "access-control-allow-origin" not in reply.headers
