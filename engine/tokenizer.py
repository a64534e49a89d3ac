"""Text to token ids and back, and what a model's tokenizer files say about ends and chat templates.

Decoding works on bytes: every token is the bytes it adds to the text, and a character is text once its last
byte is there. That makes it incremental and linear, and the same text comes out however the tokens are cut
into pieces. `transformers` agrees except where byte tokens of a sentencepiece vocabulary do not make a
character: it then replaces the valid characters beside them too, which a stream has long sent. Tokenizers
whose decoders are not known here to work on bytes (WordPiece, say) go through `transformers` with a short
window of tokens.
"""

import codecs
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from hybridgen.engine.request import InvalidRequest

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# Names that transformers' functions and Jinja's have for themselves.
_NOT_TEMPLATE_VARIABLES = frozenset(
    {
        "self",
        "messages",
        "conversations",
        "tools",
        "add_generation_prompt",
        "continue_final_message",
        "conversation",
        "chat_template",
        "tokenize",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    }
)

# A prompt's last tokens are enough to know how it ends: a character has at most 4 bytes.
_NUM_CONTEXT_TOKENS = 8


class TokenizerError(Exception):
    """The tokenizer cannot be loaded; the message says what is missing."""


class TextStream(ABC):
    """Tokens in, text out as soon as it is certain: never part of a character."""

    @abstractmethod
    def push(self, token: int) -> str:
        """The text that became certain with this token; may be empty."""

    @abstractmethod
    def finish(self) -> str:
        """What is left: U+FFFD for a character that was never completed, or nothing."""


class Tokenizer:
    """A model's tokenizer.

    Args:
        source: a folder or a hub id.
        chat_template: Jinja, in place of the model's own.
        local_files_only: never ask the hub. With HF_HUB_OFFLINE set it is not asked either.

    Raises:
        TokenizerError: it cannot be loaded without running code from the model's repository.
    """

    def __init__(
        self,
        source: str,
        *,
        revision: str | None = None,
        chat_template: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        self._tokenizer = _load(source, revision, local_files_only)
        if chat_template is not None:
            self._tokenizer.chat_template = chat_template
        self._backend = getattr(self._tokenizer, "backend_tokenizer", None)
        self._pieces: _Pieces | None = None
        if self._backend is not None:
            # The files may set these for training; a prompt is taken whole or refused.
            self._backend.no_truncation()
            self._backend.no_padding()
            self._pieces = _pieces(json.loads(self._backend.to_str())["decoder"])
        self._special_ids = frozenset(
            token for token, added in self._tokenizer.added_tokens_decoder.items() if added.special
        )
        self._bytes: dict[int, bytes] = {}
        self._max_token_bytes: float | None = None  # of text that one token can stand for
        self.vocab_size = len(self._tokenizer)
        self.max_token_id = max(self._tokenizer.get_vocab().values(), default=-1)
        self.eos_token_ids = _eos_token_ids(self._tokenizer, source, revision, local_files_only)

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.chat_template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self.encode_all([text], add_special_tokens=add_special_tokens)[0]

    def encode_all(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text. Other threads go on meanwhile, unless the tokenizer is written in Python."""
        if self._backend is not None:
            # `encode` of the backend keeps the interpreter's lock all the while; this gives it up.
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in encodings]
        return [list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens)) for text in texts]

    def min_tokens(self, text: str) -> int:
        """At least so many tokens the text has: found without tokenizing it, and often far too few."""
        if self._max_token_bytes is None:
            self._max_token_bytes = self._find_max_token_bytes()
        return math.ceil(len(text.encode()) / self._max_token_bytes)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Ids that the tokenizer does not have add no text."""
        stream = self.stream(skip_special_tokens=skip_special_tokens)
        return "".join(map(stream.push, tokens)) + stream.finish()

    def stream(
        self,
        *,
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool = True,
        context: Sequence[int] = (),
    ) -> TextStream:
        """Decode token by token.

        Args:
            spaces_between_special_tokens: False: no spaces between neighbouring special tokens, where the
                tokenizer's decoder would put them. Those that work on bytes never do.
            context: tokens before the first one pushed. They decide whether that one begins the text, where
                sentencepiece drops a space, and it may complete their last character.
        """
        skipped = self._special_ids if skip_special_tokens else frozenset()
        begin = max(0, len(context) - _NUM_CONTEXT_TOKENS)
        at_start = all(token in skipped for token in context[:begin])
        stream: TextStream
        if self._pieces is not None:
            stream = _ByteStream(self, self._pieces, skipped, at_start=at_start)
        else:
            unspaced = frozenset() if spaces_between_special_tokens else self._special_ids
            stream = _WindowStream(self._tokenizer, skipped, unspaced)
        for token in context[begin:]:
            stream.push(token)
        return stream

    def token_text(self, token: int) -> tuple[str, bytes]:
        """The token as it continues a text, and its bytes; part of a character gives U+FFFD as text."""
        raw = self.token_bytes(token)
        return raw.decode("utf-8", "replace"), raw

    def token_bytes(self, token: int) -> bytes:
        """What the token adds in the middle of a text; nothing for an id that the tokenizer does not have."""
        known = self._bytes.get(token)
        if known is not None:
            return known
        if self._pieces is not None:
            name = self.token_name(token)
            raw = b"" if name is None else self._pieces.to_bytes(name)
        else:
            text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
            assert isinstance(text, str)
            raw = text.encode()
        self._bytes[token] = raw
        return raw

    def _find_max_token_bytes(self) -> float:
        """Infinite where a token can stand for text of any length: unknown words, dropped spaces."""
        if self._backend is None or self._pieces is None:
            return math.inf
        num_shrinking = _shrinking(json.loads(self._backend.to_str()))
        longest = max((len(self._pieces.to_bytes(name)) for name in self._tokenizer.get_vocab()), default=1)
        return max(longest, 1) * num_shrinking

    def token_name(self, token: int) -> str | None:
        """The token as the vocabulary spells it. None for an id that it does not have."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        return name if isinstance(name, str) else None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        """The chat as text, special tokens included: encode it with `add_special_tokens=False`.

        Args:
            variables: what else the template reads; `enable_thinking`, say.

        Raises:
            InvalidRequest: there is no template, or it refuses these messages.
        """
        reserved = sorted(_NOT_TEMPLATE_VARIABLES & variables.keys())
        if reserved:
            raise InvalidRequest(
                f"{', '.join(reserved)} cannot be set for a chat template", "chat_template_kwargs"
            )
        if not self.has_chat_template:
            raise InvalidRequest(
                "this model has no chat template: send a prompt to /v1/completions or start with a template",
                "messages",
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **variables,
            )
        except (
            Exception
        ) as exc:  # a template is a program that runs on what the client sent: anything may come out
            raise InvalidRequest(f"the chat template refuses these messages: {exc}", "messages") from exc
        assert isinstance(text, str)
        return text


class _Pieces(ABC):
    """How the tokenizer's decoder makes bytes of tokens."""

    @abstractmethod
    def to_bytes(self, name: str) -> bytes:
        """What the token adds in the middle of a text."""

    def first(self, name: str, num_dropped: int) -> tuple[bytes, int | None]:
        """What the token adds while the text is still empty, and how many spaces have been dropped with it.

        None ends the beginning: the next token is in the middle.
        """
        return self.to_bytes(name), None


class _ByteLevel(_Pieces):
    """GPT-2's alphabet: one printable character stands for each byte."""

    def __init__(self) -> None:
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        self._byte_of = {chr(byte): byte for byte in printable}
        self._byte_of |= {chr(256 + index): byte for index, byte in enumerate(others)}

    def to_bytes(self, name: str) -> bytes:
        try:
            return bytes([self._byte_of[letter] for letter in name])
        except KeyError:  # an added token with a character outside the alphabet is plain text
            return name.encode()


class _Sentencepiece(_Pieces):
    """Spaces are written as another character; a byte of a character that has no token is written `<0xE2>`.

    Args:
        num_stripped: leading spaces that the whole text loses.
        drops_in_first: the first token loses all of its spaces, wherever they are (Metaspace).
    """

    def __init__(
        self,
        replacements: Sequence[tuple[str, str]],
        *,
        has_bytes: bool,
        num_stripped: int,
        drops_in_first: str,
    ) -> None:
        self._replacements = tuple(replacements)
        self._has_bytes = has_bytes
        self._num_stripped = num_stripped
        self._drops_in_first = drops_in_first

    def to_bytes(self, name: str) -> bytes:
        for old, new in self._replacements:
            name = name.replace(old, new)
        match = _BYTE_TOKEN.fullmatch(name) if self._has_bytes else None
        return bytes([int(match[1], 16)]) if match else name.encode()

    def first(self, name: str, num_dropped: int) -> tuple[bytes, int | None]:
        if self._drops_in_first:
            return self.to_bytes(name.replace(self._drops_in_first, "")), None
        raw = self.to_bytes(name)
        while num_dropped < self._num_stripped and raw.startswith(b" "):
            raw = raw[1:]
            num_dropped += 1
        return raw, None if raw or num_dropped == self._num_stripped else num_dropped


def _pieces(decoder: Mapping[str, Any] | None) -> _Pieces | None:
    """From the decoder of a tokenizer.json; None for one that is not known to work on bytes."""
    if decoder is None:
        return None
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _ByteLevel()
    replacements: list[tuple[str, str]] = []
    num_stripped = 0
    drops_in_first = ""
    for index, step in enumerate(steps):
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(old)} if "Fuse" not in kinds[:index]:
                replacements.append((old, " "))
                drops_in_first = "" if step.get("prepend_scheme") == "never" else old
            # Before Fuse it would strip each token.
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0} if "Fuse" in kinds[:index]:
                num_stripped = start
            case {"type": "ByteFallback" | "Fuse"}:
                pass
            case _:
                return None
    if not (replacements or "ByteFallback" in kinds) or (num_stripped and drops_in_first):
        return None
    return _Sentencepiece(
        replacements,
        has_bytes="ByteFallback" in kinds,
        num_stripped=num_stripped,
        drops_in_first=drops_in_first,
    )


# Canonical composition makes at most this many times fewer bytes of a text (3.5, of U+0390).
_MAX_COMPOSITION = 4

_KEEPING_PRE_TOKENIZERS = frozenset({"ByteLevel", "Metaspace", "Digits", "Split"})


def _shrinking(files: Mapping[str, Any]) -> float:
    """Bytes of text for each byte that its tokens stand for, at most. Infinite for what is not known here.

    Args:
        files: the content of a tokenizer.json.
    """
    model, factor = files["model"], 1.0
    if model["type"] != "BPE" or not (
        model.get("byte_fallback")
        or (model.get("unk_token") is None and files["decoder"]["type"] == "ByteLevel")
    ):
        return math.inf  # one unknown token may stand for a whole text
    if any(added["lstrip"] or added["rstrip"] for added in files["added_tokens"]):
        return math.inf
    for step in _steps(files.get("normalizer"), "normalizers"):
        match step:
            case {"type": "NFC"}:
                factor *= _MAX_COMPOSITION
            case {"type": "Prepend"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if len(
                new.encode()
            ) >= len(old.encode()):
                pass
            case _:
                return math.inf
    for step in _steps(files.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] not in _KEEPING_PRE_TOKENIZERS or step.get("behavior") == "Removed":
            return math.inf
    return factor


def _steps(part: Mapping[str, Any] | None, name: str) -> Sequence[Mapping[str, Any]]:
    if part is None:
        return ()
    steps: Sequence[Mapping[str, Any]] = part[name] if part["type"] == "Sequence" else (part,)
    return steps


class _ByteStream(TextStream):
    def __init__(
        self, tokenizer: Tokenizer, pieces: _Pieces, skipped: frozenset[int], *, at_start: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._pieces = pieces
        self._skipped = skipped
        self._num_dropped: int | None = 0 if at_start else None  # spaces; None: the text has begun
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        if token in self._skipped:
            return ""
        raw = self._tokenizer.token_bytes(token)
        if self._num_dropped is not None and (name := self._tokenizer.token_name(token)) is not None:
            raw, self._num_dropped = self._pieces.first(name, self._num_dropped)
        return self._utf8.decode(raw)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowStream(TextStream):
    """Decodes the last few tokens with and without the new ones; the difference is new text."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, skipped: frozenset[int], unspaced: frozenset[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._unspaced = unspaced
        self._before: list[int] = []  # their text has been given
        self._new: list[int] = []

    def push(self, token: int) -> str:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if token in self._skipped or not isinstance(name, str):
            return ""
        if (
            token in self._unspaced
            and not self._new
            and self._before[-1:]
            and self._before[-1] in self._unspaced
        ):
            self._before = [token]
            return name
        self._new.append(token)
        text = self._difference()
        # An incomplete character, which is given up after as many tokens as a character can have bytes.
        if text.endswith("\ufffd") and len(self._new) < 4:
            return ""
        self._before, self._new = self._new, []
        return text

    def finish(self) -> str:
        text = self._difference() if self._new else ""
        self._new = []
        return text

    def _difference(self) -> str:
        before = self._decode(self._before)
        text = self._decode(self._before + self._new)
        return text.removeprefix(before) if text.startswith(before) else self._decode(self._new)

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def _load(source: str, revision: str | None, local_files_only: bool) -> PreTrainedTokenizerBase:
    folder = Path(source)
    if folder.is_dir() and not any(folder.glob("tokenizer*")) and not any(folder.glob("*vocab*")):
        held = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise TokenizerError(f"{source} has no tokenizer.json; it holds {held}")
    if not folder.is_dir() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise TokenizerError(f"there is no folder {source}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=False, local_files_only=local_files_only
        )
    except Exception as exc:  # transformers raises whatever its readers of seven file formats do
        raise TokenizerError(f"the tokenizer of {source} cannot be loaded: {exc}") from exc
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _eos_token_ids(
    tokenizer: PreTrainedTokenizerBase, source: str, revision: str | None, local_files_only: bool
) -> tuple[int, ...]:
    """Every token that some file of the model calls an end of text, ascending."""
    named: list[Any] = [tokenizer.eos_token_id]
    # A folder may hold a tokenizer alone: then reading the configurations raises OSError.
    with suppress(OSError):
        config, _ = PretrainedConfig.get_config_dict(
            source, revision=revision, local_files_only=local_files_only
        )
        named.append(config.get("eos_token_id"))
    with suppress(OSError):
        generation = GenerationConfig.from_pretrained(
            source, revision=revision or "main", local_files_only=local_files_only
        )
        named.append(generation.eos_token_id)
    found: set[int] = set()
    for ids in named:
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    return tuple(sorted(found))
