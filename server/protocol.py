"""The JSON that clients send and get: OpenAI's names and shapes, with the sampling fields that vLLM added.

Requests are pydantic models, so that a bad value is refused with its field and the OpenAPI page is true.
Responses are msgspec structs, because a stream encodes one per token. Nothing here knows the engine.
"""

import logging
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from annotated_types import Ge, Le, MinLen
from msgspec import UNSET, UnsetType
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, model_validator

from hybridgen.server.errors import Unsupported

logger = logging.getLogger(__name__)

# Requests

TokenId = Annotated[int, Ge(0), Le(2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]


def _check_text(value: str) -> str:
    value.encode()  # JSON may spell half a surrogate pair, which is not text; UnicodeError is a ValueError
    return value


Text = Annotated[str, AfterValidator(_check_text)]


def _all_token_ids(value: list[Any]) -> bool:
    return all(type(token) is int and 0 <= token < 2**31 for token in value)


def _check_prompt(value: Any) -> list[str] | list[list[int]]:
    """One shape for the four that are allowed. By hand: a union would report every item four times."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return [_check_text(item) for item in value]
        if _all_token_ids(value):
            return [value]
        if all(isinstance(item, list) and _all_token_ids(item) for item in value):
            return value
    raise ValueError(
        "must be a string, a list of strings, a list of token ids or a list of lists of token ids"
    )


def _check_logit_bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and biases")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isdecimal() and len(key) <= 10):
            raise ValueError(f"the key {key[:20]!r} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {key} must be a number from -100 to 100")
        biases[int(key)] = float(bias)
    return biases


Prompt = Annotated[
    list[str] | list[list[int]],
    PlainValidator(
        _check_prompt,
        json_schema_input_type=Annotated[str, Field()]
        | Annotated[list[str], MinLen(1)]
        | Annotated[list[TokenId], MinLen(1)]
        | Annotated[list[list[TokenId]], MinLen(1)],
    ),
]
LogitBias = Annotated[
    dict[int, float] | None,
    PlainValidator(
        _check_logit_bias, json_schema_input_type=dict[str, Annotated[float, Field(ge=-100, le=100)]] | None
    ),
]


class RequestModel(BaseModel):
    """Strict, so that `"max_tokens": "16"` or `true` is an error rather than a guess; unknown fields pass."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())

    _null_differs: ClassVar[frozenset[str]] = frozenset()

    def log_unknown_fields(self) -> None:
        if self.model_extra:
            logger.debug("ignored unknown request fields: %s", ", ".join(map(ascii, self.model_extra)))

    @model_validator(mode="before")
    @classmethod
    def _take_null_for_absent(cls, body: Any) -> Any:
        """Clients generated from OpenAI's schema send null for what they leave open."""
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None or name in cls._null_differs}


class StreamOptions(RequestModel):
    include_usage: bool = Field(default=False, description="a last chunk without choices carries the usage")
    continuous_usage_stats: bool = Field(default=False, description="every chunk carries the usage so far")


_GRAMMARS_LATER = "output cannot be constrained to a grammar yet"
_TOOLS_LATER = "tools cannot be called yet"
_TEXT_ONLY = "the model reads and writes text only"


class GenerationRequest(RequestModel):
    """What both kinds of completion have in common. None: the model's own default, else a neutral one."""

    model: Text | None = Field(
        default=None, description="a name of GET /v1/models; when left out, the model that is served"
    )
    n: int = Field(default=1, ge=1, le=16_384, description="choices per prompt")
    temperature: float | None = Field(default=None, description="0: greedy")
    top_p: float | None = None
    top_k: int | None = Field(default=None, ge=-1, le=2**31 - 1, description="0 or -1: off")
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: LogitBias = None
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: Text | Annotated[list[Text], Field(fail_fast=True)] | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = Field(default=0, ge=0, le=2**31 - 1)
    prompt_logprobs: int | None = Field(
        default=None, ge=-1, le=2**31 - 1, description="alternatives per prompt token"
    )
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    priority: int = Field(default=0, ge=-(2**31), le=2**31 - 1, description="lower is served earlier")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, description="accepted and ignored")

    # Field -> (values that change nothing, why the others are refused). None always changes nothing.
    _unsupported: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        "response_format": (({"type": "text"},), _GRAMMARS_LATER),
        "structured_outputs": ((), _GRAMMARS_LATER),
        "guided_json": ((), _GRAMMARS_LATER),
        "guided_regex": ((), _GRAMMARS_LATER),
        "guided_choice": ((), _GRAMMARS_LATER),
        "guided_grammar": ((), _GRAMMARS_LATER),
        "json_schema": ((), _GRAMMARS_LATER),
        "regex": ((), _GRAMMARS_LATER),
        "ebnf": ((), _GRAMMARS_LATER),
        "use_beam_search": ((False,), "there is no beam search"),
        "prompt_embeds": ((), "prompts are text or token ids"),
        "truncate_prompt_tokens": ((), "prompts are never cut; send a shorter one"),
        "allowed_token_ids": ((), "use logit_bias"),
        "bad_words": (([],), "use logit_bias"),
        "logprob_token_ids": ((), "use logprobs"),
        "stop_regex": (([], ""), "use stop"),
        "no_stop_trim": ((False,), "use include_stop_str_in_output"),
        "return_token_ids": ((False,), "responses carry text only"),
        "return_tokens_as_token_ids": ((False,), "responses carry text only"),
        "return_hidden_states": ((False,), "responses carry text only"),
        "cache_salt": ((), "cached prefixes cannot be kept apart yet"),
        "thinking_token_budget": ((), "reasoning is not told apart from text yet"),
        "kv_transfer_params": ((), "KV pages cannot be sent to another server"),
        "lora_path": ((), "adapters cannot be loaded"),
        "custom_logit_processor": ((), "no code is taken from requests"),
        "logits_processors": (([],), "no code is taken from requests"),
    }

    def check_supported(self) -> None:
        """Raise `Unsupported` for the first field that asks for what this server does not do."""
        extra = self.model_extra or {}
        for name in extra.keys() & self._unsupported.keys():
            neutral, reason = self._unsupported[name]
            if extra[name] is not None and extra[name] not in neutral:
                raise Unsupported(name, reason)
        self.log_unknown_fields()


class CompletionRequest(GenerationRequest):
    _null_differs: ClassVar[frozenset[str]] = frozenset({"max_tokens"})

    prompt: Prompt
    max_tokens: int | None = Field(
        default=16, ge=0, le=2**31 - 1, description="null: as many as the context holds; 0 only with echo"
    )
    max_completion_tokens: int | None = Field(
        default=None, ge=0, le=2**31 - 1, description="another name of max_tokens"
    )
    logprobs: int | None = Field(
        default=None, ge=-1, le=2**31 - 1, description="alternatives per token; 0: the token's alone"
    )
    echo: bool = Field(default=False, description="the text begins with the prompt")
    add_special_tokens: bool = Field(
        default=True, description="tokenize text prompts with the model's begin-of-text token"
    )
    best_of: int | None = Field(default=None, description="accepted when equal to n")

    _unsupported: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        **GenerationRequest._unsupported,
        "suffix": (("",), "the model does not fill in the middle"),
    }

    def check_supported(self) -> None:
        if self.best_of is not None and self.best_of != self.n:
            raise Unsupported("best_of", f"only best_of equal to n ({self.n}), not {self.best_of}")
        super().check_supported()


class TextPart(RequestModel):
    type: Text
    text: Text | None = None


class Message(RequestModel):
    """What a chat template reads; further fields (name, tool_call_id, ...) reach it as they are."""

    role: Annotated[Text, MinLen(1)]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)] | None = None

    def for_template(self, index: int) -> dict[str, Any]:
        """Raises `Unsupported` for parts that are not text."""
        content = self.content
        if isinstance(content, list):
            for position, part in enumerate(content):
                if part.type != "text" or part.text is None:
                    param = f"messages[{index}].content[{position}]"
                    raise Unsupported(param, f"a part of type {part.type!r}; {_TEXT_ONLY}")
            content = "\n".join(part.text or "" for part in content)
        return {**(self.model_extra or {}), "role": self.role, "content": content or ""}


class ChatCompletionRequest(GenerationRequest):
    messages: Annotated[list[Message], MinLen(1), Field(fail_fast=True)]
    max_tokens: int | None = Field(
        default=None, ge=1, le=2**31 - 1, description="null: as many as the context holds"
    )
    max_completion_tokens: int | None = Field(
        default=None, ge=1, le=2**31 - 1, description="goes before max_tokens"
    )
    logprobs: bool | None = False
    top_logprobs: int | None = Field(
        default=None, ge=0, le=2**31 - 1, description="alternatives per token; needs logprobs"
    )
    add_generation_prompt: bool = Field(
        default=True, description="end the prompt where the assistant begins to speak"
    )
    continue_final_message: bool = Field(
        default=False, description="leave the last message open, to be continued"
    )
    add_special_tokens: bool = Field(
        default=False, description="in addition to those that the template writes"
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        default=None, description="variables for the chat template"
    )

    _unsupported: ClassVar[Mapping[str, tuple[tuple[Any, ...], str]]] = {
        **GenerationRequest._unsupported,
        "tools": (([],), _TOOLS_LATER),
        "tool_choice": (("none", "auto"), _TOOLS_LATER),
        "functions": (([],), _TOOLS_LATER),
        "function_call": (("none", "auto"), _TOOLS_LATER),
        "modalities": ((["text"],), _TEXT_ONLY),
        "audio": ((), _TEXT_ONLY),
        "prediction": ((), "use the prompt"),
        "web_search_options": ((), "the server reaches no other"),
        "documents": (([],), "put them into a message"),
        "chat_template": ((), "the server's own template is used"),
        "echo": ((False,), "use /v1/completions"),
    }


class TokenizeRequest(RequestModel):
    """Either a text or a chat."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[Message], MinLen(1), Field(fail_fast=True)] | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="null: true for a prompt, false for messages"
    )
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(RequestModel):
    model: Text | None = None
    tokens: TokenIds


# Responses


class PromptTokensDetails(msgspec.Struct, frozen=True, kw_only=True):
    cached_tokens: int  # found in the prefix cache


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(msgspec.Struct, frozen=True, kw_only=True):
    logprob: float
    rank: int | None
    decoded_token: str


# Token id -> its logprob, per prompt token; null for the first, which nothing precedes.
PromptLogprobs = list[dict[int, PromptLogprob] | None]


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]  # in characters, from the beginning of the choice's text


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | UnsetType | None = UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer, and also one chunk of a stream: OpenAI gives both the same shape here."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class TopLogprob(msgspec.Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True, kw_only=True):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    content: list[ChatTokenLogprob]
    refusal: None = None


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | UnsetType | None = UNSET


class ChatDelta(msgspec.Struct, frozen=True, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET  # only beside a finish_reason


class ChatCompletionChunk(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "hybridgen"
    root: str  # the folder or hub id that was loaded
    parent: None = None
    max_model_len: int
    permission: list[Any] = []


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(msgspec.Struct, frozen=True, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(msgspec.Struct, frozen=True, kw_only=True):
    prompt: str


class Version(msgspec.Struct, frozen=True, kw_only=True):
    version: str


class PlacementText(msgspec.Struct, frozen=True, kw_only=True):
    """Where host pages lie, and why, for people to read."""

    lines: tuple[str, ...]


class Status(msgspec.Struct, frozen=True, kw_only=True):
    status: str
