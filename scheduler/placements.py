"""Where the four roles of host pages lie, and rules that say where they should. Plain counters, no KV.

`Books` has what is true of every rule: which piece lies on which node, what each node holds and is asked to read.
A *piece* is one role of one page. The rules here are those that others use; `mapper.py` has ours, with the same interface.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hybridgen.scheduler.machine import MemoryNode, Role

ROLES = tuple(Role)  # the order of columns


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
    """The share of each role's bytes that one reader of a page reads in a step, as long as the page has not been measured.

    `exact`: (0, 0, 1, 1). `mass`: index 1, a few of the sums, the same small share of K and V. `hybridgen`: K 1, V sparse.
    """

    index: float
    v_sums: float
    k: float
    v: float

    @property
    def shares(self) -> tuple[float, float, float, float]:
        """In the order of `ROLES`."""
        return self.index, self.v_sums, self.k, self.v


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

    def place(self, pages: Sequence[int], *, readers: int = 1) -> tuple[tuple[int, ...], ...]:
        """Take in new pages; for each the ids of the nodes of its roles, in the order of `ROLES`.

        Args:
            readers: running sequences that hold each of them.

        Raises:
            NoRoom: routinely; nothing was placed.
        """
        ...

    def release(self, pages: Sequence[int]) -> None:
        """The pages are free: forget where they lay."""
        ...

    def set_readers(self, pages: Sequence[int], readers: Sequence[int]) -> None:
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


@dataclass(frozen=True, slots=True)
class PaperRule:
    """Placeholder of the rule K -> DRAM, V -> CXL; see `Placement`."""

    nodes: tuple[MemoryNode, ...]
    shape: PageShape
    pattern: ReadPattern
    num_pages: int
