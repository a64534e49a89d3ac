"""What a machine can do, as plain data: the memories that hold KV, the processors that read them. Measures nothing.

The controller, the mapper and the simulator decide by these numbers, wherever they come from: measured on this machine
(`kernels/numa.py`), or read from a description (`configs/machines/`).
"""

from dataclasses import dataclass
from enum import StrEnum


class Tier(StrEnum):
    """Where a memory stands: on the device, beside the CPUs, or behind a CXL link."""

    DEVICE = "device"
    DRAM = "dram"
    CXL = "cxl"


class Role(StrEnum):
    """What a piece of a host page is for, which says how it is read."""

    INDEX = "index"  # int8 K, scanned whole every step by policies that select
    V_SUMS = "v_sums"  # sums of V over a page, a few of them read every step
    K = "k"  # exact keys
    V = "v"  # exact values


@dataclass(frozen=True, slots=True)
class MemoryNode:
    """A memory that holds KV pages, as its nearest CPUs (the device's own memory: the device) see it.

    Attributes:
        id: the kernel's number of the NUMA node; -1 for the device's memory. Emulated nodes have numbers of their own.
        read_bandwidth: bytes a second with all the threads that may read it.
        latency_s: of one dependent read.
        capacity_bytes: that KV may take.
        emulated: made of another node's memory and slowed down; whatever shows a figure of it says so.
    """

    id: int
    name: str
    tier: Tier
    read_bandwidth: float
    latency_s: float
    capacity_bytes: int
    emulated: bool = False

    @property
    def label(self) -> str:
        """Its name for people."""
        return f"{self.name} (emulated)" if self.emulated else self.name

    def __post_init__(self) -> None:
        if self.read_bandwidth <= 0 or self.latency_s < 0 or self.capacity_bytes < 0:
            raise ValueError(
                f"node {self.name}: {self.read_bandwidth} bytes/s, {self.latency_s} s, {self.capacity_bytes} bytes"
            )


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or whatever stands for one.

    Attributes:
        link_bandwidth: bytes a second between host memory and the device, one way.
        matmul_flops: dense products of the weights' dtype, floating-point operations a second.
    """

    name: str
    memory: MemoryNode
    link_bandwidth: float
    matmul_flops: float


@dataclass(frozen=True, slots=True)
class Machine:
    """
    Attributes:
        device: None where linear layers run on the CPUs too.
        nodes: host memories, DRAM first; at least one.
        num_cores: that attend host pages.
        core_flops: of one core in attention: multiply-adds with keys and values count two.
        source: where the numbers come from.
    """

    name: str
    device: Device | None
    nodes: tuple[MemoryNode, ...]
    num_cores: int
    core_flops: float
    source: str

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ValueError(f"machine {self.name} has no host memory")
        if self.num_cores < 1 or self.core_flops <= 0:
            raise ValueError(f"machine {self.name}: {self.num_cores} cores of {self.core_flops} flop/s")
