"""Figures of this machine's memory nodes, as data; `kernels/measure.py` gets them."""

import logging
from dataclasses import dataclass

from hybridgen.kernels.numa import Topology

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NodeMeasurement:
    """
    Attributes:
        cpus: that read, the node's nearest, one of each core first.
        read_bandwidth: (threads, bytes a second), by rising number of threads; the last is all the cores. Empty where
            nothing could be measured.
        latency_s: of a read that the next one waits for, in no cache, address translation included.
        buffer_bytes: that were read through.
        cpu_share: of the time in which latency was measured, the part that the thread had its CPU; 1: undisturbed.
        problem: why there are no figures; else empty.
    """

    node: int
    cpus: tuple[int, ...]
    read_bandwidth: tuple[tuple[int, float], ...]
    latency_s: float
    buffer_bytes: int
    cpu_share: float = 1.0
    problem: str = ""

    @property
    def was_disturbed(self) -> bool:
        return self.cpu_share < 0.9

    @property
    def best_bandwidth(self) -> float:
        """Bytes a second with the best number of threads.

        Raises:
            ValueError: nothing could be measured.
        """
        if not self.read_bandwidth:
            raise ValueError(self.problem)
        return max(bandwidth for _, bandwidth in self.read_bandwidth)


@dataclass(frozen=True, slots=True)
class Measurements:
    """
    Attributes:
        fingerprint: of what they depend on; equal fingerprints, equal machines.
        measured_at: seconds since 1970, UTC.
        took_s: for all nodes.
    """

    fingerprint: str
    measured_at: float
    took_s: float
    nodes: tuple[NodeMeasurement, ...]

    def node(self, number: int) -> NodeMeasurement:
        """
        Raises:
            KeyError: the node was not measured.
        """
        for node in self.nodes:
            if node.node == number:
                return node
        raise KeyError(f"node {number} was not measured")


NOT_MEASURED = Measurements("", 0.0, 0.0, ())


@dataclass(frozen=True, slots=True)
class MeasuredNode:
    """What a plan needs to know of a node; figures from the firmware where nothing could be measured say so."""

    id: int
    name: str
    tier: str
    read_bandwidth: float  # bytes a second
    latency_s: float
    capacity_bytes: int  # free now, files' cached pages included
    source: str


def measured_nodes(topology: Topology, measurements: Measurements) -> tuple[MeasuredNode, ...]:
    """The nodes that may hold KV, DRAM first, each with its best figures.

    A node that could be neither measured nor is described by the firmware is left out, and logged.
    """
    found: list[MeasuredNode] = []
    for node in topology.usable:
        measured = next((item for item in measurements.nodes if item.node == node.id), None)
        access = node.access
        if measured is not None and measured.read_bandwidth:
            bandwidth, latency, source = measured.best_bandwidth, measured.latency_s, "measured"
        elif access is not None and access.read_bandwidth:
            bandwidth, latency, source = access.read_bandwidth, access.read_latency_s, "firmware"
        else:
            reason = "it was not measured" if measured is None else measured.problem
            _log.warning("node %d is left out of plans, since its speed is not known: %s", node.id, reason)
            continue
        name, capacity = f"{node.tier}{node.id}", node.free_bytes + node.cached_bytes
        found.append(MeasuredNode(node.id, name, node.tier, bandwidth, latency, capacity, source))
    return tuple(found)
