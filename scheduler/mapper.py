"""Which piece of a host page lies on which node, by how it is read. Plain counters, no KV.

A sequence's reading has phases (`ReadPattern.phases`): which keys are read follows from the index, which values from
the keys. Nodes work at the same time only within a phase, and a phase ends when its slowest node has been read. So the
mapper minimises the sum over phases of the maximum over nodes of bytes read / bandwidth, within capacities. It knows
four roles, how much of each a step reads, and which pages are read more than others. Where every node has room, each
phase is striped in proportion to bandwidth; that K lies in DRAM and V in CXL memory is a result where DRAM is short and
V is read sparsely.

Where many sequences' phases overlap, a step takes at least the longest of the nodes' times over all phases and at most
the sum that is minimised; what is even in each phase is even in all together.

Two parts:

- *Placing* goes by role. What present, new and coming pieces are read and hold, by role, is divided over the nodes by
  a linear program (`pour`). New pieces take turns in these proportions.
- *Migrating* goes by piece, and by what was measured. While in some phase one node takes longer than all would if they
  shared the phase's work evenly, what is read most for its bytes in that phase leaves it for the one that is ready
  first; where that one is full, in exchange for what is read least there, in whichever phase. A move must save more in
  `horizon_steps` than copying costs. Every move lowers the longer of two times of a phase without making the shorter
  the longer, and what an exchange adds to another phase must be less than that. Both are measured by one sum of means
  that weigh late nodes most (`_seconds`), which falls with every move: under the same reads there is an end to them.
"""

import importlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybridgen.scheduler.machine import MemoryNode
from hybridgen.scheduler.placements import (
    ROLES,
    Migration,
    PageShape,
    ReadPattern,
    RuleBase,
)

_MARGIN = 0.005  # of the even time, by which a node is late before anything moves
_RESTALE = 0.02  # change of bytes held or read after which the proportions are computed again
_POWER = 32  # of a mean of nodes' times that is nearly the longest, and falls when any late one gets shorter

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def pour(sizes: Floats, loads: Floats, phase_of: Ints, capacity: Floats, bandwidth: Floats) -> Floats:
    """Divide things with sizes and loads over nodes so that the sum over phases of max(load / bandwidth) is least,
    within capacities.

    Of what is equally good: in proportion to bandwidth if there is room for that; else what is read most for its size
    on fast nodes, and of what is read alike, what comes first.

    Args:
        sizes, loads: [things]; a thing can be divided.
        phase_of: [things] number of the phase in which it is read.
        capacity, bandwidth: [nodes].

    Returns:
        [things, nodes] sizes; in proportion to capacities, and beyond them, if they do not suffice.
    """
    total = sizes.sum()
    if total > capacity.sum() or not sizes.any():
        return np.outer(sizes, capacity / max(1.0, capacity.sum()))
    stripes = bandwidth / bandwidth.sum()
    if (total * stripes <= capacity).all():
        return np.asarray(sizes[:, None] * stripes, dtype=np.float64)
    # Nodes that are alike share alike. Fast ones first.
    kinds: dict[tuple[float, float], list[int]] = {}
    for node in np.lexsort((capacity, -bandwidth)).tolist():
        kinds.setdefault((float(bandwidth[node]), float(capacity[node])), []).append(node)
    members = list(kinds.values())
    shares = _programme(
        np.flatnonzero(sizes > 0),
        sizes / total,
        loads / max(loads.sum() / bandwidth.sum(), 1e-30),
        phase_of,
        np.array([capacity[nodes].sum() for nodes in members]) / total,
        np.array([bandwidth[nodes].sum() for nodes in members]),
    )
    result = np.zeros((len(sizes), len(bandwidth)))
    for nodes, column in zip(members, shares.T, strict=True):
        result[:, nodes] = (sizes * column / len(nodes))[:, None]
    return result


def _programme(
    things: Ints, sizes: Floats, loads: Floats, phase_of: Ints, capacity: Floats, bandwidth: Floats
) -> Floats:
    """The linear program of `pour`: returns [things, groups of nodes] shares, rows of `things` add up to 1.

    Variables are the shares of `things` on each group, row by row, then each phase's time. Numbers are near 1: sizes
    are parts of all, loads are such that all nodes together need 1 for them. Groups are given fastest first.
    """
    # Not at the top: whoever has one node never needs it, and it takes half a second.
    from scipy.optimize import linprog

    num_groups, num_phases = len(capacity), int(phase_of.max()) + 1
    num_shares = len(things) * num_groups
    # What is read densest should lie on the fastest; roles that are measured nearly alike stay in order.
    density = np.round(np.divide(loads, sizes, out=np.zeros_like(loads), where=sizes > 0), 2)[things]
    rank = np.empty(len(things))
    rank[np.lexsort((-np.arange(len(things)), density))] = np.arange(1, len(things) + 1)
    order = np.outer(rank * sizes[things], np.arange(num_groups)).ravel() / (len(things) * num_groups)
    whole = np.zeros((len(things), num_shares + num_phases))
    room = np.zeros((num_groups, num_shares + num_phases))
    ready = np.zeros((num_phases * num_groups, num_shares + num_phases))
    for row, thing in enumerate(things.tolist()):
        for group in range(num_groups):
            column = row * num_groups + group
            whole[row, column] = 1
            room[group, column] = sizes[thing]
            ready[phase_of[thing] * num_groups + group, column] = loads[thing] / bandwidth[group]
    for phase in range(num_phases):
        ready[phase * num_groups : (phase + 1) * num_groups, num_shares + phase] = -1
    # Order costs less than 1 altogether, a thousandth of the least time.
    solved = linprog(
        np.concatenate([order, np.full(num_phases, 1000.0)]),
        A_ub=np.concatenate([room, ready]),
        b_ub=np.concatenate([capacity, np.zeros(len(ready))]),
        A_eq=whole,
        b_eq=np.ones(len(things)),
    )
    assert solved.x is not None, f"{solved.message}: sizes {sizes}, capacities {capacity}"
    shares = np.zeros((len(sizes), num_groups))
    shares[things] = np.clip(solved.x[:num_shares].reshape(-1, num_groups), 0, 1)
    return shares


class SemanticMapper(RuleBase):
    """See the module; the interface is `placements.Placement`, and what is below.

    Args:
        nodes: host memories.
        num_pages: host pages that there can be.
        horizon_steps: for how many steps what is read is expected to stay as it is.
    """

    def __init__(
        self,
        nodes: Sequence[MemoryNode],
        shape: PageShape,
        pattern: ReadPattern,
        num_pages: int,
        *,
        horizon_steps: int = 256,
    ) -> None:
        super().__init__(nodes, shape, pattern, num_pages)
        self._horizon = horizon_steps
        self._targets = np.zeros((len(ROLES), len(nodes)))  # shares of a role's pieces; rows add up to 1
        self._poured = (-1.0, -1.0, -1.0)  # bytes held, read, and of room, when they were computed
        if len(nodes) > 1:
            importlib.import_module("scipy.optimize")  # now, rather than during a step

    def _before_placing(self, num_pages: int, readers: int, coming: int) -> None:
        books = self.books
        pieces = books.num_pieces.sum(axis=1)
        room = (books.capacity.sum() - books.used.sum()) // books.role_bytes.sum()
        num_pages += int(max(0, min(coming, room - num_pages)))
        loads = self._role_loads() + num_pages * readers * books.role_bytes * books.pattern.shares
        sizes = (pieces + num_pages) * books.role_bytes
        now = float(sizes.sum()), float(loads.sum()), float(books.capacity.sum())
        if all(
            abs(new - old) <= _RESTALE * max(new, old) for new, old in zip(now, self._poured, strict=True)
        ):
            return
        self._poured = now
        poured = pour(sizes, loads, books.phase_of, books.capacity, books.bandwidth)
        self._targets = poured / np.maximum(sizes, 1.0)[:, None]

    def _role_loads(self) -> Floats:
        """Bytes a step reads of each role: means of what was measured, if anything was placed."""
        books = self.books
        placed = books.node_of >= 0
        return np.asarray(
            (books.share * books.readers[:, None] * placed).sum(axis=0) * books.role_bytes, dtype=np.float64
        )

    def _order(self, column: int, used: Sequence[float]) -> Sequence[int]:
        books = self.books
        targets, pieces = self._targets[column], books.num_pieces[column]
        loads = books.phase_loads[books.phase_of[column]]
        ready = (loads + books.role_bytes[column] * books.pattern.shares[column]) / books.bandwidth
        # Of the nodes that have less than their share of the role, the one that is ready first: shares are not whole.
        has_enough = pieces >= targets * (pieces.sum() + 1)
        order: list[int] = np.lexsort((ready, targets == 0, has_enough)).tolist()
        return order

    def plan(self, byte_budget: int) -> tuple[Migration, ...]:
        """See `Placement.plan`."""
        books = self.books
        plan = _Plan(self, float(byte_budget), self._horizon)
        even_s = books.phase_loads.sum(axis=1) / books.bandwidth.sum()
        for phase in np.argsort(even_s - books.phase_seconds(), kind="stable").tolist():  # the latest first
            self._even_out(plan, phase)
        return tuple(plan.migrations)

    def _even_out(self, plan: "_Plan", phase: int) -> None:
        loads, bandwidth = plan.loads[phase], self.books.bandwidth
        active = np.ones(len(bandwidth), dtype=bool)
        while active.sum() > 1 and not plan.is_spent:
            even_s = loads[active].sum() / bandwidth[active].sum()
            times = np.where(active, loads / bandwidth, even_s)
            late, ready = int(times.argmax()), int(times.argmin())
            if times[late] <= (1 + _MARGIN) * even_s or times[ready] >= even_s:
                return
            amount = min(loads[late] - even_s * bandwidth[late], even_s * bandwidth[ready] - loads[ready])
            num_before = len(plan.migrations)
            plan.transfer(phase, late, ready, float(amount))
            # Either one of the two is even now, or there is nothing more that could go from one to the other.
            if len(plan.migrations) == num_before:
                active[ready] = False

    def explain(self, page: int) -> tuple[str, ...]:
        """Lines that say where the page's roles lie, and why."""
        books = self.books
        if not books.is_placed(page):
            return (f"page {page} is free",)
        hotness = books.hotness[page]
        known = f"holds {hotness:.4f} of the mass" if hotness >= 0 else "mass never measured"
        lines = [
            f"page {page}: {books.readers[page]} readers, {known}, placed {books.step - books.placed_at[page]} "
            f"observations ago, read {books.step - books.read_at[page]} ago"
        ]
        times = 1e3 * books.phase_loads / books.bandwidth
        for column, role in enumerate(ROLES):
            position = int(books.node_of[page, column])
            if position < 0:
                continue
            node, size = books.nodes[position], books.role_bytes[column]
            read = books.share[page, column] * books.readers[page]
            share = self._targets[column, position]
            full = books.used[position] + size > books.capacity[position]
            phase = int(books.phase_of[column])
            of = "the step's" if len(times) == 1 else f"{_phase_name(books.pattern, phase)}'s"
            lines.append(
                f"  {role}: {node.label}, {size / 1024:.0f} KiB, "
                f"{read:.1%} of it read a step; {node.name} is to have {share:.0%} of all {role} and takes "
                f"{times[phase, position]:.2f} ms of {of} {times[phase].max():.2f} ms"
                f"{', and is full' if full else ''}"
            )
        return tuple(lines)

    def describe(self) -> tuple[str, ...]:
        """Lines of the whole: every node's room, what is read of it, which roles it holds."""
        books = self.books
        phases = [_phase_name(books.pattern, phase) for phase in range(len(books.phase_loads))]

        def by_phase(times: Floats) -> str:
            words = [f"{name} {1e3 * seconds:.2f}" for name, seconds in zip(phases, times, strict=True)]
            return f" ({', then '.join(words)})" if len(words) > 1 else ""

        lines = [
            f"a step reads the host's pages in {1e3 * books.read_seconds():.2f} ms{by_phase(books.phase_seconds())}"
        ]
        for position, node in enumerate(books.nodes):
            times = books.phase_loads[:, position] / books.bandwidth[position]
            lines.append(
                f"  {node.label}, {node.tier}: "
                f"{books.used[position] / 2**30:.2f} of {books.capacity[position] / 2**30:.2f} GiB, "
                f"{books.loads[position] / 2**20:.1f} MiB a step at {node.read_bandwidth / 1e9:.1f} GB/s: "
                f"{1e3 * times.sum():.2f} ms{by_phase(times)}; {books.pieces_on(position)}"
            )
        return tuple(lines)


def _phase_name(pattern: ReadPattern, phase: int) -> str:
    """By the roles that are read in it."""
    shares = dict(zip(ROLES, pattern.shares, strict=True))
    return " and ".join(role for role in pattern.phases[phase] if shares[role] > 0)


@dataclass(frozen=True, slots=True)
class _Piece:
    """One role of one page: `number` counts roles of all pages, `density` is what a step reads of a byte."""

    number: int
    phase: int
    size: float
    density: float

    @property
    def load(self) -> float:
        return self.size * self.density


class _Plan:
    """Migrations as they are thought of, with what nodes hold and read once they are made.

    Attributes:
        loads: [phases, nodes].
    """

    def __init__(self, mapper: SemanticMapper, budget: float, horizon_steps: int) -> None:
        self._books = mapper.books
        self.loads = mapper.books.phase_loads.copy()
        self._used = mapper.books.used.copy()
        self._left = budget
        self._horizon = horizon_steps
        self._smallest = min(size for size in self._books.role_bytes.tolist() if size > 0)
        self._where = self._books.node_of.ravel()
        self._density: Floats | None = None
        self._moved: set[int] = set()
        self.migrations: list[Migration] = []

    @property
    def is_spent(self) -> bool:
        return bool(self._left < self._smallest)

    def transfer(self, phase: int, late: int, ready: int, amount: float) -> None:
        """Move pieces that are read by `amount` bytes a step together in the phase, or as near below it as there are.

        Where `ready` is full, what is read least there makes room, if `late` has room for it.
        """
        books = self._books
        # A step's read of a piece is density times size; copying it reads it once here and writes it once there.
        least = (1 + books.bandwidth[late] / books.bandwidth[ready]) / self._horizon
        count = int(self._left // self._smallest)
        light = deque[_Piece]()
        looked = False
        hopeless = set[float]()  # sizes: what is less dense and as large gains less
        # Without an exchange, what is read by more than `amount` cannot move, and must not hide what can.
        exchanges = self._used[ready] + books.role_bytes.max() > books.capacity[ready]
        most = np.inf if exchanges else amount
        for piece in self._extreme(late, count, phase=phase, least=least, most=most):
            if piece.size in hopeless:
                continue
            missing = self._used[ready] + piece.size - books.capacity[ready]
            if missing > 0 and not looked:
                light.extend(self._extreme(ready, 2 * count))
                looked = True
            back: list[_Piece] = []
            room = books.capacity[late] - self._used[late]
            for other in light:
                if missing <= 0 or other.density >= piece.density or other.size > room:
                    break
                back.append(other)
                missing -= other.size
                room -= other.size
            if missing > 0:
                hopeless.add(piece.size)
                continue
            change = piece.load - sum(other.load for other in back if other.phase == phase)
            copied = piece.size + sum(other.size for other in back)
            if change > amount or copied > self._left:
                continue
            if change < least * copied or not self._pays(piece, back, late, ready, least * copied):
                hopeless.add(piece.size)
                continue
            for _ in back:
                self._move(light.popleft(), ready, late, "read less than what it makes room for")
            self._move(piece, late, ready, "less to read on the slowest node")
            amount -= change
            if self.is_spent:
                return

    def _pays(self, piece: _Piece, back: Sequence[_Piece], late: int, ready: int, least: float) -> bool:
        """Whether what an exchange adds to other phases leaves a gain, of as long as `least` bytes take on `late`."""
        if all(other.phase == piece.phase for other in back):
            return True
        loads = self.loads.copy()
        for sign, moved in ((1, piece), *((-1, other) for other in back)):
            loads[moved.phase, late] -= sign * moved.load
            loads[moved.phase, ready] += sign * moved.load
        bandwidth = self._books.bandwidth
        gain_s = _seconds(self.loads, bandwidth) - _seconds(loads, bandwidth)
        return bool(gain_s >= least / bandwidth[late])

    def _extreme(
        self, node: int, count: int, *, phase: int | None = None, least: float = -1.0, most: float = np.inf
    ) -> list[_Piece]:
        """Up to `count` pieces on the node that have not moved.

        With a phase, those that are read in it, at least so much for their bytes and by at most so many bytes, the
        densest first; without, the least dense first.
        """
        books, densest = self._books, phase is not None
        if self._density is None:
            self._density = (books.share * books.readers[:, None]).ravel()
        pieces = np.flatnonzero(self._where == node)
        density = self._density[pieces]
        phases = books.phase_of[pieces % len(ROLES)]
        chosen = (density >= least) & ((phases == phase) | (not densest))
        chosen &= density * books.role_bytes[pieces % len(ROLES)] <= most
        pieces, density = pieces[chosen], density[chosen]
        count += len(self._moved)
        key = -density if densest else density
        if len(pieces) > count:
            nearest = np.argpartition(key, count)[:count]
            pieces, density, key = pieces[nearest], density[nearest], key[nearest]
        # Of what is read alike, what was read longest ago is colder.
        age = books.read_at[pieces // len(ROLES)]
        order = np.lexsort((pieces, -age if densest else age, key))
        sizes = books.role_bytes[pieces % len(ROLES)]
        return [
            _Piece(number, of_phase, size, value)
            for number, of_phase, size, value in zip(
                pieces[order].tolist(),
                books.phase_of[pieces[order] % len(ROLES)].tolist(),
                sizes[order].tolist(),
                density[order].tolist(),
                strict=True,
            )
            if number not in self._moved
        ]

    def _move(self, piece: _Piece, source: int, target: int, reason: str) -> None:
        nodes = self._books.nodes
        page, column = divmod(piece.number, len(ROLES))
        self.migrations.append(Migration(page, ROLES[column], nodes[source].id, nodes[target].id, reason))
        self._moved.add(piece.number)
        self._left -= piece.size
        for node, sign in ((source, -1), (target, 1)):
            self._used[node] += sign * piece.size
            self.loads[piece.phase, node] += sign * piece.load


def _seconds(loads: Floats, bandwidth: Floats) -> float:
    """Nearly the sum over phases of the longest time, but lower for less on any late node.

    The mean of a phase's times to a high power, weighed by bandwidth: where all are the same it is that time.
    """
    times = np.maximum(loads, 0.0) / bandwidth
    longest = np.maximum(times.max(axis=1), 1e-30)
    means = (times / longest[:, None]) ** _POWER @ (bandwidth / bandwidth.sum())
    return float((longest * means ** (1 / _POWER)).sum())
