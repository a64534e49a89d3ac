"""The guest's memory, for the one who boots it and for the tests inside: what is passed to QEMU must come out again."""

from typing import NamedTuple


class GuestNode(NamedTuple):
    id: int
    mebibytes: int
    has_cpu: bool
    near: int  # the node whose CPUs are nearest
    plugged: bool = False  # into a slot, as memory that can be taken offline


class GuestAccess(NamedTuple):
    distance: int
    latency_ns: int
    bandwidth_mb: int  # a second; reads and writes alike


NODES = (
    GuestNode(0, 2560, True, 0),
    GuestNode(1, 2048, True, 1),
    GuestNode(2, 1024, False, 0),
    GuestNode(3, 1024, False, 1, plugged=True),
)


def access(initiator: GuestNode, target: GuestNode) -> GuestAccess:
    """As of two sockets with an expander each: figures of no particular machine."""
    if initiator == target:
        return GuestAccess(10, 90, 204_800)
    if initiator.has_cpu and target.has_cpu:
        return GuestAccess(21, 140, 102_400)
    if initiator.has_cpu or target.has_cpu:
        cpu, memory = (initiator, target) if initiator.has_cpu else (target, initiator)
        return GuestAccess(24, 250, 32_768) if memory.near == cpu.id else GuestAccess(34, 330, 24_576)
    return GuestAccess(44, 500, 16_384)
