"""Page accounting for one tier of the KV cache. Holds no tensors."""

from collections import Counter
from collections.abc import Iterable, Sequence


class OutOfPages(Exception):
    """The tier has fewer free and cached pages than asked for; nothing was allocated.

    Routine under load: release pages (preempt a sequence) and ask again.
    """


class PagePool:
    """Reference counts, the free list and the prefix cache of `num_pages` pages, numbered from 0.

    Every page is in exactly one of three states:
        free: no references, no content worth keeping;
        cached: no references, published content, reclaimed least recently used first;
        held: one reference or more, published or not.

    The order of reclaim keeps a chain's head longer than its tail provided that whoever holds a published
    page also holds the pages before it in the chain and releases them together: `release` sees to the rest.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; a pool needs at least one page")
        self.num_pages = num_pages
        self._refs = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page given back last is taken first
        self._cached: dict[int, None] = {}  # an ordered set, least recently used first
        self._published: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}  # the inverse of `_published`

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give now: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    def allocate(self, num_pages: int) -> tuple[int, ...]:
        """Take pages with one reference each: free ones first, then cached ones, which lose their content.

        Raises OutOfPages, and then takes none.
        """
        if num_pages > self.num_available:
            raise OutOfPages(
                f"{num_pages} pages asked for, {self.num_free} free and {self.num_cached} cached"
                f" of {self.num_pages}"
            )
        pages = tuple(self._free.pop() if self._free else self._evict() for _ in range(num_pages))
        for page in pages:
            self._refs[page] = 1
        return pages

    def _evict(self) -> int:
        page = next(iter(self._cached))
        del self._cached[page]
        del self._published[self._digests.pop(page)]
        return page

    def match(self, digests: Iterable[bytes]) -> tuple[int, ...]:
        """The pages published under the longest known run of `digests` from its start.

        Takes no references: `acquire` them before anything else is allocated.
        """
        pages: list[int] = []
        for digest in digests:
            if digest not in self._published:
                break
            pages.append(self._published[digest])
        return tuple(pages)

    def count_cached(self, pages: Iterable[int]) -> int:
        """How many of `pages` are cached, that is, would stop being available if acquired."""
        return sum(page in self._cached for page in pages)

    def acquire(self, pages: Iterable[int]) -> None:
        """Add one reference to each of these published pages."""
        for page in pages:
            assert page in self._digests, f"page {page} is not published"
            self._cached.pop(page, None)
            self._refs[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference to each page. `pages` are in token order, so that tails are reclaimed first."""
        for page in reversed(pages):
            assert self._refs[page] > 0, f"page {page} released twice"
            self._refs[page] -= 1
            if self._refs[page] > 0:
                continue
            if page in self._digests:
                self._cached[page] = None
            else:
                self._free.append(page)

    def publish(self, page: int, digest: bytes) -> int:
        """Offer a held page's content for reuse; returns the page that now stands for `digest`.

        That is `page`, unless another page has the same content already. Then the caller's reference moves
        to that one and `page` is freed: one copy is kept, and whoever holds a page of a chain holds its head.
        """
        assert self._refs[page] == 1, f"page {page} with {self._refs[page]} references cannot be new"
        assert page not in self._digests, f"page {page} is published already"
        twin = self._published.get(digest)
        if twin is None:
            self._published[digest] = page
            self._digests[page] = digest
            return page
        self.acquire((twin,))
        self.release((page,))
        return twin

    def withdraw(self, pages: Iterable[int]) -> None:
        """Take back what was published of these held pages; other holders keep them."""
        for page in pages:
            assert self._refs[page] > 0, f"page {page} is not held"
            if page in self._digests:
                del self._published[self._digests.pop(page)]

    def forget(self) -> None:
        """Withdraw everything published. Cached pages become free; held ones stay with their holders."""
        self._free.extend(reversed(self._cached))
        self._cached.clear()
        self._published.clear()
        self._digests.clear()

    def check_integrity(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the books balance, `block_tables` being all references there are."""
        num_held = sum(refs > 0 for refs in self._refs)
        assert self.num_free + self.num_cached + num_held == self.num_pages, (
            f"{self.num_free} free + {self.num_cached} cached + {num_held} held != {self.num_pages} pages"
        )
        idle = self._free + list(self._cached)
        assert len(set(idle)) == len(idle), f"a page is free or cached twice: {sorted(idle)}"
        assert all(self._refs[page] == 0 for page in idle), "a free or cached page has references"
        assert all(page in self._digests for page in self._cached), "a cached page has no content"
        assert not any(page in self._digests for page in self._free), "a free page is published"
        assert {page: digest for digest, page in self._published.items()} == self._digests, (
            f"{len(self._published)} digests map to pages, {len(self._digests)} pages to digests"
        )
        holders = Counter(page for table in block_tables for page in table)
        for page, refs in enumerate(self._refs):
            assert refs == holders[page], f"page {page} has {refs} references and {holders[page]} holders"
