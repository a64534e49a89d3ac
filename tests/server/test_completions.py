"""POST /v1/completions: shapes, prompts, echo, logprobs, stop strings, usage."""

import pytest

from hybridgen.engine.request import Output, Request
from tests.server.conftest import MakeClient
from tests.server.fakes import EOS, FakeEngine, Step, events, logprob, say, with_logprobs

URL = "/v1/completions"


def text_of(chunks: list[dict], index: int = 0) -> str:
    return "".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index)


async def test_a_completion_has_openais_shape(make_client: MakeClient) -> None:
    reply = await make_client().post(URL, json={"model": "tiny", "prompt": "Say"})
    assert reply.status_code == 200
    body = reply.json()
    assert body.pop("id").startswith("cmpl-")
    assert body.pop("created") > 1_700_000_000
    assert body.pop("system_fingerprint").startswith("hybridgen-")
    assert body == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [
            {"index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 6,
            "total_tokens": 9,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_the_first_served_name_is_the_one_in_answers(make_client: MakeClient) -> None:
    reply = await make_client().post(URL, json={"model": "org/alias", "prompt": "x"})
    assert reply.json()["model"] == "tiny"


async def test_null_is_as_good_as_absent(make_client: MakeClient) -> None:
    names = ("n", "echo", "stream", "logprobs", "temperature", "stop", "logit_bias", "ignore_eos", "suffix")
    reply = await make_client().post(URL, json={"prompt": "x", **dict.fromkeys(names)})
    assert reply.status_code == 200
    assert reply.json()["choices"][0]["text"] == "Hello"


async def test_the_model_may_be_left_out(make_client: MakeClient) -> None:
    assert (await make_client().post(URL, json={"prompt": "x"})).status_code == 200


async def test_sampling_fields_reach_the_engine(make_client: MakeClient) -> None:
    engine = FakeEngine()
    fields = {
        "max_tokens": 7,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
        "seed": 42,
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
    }
    body = {
        "prompt": "x",
        "logit_bias": {"65": 2, "66": -1.5},
        "stop": "END",
        "stop_token_ids": [9],
        "priority": -3,
    }
    reply = await make_client(engine).post(URL, json={**body, **fields})
    assert reply.status_code == 200, reply.text
    (request,) = engine.requests
    assert {name: getattr(request.params, name) for name in fields} == fields
    assert request.params.logit_bias == {65: 2.0, 66: -1.5}
    assert request.params.stop == ("END",)
    assert request.params.stop_token_ids == (9,)
    assert request.priority == -3


@pytest.mark.parametrize("value", [16, None, 5])
async def test_max_tokens_defaults_to_16_and_null_means_the_rest_of_the_context(
    make_client: MakeClient, value: int | None
) -> None:
    engine = FakeEngine()
    body: dict[str, object] = {"prompt": "x"}
    if value != 16:
        body["max_tokens"] = value
    await make_client(engine).post(URL, json=body)
    assert engine.requests[0].params.max_tokens == value


async def test_max_completion_tokens_goes_before_max_tokens(make_client: MakeClient) -> None:
    engine = FakeEngine()
    await make_client(engine).post(URL, json={"prompt": "x", "max_tokens": 9, "max_completion_tokens": 4})
    assert engine.requests[0].params.max_tokens == 4


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("ab", [[97, 98]]),
        (["a", "b"], [[97], [98]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
async def test_prompts_come_in_four_shapes(
    make_client: MakeClient, prompt: object, tokens: list[list[int]]
) -> None:
    engine = FakeEngine()
    reply = await make_client(engine).post(URL, json={"prompt": prompt})
    assert reply.status_code == 200
    assert [request.prompt for request in engine.requests] == tokens
    assert len({request.id for request in engine.requests}) == len(tokens)


def _name_each(request: Request) -> list[Step]:
    """Choices in reverse order, each saying its prompt and its number."""
    return [
        output
        for index in reversed(range(request.params.n))
        for output in say(f"{bytes(request.prompt).decode()}{index}", index=index)
    ]


async def test_choices_are_numbered_prompt_by_prompt(make_client: MakeClient) -> None:
    body = {"prompt": ["a", "b", "c"], "n": 2}
    reply = await make_client(FakeEngine(_name_each)).post(URL, json=body)
    choices = reply.json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3, 4, 5]
    assert [choice["text"] for choice in choices] == ["a0", "a1", "b0", "b1", "c0", "c1"]
    assert reply.json()["usage"]["prompt_tokens"] == 3
    assert reply.json()["usage"]["completion_tokens"] == 18

    streamed = await make_client(FakeEngine(_name_each)).post(URL, json={**body, "stream": True})
    chunks = events(streamed.content)
    assert [text_of(chunks, index) for index in range(6)] == ["a0", "a1", "b0", "b1", "c0", "c1"]
    finished = [c["index"] for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
    assert sorted(finished) == [0, 1, 2, 3, 4, 5]


async def test_prompts_run_at_the_same_time(make_client: MakeClient) -> None:
    most = 0

    def script(request: Request) -> list[Step]:
        nonlocal most
        most = max(most, engine.num_open)
        return [0.02, *say("x")]

    engine = FakeEngine(script)
    await make_client(engine).post(URL, json={"prompt": ["a", "b", "c"]})
    assert most == 3


async def test_a_character_split_over_tokens_is_sent_once_it_is_whole(make_client: MakeClient) -> None:
    engine = FakeEngine(lambda _: say("a€🙂b"))
    reply = await make_client(engine).post(URL, json={"prompt": "x", "stream": True})
    texts = [chunk["choices"][0]["text"] for chunk in events(reply.content)]
    assert [text for text in texts if text] == ["a", "€", "🙂", "b"]


@pytest.mark.parametrize("step", [1, 2, 3, 100])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_ends_the_choice_wherever_the_chunks_fall(
    make_client: MakeClient, step: int, stream: bool, include: bool
) -> None:
    engine = FakeEngine(lambda _: say("one STOP two", step=step, finish="length"))
    body = {"prompt": "x", "stop": ["nope", "STOP"], "stream": stream, "include_stop_str_in_output": include}
    reply = await make_client(engine).post(URL, json=body)
    chunks = events(reply.content) if stream else [reply.json()]
    assert text_of(chunks) == ("one STOP" if include else "one ")
    last = chunks[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "STOP")
    assert sum(c["finish_reason"] is not None for chunk in chunks for c in chunk["choices"]) == 1
    if step < 100:  # otherwise the engine had finished by itself
        assert engine.aborted_choices == [(engine.requests[0].id, 0)]


async def test_a_stop_string_ends_only_its_own_choice(make_client: MakeClient) -> None:
    def script(_: Request) -> list[Step]:
        pairs = zip(say("a.bcdef", finish="length"), say("wxyz.vu", index=1, finish="length"), strict=True)
        return [output for pair in pairs for output in pair]

    engine = FakeEngine(script)
    reply = await make_client(engine).post(URL, json={"prompt": "x", "n": 2, "stop": "."})
    assert [choice["text"] for choice in reply.json()["choices"]] == ["a", "wxyz"]
    assert [index for _, index in engine.aborted_choices] == [0, 1]
    assert reply.json()["usage"]["completion_tokens"] == 2 + 5


async def test_the_stop_token_that_matched_is_the_stop_reason(make_client: MakeClient) -> None:
    script = [Output(id="", tokens=(97,)), Output(id="", tokens=(98,), finish_reason="stop", stop_reason=98)]
    reply = await make_client(FakeEngine(lambda _: script)).post(
        URL, json={"prompt": "x", "stop_token_ids": [98]}
    )
    choice = reply.json()["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("a", "stop", 98)


async def test_logprobs_are_four_parallel_lists(make_client: MakeClient) -> None:
    engine = FakeEngine(lambda _: with_logprobs(say("a€", finish="length"), 1))
    reply = await make_client(engine).post(URL, json={"prompt": "x", "logprobs": 1})
    assert engine.requests[0].params.logprobs == 1
    assert engine.requests[0].params.prompt_logprobs is None
    assert reply.json()["choices"][0]["logprobs"] == {
        "tokens": ["a", "bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"],
        "token_logprobs": [-0.5] * 4,
        "top_logprobs": [{"a": -0.5}, {"bytes:\\xe2": -0.5}, {"bytes:\\x82": -0.5}, {"bytes:\\xac": -0.5}],
        "text_offset": [0, 1, 1, 1],
    }


async def test_the_sampled_token_is_among_the_top_logprobs(make_client: MakeClient) -> None:
    output = Output(
        id="", tokens=(97,), logprobs=(logprob(97, -3.0, top=((98, -0.1),)),), finish_reason="length"
    )
    reply = await make_client(FakeEngine(lambda _: [output])).post(URL, json={"prompt": "x", "logprobs": 1})
    assert reply.json()["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -3.0, "b": -0.1}]


async def test_an_impossible_token_has_a_finite_logprob(make_client: MakeClient) -> None:
    output = Output(id="", tokens=(97,), logprobs=(logprob(97, float("-inf")),), finish_reason="length")
    reply = await make_client(FakeEngine(lambda _: [output])).post(URL, json={"prompt": "x", "logprobs": 0})
    assert reply.json()["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


async def test_streamed_logprobs_add_up_to_the_whole(make_client: MakeClient) -> None:
    body = {"prompt": "x€", "logprobs": 2, "echo": True}

    def script(request: Request) -> list[Step]:
        scores = (None, *(logprob(token, top=((token, -0.5),)) for token in request.prompt[1:]))
        outputs = with_logprobs(say("a€b", finish="length"), 2)
        return [
            Output(id="", tokens=outputs[0].tokens, logprobs=outputs[0].logprobs, prompt_logprobs=scores),
            *outputs[1:],
        ]

    whole = (await make_client(FakeEngine(script)).post(URL, json=body)).json()["choices"][0]
    chunks = events((await make_client(FakeEngine(script)).post(URL, json={**body, "stream": True})).content)
    assert text_of(chunks) == whole["text"] == "x€a€b"
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        streamed = [item for chunk in chunks for item in chunk["choices"][0]["logprobs"][name]]
        assert streamed == whole["logprobs"][name], name
    assert whole["logprobs"]["text_offset"] == [0, 1, 1, 1, 2, 3, 3, 3, 4]


async def test_echo_begins_with_the_prompt_as_it_was_sent(make_client: MakeClient) -> None:
    reply = await make_client().post(URL, json={"prompt": ["ab", "c"], "echo": True})
    assert [choice["text"] for choice in reply.json()["choices"]] == ["abHello", "cHello"]
    reply = await make_client().post(URL, json={"prompt": [97, 98], "echo": True, "stream": True})
    assert text_of(events(reply.content)) == "abHello"


@pytest.mark.parametrize("max_tokens", [0, 1])
async def test_echo_scores_the_prompt(make_client: MakeClient, max_tokens: int) -> None:
    """What lm-eval asks for: the prompt's own logprobs, with no token or one beyond it."""

    def script(request: Request) -> list[Step]:
        assert request.params.max_tokens == 1
        assert request.params.prompt_logprobs == 1
        scores = (None, logprob(98, -0.25, top=((98, -0.25),)), logprob(99, -2.0, top=((100, -0.1),)))
        return [
            Output(
                id="",
                tokens=(101,),
                logprobs=(logprob(101, -0.75, top=((101, -0.75),)),),
                prompt_logprobs=scores,
                finish_reason="length",
            )
        ]

    body = {"prompt": [97, 98, 99], "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    reply = await make_client(FakeEngine(script)).post(URL, json=body)
    choice = reply.json()["choices"][0]
    assert choice["text"] == "abc" + "e" * max_tokens
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c", "e"][: 3 + max_tokens],
        "token_logprobs": [None, -0.25, -2.0, -0.75][: 3 + max_tokens],
        "top_logprobs": [None, {"b": -0.25}, {"c": -2.0, "d": -0.1}, {"e": -0.75}][: 3 + max_tokens],
        "text_offset": [0, 1, 2, 3][: 3 + max_tokens],
    }
    assert reply.json()["usage"]["completion_tokens"] == max_tokens


async def test_prompt_logprobs_have_vllms_shape(make_client: MakeClient) -> None:
    scores = (None, logprob(98, -2.0, rank=2, top=((99, -0.1),)))
    output = Output(id="", tokens=(97,), prompt_logprobs=scores, finish_reason="length")
    reply = await make_client(FakeEngine(lambda _: [output])).post(
        URL, json={"prompt": "ab", "prompt_logprobs": 1}
    )
    assert reply.json()["choices"][0]["prompt_logprobs"] == [
        None,
        {
            "99": {"logprob": -0.1, "rank": 1, "decoded_token": "c"},
            "98": {"logprob": -2.0, "rank": 2, "decoded_token": "b"},
        },
    ]


async def test_cached_tokens_are_those_of_the_first_choice(make_client: MakeClient) -> None:
    script = [
        Output(id="", tokens=(97,), num_cached_tokens=2, finish_reason="length"),
        Output(id="", index=1, tokens=(98,), num_cached_tokens=4, finish_reason="length"),
    ]
    reply = await make_client(FakeEngine(lambda _: script)).post(URL, json={"prompt": "abcd", "n": 2})
    assert reply.json()["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}


@pytest.mark.parametrize("continuous", [False, True])
async def test_the_usage_of_a_stream_comes_last_without_choices(
    make_client: MakeClient, continuous: bool
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": continuous}
    reply = await make_client().post(URL, json={"prompt": "abc", "stream": True, "stream_options": options})
    *chunks, last = events(reply.content)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    assert last["usage"]["total_tokens"] == 9
    counts = [chunk["usage"] and chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == ([1, 2, 3, 4, 5, 6] if continuous else [None] * 6)


async def test_special_tokens_are_shown_on_request(make_client: MakeClient) -> None:
    script = [Output(id="", tokens=(97, EOS, 98), finish_reason="length")]
    for skip, text in ((True, "ab"), (False, "a<|end|>b")):
        reply = await make_client(FakeEngine(lambda _: script)).post(
            URL, json={"prompt": "x", "ignore_eos": True, "skip_special_tokens": skip}
        )
        assert reply.json()["choices"][0]["text"] == text


async def test_a_refusal_of_the_engine_is_the_clients_error(make_client: MakeClient) -> None:
    refusal = Output(id="", finish_reason="error", error="needs 9 pages of 4", refused="max_tokens")
    for stream in (False, True):
        engine = FakeEngine(lambda _: [refusal])
        reply = await make_client(engine).post(URL, json={"prompt": "x", "n": 2, "stream": stream})
        assert reply.status_code == 400
        assert reply.json()["error"]["message"] == "needs 9 pages of 4"


async def test_an_aborted_choice_says_so(make_client: MakeClient) -> None:
    script = [Output(id="", tokens=(97,)), Output(id="", finish_reason="abort")]
    reply = await make_client(FakeEngine(lambda _: script)).post(URL, json={"prompt": "x"})
    assert reply.json()["choices"][0]["text"] == "a"
    assert reply.json()["choices"][0]["finish_reason"] == "abort"


async def test_the_whole_vocabulary_is_more_than_any_number_of_alternatives(make_client: MakeClient) -> None:
    body = {"prompt": "x", "max_tokens": 1, "echo": True, "logprobs": 2, "prompt_logprobs": -1}
    engine = FakeEngine(lambda _: [refused()])
    reply = await make_client(engine).post(URL, json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt_logprobs")
    assert engine.requests == []
    await make_client(engine, max_logprobs=-1).post(URL, json=body)
    assert [request.params.prompt_logprobs for request in engine.requests] == [-1]


def refused() -> Output:
    return Output(id="", finish_reason="error", error="no", refused="prompt")


async def test_each_shape_of_the_prompts_logprobs_has_the_alternatives_asked_for_in_it(
    make_client: MakeClient,
) -> None:
    everything = tuple((token, -float(rank)) for rank, token in enumerate(range(97, 103), start=1))
    output = Output(
        id="",
        tokens=(97,),
        logprobs=(logprob(97, -1.0, top=everything),),
        prompt_logprobs=(None, logprob(97, -1.0, top=everything)),
        finish_reason="length",
    )
    body = {"prompt": "xa", "max_tokens": 1, "echo": True, "logprobs": 3}
    for wanted, num in ((2, 2), (-1, 6)):
        client = make_client(FakeEngine(lambda _: [output]), max_logprobs=-1)
        reply = await client.post(URL, json={**body, "prompt_logprobs": wanted})
        [choice] = reply.json()["choices"]
        assert len(choice["prompt_logprobs"][1]) == num
        assert [top and len(top) for top in choice["logprobs"]["top_logprobs"]] == [None, 3, 3]
