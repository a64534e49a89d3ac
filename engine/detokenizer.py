"""The text of one choice as its tokens arrive: whole characters, and never any part of a stop string."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from hybridgen.engine.request import SamplingParams
from hybridgen.engine.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Detokenized:
    """What some tokens added to a choice's text."""

    text: str  # certain now; may belong to earlier tokens, and may be empty
    num_tokens: int  # of those pushed, how many count: all, or as many as it took to complete a stop string
    offsets: tuple[int, ...]  # for each that counts: where it begins, in characters of the choice's text
    stop: str | None  # the stop string that ended the text


class Detokenizer:
    """Incremental: the cost of a push depends on what is pushed, not on what came before.

    A stop string ends the text where its last character arrives; of several that end with the same character
    the longest counts. So the cut does not depend on how tokens or pushes divide the text.

    Args:
        prompt: what the choice continues. Without it, the text begins as a text of its own, which loses the
            leading space of sentencepiece.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt: Sequence[int] = ()) -> None:
        self._stream = tokenizer.stream(
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            context=prompt,
        )
        # Longest first, so that the first to match is the one that counts.
        self._matchers = [_Matcher(stop) for stop in sorted(set(params.stop), key=len, reverse=True)]
        self._min_tokens = params.min_tokens
        self._includes_stop = params.include_stop_str_in_output
        self._num_tokens = 0
        self._num_chars = 0  # decoded so far, those held back included
        self._held = ""  # decoded, not given: it may be the beginning of a stop string
        self._has_ended = False

    def push(self, tokens: Sequence[int], *, finished: bool, stop_token: bool = False) -> Detokenized:
        """Take the next tokens. After `finished` or a stop string, no more may follow.

        Args:
            finished: these are the last, so nothing is held back any longer.
            stop_token: the last of them ended the generation by being a stop token or end-of-text, so it is
                no part of the text unless the choice includes what stopped it.
        """
        assert not self._has_ended, "tokens after the end of the text"
        offsets: list[int] = []
        for index, token in enumerate(tokens):
            offsets.append(self._num_chars)
            self._num_tokens += 1
            if stop_token and index == len(tokens) - 1 and not self._includes_stop:
                continue
            stop = self._take(self._stream.push(token))
            if stop is not None:
                return self._end(stop, offsets)
        if finished:
            stop = self._take(self._stream.finish())
            if stop is not None:
                return self._end(stop, offsets)
            self._has_ended = True
        num_held = 0
        if self._matchers and not finished and not self._includes_stop:
            num_held = max(matcher.length for matcher in self._matchers)
        begin = len(self._held) - num_held
        text, self._held = self._held[:begin], self._held[begin:]
        return Detokenized(text, len(tokens), tuple(offsets), None)

    def _take(self, text: str) -> str | None:
        """Hold the text; return a stop string that it completes, having dropped what is not to be given."""
        self._num_chars += len(text)
        begin = len(self._held)
        self._held += text
        # As in vLLM, a stop string that ends within the first min_tokens tokens is text like any other.
        counts = self._num_tokens > self._min_tokens
        for index, char in enumerate(text):
            stop = None
            for matcher in self._matchers:
                if matcher.advance(char) and stop is None:
                    stop = matcher.stop
            if stop is not None and counts:
                end = begin + index + 1
                self._held = self._held[: end if self._includes_stop else end - len(stop)]
                return stop
        return None

    def _end(self, stop: str, offsets: list[int]) -> Detokenized:
        self._has_ended = True
        text, self._held = self._held, ""
        return Detokenized(text, len(offsets), tuple(offsets), stop)


class _Matcher:
    """Finds one string in text that arrives by characters (Knuth, Morris, Pratt, 1977)."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.length = (
            0  # of the longest beginning of `stop`, shorter than it, with which the text so far ends
        )
        self._shorter = _shorter_beginnings(stop)

    def advance(self, char: str) -> bool:
        """Whether the text, with this character, ends with the string."""
        length = self.length
        while length and self.stop[length] != char:
            length = self._shorter[length - 1]
        length += self.stop[length] == char
        found = length == len(self.stop)
        self.length = self._shorter[length - 1] if found else length
        return found


@functools.lru_cache(maxsize=256)  # the choices of a request, and often the requests of a client, share it
def _shorter_beginnings(stop: str) -> tuple[int, ...]:
    """For each beginning of `stop`: the length of the longest shorter one with which it ends."""
    shorter = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[length] != stop[index]:
            length = shorter[length - 1]
        length += stop[length] == stop[index]
        shorter[index] = length
    return tuple(shorter)
