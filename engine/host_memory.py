"""The host's KV pages on the machine's memory nodes: carries out what a placement rule decides. Decides nothing.

A page's roles (index, V sums, K, V) are pieces of four arenas, whose addresses never change; which node a piece lies on
does. New pages are bound before they are written. Between steps the rule learns what was read, and its migrations are
made by a thread of their own while the next steps run: the kernel moves pages under their readers.

An emulated node is made of the first DRAM node's memory. Its pages are labelled, and reading them is slowed down.
"""

import logging
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from hybridgen.kernels.arena import Arena, stride_bytes
from hybridgen.kernels.attention import KVPages, allocate_pages
from hybridgen.kernels.index import KVIndex, index_shapes
from hybridgen.kernels.layout import KVLayout
from hybridgen.kernels.memory import NodeFull, NodeUnavailable, PlacementError, PlacementForbidden
from hybridgen.kernels.numa import allowed_nodes
from hybridgen.kernels.page_memory import NodeReads, NodeSpeed, PageMemory
from hybridgen.scheduler.machine import MemoryNode, Role, Tier
from hybridgen.scheduler.placements import (
    HOTNESS_WEIGHT,
    INDEX_FIRST,
    K_FIRST,
    ROLES,
    Migration,
    NoRoom,
    PageReads,
    PageShape,
    ReadPattern,
    RuleBase,
)
from hybridgen.scheduler.rules import RULES

logger = logging.getLogger(__name__)

FIRST_EMULATED_ID = 1000  # numbers of emulated nodes; the kernel's are below
MOST_LOOKS = 255  # that migrations wait after some could not be made
COLD = 1e-6  # mass below which a page is not hot at all
OBSERVED_STEPS = 8  # from one look at what was read to the next

# What a policy is expected to read of a page, until it has been measured.
PATTERNS = {
    "exact": ReadPattern(0.0, 0.0, 1.0, 1.0),
    "mass": ReadPattern(1.0, 0.05, 0.2, 0.2, INDEX_FIRST),
    "hybridgen": ReadPattern(0.0, 0.0, 1.0, 0.05, K_FIRST),
}


@dataclass(frozen=True, slots=True)
class MemoryCounts:
    """Of all steps so far.

    Attributes:
        read_bytes, delayed_s: by position of the node: bytes of KV read; what emulation held threads up.
        pages: pieces of each role by node, [roles][nodes].
        migrated: (source, target, reason) to pieces moved.
        failed: pieces that the kernel would not move.
    """

    read_bytes: tuple[int, ...]
    delayed_s: tuple[float, ...]
    pages: tuple[tuple[int, ...], ...]
    migrated: Mapping[tuple[int, int, str], int]
    failed: int


def page_shape(layout: KVLayout, *, with_index: bool) -> PageShape:
    """Bytes that each role of a host page takes in its arena, padding included."""
    half = stride_bytes(layout.page_bytes // 2)
    if not with_index:
        return PageShape(0, 0, half, half)
    codes, sums = index_shapes(layout)
    return PageShape(stride_bytes(int(np.prod(codes))), stride_bytes(4 * int(np.prod(sums))), half, half)


class HostMemory:
    """The host tier's pages, [0, num_pages), and where they lie.

    With one node there is nothing to decide: pages come as the system gives them, and only what is read is counted.

    Args:
        nodes: that hold pages, DRAM first; emulated ones have numbers from FIRST_EMULATED_ID on. Several real ones only
            where placing memory is allowed.
        rule: a name of `scheduler/rules.py`.
        policy: a name of `PATTERNS`.
        migration_bytes: most to be moved at a time.
        is_confined: whether there are other nodes, that are not to hold pages: then even one node's are bound to it.

    Attributes:
        pages: to be attended.
        heat: page to the softmax mass that it holds for all its readers in a step, as far as it was measured; another
            object whenever it has changed.

    Raises:
        ValueError: the nodes have no room for the pages.
        OSError: the address space or the overcommit limit does not allow it.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_pages: int,
        nodes: Sequence[MemoryNode],
        *,
        with_index: bool,
        rule: str,
        policy: str,
        migration_bytes: int,
        is_confined: bool = False,
    ) -> None:
        self.nodes = tuple(nodes)
        self.layout = layout
        self._migration_bytes = migration_bytes
        self._position = {node.id: position for position, node in enumerate(nodes)}
        speeds = [
            NodeSpeed(node.read_bandwidth, node.latency_s) if node.emulated else NodeSpeed() for node in nodes
        ]
        self.memory = PageMemory(num_pages, speeds, with_heat=with_index or policy == "hybridgen")
        self._arenas: dict[Role, Arena] = {}
        self._rule: RuleBase | None = None
        self._is_placed = np.zeros(num_pages, dtype=bool)
        if num_pages == 0 or (len(nodes) == 1 and not is_confined):
            pages = allocate_pages(layout, num_pages, with_index=with_index)
            self.pages = KVPages(layout, pages.k, pages.v, pages.index, self.memory)
        else:
            shape = page_shape(layout, with_index=with_index)
            # Every node but the last may be left with a rest too small for the largest piece.
            unit = math.gcd(*shape.role_bytes)
            rest = max(shape.role_bytes) - unit
            room = rest + sum(max(0, node.capacity_bytes // unit * unit - rest) for node in nodes)
            wanted = sum(shape.role_bytes) * num_pages
            if room < wanted:
                raise ValueError(
                    f"{num_pages} host pages take {wanted} bytes; the memory nodes have room for {room}. Lower "
                    "--kv-cache-memory-bytes or --host-pages"
                )
            self._rule = RULES[rule](nodes, shape, PATTERNS[policy], num_pages)
            self._capacity = self._rule.books.capacity.copy()
            self.pages = self._allocate(layout, num_pages, with_index, is_confined)
        self._home = next(node.id for node in nodes if node.id < FIRST_EMULATED_ID)
        self._num_steps = 0
        self._readers = np.zeros(num_pages, dtype=np.int64)  # of each page in the last step
        self._num_reads = np.zeros(
            num_pages
        )  # readers of each page, summed over the steps since the last look
        self.heat: Mapping[int, float] = {}
        self._heat = np.zeros(num_pages)  # EWMA of the mass that a page held for all its readers in a step
        self._read_bytes = np.zeros(len(nodes), dtype=np.int64)
        self._delayed_s = np.zeros(len(nodes))
        self._migrated: dict[tuple[int, int, str], int] = defaultdict(int)
        self._num_failed = 0
        self._looks_to_wait = self._wait = 0
        self._moves_are_off = False
        self._mover = ThreadPoolExecutor(1, "kv-migrations") if self._rule is not None else None
        self._moving: tuple[tuple[Migration, ...], Future[frozenset[tuple[int, Role]]]] | None = None

    @classmethod
    def on_one_node(cls, layout: KVLayout, num_pages: int, *, with_index: bool = False) -> "HostMemory":
        """Pages as the system gives them."""
        node = MemoryNode(0, "dram0", Tier.DRAM, read_bandwidth=1.0, latency_s=0.0, capacity_bytes=0)
        return cls(
            layout,
            num_pages,
            (node,),
            with_index=with_index,
            rule="mapper",
            policy="mass" if with_index else "exact",
            migration_bytes=0,
        )

    def _allocate(self, layout: KVLayout, num_pages: int, with_index: bool, is_confined: bool) -> KVPages:
        physical = sorted({node.id for node in self.nodes if node.id < FIRST_EMULATED_ID})
        if is_confined:
            physical = sorted({*physical, *allowed_nodes()})
        half = layout.shape(num_pages)[1:]

        def arena(role: Role, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
            made = Arena(num_pages, shape, dtype, name=f"host {role}", nodes=physical)
            made.lock()
            logger.debug(
                "host %s: %d pieces of %d bytes, %d bytes apart, from address %#x on: see /proc/%d/numa_maps",
                role,
                num_pages,
                made.piece_bytes,
                made.stride_bytes,
                made.address,
                os.getpid(),
            )
            self._arenas[role] = made
            return made.pages

        k, v = arena(Role.K, half, layout.dtype), arena(Role.V, half, layout.dtype)
        index = None
        if with_index:
            codes, sums = index_shapes(layout)
            index = KVIndex(arena(Role.INDEX, codes, torch.uint8), arena(Role.V_SUMS, sums, torch.float32))
        return KVPages(layout, k, v, index, self.memory)

    @property
    def rule(self) -> RuleBase | None:
        """None where the system places pages."""
        return self._rule

    @property
    def arenas(self) -> Mapping[Role, Arena]:
        """Empty where the system places pages."""
        return self._arenas

    @property
    def _roles(self) -> frozenset[Role]:
        """Those that pages have."""
        return frozenset(Role if self.pages.index is not None else (Role.K, Role.V))

    def prepare(self, pages: Sequence[int], *, coming: int = 0) -> None:
        """Give pages that are about to be overwritten their nodes.

        Args:
            coming: pages that are known to follow soon.

        Where a node has less memory than its capacity says, they go to another one; where none has, the system
        decides, and a warning says so.
        """
        rule = self._rule
        self._heat[pages] = 0
        if rule is None or not pages:
            self._is_placed[pages] = True
            return
        again = [page for page in pages if self._is_placed[page]]
        if again:
            self.release(again)
        try:
            nodes = rule.place(pages, coming=coming)
        except NoRoom:
            # Pieces on their way hold room at both ends, and nodes that were full may not be any more.
            self._finish_moves(wait=True)
            rule.books.capacity[:] = self._capacity
            nodes = rule.place(pages, coming=coming)
        self._is_placed[pages] = True
        for column, role in enumerate(ROLES):
            if role not in self._arenas:
                continue
            by_node: dict[int, list[int]] = defaultdict(list)
            for page, of_roles in zip(pages, nodes, strict=True):
                by_node[of_roles[column]].append(page)
            for node, those in by_node.items():
                self._bind(role, those, node)

    def _bind(self, role: Role, pages: Sequence[int], node: int) -> None:
        """Have the pages' memory on a node; where it has none left although its capacity says so, on others."""
        try:
            self._bind_on(self._arenas[role], pages, node)
        except (NodeFull, NodeUnavailable) as error:
            self._bind_elsewhere(role, pages, node, error)
        else:
            self.memory.labels[ROLES.index(role), pages] = self._position[node]

    def _bind_elsewhere(
        self, role: Role, pages: Sequence[int], node: int, error: NodeFull | NodeUnavailable
    ) -> None:
        rule, arena = self._rule, self._arenas[role]
        assert rule is not None
        books, left = rule.books, list(pages)

        def room(other: MemoryNode) -> int:
            position = self._position[other.id]
            free = books.capacity[position] - books.used[position] - books.reserved[position]
            return max(0, int(free // arena.stride_bytes))

        full = self._home_of(node)
        others = [other for other in self.nodes if self._home_of(other.id) != full]
        for other in sorted(others, key=room, reverse=True):
            those = left[: room(other)]
            if not those:
                continue
            those = self._bind_some(arena, those, other.id)
            if not those:
                continue
            logger.warning("%s; %d pieces went to %s", error, len(those), other.name)
            for page in those:
                books.move(page, role, node, other.id)
            self.memory.labels[ROLES.index(role), those] = self._position[other.id]
            left = left[len(those) :]
            if not left:
                break
        # What it holds is what it can hold, until somebody looks again: the rule asks it for no more.
        books.capacity[self._position[node]] = books.used[self._position[node]]
        if left:
            # Better on some node than nowhere: the system gives them memory as they are written.
            logger.warning("%s; %d pieces lie where the system puts them", error, len(left))
            self.memory.labels[ROLES.index(role), left] = self._position[node]

    def _bind_some(self, arena: Arena, pages: list[int], node: int) -> list[int]:
        """As many of the pages, from the first on, as the node has memory for, to within a half."""
        while pages:
            try:
                self._bind_on(arena, pages, node)
            except NodeFull:
                pages = pages[: len(pages) // 2]
            except NodeUnavailable:
                return []
            else:
                break
        return pages

    def _bind_on(self, arena: Arena, pages: Sequence[int], node: int) -> None:
        if len(arena.nodes) > 1:
            arena.bind(pages, self._home_of(node))

    def _home_of(self, node: int) -> int:
        """The node whose memory it is made of: its own, unless it is emulated."""
        return self._home if node >= FIRST_EMULATED_ID else node

    def release(self, pages: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """These pages hold nothing any more. Their memory stays where it is until they are prepared again."""
        placed = [int(page) for page in pages if self._is_placed[page]]
        if self._moving is not None and {move.page for move in self._moving[0]} & set(placed):
            self._finish_moves(wait=True)
        self._is_placed[placed] = False
        self._heat[placed] = 0
        if self._rule is not None and placed:
            self._rule.release(placed)

    @property
    def looks_next(self) -> bool:
        """Whether the rule is asked at the end of the step under way: a good time to `release`."""
        return (self._num_steps + 1) % OBSERVED_STEPS == 0

    @property
    def wants_reads(self) -> bool:
        """Whether anybody looks at what `begin_step` is told."""
        return self._rule is not None or self.memory.has_heat

    def begin_step(self, tables: Sequence[Sequence[int] | npt.NDArray[np.int64]]) -> None:
        """A step reads these host pages; one that several sequences hold is named several times."""
        ids = np.concatenate(
            [np.asarray(pages, dtype=np.int64) for pages in tables] or [np.zeros(0, np.int64)]
        )
        self._readers = np.bincount(ids, minlength=self.memory.num_pages)
        self._num_reads += self._readers

    def end_step(self) -> NodeReads:
        """Learn from the step's reads; begin migrations that are worth it. Returns what the step read of each node."""
        reads = self.memory.take_reads()
        self._read_bytes += reads.bytes
        self._delayed_s += reads.delayed_s
        self._num_steps += 1
        if self._num_steps % OBSERVED_STEPS == 0:
            self._look()
        return reads

    def _look(self) -> None:
        rule = self._rule
        if rule is not None:
            self._finish_moves(wait=False)
            placed = np.flatnonzero(self._is_placed)
            # Pages that the last step did not read wait, or are cached.
            readers = self._readers[placed].astype(np.int32)
            changed = readers != rule.books.readers[placed]
            rule.set_readers(placed[changed], readers[changed])
            rule.books.capacity[:] = np.maximum(self._capacity, rule.books.used)
            rule.observe(self._page_reads(placed[self._num_reads[placed] > 0]))
            self._looks_to_wait -= 1
            if self._moving is None and not self._moves_are_off and self._looks_to_wait < 0:
                migrations = rule.plan(self._migration_bytes)
                if migrations and self._mover is not None:
                    # Pages that are prepared meanwhile must not take the room.
                    for move in migrations:
                        rule.books.reserved[self._position[move.target]] += self._piece_bytes(move)
                    self._moving = migrations, self._mover.submit(self._move, migrations)
        self._note_heat()
        self._num_reads[:] = 0
        self.memory.clear_heat()

    def _note_heat(self) -> None:
        if not self.memory.has_heat:
            return
        num_heads = self.layout.num_layers * self.layout.num_kv_heads
        # For all readers together: what a step reads of the page, in masses. Pages that nobody reads cool down.
        held = self.memory.mass / np.maximum(1, self._num_reads) / num_heads * self._readers
        self._heat += HOTNESS_WEIGHT * (held - self._heat)
        self._heat[self._heat < COLD] = 0
        hot = np.flatnonzero(self._heat)
        self.heat = dict(zip(hot.tolist(), self._heat[hot].tolist(), strict=True))

    def _page_reads(self, pages: npt.NDArray[np.int64]) -> PageReads:
        if not self.memory.has_heat:
            return PageReads(pages)
        # Added up over layers, KV heads, readers and steps.
        num_heads = self.layout.num_layers * self.layout.num_kv_heads
        times = self._num_reads[pages] * num_heads
        share = np.minimum(1.0, self.memory.tokens[pages] / (times * self.layout.page_size))
        mass = np.minimum(1.0, self.memory.mass[pages] / times)
        # Only V is read sparsely where there is no index to tell which keys matter.
        return PageReads(pages, share if self.pages.index is not None else None, share, mass)

    def _move(self, migrations: Sequence[Migration]) -> frozenset[tuple[int, Role]]:
        """In the mover's thread: returns the pieces that could not be moved."""
        failed: set[tuple[int, Role]] = set()
        batches: dict[tuple[Role, int], list[int]] = defaultdict(list)
        for move in migrations:
            ids = [self._home_of(node) for node in (move.source, move.target)]
            if ids[0] != ids[1]:
                batches[move.role, ids[1]].append(move.page)
        for (role, node), pages in batches.items():
            try:
                failed |= {(page, role) for page in self._arenas[role].migrate(pages, node).failed}
            except NodeUnavailable as error:
                logger.warning("%s", error)
                failed |= {(page, role) for page in pages}
            except (PlacementError, OSError) as error:
                # Serving goes on without migrations. Pieces that did arrive are read where they are all the same.
                logger.error("no page is moved between memory nodes any more: %s", error)
                self._moves_are_off = True
                failed |= {(page, role) for page in pages}
        return frozenset(failed)

    def _piece_bytes(self, move: Migration) -> int:
        return self._arenas[move.role].stride_bytes

    def _finish_moves(self, *, wait: bool) -> None:
        """Write down what the mover has done, if it has."""
        if self._moving is None or not (wait or self._moving[1].done()):
            return
        migrations, future = self._moving
        failed = future.result()
        self._moving = None
        rule = self._rule
        assert rule is not None
        rule.books.reserved[:] = 0
        num_made = 0
        for move in migrations:
            if (move.page, move.role) in failed:
                continue
            if not rule.books.has_room(self._position[move.target], self._piece_bytes(move)):
                # What was to make room for it could not be moved.
                self._move([replace(move, source=move.target, target=move.source)])
                continue
            rule.apply([move])
            self.memory.labels[ROLES.index(move.role), move.page] = self._position[move.target]
            self._migrated[move.source, move.target, move.reason] += 1
            num_made += 1
        self._num_failed += len(migrations) - num_made
        # What could not be moved now is not tried at once again, and each time in vain it is tried later.
        self._looks_to_wait = self._wait = (
            min(2 * self._wait + 1, MOST_LOOKS) if num_made < len(migrations) else 0
        )
        logger.debug("%d pieces migrated, %d could not be", num_made, len(migrations) - num_made)

    def counts(self) -> MemoryCounts:
        if self._rule is not None:
            pages = tuple(tuple(row) for row in self._rule.books.num_pieces.tolist())
        else:
            count = int(np.count_nonzero(self._is_placed))
            pages = tuple((count if role in self._roles else 0,) for role in ROLES)
        return MemoryCounts(
            tuple(self._read_bytes.tolist()),
            tuple(self._delayed_s.tolist()),
            pages,
            dict(self._migrated),
            self._num_failed,
        )

    def explain(self, page: int | None) -> tuple[str, ...]:
        """Lines that say where a page lies and why; of the whole, without one. Not while attention is in flight."""
        rule = self._rule
        if rule is None:
            return (f"all host pages lie on {self.nodes[0].name}, the only memory node",)
        if page is not None and not 0 <= page < self.memory.num_pages:
            return (f"there is no host page {page}; they are 0 to {self.memory.num_pages - 1}",)
        self._finish_moves(wait=False)
        return rule.describe() if page is None else rule.explain(page) + self._kernels_word(page)

    def _kernels_word(self, page: int) -> tuple[str, ...]:
        """What move_pages(2) says of each role's memory."""
        try:
            nodes = {role: arena.nodes_of([page])[0] for role, arena in self._arenas.items()}
        except PlacementForbidden as error:
            return (f"  the kernel was not asked: {error}",)
        words = ", ".join(
            f"{role} on {' and '.join(map(str, of)) or 'none yet'}" for role, of in nodes.items()
        )
        return (f"  by the kernel's word, NUMA nodes: {words}",)

    def close(self) -> None:
        """Wait for migrations under way; there will be no others."""
        self._finish_moves(wait=True)
        if self._mover is not None:
            self._mover.shutdown()
