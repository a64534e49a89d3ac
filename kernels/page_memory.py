"""Where a tier's pages lie and what is read of them, as the threads that attend see it.

A page has four roles, each of which may lie on a memory node of its own. Nodes are numbered from 0 here, whatever the
kernel calls them. A node may be emulated: what is read of it then takes as long as its bandwidth and latency say, a
token bucket for each node and all threads, charged when an item of work ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from hybridgen.kernels import _cpu

ROLES = ("index", "v_sums", "k", "v")  # rows of the labels, as csrc/memory.h has them


@dataclass(frozen=True, slots=True)
class NodeSpeed:
    """Of an emulated node; zeros: the node is as fast as it is.

    Attributes:
        bandwidth: bytes a second, of all threads together.
        latency_s: added to every item of work that reads of the node.
    """

    bandwidth: float = 0.0
    latency_s: float = 0.0


class NodeReads(NamedTuple):
    """What was read of each node since it was last asked."""

    bytes: npt.NDArray[np.int64]  # [nodes]
    delayed_s: npt.NDArray[np.float64]  # [nodes]  that emulation held threads up, summed over them


class PageMemory:
    """Labels and counts of a tier's pages.

    Attributes:
        num_pages: of the tier.
        has_heat: whether `mass` and `tokens` are kept.
        labels: uint8 [4, num_pages]  the node of each role of each page. Not to be changed while attention is in
            flight.
        mass: float32 [num_pages]  softmax mass that was read of a page, averaged over the query heads of a KV head and
            added up over layers, KV heads and sequences; policies that read everything do not know it, and add nothing.
        tokens: float32 [num_pages]  tokens whose V was read, likewise.

    Raises:
        ValueError: there are no nodes, or more than 32.
    """

    def __init__(
        self, num_pages: int, speeds: Sequence[NodeSpeed] = (NodeSpeed(),), *, with_heat: bool = True
    ) -> None:
        self.labels: npt.NDArray[np.uint8] = np.zeros((len(ROLES), num_pages), dtype=np.uint8)
        self._heat: npt.NDArray[np.float32] = np.zeros((2, num_pages), dtype=np.float32)
        self.mass: npt.NDArray[np.float32] = self._heat[0]
        self.tokens: npt.NDArray[np.float32] = self._heat[1]
        self.num_pages = num_pages
        self.has_heat = with_heat
        self.num_nodes = len(speeds)
        self.handle = _cpu.PageMemory(
            num_pages,
            self.labels.ctypes.data,
            self._heat.ctypes.data if with_heat else 0,
            [speed.bandwidth for speed in speeds],
            [speed.latency_s for speed in speeds],
        )

    def set_speed(self, node: int, speed: NodeSpeed) -> None:
        """Let a node be as slow as this from now on. Not while attention is in flight.

        Raises:
            ValueError: there is no such node, or the speed is negative.
        """
        self.handle.set_speed(node, speed.bandwidth, speed.latency_s)

    def take_reads(self) -> NodeReads:
        """Of each node since the last call; any time."""
        num_bytes, delayed_ns = self.handle.take()
        return NodeReads(np.array(num_bytes, dtype=np.int64), np.array(delayed_ns) / 1e9)

    def clear_heat(self) -> None:
        """Forget `mass` and `tokens`. Not while attention is in flight."""
        self._heat[:] = 0
