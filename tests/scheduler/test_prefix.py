"""HashChain: equal digests mean equal tokens from the start, under the same salt."""

from array import array

import pytest

from hybridgen.scheduler.prefix import HashChain


def digests(tokens: list[int], *, salt: bytes = b"", page_size: int = 2) -> list[bytes]:
    return list(HashChain(salt, page_size).digests(0, len(tokens) // page_size, array("I", tokens)))


def test_equal_tokens_have_equal_digests() -> None:
    assert digests([1, 2, 3, 4]) == digests([1, 2, 3, 4])


def test_a_digest_depends_on_every_token_before_it() -> None:
    left, right = digests([1, 2, 3, 4]), digests([1, 9, 3, 4])
    assert left[0] != right[0]
    assert left[1] != right[1]


def test_a_digest_does_not_depend_on_later_tokens() -> None:
    assert digests([1, 2, 3, 4])[0] == digests([1, 2, 9, 9])[0]


def test_the_same_tokens_at_another_position_have_another_digest() -> None:
    first, second = digests([1, 2, 1, 2])
    assert first != second


def test_a_salt_separates_every_page() -> None:
    assert not set(digests([1, 2, 3, 4], salt=b"x")) & set(digests([1, 2, 3, 4], salt=b"y"))


def test_token_ids_do_not_run_into_each_other() -> None:
    assert digests([1, 256]) != digests([257, 0])
    assert digests([0, 1]) != digests([1 << 24, 0])


def test_a_chosen_salt_cannot_continue_another_chain() -> None:
    (parent,) = digests([1, 2])
    forged = parent + array("I", [3, 4]).tobytes()
    assert digests([5, 6], salt=forged)[0] != digests([1, 2, 3, 4, 5, 6])[2]


def test_a_chain_grows_with_its_sequence_and_hashes_each_page_once() -> None:
    tokens = array("I", [1, 2, 3])
    chain = HashChain(b"", 2)
    first = chain.digest(0, tokens)
    tokens.append(4)
    assert chain.digest(1, tokens) == digests([1, 2, 3, 4])[1]
    assert chain.digest(0, tokens) is first


def test_a_page_that_is_not_full_has_no_digest() -> None:
    with pytest.raises(AssertionError, match="page 1 has 1 tokens"):
        HashChain(b"", 2).digest(1, array("I", [1, 2, 3]))
