"""What crosses the process boundary: requests in, outputs out. Token ids and numbers, never text to format.

Plain msgspec structs, so that the server never imports torch to build one and the wire format is the type.
"""

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]

# Each choice is a sequence of its own; more than this in one request is taken for a mistake.
MAX_N = 128
# Every character of every choice is compared with each stop string, and the server waits for it.
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 1024


class InvalidRequest(Exception):
    """The request cannot be run as it is; the client must change it. The message says limit and value."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param  # the field that is wrong


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


def check_sampling_params(params: SamplingParams, *, vocab_size: int, max_logprobs: int = 20) -> None:
    """Refuse what cannot be sampled with. The types are taken to be right, as msgspec and pydantic make them.

    Args:
        max_logprobs: the most alternatives per token that may be asked for; -1: no limit.

    Raises:
        InvalidRequest: for the first field that is out of range.
    """
    _check_range("n", params.n, 1, MAX_N)
    _check_range("presence_penalty", params.presence_penalty, -2, 2)
    _check_range("frequency_penalty", params.frequency_penalty, -2, 2)
    # Logits are multiplied and divided by it in float32; beyond these bounds nothing but the penalty would be left.
    _check_range("repetition_penalty", params.repetition_penalty, 1e-3, 1e3)
    _check_range("temperature", params.temperature, 0, 2)
    if not 0 < params.top_p <= 1:
        raise InvalidRequest(f"top_p must be greater than 0 and at most 1, got {params.top_p}", "top_p")
    if params.top_k < -1:
        raise InvalidRequest(
            f"top_k must be at least 1, or 0 or -1 for no limit, got {params.top_k}", "top_k"
        )
    _check_range("min_p", params.min_p, 0, 1)
    _check_lengths(params)
    _check_num_logprobs("logprobs", params.logprobs, vocab_size, max_logprobs)
    _check_num_logprobs("prompt_logprobs", params.prompt_logprobs, vocab_size, max_logprobs)
    _check_stops(params)
    for token in params.stop_token_ids:
        _check_token("stop_token_ids", token, vocab_size)
    for token, bias in params.logit_bias.items():
        _check_token("logit_bias", token, vocab_size)
        if not -100 <= bias <= 100:
            raise InvalidRequest(
                f"logit_bias must be between -100 and 100, got {bias} for token {token}", "logit_bias"
            )
    if params.seed is not None and not -(1 << 63) <= params.seed < 1 << 63:
        raise InvalidRequest(f"seed must fit in 64 bits with a sign, got {params.seed}", "seed")


def _check_range(param: str, value: float, lowest: float, highest: float) -> None:
    if not lowest <= value <= highest:  # NaN fails too
        raise InvalidRequest(f"{param} must be between {lowest} and {highest}, got {value}", param)


def _check_lengths(params: SamplingParams) -> None:
    if params.max_tokens is not None and params.max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, got {params.max_tokens}", "max_tokens")
    if params.min_tokens < 0:
        raise InvalidRequest(f"min_tokens must be at least 0, got {params.min_tokens}", "min_tokens")
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise InvalidRequest(
            f"min_tokens must be at most max_tokens = {params.max_tokens}, got {params.min_tokens}",
            "min_tokens",
        )


def _check_stops(params: SamplingParams) -> None:
    if "" in params.stop:
        raise InvalidRequest("stop must not contain an empty string", "stop")
    _check_most("stop", len(params.stop), MAX_STOP_STRINGS, "strings")
    _check_most(
        "stop", max(map(len, params.stop), default=0), MAX_STOP_STRING_CHARS, "characters in a string"
    )
    _check_most("stop_token_ids", len(params.stop_token_ids), MAX_STOP_TOKEN_IDS, "token ids")


def _check_most(param: str, num: int, limit: int, what: str) -> None:
    if num > limit:
        raise InvalidRequest(f"{param} may have at most {limit} {what}, got {num}", param)


def _check_num_logprobs(param: str, value: int | None, vocab_size: int, limit: int) -> None:
    if value is None:
        return
    if value < -1:
        raise InvalidRequest(
            f"{param} must be at least 0, or -1 for the whole vocabulary, got {value}", param
        )
    if limit == -1:
        return
    if value == -1 and vocab_size > limit:
        raise InvalidRequest(
            f"{param} = -1 means the whole vocabulary of {vocab_size} tokens; the limit here is {limit}",
            param,
        )
    if value > limit:
        raise InvalidRequest(f"{param} must be at most {limit} on this server, got {value}", param)


def _check_token(param: str, token: int, vocab_size: int) -> None:
    if not 0 <= token < vocab_size:
        raise InvalidRequest(
            f"{param} holds token id {token}, but the vocabulary has ids 0 to {vocab_size - 1}", param
        )


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
    error: str | None = None  # with finish_reason "error": what went wrong, with the numbers
    # With `error`: the request was refused before anything was computed, because of this field of it.
    refused: str | None = None


class BalanceStats(msgspec.Struct, frozen=True, kw_only=True):
    """Of the controller that splits attention between device and host. Seconds since the engine started."""

    device_s_total: float  # the device's part of attention
    host_s_total: float  # the host's
    device_wait_s_total: float  # the device had its part and waited for the host's
    host_wait_s_total: float  # the other way round
    target_share: float  # of the running sequences' pages, to be on the device
    actual_share: float  # that are there
    max_running: int  # sequences that may run
    limit_reason: str  # why not more
    reason: str  # why the share is what it is
    message: str  # the same in a sentence with numbers
    num_changes_total: dict[str, int]  # of the target share, by reason


class NodeStats(msgspec.Struct, frozen=True, kw_only=True):
    """Of a memory node that holds host pages."""

    name: str
    tier: str
    emulated: bool
    bandwidth: float  # bytes a second that it can be read at
    capacity_bytes: int  # for KV
    read_bytes_total: int  # of KV
    delayed_s_total: float  # that emulation held threads up
    num_pieces: tuple[int, ...]  # by role: index, v_sums, k, v


class MigrationStats(msgspec.Struct, frozen=True, kw_only=True):
    """Pieces of pages that went from one memory node to another."""

    source: str
    target: str
    reason: str
    num_total: int


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts since the engine started (num_x_total) and as of the last step (the rest)."""

    num_running: int = 0
    num_waiting: int = 0
    num_parked: int = 0  # of those waiting, preempted ones that keep their pages
    num_pages: int = 0  # of both tiers
    num_free_pages: int = 0  # never used or given back
    num_cached_pages: int = 0  # not held, kept for prefix hits, reclaimable at once
    num_device_pages: int = 0  # of num_pages those on the device, and likewise
    num_free_device_pages: int = 0
    num_cached_device_pages: int = 0
    num_demoted_pages_total: int = 0  # moved from the device to the host
    num_promoted_pages_total: int = 0  # moved from the host to the device
    # Keys attended, each once a step for its sequence, by where they lay.
    num_device_tokens_total: int = 0
    num_host_tokens_total: int = 0
    # Of the policy that reads the host pages in part: query heads whose retained softmax mass was measured, the sum
    # of it, and the smallest of the last step that measured any.
    num_measured_heads_total: int = 0
    retained_mass_total: float = 0.0
    lowest_retained_mass: float = 1.0
    # Tokens per KV head, of these heads' sequences: looked up in the index, and attended.
    num_scanned_tokens_total: int = 0
    num_selected_tokens_total: int = 0
    num_steps_total: int = 0
    num_preemptions_total: int = 0
    num_prefix_queries_total: int = 0  # prompt tokens looked up
    num_prefix_hits_total: int = 0  # prompt tokens found
    num_prompt_tokens_total: int = 0  # prompt tokens computed or found
    num_generated_tokens_total: int = 0
    last_step_tokens: int = 0  # tokens in the last forward pass
    balance: BalanceStats | None = None  # None: device and host are not processors of their own
    nodes: tuple[NodeStats, ...] = ()  # memory nodes that hold host pages
    migrations: tuple[MigrationStats, ...] = ()  # between them
    num_failed_migrations_total: int = 0  # pieces that the kernel would not move


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The model is loaded; what the server needs to know of it."""

    max_model_len: int
    vocab_size: int
    page_size: int
    num_pages: int  # of both tiers
    num_device_pages: int = 0
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


class Explain(msgspec.Struct, frozen=True, kw_only=True, tag="explain"):
    """Ask where a host page lies and why; of all of them together, without a page. Answered by Explanation."""

    id: str
    page: int | None = None


class Explanation(msgspec.Struct, frozen=True, kw_only=True, tag="explanation"):
    id: str  # of the question
    lines: tuple[str, ...]


ToEngine = Request | Abort | AbortChoice | Explain | Shutdown
FromEngine = Ready | Outputs | Explanation | Failed
