"""However tokens arrive: the pieces add up to the text, none breaks a character, stop strings cut exactly."""

import random
import time

import pytest
from tokenizers import Tokenizer as RawTokenizer

from hybridgen.engine.detokenizer import Detokenized, Detokenizer
from hybridgen.engine.request import SamplingParams
from hybridgen.engine.tokenizer import Tokenizer
from tests.engine.tiny_tokenizers import KINDS, WORDS, save


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        save(root / kind, kind)
    return {kind: Tokenizer(str(root / kind)) for kind in KINDS}


@pytest.fixture(scope="session")
def byte_level(tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers["byte_level"]


def bytes_as_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """One token per byte, so that every character beyond ASCII is split."""
    token_of = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    return [token_of[bytes([byte])] for byte in text.encode()]


def chunks(tokens: list[int], source: random.Random) -> list[list[int]]:
    parts, begin = [], 0
    while begin < len(tokens):
        end = begin + source.randint(1, 5)
        parts.append(tokens[begin:end])
        begin = end
    return [*parts, []] if source.random() < 0.3 else parts


def push_all(detokenizer: Detokenizer, parts: list[list[int]]) -> list[Detokenized]:
    """Up to the end of the text or the stop string."""
    pieces = []
    for index, part in enumerate(parts):
        pieces.append(detokenizer.push(part, finished=index == len(parts) - 1))
        if pieces[-1].stop is not None:
            break
    return pieces


def text_of(pieces: list[Detokenized]) -> str:
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("skip_special_tokens", [True, False], ids=["skip", "keep"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_pieces_of_any_tokens_in_any_chunks_add_up_to_the_text(
    tokenizers: dict[str, Tokenizer], kind: str, skip_special_tokens: bool
) -> None:
    tokenizer, source = tokenizers[kind], random.Random(kind)
    params = SamplingParams(skip_special_tokens=skip_special_tokens)
    for _ in range(300):
        tokens = [source.randrange(tokenizer.vocab_size) for _ in range(source.randint(1, 20))]
        whole = tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        pieces = push_all(Detokenizer(tokenizer, params), chunks(tokens, source))
        assert text_of(pieces) == whole
        offsets = [offset for piece in pieces for offset in piece.offsets]
        assert len(offsets) == len(tokens)
        assert offsets == sorted(offsets)
        assert 0 == offsets[0] <= offsets[-1] <= len(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_what_its_prompt_and_itself_decode_to_beyond_the_prompt(
    tokenizers: dict[str, Tokenizer], kind: str
) -> None:
    tokenizer, source = tokenizers[kind], random.Random(kind)
    words = [token for token in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(token)) > 1]
    num_compared = 0
    for _ in range(200):
        prompt, tokens = ([source.choice(words) for _ in range(source.randint(1, 12))] for _ in range(2))
        both, begin = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt + tokens, prompt))
        # A prompt that ends within a character has no text of its own to take away.
        if both.startswith(begin) and not begin.endswith("\ufffd"):
            num_compared += 1
            text = text_of(push_all(Detokenizer(tokenizer, SamplingParams(), prompt), [tokens]))
            assert text == both[len(begin) :]
    assert num_compared > 100


@pytest.mark.parametrize("kind", ["byte_level", "llama", "metaspace"])
@pytest.mark.parametrize("character", ["é", "你", "🙂"])
def test_a_character_split_over_tokens_comes_whole_with_its_last_byte(
    tokenizers: dict[str, Tokenizer], kind: str, character: str
) -> None:
    tokenizer = tokenizers[kind]
    if kind == "byte_level":
        tokens = bytes_as_tokens(tokenizer, character)
    else:
        names = {tokenizer.token_name(token): token for token in range(tokenizer.vocab_size)}
        tokens = [names[f"<0x{byte:02X}>"] for byte in character.encode()]
    detokenizer = Detokenizer(tokenizer, SamplingParams())
    pieces = [detokenizer.push([token], finished=False) for token in tokens]
    assert [piece.text for piece in pieces] == [""] * (len(tokens) - 1) + [character]
    assert [piece.offsets for piece in pieces] == [(0,)] * len(tokens)


def test_a_character_that_is_never_completed_is_replaced_at_the_end_only(
    byte_level: Tokenizer,
) -> None:
    detokenizer = Detokenizer(byte_level, SamplingParams())
    tokens = bytes_as_tokens(byte_level, "a🙂")[:-1]
    assert detokenizer.push(tokens, finished=False).text == "a"
    assert detokenizer.push([], finished=True).text == "\ufffd"


def test_a_character_that_the_prompt_began_is_completed(byte_level: Tokenizer) -> None:
    tokens = bytes_as_tokens(byte_level, "aé")
    detokenizer = Detokenizer(byte_level, SamplingParams(), tokens[:-1])
    assert detokenizer.push(tokens[-1:], finished=True).text == "é"


def first_stop(text: str, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """Where a stop string is first complete, (end, stop): the longest of those that end there."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return None
    end, _, stop = min(ends)
    return end, stop


@pytest.mark.parametrize("included", [True, False], ids=["included", "excluded"])
@pytest.mark.parametrize("kind", ["byte_level", "llama", "wordpiece"])
def test_stop_strings_cut_where_a_search_of_the_whole_text_finds_them(
    tokenizers: dict[str, Tokenizer], kind: str, included: bool
) -> None:
    tokenizer, source = tokenizers[kind], random.Random(kind)
    raw_words = [
        token for token in range(tokenizer.vocab_size) if tokenizer.token_text(token)[0].strip() in WORDS
    ]
    num_stopped = 0
    for _ in range(500):
        tokens = [source.choice(raw_words) for _ in range(source.randint(1, 25))]
        whole = tokenizer.decode(tokens, skip_special_tokens=True)
        # Pieces of the text itself, mostly, so that stop strings overlap each other and themselves.
        stops = []
        for _ in range(source.randint(1, 4)):
            begin = source.randrange(len(whole))
            stops.append(whole[begin : begin + source.randint(1, 6)] + source.choice(["", "", "", "s", "t"]))
        params = SamplingParams(stop=tuple(stops), include_stop_str_in_output=included)
        pieces = push_all(Detokenizer(tokenizer, params), chunks(tokens, source))
        found = first_stop(whole, params.stop)
        if found is None:
            assert text_of(pieces) == whole
            assert pieces[-1].stop is None
            continue
        num_stopped += 1
        end, stop = found
        assert pieces[-1].stop == stop
        assert text_of(pieces) == whole[: end if included else end - len(stop)]
        # Exactly the tokens up to the one that completed it count.
        num_tokens = sum(piece.num_tokens for piece in pieces)
        assert sum(len(piece.offsets) for piece in pieces) == num_tokens
        if kind == "byte_level":
            assert stop in tokenizer.decode(tokens[:num_tokens], skip_special_tokens=True)
            assert stop not in tokenizer.decode(tokens[: num_tokens - 1], skip_special_tokens=True)
    assert num_stopped > 100


def test_what_could_begin_a_stop_string_waits_and_nothing_else_does(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level, SamplingParams(stop=("aab", "xyz")))
    given = [
        detokenizer.push([token], finished=False).text for token in bytes_as_tokens(byte_level, "caaaxyc")
    ]
    assert given == ["c", "", "", "a", "aa", "", "xyc"]
    assert detokenizer.push(bytes_as_tokens(byte_level, "aa"), finished=True).text == "aa"


def test_of_stop_strings_that_end_together_the_longest_counts(byte_level: Tokenizer) -> None:
    for stops in (("b", "ab"), ("ab", "b")):
        piece = Detokenizer(byte_level, SamplingParams(stop=stops)).push(
            bytes_as_tokens(byte_level, "xab"), finished=True
        )
        assert (piece.text, piece.stop) == ("x", "ab")


def test_a_stop_string_counts_only_once_min_tokens_are_there(byte_level: Tokenizer) -> None:
    tokens = bytes_as_tokens(byte_level, "END END END")
    for min_tokens, text in [
        (0, ""),
        (2, ""),
        (3, "END "),
        (6, "END "),
        (7, "END END "),
        (11, "END END END"),
    ]:
        for size in (1, 2, len(tokens)):
            params = SamplingParams(stop=("END",), min_tokens=min_tokens)
            parts = [tokens[begin : begin + size] for begin in range(0, len(tokens), size)]
            pieces = push_all(Detokenizer(byte_level, params), parts)
            assert text_of(pieces) == text
            assert pieces[-1].stop == ("END" if text != "END END END" else None)


def test_a_stop_string_made_by_the_replacement_of_a_broken_character_counts(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level, SamplingParams(stop=("a\ufffd",)))
    assert detokenizer.push(bytes_as_tokens(byte_level, "xa🙂")[:-1], finished=True) == Detokenized(
        "x", 5, (0, 1, 2, 2, 2), "a\ufffd"
    )


@pytest.mark.parametrize(("included", "text"), [(False, "a"), (True, "ab")])
def test_a_stop_token_is_text_only_if_it_is_to_be_included(
    byte_level: Tokenizer, included: bool, text: str
) -> None:
    params = SamplingParams(include_stop_str_in_output=included)
    piece = Detokenizer(byte_level, params).push(
        bytes_as_tokens(byte_level, "ab"), finished=True, stop_token=True
    )
    assert piece == Detokenized(text, 2, (0, 1), None)


def test_offsets_are_those_of_the_whole_text_over_all_pushes(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level, SamplingParams(stop=("zz",)))
    tokens = bytes_as_tokens(byte_level, "aéz🙂b")
    offsets = [offset for token in tokens for offset in detokenizer.push([token], finished=False).offsets]
    assert offsets == [0, 1, 1, 2, 3, 3, 3, 3, 4]


def test_neighbouring_special_tokens_lose_their_spaces_when_asked_to(
    tokenizers: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers["wordpiece"]
    begin, end = (RawTokenizer.token_to_id(tokenizer._backend, name) for name in ("<s>", "</s>"))
    for spaced, text in [(True, "<s> </s> <s>"), (False, "<s></s><s>")]:
        params = SamplingParams(skip_special_tokens=False, spaces_between_special_tokens=spaced)
        assert Detokenizer(tokenizer, params).push([begin, end, begin], finished=True).text == text


def test_tokens_after_the_end_are_a_bug_of_the_caller(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level, SamplingParams())
    detokenizer.push([], finished=True)
    with pytest.raises(AssertionError, match="after the end"):
        detokenizer.push([1], finished=False)


@pytest.mark.parametrize("kind", ["byte_level", "llama", "wordpiece"])
def test_a_token_costs_the_same_after_a_long_text(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer, source = tokenizers[kind], random.Random(0)
    # A stop string that is always about to match is the worst case.
    detokenizer = Detokenizer(tokenizer, SamplingParams(stop=("a" * 50 + "b",)))
    tokens = [source.randrange(tokenizer.vocab_size) for _ in range(8000)]
    seconds = []
    for begin in range(0, 8000, 1000):
        started = time.perf_counter()
        for token in tokens[begin : begin + 1000]:
            detokenizer.push([token], finished=False)
        seconds.append(time.perf_counter() - started)
    # Decoding everything again would cost 15 times as much in the last part as in the first.
    assert min(seconds[-3:]) < 5 * min(seconds[:3])
