"""Where the four roles of host pages lie, and rules that say where they should. Plain counters, no KV.

`Books` has what is true of every rule: which piece lies on which node, what each node holds and is asked to read.
A *piece* is one role of one page. The rules here are those that others use; `mapper.py` has ours, with the same
interface.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hybridgen.scheduler.machine import MemoryNode, Role, Tier

ROLES = tuple(Role)  # the order of columns
# In which order roles are read, for `ReadPattern.phases`.
ONE_PHASE = (ROLES,)
INDEX_FIRST = ((Role.INDEX,), (Role.V_SUMS, Role.K, Role.V))
K_FIRST = ((Role.K,), (Role.V,))
HOTNESS_WEIGHT = 0.2  # of a step in the EWMA of what is read: about the last five count


class NoRoom(Exception):
    """The nodes together have no room for the new pages; none was placed."""


@dataclass(frozen=True, slots=True)
class PageShape:
    """Bytes of each role of one page; 0 where the policy has no such role."""

    index_bytes: int
    v_sums_bytes: int
    k_bytes: int
    v_bytes: int

    @property
    def role_bytes(self) -> tuple[int, int, int, int]:
        """In the order of `ROLES`."""
        return self.index_bytes, self.v_sums_bytes, self.k_bytes, self.v_bytes


@dataclass(frozen=True, slots=True)
class ReadPattern:
    """The share of each role's bytes that one reader of a page reads in a step, as long as the page has not been
    measured; and the phases in which roles are read, of which each begins when the one before it has ended.

    `exact`: (0, 0, 1, 1) in `ONE_PHASE`. `mass`: index 1, a few of the sums, the same small share of K and V, by
    `INDEX_FIRST`. `hybridgen`: K 1, V sparse, by `K_FIRST`.

    Raises:
        ValueError: a role that is read is in no phase, or one is in two.
    """

    index: float
    v_sums: float
    k: float
    v: float
    phases: tuple[tuple[Role, ...], ...] = ONE_PHASE

    def __post_init__(self) -> None:
        named = [role for phase in self.phases for role in phase]
        read = {role for role, share in zip(ROLES, self.shares, strict=True) if share}
        if len(set(named)) < len(named) or not read <= set(named):
            raise ValueError(f"phases {self.phases} do not have each of {sorted(read)} once")

    @property
    def shares(self) -> tuple[float, float, float, float]:
        """In the order of `ROLES`."""
        return self.index, self.v_sums, self.k, self.v

    @property
    def phase_of(self) -> tuple[int, ...]:
        """In the order of `ROLES`; 0 for what is never read."""
        return tuple(
            next((number for number, phase in enumerate(self.phases) if role in phase), 0) for role in ROLES
        )


@dataclass(frozen=True, slots=True, eq=False)
class PageReads:
    """What the pool says of pages after a step.

    Attributes:
        pages: [n] host page ids.
        k_share, v_share: [n] of the page's K and V bytes that one reader read, 0 to 1; None: as the pattern says.
        mass: [n] of the softmax, that the page held, 0 to 1; None: not measured (`exact`).
    """

    pages: npt.NDArray[np.int64]
    k_share: npt.NDArray[np.float64] | None = None
    v_share: npt.NDArray[np.float64] | None = None
    mass: npt.NDArray[np.float64] | None = None

    @classmethod
    def of_shares(
        cls, pages: Sequence[int], k_share: Sequence[float], v_share: Sequence[float]
    ) -> "PageReads":
        """From plain numbers, one of each a page."""
        return cls(np.array(pages, np.int64), np.array(k_share, np.float64), np.array(v_share, np.float64))


@dataclass(frozen=True, slots=True)
class Migration:
    """Copy one piece to another node. Those of a plan are made in order: each fits when its turn comes."""

    page: int
    role: Role
    source: int  # id of the node
    target: int
    reason: str


class Placement(Protocol):
    """A rule for where pieces lie. Page ids are [0, num_pages), whatever their numbers in block tables."""

    def place(
        self, pages: Sequence[int], *, readers: int = 1, coming: int = 0
    ) -> tuple[tuple[int, ...], ...]:
        """Take in new pages; for each the ids of the nodes of its roles, in the order of `ROLES`; a role
        without bytes has the first node.

        Args:
            readers: running sequences that hold each of them.
            coming: pages that are known to follow soon, say the rest of a prompt.

        Raises:
            NoRoom: routinely; nothing was placed.
        """
        ...

    def release(self, pages: Sequence[int]) -> None:
        """The pages are free: forget where they lay."""
        ...

    def set_readers(
        self, pages: Sequence[int] | npt.NDArray[np.int64], readers: Sequence[int] | npt.NDArray[np.int32]
    ) -> None:
        """How many running sequences hold these pages from now on; 0 for cached ones."""
        ...

    def observe(self, reads: PageReads) -> None:
        """A step has been made."""
        ...

    def plan(self, byte_budget: int) -> tuple[Migration, ...]:
        """Moves worth making now, of no more bytes together. Changes nothing: `apply` those that were made."""
        ...

    def apply(self, migrations: Sequence[Migration]) -> None:
        """These were carried out."""
        ...

    def node_read_bytes(self) -> tuple[float, ...]:
        """Bytes that a step is expected to read of each node, in the order of the nodes given."""
        ...


class Books:
    """Which piece lies where, what every node holds, and what is read of it.

    Invariants (`check_integrity`): a page has a node for each role that has bytes, or for none; no node holds more than
    its capacity; `used` and `phase_loads` are the sums over pieces.

    Attributes:
        node_of: [pages, roles] positions in `nodes`; -1: the page is free, or the role has no bytes.
        share: [pages, roles] of a piece's bytes that one reader is expected to read in a step.
        num_observed: [pages] steps since it was placed whose reads are known.
        readers: [pages] running sequences.
        hotness: [pages] EWMA of the softmax mass that the page held; negative: never measured.
        placed_at, read_at: [pages] number of the step.
        num_pieces: [roles, nodes].
        used: [nodes] bytes held.
        reserved: [nodes] bytes of pieces on their way there; what they leave is theirs until they have left.
        phase_of: [roles] number of the phase in which it is read.
        phase_loads: [phases, nodes] bytes expected to be read in a step.
    """

    def __init__(
        self, nodes: Sequence[MemoryNode], shape: PageShape, pattern: ReadPattern, num_pages: int
    ) -> None:
        if not nodes:
            raise ValueError("no nodes")
        if len({node.id for node in nodes}) < len(nodes):
            raise ValueError(f"nodes {[node.id for node in nodes]} are not all different")
        self.nodes = tuple(nodes)
        self.shape = shape
        self.pattern = pattern
        self.position = {node.id: position for position, node in enumerate(nodes)}
        self.role_bytes = np.array(shape.role_bytes, dtype=np.float64)
        self.capacity = np.array([node.capacity_bytes for node in nodes], dtype=np.float64)
        self.bandwidth = np.array([node.read_bandwidth for node in nodes], dtype=np.float64)
        self.node_of = np.full((num_pages, len(ROLES)), -1, dtype=np.int8)
        self.share = np.zeros((num_pages, len(ROLES)), dtype=np.float64)
        self.num_observed = np.zeros(num_pages, dtype=np.int64)
        self.readers = np.zeros(num_pages, dtype=np.int32)
        self.hotness = np.full(num_pages, -1.0)
        self.placed_at = np.zeros(num_pages, dtype=np.int64)
        self.read_at = np.zeros(num_pages, dtype=np.int64)
        self.num_pieces = np.zeros((len(ROLES), len(nodes)), dtype=np.int64)
        self.used = np.zeros(len(nodes))
        self.reserved = np.zeros(len(nodes))
        self.phase_of = np.array(pattern.phase_of, dtype=np.int64)
        self.phase_loads = np.zeros((len(pattern.phases), len(nodes)))
        self.step = 0

    @property
    def loads(self) -> npt.NDArray[np.float64]:
        """[nodes] bytes expected to be read in a step, of all phases."""
        return np.asarray(self.phase_loads.sum(axis=0))

    def is_placed(self, page: int) -> bool:
        return bool((self.node_of[page] >= 0).any())

    def pieces_on(self, position: int) -> str:
        """How many of each role, for people."""
        return ", ".join(
            f"{self.num_pieces[column, position]} {role}"
            for column, role in enumerate(ROLES)
            if self.num_pieces[column].any()
        )

    def has_room(self, position: int, num_bytes: float) -> bool:
        return bool(self.used[position] + self.reserved[position] + num_bytes <= self.capacity[position])

    def take_in(self, page: int, positions: Sequence[int], readers: int) -> None:
        """Write down a new page; -1 for roles without bytes."""
        assert not self.is_placed(page), f"page {page} is placed already"
        self.node_of[page] = positions
        self.share[page] = self.pattern.shares
        self.readers[page] = readers
        self.num_observed[page] = 0
        self.hotness[page] = -1.0
        self.placed_at[page] = self.read_at[page] = self.step
        for column, position in enumerate(positions):
            if position >= 0:
                size = self.role_bytes[column]
                self.num_pieces[column, position] += 1
                self.used[position] += size
                load = size * self.pattern.shares[column] * readers
                self.phase_loads[self.phase_of[column], position] += load

    def release(self, pages: Sequence[int]) -> None:
        ids = np.asarray(pages, dtype=np.int64)
        assert all(self.is_placed(page) for page in pages), "a page that is not placed was released"
        self._count(ids, -1.0)
        for column, size in enumerate(self.role_bytes):
            where = self.node_of[ids, column]
            counts = np.bincount(where[where >= 0], minlength=len(self.nodes))
            self.num_pieces[column] -= counts
            self.used -= counts * size
        self.node_of[ids] = -1
        self.readers[ids] = 0

    def set_readers(
        self, pages: Sequence[int] | npt.NDArray[np.int64], readers: Sequence[int] | npt.NDArray[np.int32]
    ) -> None:
        ids = np.asarray(pages, dtype=np.int64)
        self._count(ids, -1.0)
        self.readers[ids] = readers
        self._count(ids, 1.0)

    def observe(self, reads: PageReads, weight: float) -> None:
        """Draw shares and hotness towards what a step read, by `weight` of the difference; a mean of the first few.

        Pages whose shares were not measured, but whose mass was, are expected to be read in proportion to it: who
        selects by mass reads more where there is more of it.
        """
        self.step += 1
        ids = reads.pages
        if not len(ids):
            return
        self.read_at[ids] = self.step
        self.num_observed[ids] += 1
        weights = np.maximum(weight, 1 / self.num_observed[ids])
        if reads.mass is not None:
            self.hotness[ids] += weights * (reads.mass - np.maximum(0.0, self.hotness[ids]))
            self.hotness[ids] = np.where(weights == 1, reads.mass, self.hotness[ids])
        for role, measured in ((Role.K, reads.k_share), (Role.V, reads.v_share)):
            column = ROLES.index(role)
            share = measured
            if share is None and reads.mass is not None and 0 < self.pattern.shares[column] < 1:
                mean = max(float(self.hotness[ids].mean()), 1e-12)
                share = np.minimum(1.0, self.pattern.shares[column] * self.hotness[ids] / mean)
            if share is not None:
                change = weights * (share - self.share[ids, column])
                self.share[ids, column] += change
                loads = self.role_bytes[column] * change * self.readers[ids]
                where = np.maximum(0, self.node_of[ids, column])  # without bytes it is no load anywhere
                self.phase_loads[self.phase_of[column]] += np.bincount(
                    where, loads, minlength=len(self.nodes)
                )

    def move(self, page: int, role: Role, source: int, target: int) -> None:
        """Write down a migration between nodes with these ids."""
        column, begin, end = ROLES.index(role), self.position[source], self.position[target]
        size = self.role_bytes[column]
        assert self.node_of[page, column] == begin, f"{role} of page {page} is not on node {source}"
        assert self.has_room(end, size), f"node {target} has no room for {role} of page {page}"
        load = size * self.share[page, column] * self.readers[page]
        self.node_of[page, column] = end
        self.num_pieces[column, begin] -= 1
        self.num_pieces[column, end] += 1
        self.used[begin] -= size
        self.used[end] += size
        phase = self.phase_of[column]
        self.phase_loads[phase, begin] -= load
        self.phase_loads[phase, end] += load

    def phase_seconds(self) -> npt.NDArray[np.float64]:
        """[phases] each until its slowest node has been read."""
        return np.asarray((self.phase_loads / self.bandwidth).max(axis=1))

    def read_seconds(self) -> float:
        """Of a step, for a sequence: its phases follow one another. Where those of many sequences overlap, at most."""
        return float(self.phase_seconds().sum())

    def _count(self, ids: npt.NDArray[np.int64], sign: float) -> None:
        self.phase_loads += sign * self._sum_loads(
            self.node_of[ids], self.role_bytes * self.share[ids] * self.readers[ids, None]
        )

    def _sum_loads(
        self, where: npt.NDArray[np.int8], loads: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.float64]:
        """Add up [pages, roles] to [phases, nodes]."""
        num_phases, num_nodes = self.phase_loads.shape
        present = where >= 0
        cells = self.phase_of * num_nodes + where
        total = np.bincount(cells[present], loads[present], minlength=num_phases * num_nodes)
        return np.asarray(total.reshape(num_phases, num_nodes), dtype=np.float64)

    def check_integrity(self) -> None:
        """Raise AssertionError, with the numbers, if the sums are not those of the pieces. O(pages)."""
        present = self.node_of >= 0
        sizes = np.broadcast_to(self.role_bytes, self.node_of.shape)
        used = np.bincount(self.node_of[present], sizes[present], minlength=len(self.nodes))
        for column in range(len(ROLES)):
            where = self.node_of[:, column]
            counts = np.bincount(where[where >= 0], minlength=len(self.nodes))
            assert (counts == self.num_pieces[column]).all(), f"{counts} pieces of {ROLES[column]}"
        assert (used == self.used).all(), f"{self.used} bytes counted, {used} held"
        assert (used <= self.capacity).all(), f"{used} bytes held, of {self.capacity}"
        total = self._sum_loads(self.node_of, self.role_bytes * self.share * self.readers[:, None])
        assert np.allclose(total, self.phase_loads, rtol=1e-6, atol=1.0), (
            f"{self.phase_loads} read, {total} by pieces"
        )


class RuleBase(ABC):
    """What the rules share: books, and taking pages in whole. A rule says in which order nodes are asked."""

    REASON = ""  # for its order, to people

    def __init__(
        self, nodes: Sequence[MemoryNode], shape: PageShape, pattern: ReadPattern, num_pages: int
    ) -> None:
        self.books = Books(nodes, shape, pattern, num_pages)
        # What is read most is seated first, should there be room for one piece only.
        densest = sorted(range(len(ROLES)), key=lambda column: -pattern.shares[column])
        self._columns = [column for column in densest if shape.role_bytes[column]]

    def place(
        self, pages: Sequence[int], *, readers: int = 1, coming: int = 0
    ) -> tuple[tuple[int, ...], ...]:
        """See `Placement.place`."""
        books = self.books
        self._before_placing(len(pages), readers, coming)
        placed: list[int] = []
        answer: list[tuple[int, ...]] = []
        for page in pages:
            positions = self._choose(readers)
            if positions is None:
                if placed:
                    self.release(placed)
                raise NoRoom(
                    f"{len(pages)} pages of {sum(books.shape.role_bytes)} bytes, and "
                    f"{books.capacity.sum() - books.used.sum():.0f} bytes are free on {len(books.nodes)} nodes"
                )
            books.take_in(page, positions, readers)
            placed.append(page)
            answer.append(tuple(books.nodes[max(0, position)].id for position in positions))
        return tuple(answer)

    def _choose(self, readers: int) -> tuple[int, ...] | None:
        """Positions of the nodes for one page, -1 for roles without bytes; None: there is no room."""
        books = self.books
        used: list[float] = (books.used + books.reserved).tolist()
        capacity: list[float] = books.capacity.tolist()
        positions = [-1] * len(ROLES)
        for column in self._columns:
            size = books.shape.role_bytes[column]
            for position in self._order(column, used):
                if used[position] + size <= capacity[position]:
                    positions[column] = position
                    used[position] += size
                    break
            else:
                return None
        self._chosen(positions, readers)
        return tuple(positions)

    def _before_placing(self, num_pages: int, readers: int, coming: int) -> None:  # noqa: B027 (not every rule cares)
        """Pages are about to be placed."""

    @abstractmethod
    def _order(self, column: int, used: Sequence[float]) -> Sequence[int]:
        """Nodes to ask for a piece of this role, the first choice first."""

    def _chosen(self, positions: Sequence[int], readers: int) -> None:  # noqa: B027 (likewise)
        """This is where the page goes."""

    def release(self, pages: Sequence[int]) -> None:
        """See `Placement.release`."""
        self.books.release(pages)

    def set_readers(
        self, pages: Sequence[int] | npt.NDArray[np.int64], readers: Sequence[int] | npt.NDArray[np.int32]
    ) -> None:
        """See `Placement.set_readers`."""
        self.books.set_readers(pages, readers)

    def observe(self, reads: PageReads) -> None:
        """See `Placement.observe`."""
        self.books.observe(reads, HOTNESS_WEIGHT)

    def plan(self, byte_budget: int) -> tuple[Migration, ...]:
        """See `Placement.plan`. A rule that only places never moves anything."""
        return ()

    def apply(self, migrations: Sequence[Migration]) -> None:
        """See `Placement.apply`."""
        for migration in migrations:
            self.books.move(migration.page, migration.role, migration.source, migration.target)

    def node_read_bytes(self) -> tuple[float, ...]:
        """See `Placement.node_read_bytes`."""
        return tuple(self.books.loads.tolist())

    def explain(self, page: int) -> tuple[str, ...]:
        """Lines that say where the page's roles lie, and why."""
        books = self.books
        if not books.is_placed(page):
            return (f"page {page} is free",)
        return (
            f"page {page}: {self.REASON}",
            *(
                f"  {role}: {books.nodes[position].label}"
                for role, position in zip(ROLES, books.node_of[page].tolist(), strict=True)
                if position >= 0
            ),
        )

    def describe(self) -> tuple[str, ...]:
        """Lines of the whole: every node's room, and which roles it holds."""
        books = self.books
        return (
            self.REASON,
            *(
                f"  {node.label}, {node.tier}: {books.used[position] / 2**30:.2f} of "
                f"{books.capacity[position] / 2**30:.2f} GiB; {books.pieces_on(position)}"
                for position, node in enumerate(books.nodes)
            ),
        )


class PaperRule(RuleBase):
    """Keys to DRAM, values to CXL memory, whatever is read of them (arXiv 2604.18529); overflow to the other.

    The index counts as keys, sums count as values. Nodes of a tier take turns by what room they have.
    """

    REASON = "keys and index to DRAM, values and their sums to CXL memory, whatever is read of them"

    def _order(self, column: int, used: Sequence[float]) -> Sequence[int]:
        first = Tier.DRAM if ROLES[column] in (Role.INDEX, Role.K) else Tier.CXL
        nodes = self.books.nodes
        return sorted(
            range(len(nodes)),
            key=lambda p: (nodes[p].tier is not first, used[p] / max(1, nodes[p].capacity_bytes), p),
        )


class FirstTouch(RuleBase):
    """Fill DRAM, then CXL memory: what a kernel does that is not asked for anything else."""

    REASON = "DRAM is filled first, then CXL memory"

    def _order(self, column: int, used: Sequence[float]) -> Sequence[int]:
        nodes = self.books.nodes
        return sorted(range(len(nodes)), key=lambda p: (nodes[p].tier is not Tier.DRAM, p))


class WeightedInterleave(RuleBase):
    """Every role over all nodes in proportion to their bandwidth, as Linux's weighted interleave does with pages."""

    REASON = "every role is spread over the nodes in proportion to their bandwidth"

    def __init__(
        self, nodes: Sequence[MemoryNode], shape: PageShape, pattern: ReadPattern, num_pages: int
    ) -> None:
        super().__init__(nodes, shape, pattern, num_pages)
        self._given = np.zeros((len(ROLES), len(nodes)))  # pieces, ever

    def _order(self, column: int, used: Sequence[float]) -> Sequence[int]:
        turn = (self._given[column] + 1) / self.books.bandwidth
        order: list[int] = np.argsort(turn, kind="stable").tolist()
        return order

    def _chosen(self, positions: Sequence[int], readers: int) -> None:
        for column, position in enumerate(positions):
            if position >= 0:
                self._given[column, position] += 1


class RecencyRule(FirstTouch):
    """New pages in DRAM, the oldest in CXL memory: moves those out before DRAM is full."""

    REASON = "new pages to DRAM; the oldest leave it for CXL memory before it is full"
    HIGH, LOW = 0.95, 0.90  # of DRAM in use: from where on pages leave, and until when

    def plan(self, byte_budget: int) -> tuple[Migration, ...]:
        """See `Placement.plan`."""
        books = self.books
        is_dram = np.array([node.tier is Tier.DRAM for node in books.nodes])
        if is_dram.all() or not is_dram.any():
            return ()
        excess = books.used[is_dram].sum() - self.LOW * books.capacity[is_dram].sum()
        if books.used[is_dram].sum() <= self.HIGH * books.capacity[is_dram].sum():
            return ()
        used = books.used.copy()
        moves: list[Migration] = []
        left = float(byte_budget)
        held = np.flatnonzero(((books.node_of >= 0) & is_dram[books.node_of]).any(axis=1))
        for page in held[np.lexsort((held, books.placed_at[held]))].tolist():
            for column, position in enumerate(books.node_of[page].tolist()):
                size = float(books.role_bytes[column])
                if position < 0 or not is_dram[position]:
                    continue
                target = max(np.flatnonzero(~is_dram).tolist(), key=lambda p: books.capacity[p] - used[p])
                if size > left or excess <= 0 or used[target] + size > books.capacity[target]:
                    return tuple(moves)
                nodes = books.nodes
                moves.append(Migration(page, ROLES[column], nodes[position].id, nodes[target].id, "oldest"))
                used[position] -= size
                used[target] += size
                left -= size
                excess -= size
        return tuple(moves)
