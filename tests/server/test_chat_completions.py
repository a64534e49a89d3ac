"""POST /v1/chat/completions: shapes, templates, logprobs, streams."""

from typing import Any

import pytest

from hybridgen.engine.request import Output
from tests.server.conftest import MakeClient
from tests.server.fakes import FakeEngine, events, logprob, say, with_logprobs

URL = "/v1/chat/completions"
USER = {"role": "user", "content": "Hi"}


def prompt_of(engine: FakeEngine) -> str:
    return bytes(engine.requests[-1].prompt).decode()


async def test_a_chat_completion_has_openais_shape(make_client: MakeClient) -> None:
    reply = await make_client().post(URL, json={"model": "tiny", "messages": [USER]})
    assert reply.status_code == 200
    body = reply.json()
    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("created") > 1_700_000_000
    assert body.pop("system_fingerprint").startswith("hybridgen-")
    assert body == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 20,
            "completion_tokens": 6,
            "total_tokens": 26,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_a_stream_is_byte_for_byte_as_openai_frames_it(make_client: MakeClient) -> None:
    body = {"messages": [USER], "stream": True, "stream_options": {"include_usage": True}}
    engine = FakeEngine(lambda _: say("Héy", step=2))
    reply = await make_client(engine, enable_request_id_headers=True).post(
        URL, json=body, headers={"x-request-id": "me-1"}
    )
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    assert "content-length" not in reply.headers
    first = events(reply.content)[0]
    head = (
        f'data: {{"id":"chatcmpl-me-1","object":"chat.completion.chunk","created":{first["created"]},'
        f'"model":"tiny","system_fingerprint":"{first["system_fingerprint"]}","choices":['
    )

    def choice(delta: str, finish: str = "null", more: str = "") -> str:
        choice = f'{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{finish}{more}}}'
        return f'{head}{choice}],"usage":null}}\n\n'

    usage = (
        '{"prompt_tokens":20,"completion_tokens":5,"total_tokens":25,'
        '"prompt_tokens_details":{"cached_tokens":0}}'
    )
    assert reply.content.decode() == (
        choice('{"role":"assistant","content":""}')
        + choice('{"content":"H"}')
        + choice('{"content":"éy"}')
        + choice("{}", '"stop"', ',"stop_reason":null')
        + f'{head}],"usage":{usage}}}\n\n'
        + "data: [DONE]\n\n"
    )


async def test_every_choice_of_a_stream_has_one_role_and_one_finish_reason(make_client: MakeClient) -> None:
    def script(_: object) -> list[Any]:
        return [*say("one", index=1, finish="length"), *say("two", index=0)]

    reply = await make_client(FakeEngine(script)).post(URL, json={"messages": [USER], "n": 2, "stream": True})
    choices = [choice for chunk in events(reply.content) for choice in chunk["choices"]]
    for index, text, reason in ((0, "two", "stop"), (1, "one", "length")):
        own = [choice for choice in choices if choice["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in choice["delta"] for choice in own[1:])
        assert "".join(choice["delta"].get("content", "") for choice in own) == text
        assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == [reason]
        assert own[-1]["finish_reason"] == reason


async def test_the_last_text_comes_with_the_finish_reason(make_client: MakeClient) -> None:
    engine = FakeEngine(lambda _: say("ab", finish="length"))
    reply = await make_client(engine).post(URL, json={"messages": [USER], "stream": True})
    last = events(reply.content)[-1]["choices"][0]
    assert (last["delta"], last["finish_reason"]) == ({"content": "b"}, "length")


@pytest.mark.parametrize(
    ("content", "written"),
    [
        ("Hi", "Hi"),
        ([{"type": "text", "text": "Hi"}], "Hi"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
        ("", ""),
        (None, ""),
    ],
)
async def test_content_is_a_string_or_text_parts(
    make_client: MakeClient, content: object, written: str
) -> None:
    engine = FakeEngine()
    await make_client(engine).post(URL, json={"messages": [{"role": "user", "content": content}]})
    assert prompt_of(engine) == f"<user>{written}\n<assistant>"


async def test_the_template_gets_its_arguments(make_client: MakeClient) -> None:
    engine = FakeEngine()
    client = make_client(engine)
    conversation = [{"role": "system", "content": "S"}, USER, {"role": "assistant", "content": "Well"}]
    await client.post(URL, json={"messages": conversation, "add_generation_prompt": False})
    assert prompt_of(engine) == "<system>S\n<user>Hi\n<assistant>Well\n"
    reply = await client.post(URL, json={"messages": conversation, "continue_final_message": True})
    assert reply.status_code == 200, reply.text
    assert prompt_of(engine) == "<system>S\n<user>Hi\n<assistant>Well"


async def test_max_tokens_defaults_to_the_rest_of_the_context(make_client: MakeClient) -> None:
    engine = FakeEngine(max_model_len=100)
    client = make_client(engine)
    await client.post(URL, json={"messages": [USER]})
    assert engine.requests[-1].params.max_tokens == 80
    await client.post(URL, json={"messages": [USER], "max_tokens": 70, "max_completion_tokens": 5})
    assert engine.requests[-1].params.max_tokens == 5


async def test_logprobs_carry_bytes_and_alternatives(make_client: MakeClient) -> None:
    engine = FakeEngine(lambda _: with_logprobs(say("é", finish="length"), 2))
    reply = await make_client(engine).post(
        URL, json={"messages": [USER], "logprobs": True, "top_logprobs": 2}
    )
    assert engine.requests[0].params.logprobs == 2
    first, second = reply.json()["choices"][0]["logprobs"]["content"]
    assert (first["logprob"], first["bytes"]) == (-0.5, [0xC3])
    assert second["bytes"] == [0xA9]
    assert first["top_logprobs"][1] == {"token": "z", "logprob": -1.5, "bytes": [122]}
    assert len(first["top_logprobs"]) == 2


async def test_logprobs_without_alternatives(make_client: MakeClient) -> None:
    engine = FakeEngine(lambda _: with_logprobs(say("a", finish="length"), 0))
    reply = await make_client(engine).post(URL, json={"messages": [USER], "logprobs": True, "stream": True})
    assert engine.requests[0].params.logprobs == 0
    assert events(reply.content)[-1]["choices"][0]["logprobs"] == {
        "content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}],
        "refusal": None,
    }


async def test_prompt_logprobs_are_beside_the_choices(make_client: MakeClient) -> None:
    output = Output(id="", tokens=(97,), prompt_logprobs=(None, logprob(98)), finish_reason="length")
    reply = await make_client(FakeEngine(lambda _: [output])).post(
        URL, json={"messages": [USER], "prompt_logprobs": 0}
    )
    assert reply.json()["prompt_logprobs"] == [
        None,
        {"98": {"logprob": -0.5, "rank": 1, "decoded_token": "b"}},
    ]


@pytest.mark.parametrize(
    "fields", [{"user": "u", "store": False, "metadata": {"a": "b"}, "service_tier": "auto"}]
)
async def test_fields_that_change_nothing_here_are_accepted(
    make_client: MakeClient, fields: dict[str, Any]
) -> None:
    neutral = {
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "modalities": ["text"],
    }
    reply = await make_client().post(URL, json={"messages": [USER], "made_up": 1, **fields, **neutral})
    assert reply.status_code == 200
