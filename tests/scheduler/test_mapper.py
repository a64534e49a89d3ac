"""Where pieces of host pages lie: the mapper, the rules it is compared with, and the books of both."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.mapper import compare, draw
from hybridgen.scheduler.machine import MemoryNode, Role, Tier
from hybridgen.scheduler.mapper import SemanticMapper, pour
from hybridgen.scheduler.placements import (
    INDEX_FIRST,
    K_FIRST,
    ROLES,
    FirstTouch,
    Migration,
    NoRoom,
    PageReads,
    PageShape,
    PaperRule,
    ReadPattern,
    RecencyRule,
    RuleBase,
    WeightedInterleave,
)
from hybridgen.scheduler.rules import RULES

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
HALF = 64 * KIB
EXACT, SPARSE_V = ReadPattern(0, 0, 1, 1), ReadPattern(0, 0, 1, 0.1, K_FIRST)
MASS = ReadPattern(1, 0.25, 0.1, 0.1, INDEX_FIRST)
PLAIN = PageShape(0, 0, HALF, HALF)
INDEXED = PageShape(HALF // 2, HALF // 16, HALF, HALF)
INDEX, V_SUMS, K, V = range(len(ROLES))


def dram(number: int = 0, *, gb_s: float = 200, capacity: int = GIB) -> MemoryNode:
    return MemoryNode(number, f"dram{number}", Tier.DRAM, gb_s * 1e9, 1e-7, capacity)


def cxl(number: int = 8, *, gb_s: float = 36, capacity: int = GIB) -> MemoryNode:
    return MemoryNode(number, f"cxl{number}", Tier.CXL, gb_s * 1e9, 2.5e-7, capacity)


def mapper(
    *nodes: MemoryNode, shape: PageShape = PLAIN, pattern: ReadPattern = EXACT, pages: int = 500
) -> SemanticMapper:
    return SemanticMapper(nodes, shape, pattern, pages)


def converge(rule: RuleBase, budget: int = 1 << 20, most: int = 500) -> int:
    """Plan and apply until nothing moves; how many steps that took."""
    for step in range(most):
        moves = rule.plan(budget)
        if not moves:
            return step
        rule.apply(moves)
        rule.books.check_integrity()
    raise AssertionError(f"still moving after {most} steps")


def share_on(rule: RuleBase, tier: Tier, column: int) -> float:
    """Of a role's pieces, those on nodes of a tier."""
    pieces = rule.books.num_pieces[column]
    is_tier = np.array([node.tier is tier for node in rule.books.nodes])
    return float(pieces[is_tier].sum() / pieces.sum())


def test_phases_follow_one_another_and_each_ends_with_its_slowest_node() -> None:
    """8 MiB/s and 2 MiB/s; 3 MiB of K and 1 MiB of V on the first, 1 MiB of K and half a MiB of V on the second."""
    nodes = dram(gb_s=8 * MIB / 1e9), cxl(gb_s=2 * MIB / 1e9)
    placed = mapper(*nodes, shape=PageShape(0, 0, MIB, MIB), pattern=ReadPattern(0, 0, 1, 0.5, K_FIRST))
    for page, (k, v) in enumerate([(0, 0), (0, 0), (0, 1), (1, 1)]):
        placed.books.take_in(page, (-1, -1, k, v), 1)
    assert placed.books.phase_loads.tolist() == [[3 * MIB, MIB], [MIB, MIB]]
    assert placed.books.phase_seconds().tolist() == [0.5, 0.5]
    assert placed.books.read_seconds() == 1.0
    assert placed.node_read_bytes() == (4 * MIB, 2 * MIB)
    at_once = mapper(*nodes, shape=PageShape(0, 0, MIB, MIB), pattern=ReadPattern(0, 0, 1, 0.25))
    at_once.books.take_in(0, (-1, -1, 0, 1), 1)
    assert at_once.books.read_seconds() == 0.125


@pytest.mark.parametrize("pattern", [EXACT, SPARSE_V, MASS], ids=["exact", "hybridgen", "mass"])
def test_where_there_is_room_each_role_is_striped_in_proportion_to_bandwidth(pattern: ReadPattern) -> None:
    placed = mapper(dram(), cxl(), shape=INDEXED, pattern=pattern)
    placed.place(range(400))
    assert placed.books.num_pieces / 400 == pytest.approx(np.tile([200 / 236, 36 / 236], (4, 1)), abs=0.01)
    assert placed.books.read_seconds() == pytest.approx(placed.books.loads.sum() / 236e9, rel=0.02)
    assert not placed.plan(1 << 30)


def test_keys_lie_in_dram_and_values_in_cxl_memory_where_dram_is_short_and_values_are_read_sparsely() -> None:
    placed = mapper(dram(capacity=200 * HALF), cxl(), pattern=SPARSE_V)
    placed.place(range(200), coming=100)
    placed.place(range(200, 300))
    assert share_on(placed, Tier.CXL, V) == 1
    assert share_on(placed, Tier.DRAM, K) == pytest.approx(2 / 3, abs=0.02)


def test_in_short_dram_the_index_comes_first_and_values_leave_before_keys() -> None:
    # The index's stripe, 0.42 of a half page of 2.56, and little more.
    placed = mapper(dram(capacity=300 * HALF), cxl(), shape=INDEXED, pattern=MASS)
    placed.place(range(300))
    assert share_on(placed, Tier.DRAM, INDEX) == pytest.approx(200 / 236, abs=0.02)
    assert share_on(placed, Tier.CXL, V) > 0.95
    assert 0.2 < share_on(placed, Tier.DRAM, K) < 0.7


def test_where_everything_is_read_both_are_striped_in_proportion_to_bandwidth() -> None:
    placed = mapper(dram(), cxl(), cxl(9, gb_s=18), pattern=EXACT)
    placed.place(range(400))
    for column in (K, V):
        pieces = placed.books.num_pieces[column] / 400
        assert pieces.tolist() == pytest.approx([200 / 254, 36 / 254, 18 / 254], abs=0.01)


@pytest.mark.parametrize("seed", range(50))
def test_pour_finds_the_least_time_that_whole_pieces_could_have_too(seed: int) -> None:
    """Against every way to lay six pieces, of one phase or two, on two nodes or three."""
    rng = np.random.default_rng(seed)
    count = 2 + seed % 2
    sizes = rng.integers(1, 6, 6).astype(float)
    loads = sizes * rng.choice([0, 0.1, 0.5, 1, 3], 6)
    phases = rng.integers(0, 1 + seed // 25, 6, endpoint=True) if seed >= 25 else np.zeros(6, dtype=np.int64)
    bandwidth = rng.choice([1.0, 2.0, 7.0], count)
    capacity = rng.uniform(0.4, 1.2, count) * sizes.sum()
    cells = np.zeros((int(phases.max()) + 1, count))

    def seconds(amounts: np.ndarray[Any, Any]) -> float:
        total = np.zeros_like(cells)
        np.add.at(total, phases, amounts)
        return float((total / bandwidth).max(axis=1).sum())

    best = np.inf
    for where in product(range(count), repeat=6):
        amounts = np.eye(count)[list(where)]
        if (sizes @ amounts <= capacity).all():
            best = min(best, seconds(loads[:, None] * amounts))
    if capacity.sum() < sizes.sum() or best == np.inf:
        pytest.skip("the pieces do not fit")
    poured = pour(sizes, loads, phases, capacity, bandwidth)
    assert poured.sum(axis=1) == pytest.approx(sizes)
    assert (poured.sum(axis=0) <= capacity + 1e-6 * sizes.sum()).all()
    assert seconds(poured * (loads / sizes)[:, None]) <= best * 1.001 + 1e-9


@given(
    seed=st.integers(0, 1 << 30),
    num_cxl=st.integers(1, 4),
    dram_share=st.floats(0.2, 1.5),
    pattern=st.sampled_from([EXACT, SPARSE_V, MASS]),
)
@settings(max_examples=40, deadline=None)
def test_it_is_never_worse_than_interleave_but_for_whole_pieces(
    seed: int, num_cxl: int, dram_share: float, pattern: ReadPattern
) -> None:
    """Where every page is read alike, before anything moves and after."""
    rng = np.random.default_rng(seed)
    shape = INDEXED if pattern is MASS else PLAIN
    total = 200 * sum(shape.role_bytes)
    nodes = [
        dram(gb_s=float(rng.uniform(50, 300)), capacity=int(total * dram_share)),
        *(cxl(8 + i, capacity=int(1.1 * total / num_cxl)) for i in range(num_cxl)),
    ]
    ours = mapper(*nodes, shape=shape, pattern=pattern, pages=200)
    theirs = WeightedInterleave(nodes, shape, pattern, 200)
    for rule in (ours, theirs):
        for begin in range(0, 200, 20):
            rule.place(range(begin, begin + 20), coming=180 - begin)
    # Two pieces of each phase more than could be divided.
    densest = max(s * b for s, b in zip(pattern.shares, shape.role_bytes, strict=True))
    whole = 2 * len(pattern.phases) * densest / ours.books.bandwidth.min()
    assert ours.books.read_seconds() <= theirs.books.read_seconds() + whole
    converge(ours)
    assert ours.books.read_seconds() <= theirs.books.read_seconds() + whole


def test_what_one_phase_has_too_much_of_on_a_node_leaves_it_though_all_together_are_even() -> None:
    placed = mapper(dram(gb_s=40), cxl(gb_s=40), pattern=ReadPattern(0, 0, 1, 1, K_FIRST), pages=100)
    for page in range(100):
        placed.books.take_in(page, (-1, -1, 0, 1), 1)
    assert placed.books.read_seconds() == pytest.approx(200 * HALF / 40e9)
    converge(placed)
    assert placed.books.read_seconds() == pytest.approx(100 * HALF / 40e9, rel=0.02)
    assert placed.books.num_pieces[[K, V]].tolist() == [[50, 50], [50, 50]]


def test_keys_change_places_with_sparsely_read_values_that_fill_dram() -> None:
    placed = mapper(dram(capacity=101 * HALF), cxl(), pattern=SPARSE_V, pages=100)
    for page in range(100):
        placed.books.take_in(page, (-1, -1, 1, 0), 1)
    before_s = placed.books.read_seconds()
    converge(placed)
    assert share_on(placed, Tier.DRAM, K) == pytest.approx(200 / 236, abs=0.03)
    assert placed.books.read_seconds() < 0.3 * before_s


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_draw_exceeds_a_capacity_or_a_budget(data: st.DataObject) -> None:
    nodes = [
        (dram if number < 2 else cxl)(number, capacity=data.draw(st.integers(0, 40)) * HALF // 2)
        for number in range(data.draw(st.integers(1, 5)))
    ]
    shape, pattern = data.draw(st.sampled_from([(PLAIN, EXACT), (PLAIN, SPARSE_V), (INDEXED, MASS)]))
    rule = data.draw(st.sampled_from(list(RULES.values())))(nodes, shape, pattern, 64)
    free, held = list(range(64)), list[int]()
    for _ in range(data.draw(st.integers(1, 12))):
        match data.draw(st.sampled_from(["place", "release", "observe", "readers", "plan", "plan"])):
            case "place":
                count = data.draw(st.integers(1, 8))
                pages, before = free[:count], rule.books.used.copy()
                try:
                    rule.place(
                        pages, readers=data.draw(st.integers(0, 3)), coming=data.draw(st.integers(0, 90))
                    )
                except NoRoom:
                    assert (rule.books.used == before).all(), "refused, but something was placed"
                else:
                    held, free = held + pages, free[count:]
            case "release" if held:
                rule.release(held[:2])
                held, free = held[2:], free + held[:2]
            case "observe" if held:
                shares = np.array([data.draw(st.floats(0, 1)) for _ in held])
                rule.observe(PageReads(np.array(held), k_share=shares, v_share=shares[::-1], mass=shares / 2))
            case "readers" if held:
                rule.set_readers(held, [data.draw(st.integers(0, 3)) for _ in held])
            case _:
                budget = data.draw(st.integers(0, 12 * HALF))
                moves = rule.plan(budget)
                assert sum(shape.role_bytes[ROLES.index(move.role)] for move in moves) <= budget
                assert len({(move.page, move.role) for move in moves}) == len(moves)
                rule.apply(moves)  # asserts that each fits at its turn
        rule.books.check_integrity()


@given(
    seed=st.integers(0, 1 << 30),
    num_cxl=st.integers(1, 4),
    tight=st.booleans(),
    pattern=st.sampled_from([MASS, SPARSE_V]),
)
@settings(max_examples=25, deadline=None)
def test_under_the_same_reads_there_is_an_end_to_migrations_and_none_is_for_the_worse(
    seed: int, num_cxl: int, tight: bool, pattern: ReadPattern
) -> None:
    rng = np.random.default_rng(seed)
    room = 0.4 if tight else 2
    nodes = [
        dram(capacity=int(300 * HALF * room)),
        *(cxl(8 + i, capacity=600 * HALF) for i in range(num_cxl)),
    ]
    shape = INDEXED if pattern is MASS else PLAIN
    placed = mapper(*nodes, shape=shape, pattern=pattern, pages=200)
    placed.place(range(200))
    mass = rng.pareto(1.0, 200)
    shares = np.minimum(1, 0.2 * mass / mass.mean())
    reads = PageReads(
        np.arange(200),
        k_share=shares if pattern is MASS else None,
        v_share=shares,
        mass=mass / mass.sum(),
    )
    for _ in range(30):
        placed.observe(reads)
    before_s = placed.books.read_seconds()
    converge(placed)
    assert placed.books.read_seconds() <= before_s
    for _ in range(20):
        placed.observe(reads)
        assert not placed.plan(1 << 30), "moved again, though nothing has changed"


def test_a_full_node_changes_places_with_what_is_read_less() -> None:
    placed = mapper(dram(capacity=101 * HALF), cxl(capacity=150 * HALF), pages=100)
    placed.place(range(100))
    on_cxl = placed.books.node_of == 1
    for _ in range(30):
        k_share, v_share = (np.where(on_cxl[:, column], 1.0, 0.01) for column in (K, V))
        placed.observe(PageReads(np.arange(100), k_share=k_share, v_share=v_share))
    before_s = placed.books.read_seconds()
    converge(placed)
    assert placed.books.read_seconds() < 0.5 * before_s
    even_s = placed.books.loads.sum() / placed.books.bandwidth.sum()
    assert placed.books.read_seconds() < 1.05 * even_s


def test_what_hardly_pays_does_not_move() -> None:
    """A page that is read a thousandth in a step would take longer to copy than it could ever save."""
    placed = mapper(dram(), cxl(), pattern=ReadPattern(0, 0, 0.001, 0.001), pages=100)
    placed.place(range(100))
    placed.observe(
        PageReads(
            np.arange(100), k_share=np.full(100, 0.001), v_share=np.where(np.arange(100) < 50, 0.003, 0)
        )
    )
    assert placed.plan(1 << 30) == ()


def test_pages_without_readers_cost_nothing_and_shared_ones_cost_once_for_each() -> None:
    placed = mapper(dram(), pages=4)
    placed.place([0, 1], readers=3)
    assert placed.node_read_bytes() == (3 * 4 * HALF,)
    placed.set_readers([0], [0])
    assert placed.node_read_bytes() == (3 * 2 * HALF,)


def test_unmeasured_shares_follow_the_mass_that_pages_hold() -> None:
    placed = mapper(dram(), shape=INDEXED, pattern=MASS, pages=3)
    placed.place([0, 1, 2])
    for _ in range(60):
        placed.observe(PageReads(np.arange(3), mass=np.array([0.6, 0.3, 0.0])))
    assert placed.books.share[:, K].tolist() == pytest.approx([0.2, 0.1, 0.0], abs=1e-3)
    assert placed.books.hotness.tolist() == pytest.approx([0.6, 0.3, 0.0])


def test_hotness_is_a_mean_at_first_and_forgets_later() -> None:
    placed = mapper(dram(), pages=1, shape=INDEXED, pattern=MASS)
    placed.place([0])
    assert placed.books.hotness[0] < 0, "unknown"
    for mass, expected in ((0.2, 0.2), (0.4, 0.3)):
        placed.observe(PageReads(np.array([0]), mass=np.array([mass])))
        assert placed.books.hotness[0] == pytest.approx(expected)
    for _ in range(40):
        placed.observe(PageReads(np.array([0]), mass=np.array([0.9])))
    assert placed.books.hotness[0] == pytest.approx(0.9, abs=1e-3)
    placed.release([0])
    placed.place([0])
    assert placed.books.hotness[0] < 0, "a new page knows nothing of the one that had its id"


def test_a_page_says_where_it_lies_and_why() -> None:
    emulated = MemoryNode(8, "slow", Tier.CXL, 36e9, 2.5e-7, GIB, emulated=True)
    placed = mapper(dram(capacity=101 * HALF), emulated, pattern=SPARSE_V)
    placed.place(range(100))
    placed.observe(PageReads(np.arange(100), mass=np.full(100, 0.01)))
    text = "\n".join(placed.explain(3))
    assert "page 3: 1 readers, holds 0.0100 of the mass" in text
    assert "v: slow (emulated), 64 KiB" in text
    assert placed.explain(400) == ("page 400 is free",)
    whole = "\n".join(placed.describe())
    assert "slow (emulated), cxl" in whole
    assert "16 k, 83 v" in whole
    k_ms, v_ms = (1e3 * placed.books.phase_seconds()).tolist()
    assert f"in {k_ms + v_ms:.2f} ms (k {k_ms:.2f}, then v {v_ms:.2f})" in whole
    assert f" ms of v's {v_ms:.2f} ms" in text


def test_the_paper_s_rule_puts_keys_in_dram_and_values_in_cxl_memory_and_overflows() -> None:
    rule = PaperRule([dram(capacity=12 * HALF), cxl(capacity=11 * HALF)], PLAIN, EXACT, 20)
    rule.place(range(10))
    assert rule.books.num_pieces[[K, V]].tolist() == [[10, 0], [0, 10]]
    rule.place([10])
    with pytest.raises(NoRoom, match="2 pages of 131072 bytes, and 65536 bytes are free"):
        rule.place([11, 12])


def test_first_touch_fills_dram_first() -> None:
    rule = FirstTouch([cxl(), dram(capacity=4 * HALF)], PLAIN, EXACT, 8)
    rule.place(range(3))
    assert rule.books.num_pieces[[K, V]].tolist() == [[1, 2], [1, 2]]


def test_interleave_is_in_proportion_to_bandwidth() -> None:
    rule = WeightedInterleave([dram(gb_s=300), cxl(gb_s=100)], PLAIN, SPARSE_V, 80)
    rule.place(range(80))
    assert rule.books.num_pieces[[K, V]].tolist() == [[60, 20], [60, 20]]


def test_by_recency_the_oldest_leave_dram_before_it_is_full() -> None:
    rule = RecencyRule([dram(capacity=100 * HALF), cxl()], PLAIN, EXACT, 60)
    for page in range(49):
        rule.place([page])
        rule.observe(PageReads(np.array([page])))
    moves = rule.plan(1 << 30)
    assert {move.page for move in moves} == set(range(4))
    rule.apply(moves)
    assert rule.books.used[0] == 90 * HALF
    assert rule.plan(1 << 30) == ()


def test_a_migration_from_where_the_piece_does_not_lie_is_caught() -> None:
    placed = mapper(dram(), cxl(), pages=1)
    placed.place([0])
    with pytest.raises(AssertionError, match="is not on node 8"):
        placed.apply([Migration(0, Role.K, 8, 0, "")])


@pytest.mark.parametrize("wrong", [[], [dram(), dram()]], ids=["no nodes", "the same twice"])
def test_nodes_that_make_no_sense_are_refused(wrong: list[Any]) -> None:
    with pytest.raises(ValueError, match="nodes"):
        SemanticMapper(wrong, PLAIN, EXACT, 1)


def test_50_simulated_loads_against_the_paper_s_rule_and_interleave() -> None:
    """The bounds of `python -m bench.mapper`, on its loads with fewer pages, so that drift and noise are felt more."""
    paper, interleave = [], []
    for seed in range(50):
        results = compare(draw(seed, shrink_to=800), steps=60, rules=("mapper", "paper", "interleave"))
        ours_s = results["mapper"].read_s
        paper.append(results["paper"].read_s / ours_s)
        interleave.append(results["interleave"].read_s / ours_s)
    assert sum(ratio >= 1.3 for ratio in paper) >= 25
    assert min(paper) >= 0.99
    assert min(interleave) >= 0.99
