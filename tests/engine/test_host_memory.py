"""Host pages on several memory nodes: they lie where the rule says, are read right wherever they lie, and move."""

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hybridgen.configs.emulation import EmulatedNode
from hybridgen.configs.settings import EngineSettings
from hybridgen.engine import build
from hybridgen.engine.host_memory import (
    FIRST_EMULATED_ID,
    OBSERVED_STEPS,
    PATTERNS,
    HostMemory,
    page_shape,
)
from hybridgen.kernels import arena as arena_module
from hybridgen.kernels.arena import Arena
from hybridgen.kernels.attention import AttentionStep, KVLayout
from hybridgen.kernels.memory import NodeFull, PlacementForbidden
from hybridgen.kernels.pool import AttentionPool
from hybridgen.scheduler.machine import MemoryNode, Role, Tier
from hybridgen.scheduler.placements import ROLES, Migration
from hybridgen.scheduler.rules import RULES

LAYOUT = KVLayout(2, 2, 64, 16, torch.bfloat16)
HALF = 8 << 10  # bytes of a page's K, and of its V
INDEX, V_SUMS, K, V = (ROLES.index(role) for role in (Role.INDEX, Role.V_SUMS, Role.K, Role.V))
GIB = 1 << 30
SLOW, SLOWER = FIRST_EMULATED_ID, FIRST_EMULATED_ID + 1


@pytest.fixture(scope="module")
def pool() -> Iterator[AttentionPool]:
    with AttentionPool(2) as pool:
        yield pool


def dram(capacity: int = GIB) -> MemoryNode:
    return MemoryNode(0, "dram0", Tier.DRAM, 20e9, 1e-7, capacity)


def emulated(number: int, capacity: int = GIB, bandwidth: float = 10e9) -> MemoryNode:
    name = "slow" if number == SLOW else "slower"
    return MemoryNode(number, name, Tier.CXL, bandwidth, 0.0, capacity, emulated=True)


def memory(
    *nodes: MemoryNode, num_pages: int = 12, rule: str = "mapper", policy: str = "exact", budget: int = GIB
) -> HostMemory:
    nodes = nodes or (dram(), emulated(SLOW), emulated(SLOWER))
    return HostMemory(
        LAYOUT,
        num_pages,
        nodes,
        with_index=policy == "mass",
        rule=rule,
        policy=policy,
        migration_bytes=budget,
    )


def steps(host: HostMemory, *tables: Sequence[int], count: int = OBSERVED_STEPS) -> None:
    for _ in range(count):
        host.begin_step(tables)
        host.end_step()


def settle(host: HostMemory) -> None:
    """Write down the migrations under way."""
    host._finish_moves(wait=True)


def check(host: HostMemory) -> None:
    """Labels and books agree, and no node holds more than it may."""
    assert host.rule is not None
    host.rule.books.check_integrity()
    for column, role in enumerate(ROLES):
        nodes = host.rule.books.node_of[:, column]
        if role in host.arenas:
            assert (host.memory.labels[column] == nodes)[nodes >= 0].all()


def test_pages_that_are_prepared_lie_where_the_rule_says() -> None:
    host = memory(rule="paper", policy="mass")
    host.prepare([0, 1, 2, 3])
    assert host.memory.labels[INDEX, :4].tolist() == [0] * 4
    assert host.memory.labels[K, :4].tolist() == [0] * 4
    assert set(host.memory.labels[V, :4].tolist()) == {1, 2}
    assert set(host.memory.labels[V_SUMS, :4].tolist()) <= {1, 2}
    assert host.counts().pages[K] == (4, 0, 0)
    check(host)


def test_a_page_that_is_prepared_again_is_placed_anew() -> None:
    host = memory(dram(4 * HALF), emulated(SLOW), rule="first-touch")
    host.prepare([0, 1])
    host.prepare([2])
    assert host.memory.labels[K, :3].tolist() == [0, 0, 1]
    host.prepare([2, 0])
    assert host.memory.labels[K, :3].tolist() == [1, 0, 0]
    assert host.counts().pages[V] == (2, 1)
    check(host)


def test_what_was_read_reaches_the_rule_after_some_steps() -> None:
    host = memory(policy="mass", budget=0)
    assert host.rule is not None
    books = host.rule.books
    host.prepare([0, 1, 2])
    num_heads = LAYOUT.num_layers * LAYOUT.num_kv_heads
    for step in range(OBSERVED_STEPS):
        assert not books.num_observed.any()
        host.begin_step([[0, 1], [0]] if step % 2 else [[0, 1]])
        host.memory.tokens[0] += num_heads * 4  # of 16
        host.memory.mass[0] += num_heads * 0.5
        host.end_step()
    assert books.num_observed[:3].tolist() == [1, 1, 0]
    assert books.readers[:3].tolist() == [2, 1, 0]  # one and a half are two
    assert books.share[0, K] == pytest.approx(4 / 16 / 1.5)
    assert books.share[1, V] == 0
    assert books.hotness[0] == pytest.approx(0.5 / 1.5)
    assert not host.memory.mass.any()


def test_migrations_keep_to_their_budget_and_change_no_byte() -> None:
    budget = 5 * HALF
    host = memory(dram(), emulated(SLOW), num_pages=40, budget=budget)
    host.prepare(range(40))
    k, v = host.pages.k, host.pages.v
    k.copy_(torch.randn(k.shape))
    v.copy_(torch.randn(v.shape))
    expected = k.clone(), v.clone()
    table = [page for page in range(40) if host.memory.labels[K, page] or host.memory.labels[V, page]]
    assert 0 < len(table) < 40
    before = 0
    for _ in range(10):
        steps(host, table)
        settle(host)
        moved = sum(host.counts().migrated.values())
        assert (moved - before) * HALF <= budget
        before = moved
        check(host)
    assert before > budget // HALF
    assert all(
        (source, target) == (SLOW, 0) or reason.startswith("read less")
        for source, target, reason in host.counts().migrated
    )
    assert host.counts().failed == 0
    assert torch.equal(k, expected[0])
    assert torch.equal(v, expected[1])


def test_pages_are_read_right_whatever_their_labels(pool: AttentionPool) -> None:
    generator = torch.Generator().manual_seed(0)
    length, table = 10 * 16 - 3, [7, 3, 0, 9, 5, 1, 11, 2, 10, 4]
    k, v = (torch.randn(length, 2, 64, generator=generator).to(torch.bfloat16) for _ in range(2))
    q = torch.randn(length, 4, 64, generator=generator).to(torch.bfloat16)

    def attend(host: HostMemory) -> torch.Tensor:
        host.prepare(table)
        step = AttentionStep(
            pool,
            host.pages,
            query_begin=[0, length],
            kv_len=[length],
            block_table=[table],
            num_heads=4,
            scale=0.125,
        )
        step.store(1, k, v)
        return step.attend(1, q)

    expected = attend(HostMemory.on_one_node(LAYOUT, 12))
    for rule in RULES:
        host = memory(rule=rule)
        assert torch.equal(attend(host), expected)
        reads = host.end_step()
        assert reads.bytes.sum() > 0
        on_nodes = np.bincount(host.memory.labels[[K, V]][:, table].ravel(), minlength=3)
        assert ((reads.bytes > 0) == (on_nodes > 0)).all()


@pytest.mark.parametrize("rule", RULES)
def test_capacity_is_never_exceeded(rule: str) -> None:
    nodes = (dram(20 * HALF), emulated(SLOW, 12 * HALF), emulated(SLOWER, 18 * HALF, 5e9))
    host = memory(*nodes, num_pages=24, rule=rule, budget=8 * HALF)
    random = np.random.default_rng(0)
    for _ in range(60):
        host.prepare(random.choice(24, size=random.integers(1, 9), replace=False).tolist())
        check(host)
        steps(host, random.choice(24, size=8, replace=False).tolist())
        check(host)
    settle(host)
    check(host)
    assert sum(map(sum, host.counts().pages)) == 2 * np.count_nonzero(host._is_placed)


@pytest.mark.parametrize("rule", RULES)
def test_a_page_and_the_whole_are_explained(rule: str) -> None:
    host = memory(dram(), emulated(SLOW), rule=rule)
    host.prepare([3])
    lines = host.explain(3)
    places = {role: ["dram0", "slow (emulated)"][host.memory.labels[ROLES.index(role), 3]] for role in "kv"}
    assert lines[0].startswith("page 3: ")
    for line, role in zip(lines[1:3], "kv", strict=True):
        assert line.startswith(f"  {role}: {places[role]}")
    assert lines[3].startswith(("  by the kernel's word", "  the kernel was not asked"))
    assert host.explain(4)[0] == "page 4 is free"
    assert host.explain(12) == ("there is no host page 12; they are 0 to 11",)
    whole = host.explain(None)
    assert len(whole) == 3
    assert "slow (emulated), cxl" in whole[2]
    assert sum(int(number) for line in whole[1:] for number in _before(line, " k")) == 1


def _before(line: str, word: str) -> list[str]:
    """The number before the first `word` that ends a role."""
    return [part.split()[-2] for part in line.split(",") if part.rstrip().endswith(word)]


def test_with_one_node_nothing_is_decided_and_reads_are_counted(pool: AttentionPool) -> None:
    host = HostMemory.on_one_node(LAYOUT, 4)
    host.prepare([0])
    assert host.rule is None
    assert not host.arenas
    step = AttentionStep(
        pool, host.pages, query_begin=[0, 1], kv_len=[5], block_table=[[0]], num_heads=2, scale=1.0
    )
    step.attend(0, torch.zeros(1, 2, 64, dtype=torch.bfloat16))
    host.begin_step([[0]])
    assert host.end_step().bytes.tolist() == [2 * 5 * 2 * 64 * 2]
    assert host.counts().read_bytes == (2 * 5 * 2 * 64 * 2,)
    assert host.explain(0) == ("all host pages lie on dram0, the only memory node",)
    steps(host, [0])
    host.close()


def test_pages_that_fit_no_node_are_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"^12 host pages take 196608 bytes; .* room for 163840\. Lower"):
        memory(dram(10 * HALF), emulated(SLOW, 10 * HALF), rule="paper")
    memory(dram(12 * HALF), emulated(SLOW, 12 * HALF)).prepare(range(12))
    # As many bytes, and no node for the last half page.
    with pytest.raises(ValueError, match=f"have room for {23 * HALF}"):
        memory(dram(12 * HALF + HALF // 2), emulated(SLOW, 11 * HALF + HALF // 2))


@pytest.mark.parametrize("missing", [0, 1])
@pytest.mark.parametrize("rule", RULES)
def test_pages_with_an_index_that_fit_by_the_numbers_find_room(rule: str, missing: int) -> None:
    sizes = page_shape(LAYOUT, with_index=True).role_bytes
    # Rests of less than 4 KiB are nothing; each node but one may be left with one of 4 KiB, too small for K.
    nodes = (
        dram(11 * sum(sizes) + 4095),
        emulated(SLOW, 12 << 10),
        emulated(SLOWER, sum(sizes) - (12 << 10) + (8 << 10) - missing),
    )
    if missing:
        with pytest.raises(ValueError, match="have room for"):
            memory(*nodes, rule=rule, policy="mass")
        return
    host = memory(*nodes, rule=rule, policy="mass")
    random = np.random.default_rng(1)
    for _ in range(50):
        host.prepare(random.permutation(12).tolist())
        check(host)


def test_index_and_sums_are_counted_as_bytes_of_a_page() -> None:
    plain, indexed = page_shape(LAYOUT, with_index=False), page_shape(LAYOUT, with_index=True)
    assert plain.role_bytes == (0, 0, HALF, HALF)
    assert indexed.role_bytes == (8192, 4096, HALF, HALF)  # padded to whole pages of the system
    assert set(PATTERNS) == {"exact", "mass", "hybridgen"}


class Kernel:
    """Stands for the kernel's work on a node 1 that this machine may not have: takes so many pieces of all arenas."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.bound: dict[tuple[str, int], int] = {}
        self.migrated: list[tuple[str, int, int]] = []
        self.refused: Collection[int] = ()  # pages that cannot be moved

    def bind(self, arena: Arena, pages: Sequence[int], node: int) -> None:
        if node == 1 and len(pages) > self.room:
            raise NodeFull(arena.name, node, len(pages) * HALF, len(pages) * HALF, 0)
        self.room -= len(pages) if node == 1 else 0
        self.bound.update({(arena.name, page): node for page in pages})

    def migrate(self, arena: Arena, pages: Sequence[int], node: int) -> arena_module.Migration:
        failed = {page: "ENOMEM" for page in pages if page in self.refused}
        self.migrated += [(arena.name, page, node) for page in pages if page not in failed]
        return arena_module.Migration(0, failed)

    def agrees(self, host: HostMemory) -> bool:
        assert host.rule is not None
        nodes = host.rule.books.node_of
        return self.bound == {
            (f"host {role}", int(page)): int(nodes[page, column])
            for column, role in enumerate(ROLES)
            for page in np.flatnonzero(nodes[:, column] >= 0)
        }


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel(room=1000)
    monkeypatch.setattr(Arena, "bind", lambda arena, pages, node: kernel.bind(arena, pages, node))
    monkeypatch.setattr(Arena, "migrate", lambda arena, pages, node: kernel.migrate(arena, pages, node))
    return kernel


def two_nodes(*, capacity: int = GIB) -> tuple[MemoryNode, MemoryNode]:
    return dram(), MemoryNode(1, "cxl1", Tier.CXL, 10e9, 2e-7, capacity)


def test_a_node_that_is_full_before_its_capacity_is_asked_for_no_more(
    kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    kernel.room = 3
    host = memory(*two_nodes(), rule="paper")
    for page in range(8):
        host.prepare([page])
        assert kernel.agrees(host)
        check(host)
    assert host.memory.labels[V, :8].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    # Once, not for every page since.
    assert len(caplog.records) == 1
    assert "host v: node 1 has no room for 8192 of 8192 bytes" in caplog.text
    assert "1 pieces went to dram0" in caplog.text


def test_what_no_node_has_room_for_lies_where_the_system_puts_it(
    kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    kernel.room = 3
    host = memory(dram(12 * HALF), two_nodes()[1], rule="paper")
    host.prepare(range(12))
    assert "pieces lie where the system puts them" in caplog.text
    check(host)


def test_a_node_that_was_full_for_a_while_is_asked_again(kernel: Kernel) -> None:
    host = memory(*two_nodes(capacity=20 * HALF), rule="paper")
    assert host.rule is not None
    kernel.room = 0
    host.prepare([0])
    assert host.rule.books.capacity[1] < 20 * HALF
    kernel.room = 100
    steps(host, [0])
    assert host.rule.books.capacity[1] == 20 * HALF
    host.prepare([1])
    assert host.memory.labels[V, 1] == 1
    check(host)


def test_released_pages_are_counted_no_more_and_can_be_prepared_again() -> None:
    host = memory(dram(), emulated(SLOW), num_pages=10)
    host.prepare(range(10))
    assert sum(host.counts().pages[K]) == 10
    host.release([3, 4])
    assert sum(host.counts().pages[K]) == 8
    host.release([3, 4])  # twice is once
    host.prepare([4])
    assert sum(host.counts().pages[K]) == 9
    check(host)


def planned(host: HostMemory, *moves: Migration) -> None:
    """Begin these migrations with the next look; their thread is done with them when they are asked for."""
    assert host.rule is not None
    host.rule.plan = lambda byte_budget: moves  # type: ignore[method-assign]
    steps(host, [0])
    host.rule.plan = lambda byte_budget: ()  # type: ignore[method-assign]


def test_new_pages_do_not_take_the_room_of_pieces_on_their_way(kernel: Kernel) -> None:
    host = memory(*two_nodes(capacity=2 * HALF), rule="paper")
    host.prepare([0])
    assert host.memory.labels[[K, V], 0].tolist() == [0, 1]
    planned(host, Migration(0, Role.K, 0, 1, "because"))
    host.prepare([1])
    assert host.memory.labels[V, 1] == 0
    settle(host)
    assert host.memory.labels[[K, V], 0].tolist() == [1, 1]
    assert host.counts().migrated == {(0, 1, "because"): 1}
    check(host)


def test_a_piece_goes_back_if_what_was_to_make_room_for_it_could_not_be_moved(kernel: Kernel) -> None:
    host = memory(*two_nodes(capacity=HALF), rule="paper")
    host.prepare([0, 1])
    assert host.memory.labels[V, :2].tolist() == [1, 0]
    kernel.refused = {0}
    planned(host, Migration(0, Role.V, 1, 0, "out"), Migration(1, Role.V, 0, 1, "in"))
    settle(host)
    assert kernel.migrated == [("host v", 1, 1), ("host v", 1, 0)]
    assert host.memory.labels[V, :2].tolist() == [1, 0]
    assert host.counts().failed == 2
    assert not host.counts().migrated
    check(host)


def test_a_page_on_its_way_is_waited_for_before_it_is_placed_anew(kernel: Kernel) -> None:
    host = memory(*two_nodes(), rule="paper")
    host.prepare([0, 1])
    planned(host, Migration(0, Role.V, 1, 0, "because"))
    host.prepare([0])
    assert isinstance(host._moving, tuple | None)
    assert host.counts().migrated == {(1, 0, "because"): 1}
    assert host.memory.labels[V, 0] == 1
    check(host)


def test_the_only_node_of_several_is_bound_to(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybridgen.engine.host_memory.allowed_nodes", lambda: (0, 1))
    host = HostMemory(
        LAYOUT,
        2,
        [dram()],
        with_index=False,
        rule="mapper",
        policy="exact",
        migration_bytes=0,
        is_confined=True,
    )
    host.prepare([1])
    assert kernel.bound == {("host k", 1): 0, ("host v", 1): 0}


def topology(*nodes: int) -> Any:
    usable = [SimpleNamespace(id=node, tier="dram", free_bytes=GIB, cached_bytes=GIB) for node in nodes]
    return SimpleNamespace(usable=usable)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that gives `host_nodes` a machine with these nodes."""

    def set_up(usable: Sequence[int], allowed: Sequence[int], measured: Sequence[MemoryNode] = ()) -> None:
        monkeypatch.setattr(build, "describe_memory", lambda tiers, measured: (topology(*usable), None))
        monkeypatch.setattr(build, "allowed_nodes", lambda: tuple(allowed))
        monkeypatch.setattr(build, "memory_nodes", lambda topology, measurements: tuple(measured))
        monkeypatch.setattr(build, "check_placement", lambda: None)

    return set_up


SETTINGS = EngineSettings(model="")
EMULATING = EngineSettings(model="", emulate_node=(EmulatedNode("slow", 1e9),))


def nodes_of(settings: EngineSettings = SETTINGS) -> tuple[tuple[MemoryNode, ...], bool]:
    return build.host_nodes(settings, 10, LAYOUT, with_index=False)


def test_one_node_is_not_measured_and_has_its_own_number(machine: Any) -> None:
    machine([2], allowed=[2])
    (node,), is_confined = nodes_of()
    assert (node.id, node.name, node.capacity_bytes, is_confined) == (2, "dram2", 20 * HALF, False)


def test_one_node_of_several_is_kept_to_with_what_it_has(machine: Any) -> None:
    machine([0], allowed=[0, 1])
    (node,), is_confined = nodes_of()
    assert (node.id, node.capacity_bytes, is_confined) == (0, 2 * GIB, True)


def test_where_placing_is_forbidden_the_system_places(
    machine: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise PlacementForbidden("mbind is forbidden")

    machine([0, 1], allowed=[0, 1], measured=[dram(), replace(dram(), id=1, name="dram1")])
    monkeypatch.setattr(build, "check_placement", refuse)
    nodes, is_confined = nodes_of()
    assert ([node.id for node in nodes], is_confined) == ([0], False)
    assert "mbind is forbidden. Host pages lie where the system puts them" in caplog.text
    assert [node.id for node in nodes_of(EMULATING)[0]] == [0, FIRST_EMULATED_ID]


def test_nodes_whose_speed_is_not_known_are_left_out(machine: Any, caplog: pytest.LogCaptureFixture) -> None:
    machine([0, 1, 2], allowed=[0, 1, 2], measured=[dram(), replace(dram(), id=2, name="dram2")])
    assert [node.id for node in nodes_of()[0]] == [0, 2]
    machine([0, 1], allowed=[0, 1])
    assert [node.id for node in nodes_of()[0]] == [0]
    assert "no memory node's speed is known: host pages lie where the system puts them" in caplog.text
    with pytest.raises(ValueError, match="none can be emulated"):
        nodes_of(EMULATING)
    machine([], allowed=[0, 1])
    with pytest.raises(ValueError, match="--memory-tiers takes them all out"):
        nodes_of()


def test_nothing_moves_after_closing() -> None:
    host = memory()
    host.prepare([0])
    host._moving = (Migration(0, Role.K, 0, SLOW, "because"),), Future()
    host._moving[1].set_result(frozenset())
    host.close()
    assert host.counts().migrated == {(0, SLOW, "because"): 1}
