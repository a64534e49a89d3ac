"""The threads that attend: which CPUs they are pinned to, and what they say of their work.

Knows nothing of attention. In csrc/, `pool.h` has the threads and the jobs that C++ code gives them.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from torch import Tensor

from hybridgen.configs.settings import allowed_cpus
from hybridgen.kernels import _cpu
from hybridgen.kernels.isa import select_isa
from hybridgen.kernels.numa import cores, node_of_cpus


@dataclass(frozen=True, slots=True)
class PoolStats:
    """What a pool has done since its last `reset_stats`, per layer and group of threads (NUMA node).

    Bytes, items and busy time are those of the group's items, whoever ran them; waiting time is that of the
    group's threads: from a thread's last item in a job to its next one or the end of the job.
    """

    bytes: np.ndarray  # [layers, groups]  int64; what items said they read
    items: np.ndarray  # [layers, groups]  int64
    busy_s: np.ndarray  # [layers, groups]  in items, summed over threads
    waiting_s: np.ndarray  # [layers, groups]  summed over the pool's threads, callers not among them
    blocked_s: np.ndarray  # [layers]  of callers in `wait`, less what they spent in items


class TraceEvent(NamedTuple):
    """An unbroken run of items of one phase of a job, or a caller's wait for a job."""

    thread: int  # from `num_threads` on: callers
    layer: int  # -1: a job of no layer
    name: str  # of the job; "wait": a caller's wait, the items that it ran meanwhile included
    phase: int  # -1 for "wait"
    job: int  # counted from 1 in the order of submission; 0: run alone in the caller
    begin_ns: int  # as time.perf_counter_ns counts
    end_ns: int


class AttentionPool:
    """Threads that attend, one pinned to each core, asleep between jobs; the thread that waits works too.

    Threads of one NUMA node are a group: they take the items of their node first and then those of the others.
    Any number of Python threads may use a pool. Jobs begin in the order of submission. After a fork the
    child's pool works in the calling thread alone. `close` (or the end of a `with` block) ends the threads.

    Args:
        num_threads: including the caller; default: one for each core of `cpus`, but not more than the CPU
            quota of this process's cgroup allows.
        cpus: where to pin; default: the CPUs this process may use, which a cgroup's cpuset limits, one
            of each core first, and taking turns between the NUMA nodes.
        nodes: the NUMA node of each of `cpus`; default: as the system says.
        is_apart: the caller has a CPU and work of its own. It is none of `num_threads`, which all work on what is
            submitted, however little it is; if it polls `Ticket.is_done` it never helps.
        isa: a name of `kernels/isa.py`; default: HYBRIDGEN_CPU_ISA, else the fastest supported.
    """

    def __init__(
        self,
        num_threads: int | None = None,
        *,
        cpus: Sequence[int] | None = None,
        nodes: Sequence[int] | None = None,
        isa: str | None = None,
        is_apart: bool = False,
    ) -> None:
        node_of = node_of_cpus()
        if cpus is None:
            if nodes is not None:
                raise ValueError("nodes are given for given CPUs")
            by_core = cores(os.sched_getaffinity(0), node_of)
            cpus = _core_by_core(by_core)
            default_threads = min(len(by_core), allowed_cpus())
        else:
            default_threads = len(cpus)
        if not cpus:
            raise ValueError("a pool needs at least one CPU")
        if nodes is None:
            nodes = [node_of.get(cpu, 0) for cpu in cpus]
        if len(nodes) != len(cpus):
            raise ValueError(f"{len(nodes)} nodes are given for {len(cpus)} CPUs")
        if num_threads is None:
            num_threads = default_threads
        if num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}; a pool needs at least 1")
        if is_apart:
            num_threads += 1  # what a pool counts as its caller's
        # More threads than CPUs share them in turn; useful to nobody but tests.
        places = sorted(
            ((nodes[i % len(cpus)], cpus[i % len(cpus)]) for i in range(num_threads)),
            key=lambda place: place[0],
        )
        self.cpus = tuple(cpu for _, cpu in places)
        self.nodes = tuple(sorted({node for node, _ in places}))  # [groups]
        self.num_threads = num_threads
        self.num_groups = len(self.nodes)
        self.isa = select_isa(isa)
        self.handle = _cpu.Pool(self.cpus, [self.nodes.index(node) for node, _ in places], self.isa)
        if is_apart:
            self.handle.leave_caller_alone()

    @staticmethod
    def default_cpus() -> tuple[int, ...]:
        """The CPUs that this process may use, one of each core first, and taking turns between the NUMA nodes, as many
        as its cgroup's quota allows threads."""
        by_core = cores(os.sched_getaffinity(0), node_of_cpus())
        return tuple(_core_by_core(by_core)[: min(len(by_core), allowed_cpus())])

    def stats(self) -> PoolStats:
        stats = self.handle.stats()
        shape = (stats.num_layers, self.num_groups)

        def array(values: Sequence[int]) -> np.ndarray:
            return np.array(values, dtype=np.int64).reshape(shape)

        return PoolStats(
            bytes=array(stats.bytes),
            items=array(stats.items),
            busy_s=array(stats.busy_ns) / 1e9,
            waiting_s=array(stats.waiting_ns) / 1e9,
            blocked_s=np.array(stats.blocked_ns, dtype=np.int64) / 1e9,
        )

    def reset_stats(self) -> None:
        self.handle.reset_stats()

    def start_trace(self, max_events: int = 1 << 15) -> None:
        """Note what each thread does from now on; of more than `max_events` per thread the last are kept.

        Waits for the jobs in flight, as `stop_trace` does.
        """
        self.handle.start_trace(max_events)

    def stop_trace(self) -> list[TraceEvent]:
        """What was done since `start_trace`, in the order of beginning."""
        return [TraceEvent(*event) for event in self.handle.stop_trace()]

    def plain_read(self, tensor: Tensor) -> int:
        """Read a tensor with all threads as fast as they can: the speed that attention is compared with.

        Args:
            tensor: in host memory, contiguous. Bytes past its last multiple of 8 are not read.

        Returns:
            The sum of its 64-bit words, modulo 2^64.
        """
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError("plain_read takes a contiguous tensor in host memory")
        return self.handle.read(tensor.data_ptr(), tensor.nbytes)

    def close(self) -> None:
        """End the threads after the jobs in flight; what is submitted afterwards runs in the calling thread."""
        self.handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _core_by_core(by_core: Sequence[Sequence[int]]) -> list[int]:
    """The first CPU of each core, then the second ones."""
    return [cpu for turn in zip_longest(*by_core) for cpu in turn if cpu is not None]
