"""PagePool: which page comes back, when, and on which tier."""

import random

import pytest

from hybridgen.scheduler.pages import BlockTable, PagePool
from hybridgen.scheduler.step import PageMove

A, B, C, D = b"a", b"b", b"c", b"d"


def one_tier(num_pages: int) -> PagePool:
    return PagePool(num_device_pages=0, num_host_pages=num_pages)


def take(pool: PagePool, num_pages: int) -> BlockTable:
    """A table of new pages, as the scheduler takes them: cached ones are reclaimed when none is free."""
    table = BlockTable()
    for _ in range(num_pages):
        if not pool.num_free_to_write:
            assert pool.reclaim_cached(), "out of pages"
        pool.grow(table)
    return table


def publish_chain(pool: PagePool, digests: list[bytes]) -> BlockTable:
    table = take(pool, len(digests))
    for index, digest in enumerate(digests):
        pool.publish(table, index, digest)
    return table


def give_back(pool: PagePool, table: BlockTable) -> None:
    pool.truncate(table, 0)


def hit(pool: PagePool, digests: list[bytes]) -> BlockTable:
    table = BlockTable()
    pool.extend(table, pool.match(digests))
    return table


def found(pool: PagePool, digests: list[bytes]) -> tuple[int, ...]:
    return tuple(page.id for page in pool.match(digests))


class TestOneTier:
    def test_pages_are_handed_out_from_the_first(self) -> None:
        pool = one_tier(3)
        assert take(pool, 2).ids == (0, 1)
        assert take(pool, 1).ids == (2,)

    def test_the_first_page_of_the_last_table_given_back_is_taken_first(self) -> None:
        pool = one_tier(4)
        first, second = take(pool, 2), take(pool, 2)
        give_back(pool, first)
        give_back(pool, second)
        assert take(pool, 4).ids == (2, 3, 0, 1)

    def test_a_pool_without_pages_is_refused(self) -> None:
        with pytest.raises(ValueError, match="0 device pages and 0 host pages"):
            one_tier(0)

    def test_an_unpublished_page_is_free_again_and_a_published_one_is_cached(self) -> None:
        pool = one_tier(4)
        table = take(pool, 2)
        pool.publish(table, 0, A)
        give_back(pool, table)
        assert (pool.num_free, pool.num_cached, pool.num_reclaimable) == (3, 1, 4)

    def test_the_tail_of_a_chain_is_dropped_before_its_head(self) -> None:
        pool = one_tier(3)
        give_back(pool, publish_chain(pool, [A, B, C]))
        assert take(pool, 1).ids == (2,)
        assert found(pool, [A, B, C]) == (0, 1)
        assert take(pool, 1).ids == (1,)
        assert found(pool, [A, B, C]) == (0,)

    def test_the_least_recently_used_chain_is_dropped_first(self) -> None:
        pool = one_tier(4)
        first, second = publish_chain(pool, [A, B]), publish_chain(pool, [C, D])
        give_back(pool, first)
        give_back(pool, second)
        give_back(pool, hit(pool, [A, B]))
        assert take(pool, 2).ids == (3, 2)
        assert found(pool, [C]) == ()
        assert found(pool, [A, B]) == (0, 1)

    def test_a_match_ends_at_the_first_unknown_digest_and_reads_no_further(self) -> None:
        pool = one_tier(3)
        publish_chain(pool, [A, C])
        digests = iter([A, B, C])
        assert [page.id for page in pool.match(digests)] == [0]
        assert list(digests) == [C]

    def test_a_page_still_held_by_its_first_owner_is_shared(self) -> None:
        pool = one_tier(2)
        owner = publish_chain(pool, [A])
        second = hit(pool, [A])
        pool.check_integrity([owner, second])
        give_back(pool, owner)
        assert (pool.num_free, pool.num_cached) == (1, 0)
        give_back(pool, second)
        assert (pool.num_free, pool.num_cached) == (1, 1)

    def test_a_cached_page_that_is_hit_is_not_dropped(self) -> None:
        pool = one_tier(2)
        give_back(pool, publish_chain(pool, [A, B]))
        hit(pool, [A])
        assert take(pool, 1).ids == (1,)
        assert not pool.reclaim_cached()

    def test_of_two_pages_with_the_same_content_one_is_kept(self) -> None:
        pool = one_tier(2)
        first, second = take(pool, 1), take(pool, 1)
        pool.publish(first, 0, A)
        pool.publish(second, 0, A)
        assert (first.ids, second.ids) == ((0,), (0,))
        pool.check_integrity([first, second])
        assert pool.num_free == 1

    def test_withdrawn_pages_stay_with_their_holders_and_are_free_afterwards(self) -> None:
        pool = one_tier(2)
        owner = publish_chain(pool, [A])
        second = hit(pool, [A])
        pool.withdraw(owner)
        assert found(pool, [A]) == ()
        pool.check_integrity([owner, second])
        give_back(pool, owner)
        give_back(pool, second)
        assert (pool.num_free, pool.num_cached) == (2, 0)

    def test_forgetting_frees_cached_pages_and_leaves_held_ones(self) -> None:
        pool = one_tier(4)
        give_back(pool, publish_chain(pool, [A, B]))
        held = publish_chain(pool, [C])
        pool.forget()
        assert (pool.num_free, pool.num_cached) == (3, 0)
        assert found(pool, [C]) == ()
        pool.check_integrity([held])
        give_back(pool, held)
        assert pool.num_free == 4

    def test_pages_of_a_parked_table_are_reclaimable_unless_another_needs_them(self) -> None:
        pool = one_tier(3)
        owner = publish_chain(pool, [A, B])
        second = hit(pool, [A])
        pool.park(owner)
        assert (pool.num_parked_pages, pool.num_reclaimable) == (1, 2)
        pool.park(second)
        assert pool.num_parked_pages == 2
        third = hit(pool, [A, B])
        assert pool.num_parked_pages == 0
        pool.unpark(owner)
        pool.check_integrity([owner, second, third])

    def test_integrity_notices_a_holder_that_is_not_counted(self) -> None:
        pool = one_tier(2)
        table = publish_chain(pool, [A])
        stranger = BlockTable()
        stranger.pages = list(table.pages)
        with pytest.raises(AssertionError, match="page 0 does not know a holder"):
            pool.check_integrity([table, stranger])
        with pytest.raises(AssertionError, match=r"1 free \+ 0 cached \+ 0 held != 2 pages"):
            pool.check_integrity([])


class TestTwoTiers:
    def test_new_pages_are_device_pages_and_a_demoted_one_changes_its_number_in_every_table(self) -> None:
        pool = PagePool(num_device_pages=2, num_host_pages=2)
        owner = publish_chain(pool, [A, B])
        second = hit(pool, [A])
        pool.demote(owner.pages[0])
        assert (owner.ids, second.ids) == ((2, 1), (2,))
        assert (owner.num_device_pages, second.num_device_pages) == (1, 0)
        assert pool.moves == [PageMove(0, 2)]
        assert take(pool, 1).ids == (0,)

    def test_a_promoted_page_frees_its_host_page(self) -> None:
        pool = PagePool(num_device_pages=1, num_host_pages=1)
        table = take(pool, 1)
        pool.demote(table.pages[0])
        pool.promote(table.pages[0])
        assert table.ids == (0,)
        assert pool.moves == [PageMove(0, 1), PageMove(1, 0)]
        assert (pool.num_free_device, pool.num_free_host) == (0, 1)

    def test_a_cached_device_page_is_demoted_and_found_on_the_host(self) -> None:
        pool = PagePool(num_device_pages=2, num_host_pages=2)
        give_back(pool, publish_chain(pool, [A, B]))
        assert pool.reclaim_cached()
        assert pool.moves == [PageMove(1, 2)]  # the tail
        table = hit(pool, [A, B])
        assert table.ids == (0, 2)
        assert len(pool.moves) == 1, "a hit moves nothing"
        pool.check_integrity([table])

    def test_without_a_free_host_page_the_least_recently_used_of_both_tiers_is_dropped(self) -> None:
        pool = PagePool(num_device_pages=1, num_host_pages=1)
        for digest in (A, B):  # A goes to the host for B
            give_back(pool, take_published(pool, digest))
        assert (found(pool, [A]), found(pool, [B])) == ((1,), (0,))
        give_back(pool, take_published(pool, C))
        assert (found(pool, [A]), found(pool, [B]), found(pool, [C])) == ((), (1,), (0,))
        give_back(pool, hit(pool, [B]))  # now C is the oldest
        give_back(pool, take_published(pool, D))
        assert (found(pool, [B]), found(pool, [C]), found(pool, [D])) == ((1,), (), (0,))

    def test_a_chain_over_both_tiers_is_dropped_from_its_tail(self) -> None:
        pool = PagePool(num_device_pages=3, num_host_pages=2)
        chain = publish_chain(pool, [A, B, C])
        pool.demote(chain.pages[1])  # as in a long sequence: the middle is on the host
        give_back(pool, chain)
        take(pool, 1)
        take(pool, 1)
        assert found(pool, [A, B, C]) == (0, 3, 4)
        take(pool, 1)
        assert found(pool, [A, B, C]) == (4, 3), "C was dropped for A"

    def test_without_a_host_tier_cached_pages_are_dropped(self) -> None:
        pool = PagePool(num_device_pages=2, num_host_pages=0)
        give_back(pool, publish_chain(pool, [A, B]))
        assert take(pool, 1).ids == (1,)
        assert not pool.has_room_to_demote
        assert pool.moves == []

    def test_the_oldest_device_page_is_found_again_after_a_page_came_back(self) -> None:
        pool = PagePool(num_device_pages=4, num_host_pages=4)
        table = take(pool, 4)
        for place in (1, 2):
            page = pool.oldest_device_page(table, 1, 4)
            assert page is table.pages[place]
            pool.demote(page)
        assert pool.oldest_device_page(table, 1, 3) is None
        pool.promote(table.pages[1])
        assert pool.oldest_device_page(table, 1, 3) is table.pages[1]


def take_published(pool: PagePool, digest: bytes) -> BlockTable:
    table = take(pool, 1)
    pool.publish(table, 0, digest)
    return table


@pytest.mark.parametrize("num_device_pages", [0, 1, 3, 6])
@pytest.mark.parametrize("seed", range(5))
def test_the_books_balance_through_a_random_walk(seed: int, num_device_pages: int) -> None:
    rng = random.Random(seed)
    pool = PagePool(num_device_pages=num_device_pages, num_host_pages=rng.randint(num_device_pages == 0, 8))
    tables: list[BlockTable] = []
    for _ in range(400):
        table = rng.choice(tables) if tables else BlockTable()
        page = rng.choice(table.pages) if table.pages else None
        match rng.randrange(8):
            case 0 | 1 if pool.num_free_to_write or pool.reclaim_cached():
                tables.append(take(pool, 1))
            case 2 if tables:
                tables.remove(table)
                give_back(pool, table)
            case 3:
                tables.append(hit(pool, [bytes([rng.randrange(5)])]))
            case 4 if page is not None and page.digest is None and len(page.holders) == 1 and page.num_active:
                pool.publish(table, 0, bytes([rng.randrange(5)]))
            case 5 if tables:
                (pool.unpark if table.is_parked else pool.park)(table)
            case 6 if page is not None and pool.is_on_device(page) and pool.num_free_host:
                pool.demote(page)
            case 7 if page is not None and not pool.is_on_device(page) and pool.num_free_device:
                pool.promote(page)
            case _ if rng.random() < 0.02:
                pool.forget()
        pool.check_integrity(tables)
    for table in tables:
        give_back(pool, table)
    assert pool.num_free + pool.num_cached == pool.num_reclaimable == pool.num_pages
