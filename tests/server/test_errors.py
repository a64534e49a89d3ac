"""Every way to be refused: the status, the field, the code, and OpenAI's shape for all of them."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from hybridgen.engine.client import EngineDead
from hybridgen.engine.request import Output
from hybridgen.server.lifecycle import Lifecycle
from tests.server.conftest import MakeClient
from tests.server.fakes import FakeEngine, forever, say, until

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


def error_of(reply: httpx.Response, status: int) -> dict[str, Any]:
    """The error, after checking that it has OpenAI's shape."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    return dict(error)


BAD_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [257]}, "prompt"),
    ({"prompt": "x", "max_tokens": "5"}, "max_tokens"),
    ({"prompt": "x", "max_tokens": True}, "max_tokens"),
    ({"prompt": "x", "max_tokens": -1}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"),
    ({"prompt": "x", "max_tokens": 1.5}, "max_tokens"),
    ({"prompt": "x", "n": 0}, "n"),
    ({"prompt": "x", "temperature": -0.1}, "temperature"),
    ({"prompt": "x", "temperature": "hot"}, "temperature"),
    ({"prompt": "x", "top_p": 0}, "top_p"),
    ({"prompt": "x", "top_p": 1.1}, "top_p"),
    ({"prompt": "x", "top_k": -2}, "top_k"),
    ({"prompt": "x", "min_p": 2}, "min_p"),
    ({"prompt": "x", "presence_penalty": 3}, "presence_penalty"),
    ({"prompt": "x", "frequency_penalty": -3}, "frequency_penalty"),
    ({"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
    ({"prompt": "x", "min_tokens": 20, "max_tokens": 10}, "min_tokens"),
    ({"prompt": "x", "logprobs": 21}, "logprobs"),
    ({"prompt": "x", "logprobs": True}, "logprobs"),
    ({"prompt": "x", "prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt": "x", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"1": "2"}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": {"257": 1}}, "logit_bias"),
    ({"prompt": "x", "logit_bias": []}, "logit_bias"),
    ({"prompt": "x", "seed": 2**64}, "seed"),
    ({"prompt": "x", "seed": "s"}, "seed"),
    ({"prompt": "x", "stop": 5}, "stop"),
    ({"prompt": "x", "stop": [""]}, "stop"),
    ({"prompt": "x", "stop_token_ids": ["1"]}, "stop_token_ids[0]"),
    ({"prompt": "x", "stop_token_ids": [257]}, "stop_token_ids"),
    ({"prompt": "x", "priority": 2**40}, "priority"),
    ({"prompt": "x", "stream": "yes"}, "stream"),
    ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "x", "stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"prompt": "x", "echo": "yes"}, "echo"),
    ({"prompt": "x", "model": 5}, "model"),
]


@pytest.mark.parametrize(("body", "param"), BAD_COMPLETIONS, ids=lambda value: str(value)[:60])
async def test_a_bad_value_is_a_400_that_names_its_field(
    make_client: MakeClient, body: dict[str, Any], param: str
) -> None:
    engine = FakeEngine()
    error = error_of(await make_client(engine).post(COMPLETIONS, json=body), 400)
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "invalid_value"
    assert engine.requests == []


BAD_CHATS: list[tuple[dict[str, Any], str]] = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
    ({"messages": MESSAGES, "logprobs": 5}, "logprobs"),
    ({"messages": MESSAGES, "top_logprobs": 5}, "top_logprobs"),
    ({"messages": MESSAGES, "logprobs": True, "top_logprobs": 21}, "logprobs"),
    ({"messages": MESSAGES, "max_tokens": 0}, "max_tokens"),
    (
        {"messages": MESSAGES, "continue_final_message": True, "add_generation_prompt": True},
        "continue_final_message",
    ),
    ({"messages": MESSAGES, "chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
    ({"messages": MESSAGES, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    ({"messages": MESSAGES, "chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
    (
        {"messages": MESSAGES, "chat_template_kwargs": {"variables": 1, "conversations": 1}},
        "chat_template_kwargs",
    ),
    ({"messages": MESSAGES, "chat_template_kwargs": 5}, "chat_template_kwargs"),
]


@pytest.mark.parametrize(("body", "param"), BAD_CHATS, ids=lambda value: str(value)[:60])
async def test_a_bad_chat_is_a_400_that_names_its_field(
    make_client: MakeClient, body: dict[str, Any], param: str
) -> None:
    error = error_of(await make_client().post(CHAT, json=body), 400)
    assert error["param"] == param, error


@pytest.mark.parametrize("name", ["self", "conversation", "tokenize", "messages"])
async def test_tokenize_refuses_a_template_variable_that_is_none(make_client: MakeClient, name: str) -> None:
    body = {"messages": MESSAGES, "chat_template_kwargs": {name: 1}}
    error = error_of(await make_client().post("/tokenize", json=body), 400)
    assert error["param"] == "chat_template_kwargs"


async def test_any_other_name_may_be_a_template_variable(make_client: MakeClient) -> None:
    names = ("variables", "tokenizer", "args", "kwargs", "text", "cls", "documents_")
    body = {"messages": MESSAGES, "chat_template_kwargs": dict.fromkeys(names, 1)}
    reply = await make_client().post(CHAT, json=body)
    assert reply.status_code == 200, reply.text


UNSUPPORTED: list[tuple[str, str, Any]] = [
    (CHAT, "tools", [{"type": "function", "function": {"name": "f"}}]),
    (CHAT, "tool_choice", "required"),
    (CHAT, "functions", [{"name": "f"}]),
    (CHAT, "response_format", {"type": "json_object"}),
    (CHAT, "modalities", ["text", "audio"]),
    (CHAT, "audio", {"voice": "alloy"}),
    (CHAT, "structured_outputs", {"regex": "a+"}),
    (CHAT, "echo", True),
    (COMPLETIONS, "response_format", {"type": "json_schema", "json_schema": {}}),
    (COMPLETIONS, "guided_json", {}),
    (COMPLETIONS, "guided_regex", "a+"),
    (COMPLETIONS, "guided_choice", ["a"]),
    (COMPLETIONS, "guided_grammar", "root ::= a"),
    (COMPLETIONS, "suffix", "end"),
    (COMPLETIONS, "best_of", 2),
    (COMPLETIONS, "use_beam_search", True),
    (COMPLETIONS, "allowed_token_ids", [1]),
]


@pytest.mark.parametrize(("url", "field", "value"), UNSUPPORTED)
async def test_what_is_not_done_yet_is_refused_by_name(
    make_client: MakeClient, url: str, field: str, value: object
) -> None:
    body = {"messages": MESSAGES} if url == CHAT else {"prompt": "x"}
    error = error_of(await make_client().post(url, json={**body, field: value}), 400)
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")


@pytest.mark.parametrize(("url", "field", "value"), UNSUPPORTED)
async def test_null_for_what_is_not_done_yet_is_accepted(
    make_client: MakeClient, url: str, field: str, value: object
) -> None:
    body = {"messages": MESSAGES} if url == CHAT else {"prompt": "x"}
    reply = await make_client().post(url, json={**body, field: None})
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "input_audio"}])
async def test_parts_that_are_not_text_are_refused(make_client: MakeClient, part: dict[str, Any]) -> None:
    content = [{"type": "text", "text": "what is this"}, part]
    reply = await make_client().post(
        CHAT, json={"messages": [*MESSAGES, {"role": "user", "content": content}]}
    )
    error = error_of(reply, 400)
    assert error["param"] == "messages[1].content[1]"
    assert part["type"] in error["message"]


@pytest.mark.parametrize(
    "content",
    [b"{", b'{"prompt": "x",}', b"\xff\xfe", b"\xff", b"[" * 100_000, b'{"seed": ' + b"1" * 5000 + b"}"],
    ids=lambda content: str(content[:20]),
)
async def test_malformed_json_is_a_400_that_says_so(make_client: MakeClient, content: bytes) -> None:
    reply = await make_client().post(
        COMPLETIONS, content=content, headers={"content-type": "application/json"}
    )
    error = error_of(reply, 400)
    assert error["code"] == "invalid_json"
    assert error["message"].startswith("Malformed JSON")


@pytest.mark.parametrize("content", [b"", b"[]", b'"x"'])
async def test_json_of_another_shape_is_a_400(make_client: MakeClient, content: bytes) -> None:
    reply = await make_client().post(
        COMPLETIONS, content=content, headers={"content-type": "application/json"}
    )
    error_of(reply, 400)


@pytest.mark.parametrize("url", [COMPLETIONS, "/tokenize"])
async def test_half_a_surrogate_pair_is_not_text(make_client: MakeClient, url: str) -> None:
    content = b'{"prompt": "\\ud800"}'
    reply = await make_client().post(url, content=content, headers={"content-type": "application/json"})
    assert error_of(reply, 400)["param"] == "prompt"


async def test_not_a_number_is_not_a_number(make_client: MakeClient) -> None:
    content = b'{"prompt": "x", "temperature": NaN}'
    reply = await make_client().post(
        COMPLETIONS, content=content, headers={"content-type": "application/json"}
    )
    assert error_of(reply, 400)["param"] == "temperature"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
async def test_another_content_type_is_a_415(make_client: MakeClient, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    reply = await make_client().post(COMPLETIONS, content=b'{"prompt": "x"}', headers=headers)
    assert "application/json" in error_of(reply, 415)["message"]


@pytest.mark.parametrize(("url", "body"), [(COMPLETIONS, {"prompt": "x"}), (CHAT, {"messages": MESSAGES})])
async def test_an_unknown_model_is_a_404_that_lists_the_known(
    make_client: MakeClient, url: str, body: dict[str, Any]
) -> None:
    error = error_of(await make_client().post(url, json={**body, "model": "nope"}), 404)
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "nope" in error["message"]
    assert "tiny, org/alias" in error["message"]


async def test_an_unknown_route_is_a_404_and_a_wrong_method_a_405(make_client: MakeClient) -> None:
    client = make_client()
    error_of(await client.get("/v1/embeddings"), 404)
    reply = await client.get(COMPLETIONS)
    assert error_of(reply, 405)["code"] == "method_not_allowed"
    assert reply.headers["allow"] == "POST"


async def test_prompt_and_max_tokens_over_the_limit_is_a_400_with_both_numbers(
    make_client: MakeClient,
) -> None:
    client = make_client(FakeEngine(max_model_len=50))
    error = error_of(await client.post(COMPLETIONS, json={"prompt": "x" * 40, "max_tokens": 11}), 400)
    assert (error["param"], error["code"]) == ("max_tokens", "context_length_exceeded")
    for number in ("50", "51", "40", "11"):
        assert number in error["message"]
    assert (await client.post(COMPLETIONS, json={"prompt": "x" * 40, "max_tokens": 10})).status_code == 200


async def test_a_prompt_that_fills_the_context_is_a_400_with_both_numbers(make_client: MakeClient) -> None:
    client = make_client(FakeEngine(max_model_len=50))
    for url, body, param, length in (
        (COMPLETIONS, {"prompt": "x" * 50, "max_tokens": None}, "prompt", 50),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 50}]}, "messages", 68),
    ):
        error = error_of(await client.post(url, json=body), 400)
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")
        assert "50" in error["message"]
        assert str(length) in error["message"]


@pytest.fixture
async def tasks() -> AsyncIterator[list[asyncio.Task[Any]]]:
    """Requests that a test leaves running."""
    running: list[asyncio.Task[Any]] = []
    yield running
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def test_a_full_queue_is_a_429_with_retry_after(
    make_client: MakeClient, tasks: list[asyncio.Task[Any]]
) -> None:
    engine = FakeEngine(forever)
    client = make_client(engine, max_num_seqs=2, max_num_queued_reqs=1)
    tasks += [asyncio.create_task(client.post(COMPLETIONS, json={"prompt": "x"})) for _ in range(3)]
    await until(lambda: engine.num_open == 3)
    for stream in (False, True):
        reply = await client.post(COMPLETIONS, json={"prompt": "x", "stream": stream})
        error = error_of(reply, 429)
        assert error["code"] == "queue_full"
        assert int(reply.headers["retry-after"]) >= 1
    tasks.pop().cancel()
    await until(lambda: engine.num_open == 2)
    tasks.append(asyncio.create_task(client.post(COMPLETIONS, json={"prompt": "x"})))
    await until(lambda: engine.num_open == 3)


async def test_more_sequences_than_there_ever_is_room_for_are_a_400(make_client: MakeClient) -> None:
    client = make_client(max_num_seqs=2, max_num_queued_reqs=1)
    error = error_of(await client.post(COMPLETIONS, json={"prompt": ["a", "b"], "n": 2}), 400)
    assert error["param"] == "n"
    assert (await client.post(COMPLETIONS, json={"prompt": ["a", "b", "c"]})).status_code == 200


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
async def test_a_draining_server_is_a_503_that_closes_the_connection(
    make_client: MakeClient, lifecycle: Lifecycle, url: str
) -> None:
    client = make_client()
    lifecycle.state = "draining"
    reply = await client.post(url, json={"prompt": "x", "messages": MESSAGES})
    assert error_of(reply, 503)["code"] == "draining"
    assert int(reply.headers["retry-after"]) >= 1
    assert reply.headers["connection"] == "close"


async def test_a_dead_engine_is_a_503(make_client: MakeClient, lifecycle: Lifecycle) -> None:
    engine = FakeEngine()
    client = make_client(engine)
    engine.failure = "killed by SIGKILL"
    error = error_of(await client.post(COMPLETIONS, json={"prompt": "x"}), 503)
    assert error["code"] == "engine_dead"
    assert "SIGKILL" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_dies_before_the_first_token_is_a_503(
    make_client: MakeClient, stream: bool
) -> None:
    client = make_client(FakeEngine(lambda _: [EngineDead("gone")]))
    error = error_of(await client.post(COMPLETIONS, json={"prompt": ["x", "y"], "stream": stream}), 503)
    assert error["code"] == "engine_dead"


async def test_an_engine_that_dies_midway_fails_the_request(make_client: MakeClient) -> None:
    client = make_client(FakeEngine(lambda _: [*say("ab", finish=None), EngineDead("gone")]))
    assert error_of(await client.post(COMPLETIONS, json={"prompt": "x"}), 503)["code"] == "engine_dead"


async def test_an_error_of_the_engine_midway_is_a_500(make_client: MakeClient) -> None:
    script = [Output(id="", tokens=(97,)), Output(id="", finish_reason="error", error="NaN logits")]
    error = error_of(
        await make_client(FakeEngine(lambda _: script)).post(COMPLETIONS, json={"prompt": "x"}), 500
    )
    assert (error["type"], error["message"]) == ("server_error", "NaN logits")


async def test_an_unforeseen_error_tells_no_details(make_client: MakeClient) -> None:
    client = make_client(FakeEngine(lambda _: [RuntimeError("secret path")]))
    error = error_of(await client.post(COMPLETIONS, json={"prompt": "x"}), 500)
    assert (error["message"], error["code"]) == ("Internal server error.", "internal_error")
