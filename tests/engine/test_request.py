"""The ranges of sampling parameters: what passes, what is refused, and that the refusal says why."""

import math
from typing import Any

import msgspec
import pytest

from hybridgen.engine.request import (
    MAX_N,
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    InvalidRequest,
    SamplingParams,
    check_sampling_params,
)

VOCAB_SIZE = 1000


def check(**fields: Any) -> None:
    check_sampling_params(SamplingParams(**fields), vocab_size=VOCAB_SIZE)


def test_the_defaults_pass() -> None:
    check()


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1},
        {"n": MAX_N},
        {"max_tokens": None, "min_tokens": 100},
        {"max_tokens": 5, "min_tokens": 5},
        {"temperature": 0.0},
        {"temperature": 2.0},
        {"top_p": 1e-9},
        {"top_k": -1},
        {"top_k": 10 * VOCAB_SIZE},
        {"min_p": 0.0},
        {"min_p": 1.0},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0},
        {"repetition_penalty": 1e-3},
        {"repetition_penalty": 1e3},
        {"logprobs": 0},
        {"logprobs": 20, "prompt_logprobs": 20},
        {"stop": ("a", " ")},
        {"stop": ("a" * MAX_STOP_STRING_CHARS,) * MAX_STOP_STRINGS},
        {"stop_token_ids": (0, VOCAB_SIZE - 1)},
        {"stop_token_ids": (0,) * MAX_STOP_TOKEN_IDS},
        {"logit_bias": {0: -100.0, VOCAB_SIZE - 1: 100.0}},
        {"seed": -(1 << 63)},
        {"seed": (1 << 63) - 1},
    ],
    ids=lambda value: str(value)[:60],
)
def test_the_ends_of_each_range_pass(fields: dict[str, Any]) -> None:
    check(**fields)


@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        ({"n": 0}, ("1", "0")),
        ({"n": MAX_N + 1}, (str(MAX_N), str(MAX_N + 1))),
        ({"max_tokens": 0}, ("1", "0")),
        ({"min_tokens": -1}, ("0", "-1")),
        ({"min_tokens": 17}, ("16", "17")),
        ({"temperature": -0.1}, ("0", "-0.1")),
        ({"temperature": 2.1}, ("2", "2.1")),
        ({"temperature": math.nan}, ("nan",)),
        ({"temperature": math.inf}, ("2", "inf")),
        ({"top_p": 0.0}, ("0", "0.0")),
        ({"top_p": 1.1}, ("1", "1.1")),
        ({"top_p": math.nan}, ("nan",)),
        ({"top_k": -2}, ("1", "-2")),
        ({"min_p": -0.1}, ("0", "-0.1")),
        ({"min_p": 1.5}, ("1", "1.5")),
        ({"presence_penalty": 2.5}, ("2", "2.5")),
        ({"frequency_penalty": -2.5}, ("-2", "-2.5")),
        ({"frequency_penalty": math.nan}, ("nan",)),
        ({"repetition_penalty": 0.0}, ("0", "0.0")),
        ({"repetition_penalty": math.inf}, ("inf",)),
        ({"repetition_penalty": math.nan}, ("nan",)),
        ({"logprobs": 21}, ("20", "21")),
        ({"logprobs": -2}, ("0", "-2")),
        ({"logprobs": -1}, ("20", "1000")),
        ({"prompt_logprobs": 21}, ("20", "21")),
        ({"stop": ("a", "")}, ("empty",)),
        ({"stop": ("a",) * (MAX_STOP_STRINGS + 1)}, ("64", "65")),
        ({"stop": ("a" * (MAX_STOP_STRING_CHARS + 1),)}, ("1024", "1025")),
        ({"stop_token_ids": (0,) * (MAX_STOP_TOKEN_IDS + 1)}, ("1024", "1025")),
        ({"stop_token_ids": (1, VOCAB_SIZE)}, ("999", "1000")),
        ({"stop_token_ids": (-1,)}, ("999", "-1")),
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, ("999", "1000")),
        ({"logit_bias": {7: 100.5}}, ("100", "100.5", "7")),
        ({"logit_bias": {7: math.nan}}, ("100", "nan")),
        ({"seed": 1 << 63}, ("64", str(1 << 63))),
        ({"seed": -(1 << 63) - 1}, ("64", str(-(1 << 63) - 1))),
    ],
    ids=lambda value: str(value)[:60],
)
def test_beyond_a_range_the_refusal_names_the_field_the_limit_and_the_value(
    fields: dict[str, Any], numbers: tuple[str, ...]
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        check(**fields)
    assert refusal.value.param == next(iter(fields))
    assert refusal.value.param in str(refusal.value)
    assert all(number in str(refusal.value) for number in numbers)


def test_the_whole_vocabulary_of_logprobs_passes_where_the_limit_allows_it() -> None:
    params = SamplingParams(logprobs=-1, prompt_logprobs=-1)
    check_sampling_params(params, vocab_size=VOCAB_SIZE, max_logprobs=VOCAB_SIZE)
    check_sampling_params(params, vocab_size=VOCAB_SIZE, max_logprobs=-1)


def test_parameters_survive_the_wire() -> None:
    params = SamplingParams(n=2, stop=("x",), logit_bias={3: -1.5}, seed=-7, logprobs=0, max_tokens=None)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
