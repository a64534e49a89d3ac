"""Which piece of a host page lies on which node, by how it is read. Plain counters, no KV.

A step ends when the slowest node has been read, so the mapper minimises max over nodes of bytes read / bandwidth, within
capacities. That K lies in DRAM and V in CXL memory is a result where V is read sparsely, and stripes are one where it is not.
"""

from collections.abc import Sequence

from hybridgen.scheduler.machine import MemoryNode
from hybridgen.scheduler.placements import Migration, PageReads, PageShape, ReadPattern


class SemanticMapper:
    """See the module; the interface is `placements.Placement`, and what is below.

    Args:
        nodes: host memories.
        num_pages: host pages that there can be.
    """

    def __init__(
        self, nodes: Sequence[MemoryNode], shape: PageShape, pattern: ReadPattern, num_pages: int
    ) -> None: ...

    def place(self, pages: Sequence[int], *, readers: int = 1) -> tuple[tuple[int, ...], ...]:
        """See `Placement.place`."""
        raise NotImplementedError

    def release(self, pages: Sequence[int]) -> None:
        raise NotImplementedError

    def set_readers(self, pages: Sequence[int], readers: Sequence[int]) -> None:
        raise NotImplementedError

    def observe(self, reads: PageReads) -> None:
        raise NotImplementedError

    def plan(self, byte_budget: int) -> tuple[Migration, ...]:
        raise NotImplementedError

    def apply(self, migrations: Sequence[Migration]) -> None:
        raise NotImplementedError

    def node_read_bytes(self) -> tuple[float, ...]:
        raise NotImplementedError

    def promotions(self, num_free_pages: int, *, coldest_device: float = 0.0) -> tuple[int, ...]:
        """Host pages worth a free device page, the hottest first.

        Args:
            coldest_device: hotness of the device page that would have to go; those not clearly hotter stay.
        """
        raise NotImplementedError

    def explain(self, page: int) -> tuple[str, ...]:
        """Lines that say where the page's roles lie, and why."""
        raise NotImplementedError

    def describe(self) -> tuple[str, ...]:
        """Lines of the whole: every node's room, what is read of it, which roles it holds."""
        raise NotImplementedError


def coldest(
    hotness: Sequence[float], num_readers: Sequence[int], age_steps: Sequence[int]
) -> tuple[int, ...]:
    """The order in which device pages should go to the host: positions in the given lists, coldest first."""
    raise NotImplementedError
