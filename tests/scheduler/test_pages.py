"""PagePool: which page comes back, and when."""

import random

import pytest

from hybridgen.scheduler.pages import OutOfPages, PagePool

A, B, C, D = b"a", b"b", b"c", b"d"


def publish_chain(pool: PagePool, digests: list[bytes]) -> tuple[int, ...]:
    pages = pool.allocate(len(digests))
    return tuple(pool.publish(page, digest) for page, digest in zip(pages, digests, strict=True))


def test_pages_are_handed_out_from_zero() -> None:
    pool = PagePool(3)
    assert pool.allocate(2) == (0, 1)
    assert pool.allocate(1) == (2,)


def test_the_first_page_of_the_last_table_given_back_is_taken_first() -> None:
    pool = PagePool(4)
    first, second = pool.allocate(2), pool.allocate(2)
    pool.release(first)
    pool.release(second)
    assert pool.allocate(4) == (2, 3, 0, 1)


@pytest.mark.parametrize("asked", [0, 1, 2, 3, 4], ids=lambda n: f"asked={n}")
def test_allocation_is_all_or_nothing(asked: int) -> None:
    pool = PagePool(4)
    pool.allocate(1)
    if asked <= 3:
        assert len(pool.allocate(asked)) == asked
        assert pool.num_free == 3 - asked
    else:
        with pytest.raises(OutOfPages, match="4 pages asked for, 3 free and 0 cached of 4"):
            pool.allocate(asked)
        assert pool.num_free == 3


def test_a_pool_without_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="num_pages is 0"):
        PagePool(0)


def test_releasing_a_page_twice_is_noticed() -> None:
    pool = PagePool(1)
    pages = pool.allocate(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="page 0 released twice"):
        pool.release(pages)


def test_an_unpublished_page_is_free_again_and_a_published_one_is_cached() -> None:
    pool = PagePool(4)
    pages = pool.allocate(2)
    pool.publish(pages[0], A)
    pool.release(pages)
    assert (pool.num_free, pool.num_cached, pool.num_available) == (3, 1, 4)


def test_free_pages_are_taken_before_cached_ones() -> None:
    pool = PagePool(3)
    pool.release(publish_chain(pool, [A]))
    assert pool.allocate(2) == (1, 2)
    assert pool.match([A]) == (0,)
    assert pool.allocate(1) == (0,)
    assert pool.match([A]) == ()


def test_the_tail_of_a_chain_is_evicted_before_its_head() -> None:
    pool = PagePool(3)
    pool.release(publish_chain(pool, [A, B, C]))
    assert pool.allocate(1) == (2,)
    assert pool.match([A, B, C]) == (0, 1)
    assert pool.allocate(1) == (1,)
    assert pool.match([A, B, C]) == (0,)


def test_the_least_recently_used_chain_is_evicted_first() -> None:
    pool = PagePool(4)
    first = publish_chain(pool, [A, B])
    second = publish_chain(pool, [C, D])
    pool.release(first)
    pool.release(second)
    used = pool.match([A, B])
    pool.acquire(used)
    pool.release(used)
    assert pool.allocate(2) == (3, 2)
    assert pool.match([C]) == ()
    assert pool.match([A, B]) == (0, 1)


def test_a_match_ends_at_the_first_unknown_digest_and_reads_no_further() -> None:
    pool = PagePool(3)
    publish_chain(pool, [A, C])
    digests = iter([A, B, C])
    assert pool.match(digests) == (0,)
    assert list(digests) == [C]


def test_a_page_still_held_by_its_first_owner_is_shared_by_reference_count() -> None:
    pool = PagePool(2)
    owner = publish_chain(pool, [A])
    assert pool.count_cached(owner) == 0
    pool.acquire(pool.match([A]))
    pool.check_integrity([owner, owner])
    pool.release(owner)
    assert (pool.num_free, pool.num_cached) == (1, 0)
    pool.release(owner)
    assert (pool.num_free, pool.num_cached) == (1, 1)


def test_acquiring_a_cached_page_protects_it_from_eviction() -> None:
    pool = PagePool(2)
    pool.release(publish_chain(pool, [A, B]))
    hit = pool.match([A])
    assert pool.count_cached(hit) == 1
    pool.acquire(hit)
    assert pool.allocate(1) == (1,)
    with pytest.raises(OutOfPages):
        pool.allocate(1)


def test_of_two_pages_with_the_same_content_one_is_kept() -> None:
    pool = PagePool(2)
    first, second = pool.allocate(1), pool.allocate(1)
    assert pool.publish(first[0], A) == 0
    assert pool.publish(second[0], A) == 0
    pool.check_integrity([(0,), (0,)])
    assert pool.num_free == 1


def test_withdrawn_pages_stay_with_their_holders_and_are_free_afterwards() -> None:
    pool = PagePool(2)
    owner = publish_chain(pool, [A])
    pool.acquire(owner)
    pool.withdraw(owner)
    assert pool.match([A]) == ()
    pool.check_integrity([owner, owner])
    pool.release(owner)
    pool.release(owner)
    assert (pool.num_free, pool.num_cached) == (2, 0)


def test_forgetting_frees_cached_pages_and_leaves_held_ones() -> None:
    pool = PagePool(4)
    pool.release(publish_chain(pool, [A, B]))
    held = publish_chain(pool, [C])
    pool.forget()
    assert (pool.num_free, pool.num_cached) == (3, 0)
    assert pool.match([C]) == ()
    pool.check_integrity([held])
    pool.release(held)
    assert pool.num_free == 4


def test_integrity_notices_a_holder_that_is_not_counted() -> None:
    pool = PagePool(2)
    pages = pool.allocate(1)
    with pytest.raises(AssertionError, match="page 0 has 1 references and 2 holders"):
        pool.check_integrity([pages, pages])
    with pytest.raises(AssertionError, match="page 0 has 1 references and 0 holders"):
        pool.check_integrity([])


@pytest.mark.parametrize("seed", range(10))
def test_the_books_balance_through_a_random_walk(seed: int) -> None:
    rng = random.Random(seed)
    pool = PagePool(rng.randint(1, 12))
    tables: list[tuple[int, ...]] = []
    for _ in range(300):
        match rng.randrange(5):
            case 0 | 1:
                try:
                    tables.append(pool.allocate(rng.randint(0, 5)))
                except OutOfPages:
                    assert pool.num_available < 5
            case 2 if tables:
                pool.release(tables.pop(rng.randrange(len(tables))))
            case 3:
                hit = pool.match(bytes([chain]) for chain in range(rng.randrange(5), 5))
                pool.acquire(hit)
                tables.append(hit)
            case 4 if tables:
                index = rng.randrange(len(tables))
                if all(pool._refs[page] == 1 and page not in pool._digests for page in tables[index]):
                    tables[index] = tuple(pool.publish(p, bytes([i])) for i, p in enumerate(tables[index]))
            case _:
                if rng.random() < 0.05:
                    pool.forget()
        pool.check_integrity(tables)
    for table in tables:
        pool.release(table)
    assert pool.num_available == pool.num_pages
