"""Which piece of a host page lies on which node, by how it is read. Plain counters, no KV.

A step ends when the slowest node has been read, so the mapper minimises the maximum over nodes of bytes read a step /
bandwidth, within capacities. It knows four roles, how much of each a step reads, and which pages are read more than
others. That K lies in DRAM and V in CXL memory is a result where V is read sparsely, and stripes are one where it is
not.

Two parts:

- *Placing* goes by role. What present, new and coming pieces are read and hold, by role, is poured over the nodes:
  the slower ones first, from what is read least for its bytes, until each has what it can read while the others read
  theirs. New pieces take turns in these proportions.
- *Migrating* goes by piece, and by what was measured. While one node takes longer than all would if they shared the
  work evenly, what is read most for its bytes leaves it for the one that is ready first; where that one is full, in
  exchange for what is read least there. A move must save more in `horizon_steps` than copying costs. Every move
  lowers the longer of two times without making the shorter the longer, so under the same reads there is an end to them.
"""

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
_CLEARLY_HOTTER = 1.25  # than the device page that would have to go

Floats = npt.NDArray[np.float64]


def pour(sizes: Floats, loads: Floats, capacity: Floats, bandwidth: Floats) -> Floats:
    """Divide things with sizes and loads over nodes so that max(load / bandwidth) is least, within capacities.

    Only sums over a node matter, so that each takes as much load and as much size as it can leaves the most to the
    others. Slow nodes begin, with the least dense; so the densest end up on the fast ones.

    Args:
        sizes, loads: [things]; a thing can be divided.
        capacity, bandwidth: [nodes].

    Returns:
        [things, nodes] sizes; in proportion to capacities, and beyond them, if they do not suffice.
    """
    if sizes.sum() > capacity.sum() or not sizes.any():
        return np.outer(sizes, capacity / max(1.0, capacity.sum()))
    # Nodes that are alike share alike.
    kinds: dict[tuple[float, float], list[int]] = {}
    for node, key in enumerate(zip(bandwidth.tolist(), capacity.tolist(), strict=True)):
        kinds.setdefault(key, []).append(node)
    groups = sorted(kinds.items())

    def within(seconds: float) -> list[list[float]] | None:
        left = sizes.tolist()
        taken = []
        for (speed, room), members in groups:
            taken.append(_take(left, density, room * len(members), seconds * speed * len(members)))
        return taken if sum(left) <= 1e-9 * sizes.sum() else None

    density = np.divide(loads, sizes, out=np.zeros_like(sizes), where=sizes > 0).tolist()
    # At `high` even the slowest node could read everything, so that only capacities count.
    low, high = loads.sum() / bandwidth.sum(), loads.sum() / bandwidth.min() + 1e-12
    best = within(low * (1 + 1e-9))
    if best is None:
        best = within(high)
        assert best is not None, "capacities suffice, and any load may go anywhere"
        for _ in range(40):
            middle = (low + high) / 2
            found = within(middle)
            low, high, best = (middle, high, best) if found is None else (low, middle, found)
    result = np.zeros((len(sizes), len(bandwidth)))
    for (_, members), amounts in zip(groups, best, strict=True):
        for node in members:
            result[:, node] = np.array(amounts) / len(members)
    return result


def _take(left: list[float], density: Sequence[float], room: float, load: float) -> list[float]:
    """Take from `left`, the least dense first, at most so much size and load; then denser for less dense."""
    order = sorted(range(len(left)), key=lambda thing: density[thing])
    taken = [0.0] * len(left)
    for thing in order:
        amount = min(left[thing], room)
        if density[thing] > 0:
            amount = min(amount, load / density[thing])
        taken[thing] += amount
        left[thing] -= amount
        room -= amount
        load = max(0.0, load - amount * density[thing])
    for lighter in order:
        for heavier in order:
            gain = density[heavier] - density[lighter]
            amount = min(taken[lighter], left[heavier], load / gain) if gain > 0 else 0.0
            if amount > 0 and room <= 1e-9:
                taken[lighter] -= amount
                left[lighter] += amount
                taken[heavier] += amount
                left[heavier] -= amount
                load = max(0.0, load - amount * gain)
    return taken


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
        self._poured = (-1.0, -1.0)  # bytes held and read when they were computed

    def _before_placing(self, num_pages: int, readers: int, coming: int) -> None:
        books = self.books
        pieces = books.num_pieces.sum(axis=1)
        room = (books.capacity.sum() - books.used.sum()) // books.role_bytes.sum()
        num_pages += int(max(0, min(coming, room - num_pages)))
        loads = self._role_loads() + num_pages * readers * books.role_bytes * books.pattern.shares
        sizes = (pieces + num_pages) * books.role_bytes
        now = float(sizes.sum()), float(loads.sum())
        if all(
            abs(new - old) <= _RESTALE * max(new, old) for new, old in zip(now, self._poured, strict=True)
        ):
            return
        self._poured = now
        # Roles that are read alike lie alike: K and V of `exact` are one thing.
        density = [round(load / size, 3) if size else 0.0 for load, size in zip(loads, sizes, strict=True)]
        alike = sorted(set(density))
        thing = np.array([alike.index(value) for value in density])
        sizes, loads = (np.bincount(thing, each).astype(np.float64) for each in (sizes, loads))
        poured = pour(sizes, loads, books.capacity, books.bandwidth)
        self._targets = (poured / np.maximum(sizes, 1.0)[:, None])[thing]

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
        ready = (books.loads + books.role_bytes[column] * books.pattern.shares[column]) / books.bandwidth
        # Of the nodes that have less than their share of the role, the one that is ready first: shares are not whole.
        has_enough = pieces >= targets * (pieces.sum() + 1)
        order: list[int] = np.lexsort((ready, targets == 0, has_enough)).tolist()
        return order

    def plan(self, byte_budget: int) -> tuple[Migration, ...]:
        """See `Placement.plan`."""
        books = self.books
        loads, used = books.loads.copy(), books.used.copy()
        active = np.ones(len(books.nodes), dtype=bool)
        plan = _Plan(self, loads, used, float(byte_budget), self._horizon)
        while active.sum() > 1:
            even_s = loads[active].sum() / books.bandwidth[active].sum()
            times = np.where(active, loads / books.bandwidth, even_s)
            late, ready = int(times.argmax()), int(times.argmin())
            if times[late] <= (1 + _MARGIN) * even_s or times[ready] >= even_s:
                break
            amount = min(
                loads[late] - even_s * books.bandwidth[late], even_s * books.bandwidth[ready] - loads[ready]
            )
            num_before = len(plan.migrations)
            plan.transfer(late, ready, float(amount))
            if plan.is_spent:
                break
            # Either one of the two is even now, or there is nothing more that could go from one to the other.
            if len(plan.migrations) == num_before:
                active[ready] = False
        return tuple(plan.migrations)

    def promotions(self, num_free_pages: int, *, coldest_device: float = 0.0) -> tuple[int, ...]:
        """Host pages worth a free device page, the hottest first: by mass that they hold for all their readers.

        Args:
            coldest_device: hotness times readers of the device page that would have to go; what is not clearly
                hotter stays. 0 if none has to.
        """
        books = self.books
        pages = np.flatnonzero((books.node_of >= 0).any(axis=1) & (books.readers > 0))
        heat = books.readers[pages] * np.maximum(0.0, books.hotness[pages])
        worth = heat >= _CLEARLY_HOTTER * coldest_device
        pages, heat = pages[worth], heat[worth]
        # Without masses, as with `exact`: what has most readers, then the newest.
        order = np.lexsort((pages, -books.placed_at[pages], -books.readers[pages], -heat))
        return tuple(pages[order[: max(0, num_free_pages)]].tolist())

    def explain(self, page: int) -> tuple[str, ...]:
        """Lines that say where the page's roles lie, and why."""
        books = self.books
        if not books.is_placed(page):
            return (f"page {page} is free",)
        hotness = books.hotness[page]
        known = f"holds {hotness:.4f} of the mass" if hotness >= 0 else "mass never measured"
        lines = [
            f"page {page}: {books.readers[page]} readers, {known}, placed {books.step - books.placed_at[page]} steps "
            f"ago, read {books.step - books.read_at[page]} steps ago"
        ]
        times = 1e3 * books.loads / books.bandwidth
        for column, role in enumerate(ROLES):
            position = int(books.node_of[page, column])
            if position < 0:
                continue
            node, size = books.nodes[position], books.role_bytes[column]
            read = books.share[page, column] * books.readers[page]
            share = self._targets[column, position]
            full = books.used[position] + size > books.capacity[position]
            lines.append(
                f"  {role}: {node.name}{' (emulated)' if node.emulated else ''}, {size / 1024:.0f} KiB, "
                f"{read:.1%} of it read a step; {node.name} is to have {share:.0%} of all {role} and takes "
                f"{times[position]:.2f} ms of the step's {times.max():.2f} ms{', and is full' if full else ''}"
            )
        return tuple(lines)

    def describe(self) -> tuple[str, ...]:
        """Lines of the whole: every node's room, what is read of it, which roles it holds."""
        books = self.books
        lines = [f"a step reads the host's pages in {1e3 * books.read_seconds():.2f} ms"]
        for position, node in enumerate(books.nodes):
            roles = ", ".join(
                f"{books.num_pieces[column, position]} {role}"
                for column, role in enumerate(ROLES)
                if books.num_pieces[column].any()
            )
            lines.append(
                f"  {node.name}{' (emulated)' if node.emulated else ''}, {node.tier}: "
                f"{books.used[position] / 2**30:.2f} of {books.capacity[position] / 2**30:.2f} GiB, "
                f"{books.loads[position] / 2**20:.1f} MiB a step at {node.read_bandwidth / 1e9:.1f} GB/s: "
                f"{1e3 * books.loads[position] / books.bandwidth[position]:.2f} ms; {roles}"
            )
        return tuple(lines)


@dataclass(frozen=True, slots=True)
class _Piece:
    """One role of one page: `number` counts roles of all pages, `density` is what a step reads of a byte."""

    number: int
    size: float
    density: float

    @property
    def load(self) -> float:
        return self.size * self.density


class _Plan:
    """Migrations as they are thought of, with what nodes hold and read once they are made."""

    def __init__(
        self, mapper: SemanticMapper, loads: Floats, used: Floats, budget: float, horizon_steps: int
    ) -> None:
        self._books = mapper.books
        self._loads = loads
        self._used = used
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

    def transfer(self, late: int, ready: int, amount: float) -> None:
        """Move pieces that are read by `amount` bytes a step together, or as near below it as there are.

        Where `ready` is full, what is read least there makes room, if `late` has room for it.
        """
        books = self._books
        # A step's read of a piece is density times size; copying it reads it once here and writes it once there.
        least = (1 + books.bandwidth[late] / books.bandwidth[ready]) / self._horizon
        count = int(self._left // self._smallest)
        light = deque[_Piece]()
        looked = False
        for piece in self._extreme(late, count, densest=True, least=least):
            missing = self._used[ready] + piece.size - books.capacity[ready]
            if missing > 0 and not looked:
                light.extend(self._extreme(ready, 2 * count, densest=False, least=-1.0))
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
                break
            change = piece.load - sum(other.load for other in back)
            copied = piece.size + sum(other.size for other in back)
            if change > amount or copied > self._left:
                continue
            if change < least * copied:
                break
            for _ in back:
                self._move(light.popleft(), ready, late, "read less than what it makes room for")
            self._move(piece, late, ready, "less to read on the slowest node")
            amount -= change
            if self._left < self._smallest:
                return

    def _extreme(self, node: int, count: int, *, densest: bool, least: float) -> list[_Piece]:
        """Up to `count` pieces on the node that have not moved, the one read most, or least, for its bytes first."""
        books = self._books
        if self._density is None:
            self._density = (books.share * books.readers[:, None]).ravel()
        pieces = np.flatnonzero(self._where == node)
        density = self._density[pieces]
        chosen = density >= least
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
            _Piece(number, size, value)
            for number, size, value in zip(
                pieces[order].tolist(), sizes[order].tolist(), density[order].tolist(), strict=True
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
            self._loads[node] += sign * piece.load


def coldest(
    hotness: Sequence[float], num_readers: Sequence[int], age_steps: Sequence[int]
) -> tuple[int, ...]:
    """The order in which device pages should go to the host: positions in the given lists, coldest first.

    By mass for all readers, then by readers, then the longest ago.
    """
    order = range(len(hotness))
    return tuple(sorted(order, key=lambda i: (hotness[i] * num_readers[i], num_readers[i], -age_steps[i], i)))
