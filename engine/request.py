"""What crosses the process boundary: requests in, outputs out. Token ids and numbers, never text to format.

Plain msgspec structs, so that the server never imports torch to build one and the wire format is the type.
"""

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens and when to end. The same names and meanings as vLLM's.

    Ranges are checked once, by `check_sampling_params`, where a request enters.
    """

    n: int = 1
    max_tokens: int | None = 16  # None: as many as the context still holds
    min_tokens: int = 0  # before this many, end-of-text and stop tokens cannot be sampled
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None  # the same seed gives the same tokens, whatever else is in the batch
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives per generated token; 0 gives the sampled token's alone
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="request"):
    """One prompt to be continued `params.n` times."""

    id: str
    prompt: list[int]  # token ids, at least one
    params: SamplingParams
    priority: int = 0  # lower is served earlier, as in vLLM


class Abort(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """Stop these requests and free their pages; unknown ids are ignored, since they may just have ended."""

    ids: list[str]


class AbortChoice(msgspec.Struct, frozen=True, kw_only=True, tag="abort_choice"):
    """Stop one of a request's `n` choices: its text has matched a stop string."""

    id: str
    index: int


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag="shutdown"):
    """Abort what runs and end the engine process."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probabilities at one position, before temperature and penalties."""

    token: int
    logprob: float
    rank: int  # 1 = the most likely token of the vocabulary
    top: tuple[tuple[int, float], ...]  # (token id, logprob), most likely first; as many as were asked for


class Output(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step added to one choice of one request."""

    id: str
    index: int = 0  # which of the request's `n` choices
    tokens: tuple[int, ...] = ()  # new token ids; a matched stop token is included
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token in `tokens` when asked for
    # With the first output of choice 0: one per prompt token, None for the first, when asked for.
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None  # the stop token id that matched; None for end-of-text
    num_cached_tokens: int = 0  # prompt tokens whose KV was found in the prefix cache
    error: str | None = None  # with finish_reason "error" or a refusal: what went wrong, with the numbers


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the engine started (num_x_total) and as of the last step (the rest)."""

    num_running: int = 0
    num_waiting: int = 0
    num_pages: int = 0
    num_free_pages: int = 0  # never used or given back
    num_cached_pages: int = 0  # unreferenced, kept for prefix hits, reclaimable at once
    num_steps_total: int = 0
    num_preemptions_total: int = 0
    num_prefix_queries_total: int = 0  # prompt tokens looked up
    num_prefix_hits_total: int = 0  # prompt tokens found
    num_prompt_tokens_total: int = 0  # prompt tokens computed or found
    num_generated_tokens_total: int = 0
    last_step_tokens: int = 0  # tokens in the last forward pass


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The model is loaded; what the server needs to know of it."""

    max_model_len: int
    vocab_size: int
    page_size: int
    num_pages: int
    dtype: str
    num_parameters: int
    load_seconds: float


class Outputs(msgspec.Struct, frozen=True, kw_only=True, tag="outputs"):
    """Everything one step produced, in one message."""

    outputs: list[Output]
    stats: EngineStats


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The engine cannot go on; it exits non-zero after sending this."""

    message: str


ToEngine = Request | Abort | AbortChoice | Shutdown
FromEngine = Ready | Outputs | Failed
