"""Page accounting for the KV cache: two tiers, one numbering. Holds no tensors.

Device pages are [0, num_device_pages), host pages follow. Either tier may have none. New tokens are written to device
pages, or, where there are none, to host pages; otherwise a host page is written once, by the move that demotes
a device page to it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from hybridgen.scheduler.step import PageMove


@dataclass(slots=True, eq=False)
class Page:
    """Content and where it lies. An object stands for the content, so that a move changes one number."""

    id: int
    index: int  # its place in the block table of whoever holds it
    holders: "set[BlockTable]" = field(default_factory=set)
    num_active: int = 0  # holders that are not parked
    digest: bytes | None = None  # under which it is published
    last_used: int = 0  # orders cached pages


class BlockTable:
    """A sequence's pages in token order. Only `PagePool` changes it."""

    __slots__ = ("_first_device", "_ids", "is_parked", "num_device_pages", "pages")

    def __init__(self) -> None:
        self.pages: list[Page] = []
        self.num_device_pages = 0
        self.is_parked = False  # its sequence does not run; it keeps its pages until they are needed
        self._ids: tuple[int, ...] | None = None
        self._first_device = 0  # `oldest_device_page` has found only host pages before

    @property
    def ids(self) -> tuple[int, ...]:
        """Page ids in token order: the same tuple until a page comes, goes or moves."""
        if self._ids is None:
            self._ids = tuple(page.id for page in self.pages)
        return self._ids

    def _count(self, page: Page, change: int, *, on_device: bool) -> None:
        self._ids = None
        if on_device:
            self.num_device_pages += change
            self._first_device = min(self._first_device, page.index)


class _CachedPages:
    """Pages that nobody holds, whose content is worth keeping, by `last_used`."""

    def __init__(self) -> None:
        self._members: dict[Page, int] = {}
        self._heap: list[tuple[int, Page]] = []  # has stale entries: those that `_members` does not confirm

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Page]:
        return iter(self._members)

    def add(self, page: Page) -> None:
        self._members[page] = page.last_used
        heappush(self._heap, (page.last_used, page))
        if len(self._heap) > 2 * len(self._members) + 64:
            self._heap = [(used, member) for member, used in self._members.items()]
            heapify(self._heap)

    def remove(self, page: Page) -> None:
        del self._members[page]

    def clear(self) -> None:
        self._members.clear()
        self._heap.clear()

    def oldest(self) -> Page:
        while self._members.get(self._heap[0][1]) != self._heap[0][0]:
            heappop(self._heap)
        return self._heap[0][1]


class _Tier:
    def __init__(self, ids: range) -> None:
        self.ids = ids
        self.free = list(reversed(ids))  # a stack: the page given back last is taken first
        self.cached = _CachedPages()


class PagePool:
    """Who holds which page, what is free, and the prefix cache.

    Every page id is in exactly one of three states, on its tier:
        free: no content worth keeping;
        cached: not held, published content, dropped least recently used first, over both tiers;
        held: in one block table or more, published or not. Held by parked tables alone it is reclaimable too.

    The order of dropping keeps a chain's head longer than its tail provided that whoever holds a published
    page also holds the pages before it in the chain and releases them together: `truncate` sees to the rest.

    `moves` are the copies that make the books true, in order. Whoever carries them out clears the list.
    """

    def __init__(self, *, num_device_pages: int, num_host_pages: int) -> None:
        if num_device_pages < 0 or num_host_pages < 0 or num_device_pages + num_host_pages < 1:
            raise ValueError(
                f"{num_device_pages} device pages and {num_host_pages} host pages; a pool needs at least one page"
            )
        self.num_device_pages = num_device_pages
        self.num_pages = num_device_pages + num_host_pages
        self._device = _Tier(range(num_device_pages))
        self._host = _Tier(range(num_device_pages, self.num_pages))
        self._written = self._device if num_device_pages else self._host
        self._published: dict[bytes, Page] = {}
        self._num_uses = 0
        self.num_parked_pages = 0  # held by parked tables alone
        self.moves: list[PageMove] = []
        self.num_demoted_total = 0
        self.num_promoted_total = 0

    @property
    def has_both_tiers(self) -> bool:
        return 0 < self.num_device_pages < self.num_pages

    @property
    def num_free(self) -> int:
        return len(self._device.free) + len(self._host.free)

    @property
    def num_free_device(self) -> int:
        return len(self._device.free)

    @property
    def num_free_host(self) -> int:
        return len(self._host.free)

    @property
    def free_host_pages(self) -> tuple[int, ...]:
        """Ids of host pages that hold nothing worth keeping."""
        return tuple(self._host.free)

    @property
    def num_cached(self) -> int:
        return len(self._device.cached) + len(self._host.cached)

    @property
    def num_cached_device(self) -> int:
        return len(self._device.cached)

    @property
    def num_reclaimable(self) -> int:
        """Pages that no sequence needs to go on running: free ones, cached ones, those of parked tables."""
        return self.num_free + self.num_cached + self.num_parked_pages

    @property
    def num_free_to_write(self) -> int:
        """Pages that `grow` can give."""
        return len(self._written.free)

    @property
    def has_room_to_demote(self) -> bool:
        """Whether `demote` can be called: a device page has a host page to go to, free or cached."""
        return self.num_device_pages > 0 and bool(self._host.free or self._host.cached)

    def is_on_device(self, page: Page) -> bool:
        return page.id < self.num_device_pages

    def can_write(self, page: Page) -> bool:
        """Whether tokens can be written to it where it lies."""
        return page.id in self._written.ids

    def oldest_device_page(self, table: BlockTable, begin: int, end: int) -> Page | None:
        """The first device page in [begin, end) of the table; `begin` is always the same for a table."""
        pages = table.pages
        index = max(begin, table._first_device)
        while index < end and pages[index].id >= self.num_device_pages:
            index += 1
        table._first_device = index
        return pages[index] if index < end else None

    def grow(self, table: BlockTable) -> None:
        """Append a free page to write to. There must be one."""
        assert not table.is_parked, "a parked table does not grow"
        page = Page(self._written.free.pop(), len(table.pages))
        table.pages.append(page)
        self._hold(page, table)

    def extend(self, table: BlockTable, pages: Iterable[Page]) -> None:
        """Append published pages."""
        for page in pages:
            assert page.digest is not None, f"page {page.id} is not published"
            assert page.index == len(table.pages), f"page {page.id} belongs at {page.index}"
            table.pages.append(page)
            self._hold(page, table)

    def truncate(self, table: BlockTable, num_pages: int) -> None:
        """Release all but the first `num_pages` pages. Of those that become cached the tail is dropped first."""
        while len(table.pages) > num_pages:
            self._release(table.pages.pop(), table)

    def _hold(self, page: Page, table: BlockTable) -> None:
        if not page.holders and page.digest is not None:
            self._tier(page).cached.remove(page)
        page.holders.add(table)
        if not table.is_parked:
            self._activate(page)
        table._count(page, 1, on_device=self.is_on_device(page))

    def _release(self, page: Page, table: BlockTable) -> None:
        page.holders.remove(table)
        table._count(page, -1, on_device=self.is_on_device(page))
        if not table.is_parked:
            self._deactivate(page)
        if page.holders:
            return
        self.num_parked_pages -= 1
        if page.digest is None:
            self._tier(page).free.append(page.id)
            return
        self._num_uses += 1
        page.last_used = self._num_uses
        self._tier(page).cached.add(page)

    def _activate(self, page: Page) -> None:
        if page.num_active == 0 and len(page.holders) > 1:
            self.num_parked_pages -= 1
        page.num_active += 1

    def _deactivate(self, page: Page) -> None:
        page.num_active -= 1
        if page.num_active == 0:
            self.num_parked_pages += 1

    def park(self, table: BlockTable) -> None:
        """Its sequence stops running. The table keeps its pages; those that no other needs become reclaimable."""
        assert not table.is_parked, "the table is parked already"
        table.is_parked = True
        for page in table.pages:
            self._deactivate(page)

    def unpark(self, table: BlockTable) -> None:
        """Its sequence runs again."""
        assert table.is_parked, "the table is not parked"
        table.is_parked = False
        for page in table.pages:
            if page.num_active == 0:
                self.num_parked_pages -= 1
            page.num_active += 1

    def demote(self, page: Page) -> None:
        """Move a held device page to the host, in place of the least recently used cached page if none is free.

        Then no device page may be cached, or what is dropped might not be the oldest of all.
        """
        if not self._host.free:
            assert not self._device.cached, f"{len(self._device.cached)} cached device pages go first"
            self._drop(self._host.cached.oldest())
        self._move(page, self._device, self._host)
        self.num_demoted_total += 1

    def promote(self, page: Page) -> None:
        """Move a held host page to a free device page. There must be one."""
        self._move(page, self._host, self._device)
        self.num_promoted_total += 1

    def reclaim_cached(self) -> bool:
        """Free a page to write to by demoting a cached one, or dropping it if it is the oldest that is left.

        Returns whether there was a cached page on that tier.
        """
        if not self._written.cached:
            return False
        page, host = self._written.cached.oldest(), self._host
        if self._written is self._device:
            if not host.free and host.cached and host.cached.oldest().last_used < page.last_used:
                self._drop(host.cached.oldest())
            if host.free:
                self._move(page, self._device, host)
                self.num_demoted_total += 1
                return True
        self._drop(page)
        return True

    def _move(self, page: Page, source: _Tier, target: _Tier) -> None:
        assert page.id in source.ids, f"page {page.id} is not in {source.ids}"
        for table in page.holders:
            table._count(page, -1, on_device=self.is_on_device(page))
        if not page.holders:
            source.cached.remove(page)
            target.cached.add(page)
        move = PageMove(page.id, target.free.pop())
        source.free.append(page.id)
        page.id = move.target
        for table in page.holders:
            table._count(page, 1, on_device=self.is_on_device(page))
        self.moves.append(move)

    def _drop(self, page: Page) -> None:
        assert not page.holders, f"page {page.id} is held"
        assert page.digest is not None, f"page {page.id} is not cached"
        tier = self._tier(page)
        tier.cached.remove(page)
        tier.free.append(page.id)
        del self._published[page.digest]

    def _tier(self, page: Page) -> _Tier:
        return self._device if page.id < self.num_device_pages else self._host

    def match(self, digests: Iterable[bytes]) -> tuple[Page, ...]:
        """The pages published under the longest known run of `digests` from its start, wherever they lie.

        They are not held: `extend` a table by them before any page is reclaimed.
        """
        pages: list[Page] = []
        for digest in digests:
            page = self._published.get(digest)
            if page is None:
                break
            pages.append(page)
        return tuple(pages)

    def publish(self, table: BlockTable, index: int, digest: bytes) -> None:
        """Offer the content of the table's page `index` for reuse.

        If another page has the same content already, it takes this one's place in the table and this one is
        freed: one copy is kept, and whoever holds a page of a chain holds its head.
        """
        page = table.pages[index]
        assert page.holders == {table}, f"page {page.id} with {len(page.holders)} holders cannot be new"
        assert page.digest is None, f"page {page.id} is published already"
        twin = self._published.get(digest)
        if twin is None:
            self._published[digest] = page
            page.digest = digest
            return
        table.pages[index] = twin
        self._hold(twin, table)
        self._release(page, table)

    def withdraw(self, table: BlockTable) -> None:
        """Take back what was published of the table's pages; other holders keep them."""
        for page in table.pages:
            if page.digest is not None:
                del self._published[page.digest]
                page.digest = None

    def forget(self) -> None:
        """Withdraw everything published. Cached pages become free; held ones stay with their holders."""
        for tier in (self._device, self._host):
            tier.free.extend(page.id for page in tier.cached)
            tier.cached.clear()
        for page in self._published.values():
            page.digest = None
        self._published.clear()

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Raise AssertionError unless the books balance, `tables` being all there are. O(pages)."""
        held: Counter[Page] = Counter()
        for table in tables:
            held.update(table.pages)
            assert table.ids == tuple(page.id for page in table.pages), f"stale block table {table.ids}"
            num_device = sum(page.id < self.num_device_pages for page in table.pages)
            assert table.num_device_pages == num_device, f"{table.num_device_pages} counted of {num_device}"
            for index, page in enumerate(table.pages):
                assert page.index == index, f"page {page.id} of place {page.index} at {index}"
                assert table in page.holders, f"page {page.id} does not know a holder"
        for page, num_holders in held.items():
            assert len(page.holders) == num_holders, (
                f"page {page.id} has {len(page.holders)} references and {num_holders} holders"
            )
            num_active = sum(not table.is_parked for table in page.holders)
            assert page.num_active == num_active, f"page {page.id}: {page.num_active} active of {num_active}"
        num_parked = sum(page.num_active == 0 for page in held)
        assert self.num_parked_pages == num_parked, f"{self.num_parked_pages} parked, {num_parked} found"
        for tier in (self._device, self._host):
            ids = [page.id for page in held if page.id in tier.ids]
            cached = [page.id for page in tier.cached]
            assert sorted([*ids, *cached, *tier.free]) == list(tier.ids), (
                f"{len(tier.free)} free + {len(cached)} cached + {len(ids)} held != {len(tier.ids)} pages, "
                "or one of them twice"
            )
            for page in tier.cached:
                assert not page.holders, f"page {page.id} is cached and held"
                assert page.digest is not None, f"page {page.id} is cached without content"
        for digest, page in self._published.items():
            assert page.digest == digest, f"page {page.id} is published under another digest"
        kept = {*held, *self._device.cached, *self._host.cached}
        published = {page for page in kept if page.digest is not None}
        assert published == set(self._published.values()), "published pages are not those with a digest"
