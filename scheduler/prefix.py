"""Names for the content of full pages: a hash chain over a sequence's tokens. Knows no pages and no pool."""

from array import array
from collections.abc import Iterator
from hashlib import blake2b

DIGEST_BYTES = 32  # a collision would hand one user's keys and values to another, so no short hashes here


class HashChain:
    """Digests of a token sequence's full pages, computed once each, when first asked for.

    Digest i commits to the salt and to all tokens of pages 0..i, hence also to their positions: two pages
    with equal digests hold equal keys and values. Tokens may be appended later but never changed.
    """

    def __init__(self, salt: bytes, page_size: int) -> None:
        self._page_size = page_size
        # `person` keeps a chosen salt from imitating the inside of another chain.
        self._root = blake2b(salt, digest_size=DIGEST_BYTES, person=b"salt").digest()
        self._digests: list[bytes] = []

    def digest(self, index: int, tokens: "array[int]") -> bytes:
        """The digest of full page `index`; `tokens` is the whole sequence."""
        known, page_size = self._digests, self._page_size
        while len(known) <= index:
            begin = len(known) * page_size
            page_tokens = tokens[begin : begin + page_size]
            assert len(page_tokens) == page_size, f"page {len(known)} has {len(page_tokens)} tokens"
            parent = known[-1] if known else self._root
            content = parent + page_tokens.tobytes()
            known.append(blake2b(content, digest_size=DIGEST_BYTES, person=b"page").digest())
        return known[index]

    def digests(self, begin: int, end: int, tokens: "array[int]") -> Iterator[bytes]:
        """The digests of pages [begin, end), hashing no further than the caller reads."""
        for index in range(begin, end):
            yield self.digest(index, tokens)
