"""What both kinds of completion say alike: events, usage, token names, prompt logprobs."""

from collections.abc import Sequence

import msgspec
from starlette.responses import Response

from hybridgen.engine.request import TokenLogprob
from hybridgen.engine.tokenizer import Tokenizer
from hybridgen.server.generation import Generation
from hybridgen.server.protocol import PromptLogprob, PromptLogprobs, PromptTokensDetails, Usage

_encoder = msgspec.json.Encoder()

# JSON has no infinity; vLLM's floor, which clients know.
LOWEST_LOGPROB = -9999.0


def event(chunk: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + _encoder.encode(chunk) + b"\n\n"


def json_response(body: msgspec.Struct) -> Response:
    return Response(_encoder.encode(body), media_type="application/json")


def usage_so_far(generation: Generation) -> Usage:
    num_prompt_tokens = generation.num_prompt_tokens
    return Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=generation.num_completion_tokens,
        total_tokens=num_prompt_tokens + generation.num_completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=generation.num_cached_tokens),
    )


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def alternatives(position: TokenLogprob, num_top: int) -> Sequence[tuple[int, float]]:
    """The `num_top` likeliest tokens with their logprobs; -1 gives the whole vocabulary."""
    return position.top if num_top == -1 else position.top[:num_top]


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """The token's text; for part of a character OpenAI's "bytes:\\xe2\\x82", which tells such parts apart."""
    text, raw = tokenizer.token_text(token)
    return text if "\ufffd" not in text else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def prompt_logprobs(
    tokenizer: Tokenizer, positions: Sequence[TokenLogprob | None], num_top: int
) -> PromptLogprobs:
    """vLLM's shape: at each position the prompt's token and `num_top` alternatives, by token id."""
    formatted: PromptLogprobs = []
    for position in positions:
        if position is None:
            formatted.append(None)
            continue
        ranked = {
            token: (logprob, rank)
            for rank, (token, logprob) in enumerate(alternatives(position, num_top), start=1)
        }
        ranked[position.token] = (position.logprob, position.rank)
        formatted.append(
            {
                token: PromptLogprob(
                    logprob=finite(logprob), rank=rank, decoded_token=tokenizer.token_text(token)[0]
                )
                for token, (logprob, rank) in ranked.items()
            }
        )
    return formatted
