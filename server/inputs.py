"""From request bodies to token ids and `SamplingParams`: the parse that both kinds of completion share."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from hybridgen.engine.request import InvalidRequest, SamplingParams, check_sampling_params
from hybridgen.server.errors import ContextLengthExceeded
from hybridgen.server.protocol import GenerationRequest, Message
from hybridgen.server.service import Service

Number = TypeVar("Number", int, float)
T = TypeVar("T")

# Template variables that are fields of the request.
_NOT_VARIABLES = frozenset({"messages", "tools", "add_generation_prompt", "continue_final_message"})

# Tokenizing and rendering on a thread let streams go on meanwhile. Less text than this, in characters, takes
# less time than the hand-over is worth.
_LONG_TEXT = 8_192


async def encode_all(
    service: Service, texts: Sequence[str], *, add_special_tokens: bool, param: str | None
) -> list[list[int]]:
    """Token ids of each text.

    Args:
        param: the field that holds them. None: they need not fit into the context.

    Raises:
        ContextLengthExceeded: one cannot fit, as its length alone tells; a text that passes may still be too
            long.
    """
    return await on_thread(
        sum(map(len, texts)), lambda: _encode_all(service, texts, add_special_tokens, param)
    )


def _encode_all(
    service: Service, texts: Sequence[str], add_special_tokens: bool, param: str | None
) -> list[list[int]]:
    max_model_len = service.engine.ready.max_model_len
    for text in texts:
        if param is not None and len(text) >= _LONG_TEXT:
            num_tokens = service.tokenizer.min_tokens(text)
            if num_tokens > max_model_len:
                raise ContextLengthExceeded(num_tokens, None, max_model_len, param, at_least=True)
    return service.tokenizer.encode_all(texts, add_special_tokens=add_special_tokens)


async def on_thread(size: int, work: Callable[[], T]) -> T:
    """The result of `work`, done on a thread when `size`, in characters or tokens, makes it long."""
    return work() if size < _LONG_TEXT else await asyncio.to_thread(work)


def _num_chars(value: object) -> int:
    """Characters in all the strings of some JSON. Not recursive: a client decides how deep it is."""
    num_chars, pending = 0, [value]
    while pending:
        match pending.pop():
            case str(text):
                num_chars += len(text)
            case list(items):
                num_chars += len(items)
                pending += items
            case dict(fields):
                num_chars += len(fields)
                pending += fields.values()
    return num_chars


async def encode_chat(
    service: Service,
    messages: Sequence[Message],
    *,
    add_special_tokens: bool,
    add_generation_prompt: bool,
    continue_final_message: bool,
    chat_template_kwargs: dict[str, Any] | None,
    param: str | None,
) -> list[int]:
    """Token ids of a chat as the model's template writes it.

    Args:
        param: as in `encode_all`.

    Raises:
        ContextLengthExceeded: as in `encode_all`.
        InvalidRequest: the template refuses these messages, or two of the arguments contradict each other.
    """
    if continue_final_message and add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message leaves the last message open, add_generation_prompt begins another",
            "continue_final_message",
        )
    variables = chat_template_kwargs or {}
    if clash := sorted(variables.keys() & _NOT_VARIABLES):
        raise InvalidRequest(f"{', '.join(clash)}: set the field of that name", "chat_template_kwargs")
    conversation = [message.for_template(index) for index, message in enumerate(messages)]

    def render_and_encode() -> list[int]:
        try:
            text = service.tokenizer.apply_chat_template(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=variables,
            )
            text.encode()  # fields that only the template reads may hold half a surrogate pair
        except UnicodeEncodeError as exc:
            raise InvalidRequest(f"the messages hold what is not text: {exc}", "messages") from exc
        return _encode_all(service, [text], add_special_tokens, param)[0]

    return await on_thread(_num_chars([conversation, variables]), render_and_encode)


def check_prompt(service: Service, prompt: Sequence[int], param: str) -> None:
    """Raises InvalidRequest for a prompt without tokens or with one that the model does not have."""
    if not prompt:
        raise InvalidRequest("a prompt must have at least one token", param)
    highest = max(prompt)
    if highest >= service.engine.ready.vocab_size:
        raise InvalidRequest(
            f"token id {highest} is not in the vocabulary of {service.engine.ready.vocab_size}", param
        )


def fit_max_tokens(service: Service, num_prompt_tokens: int, max_tokens: int | None, param: str) -> int:
    """How many tokens may be generated: `max_tokens`, or for None whatever the context still holds.

    Raises:
        ContextLengthExceeded: they do not fit, or the prompt leaves no room at all.
    """
    max_model_len = service.engine.ready.max_model_len
    room = max_model_len - num_prompt_tokens
    if room < 1:
        raise ContextLengthExceeded(num_prompt_tokens, None, max_model_len, param)
    if max_tokens is not None and max_tokens > room:
        raise ContextLengthExceeded(num_prompt_tokens, max_tokens, max_model_len, "max_tokens")
    return room if max_tokens is None else max_tokens


def sampling_params(
    service: Service,
    body: GenerationRequest,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """What the body asks for, with the model's defaults where it is silent.

    Raises:
        InvalidRequest: a value is out of range.
    """
    defaults = service.defaults
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(dict.fromkeys(body.stop or ()))
    params = SamplingParams(
        n=body.n,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=_given(body.temperature, defaults.temperature),
        top_p=_given(body.top_p, defaults.top_p),
        top_k=_given(body.top_k, defaults.top_k),
        min_p=_given(body.min_p, defaults.min_p),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=_given(body.repetition_penalty, defaults.repetition_penalty),
        logit_bias=body.logit_bias or {},
        seed=body.seed,
        stop=stop,
        stop_token_ids=tuple(dict.fromkeys(body.stop_token_ids or ())),
        include_stop_str_in_output=body.include_stop_str_in_output,
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        skip_special_tokens=body.skip_special_tokens,
        spaces_between_special_tokens=body.spaces_between_special_tokens,
    )
    check_sampling_params(
        params,
        vocab_size=service.engine.ready.vocab_size,
        max_logprobs=service.settings.max_logprobs,
    )
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options are for streams: set stream to true", "stream_options")
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequest("prompt_logprobs cannot be streamed: set stream to false", "prompt_logprobs")
    return params


def _given(value: Number | None, default: Number) -> Number:
    return default if value is None else value
