"""This machine as the scheduler's plain data: what the kernel says of its memory, and what was measured of it."""

from collections.abc import Mapping

from hybridgen.configs.settings import MemoryTier
from hybridgen.kernels.measurements import NOT_MEASURED, Measurements, measured_nodes
from hybridgen.kernels.numa import Access, Topology, format_list, gibibytes, read_topology
from hybridgen.scheduler.machine import MemoryNode, Tier

__all__ = [
    "Access",
    "Measurements",
    "Topology",
    "describe_memory",
    "format_list",
    "gibibytes",
    "memory_nodes",
]  # what the server shows comes from the kernels through here


def describe_memory(
    tiers: Mapping[int, MemoryTier], *, measured: bool, refresh: bool = False
) -> tuple[Topology, Measurements]:
    """The machine's memory, and figures of its nodes: from the cache, or measured now.

    Args:
        tiers: the settings' `memory_tiers`.
        measured: False leaves the figures out and costs no time.
        refresh: measure, whatever the cache has.
    """
    topology = read_topology(tiers=tiers)
    if not measured:
        return topology, NOT_MEASURED
    # Here, not above: it brings torch along, which takes longer than everything else here.
    from hybridgen.kernels.measure import measurements_of

    return topology, measurements_of(topology, refresh=refresh)


def memory_nodes(topology: Topology, measurements: Measurements) -> tuple[MemoryNode, ...]:
    """The nodes that may hold KV, DRAM first; those whose speed nothing tells are left out."""
    return tuple(
        MemoryNode(
            node.id,
            node.name,
            Tier(node.tier),
            read_bandwidth=node.read_bandwidth,
            latency_s=node.latency_s,
            capacity_bytes=node.capacity_bytes,
        )
        for node in measured_nodes(topology, measurements)
    )
