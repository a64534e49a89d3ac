"""What each memory node does, measured: bytes a second by number of threads, and the time of one dependent read.

Figures are kept in the user's cache, by everything that they depend on, since they take seconds to get.
"""

import hashlib
import logging
import os
import platform
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import torch
from torch import Tensor

import hybridgen
from hybridgen.kernels import _cpu
from hybridgen.kernels.arena import Arena
from hybridgen.kernels.isa import select_isa
from hybridgen.kernels.measurements import Measurements, NodeMeasurement
from hybridgen.kernels.memory import PlacementError
from hybridgen.kernels.numa import CPUS, Node, Topology, cores, format_list, free_bytes, gibibytes
from hybridgen.kernels.pool import AttentionPool

_log = logging.getLogger(__name__)

MOST_SECONDS = 2.4  # for a whole machine; with setting up it stays under 3
_PIECE_BYTES = 32 << 20  # that buffers are made of
_LEAST_PIECES, _MOST_PIECES = (
    8,
    64,
)  # 256 MiB, more where caches are as large, less where memory or time is short
_READS = 1 << 16  # of a chain
_SECONDS_PER_COUNT = 0.05


def measurements_of(topology: Topology, *, refresh: bool = False, folder: Path | None = None) -> Measurements:
    """From the cache, or measured now and put there.

    Args:
        refresh: measure, whatever the cache has.
        folder: the cache; default: the user's.
    """
    key = fingerprint(topology)
    path = (folder or cache_folder()) / f"memory-{key}.json"
    if not refresh and (kept := _load(path, key)) is not None:
        return kept
    measurements = measure(topology)
    if disturbed := [node.node for node in measurements.nodes if node.was_disturbed]:
        _log.warning(
            "nodes %s were measured while other work ran on their CPUs; the figures are too low and are not kept",
            format_list(disturbed),
        )
    else:
        _save(path, measurements)
    return measurements


def measure(topology: Topology) -> Measurements:
    """Measure each node that may hold KV, one after the other; in under 3 seconds for up to four nodes.

    The threads are pinned; other work on their CPUs meanwhile makes the figures worse.
    """
    begin = time.perf_counter()
    nodes: list[NodeMeasurement] = []
    for position, node in enumerate(topology.usable):
        left = MOST_SECONDS - (time.perf_counter() - begin)
        nodes.append(_measure_apart(topology, node, left / (len(topology.usable) - position)))
    return Measurements(fingerprint(topology), time.time(), time.perf_counter() - begin, tuple(nodes))


def fingerprint(topology: Topology) -> str:
    """Of everything that the figures depend on: processor, nodes, limits, kernel, our own version and instructions."""
    facts = {
        "cpu": topology.cpu_model,
        # To 64 MiB: what the kernel takes for itself differs from boot to boot.
        "nodes": [(node.id, node.cpus, node.tier, node.total_bytes >> 26) for node in topology.nodes],
        "limits": (topology.limits.cpus, topology.limits.nodes, topology.limits.cpu_quota),
        "kernel": topology.kernel.release,
        "huge pages": topology.kernel.transparent_huge_pages,
        "machine": platform.machine(),
        "hybridgen": hybridgen.__version__,
        "isa": select_isa(),
    }
    return hashlib.sha256(msgspec.json.encode(facts, order="sorted")).hexdigest()[:16]


def cache_folder() -> Path:
    """Where the user's programs keep what they can make again (XDG's base directories)."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if given.startswith("/") else Path.home() / ".cache") / "hybridgen"


def _measure_apart(topology: Topology, node: Node, seconds: float) -> NodeMeasurement:
    """In a thread of its own, since the thread that waits works too and is pinned for it."""
    found: list[NodeMeasurement] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(_measure_node(topology, node, seconds))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=f"measure-node-{node.id}")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return found[0]


def _measure_node(topology: Topology, node: Node, seconds: float) -> NodeMeasurement:
    node_of = {cpu: other.id for other in topology.nodes for cpu in other.cpus}
    by_core = cores(topology.nearest_cpus(node.id), node_of)
    cpus = tuple(core[0] for core in by_core)
    end = time.perf_counter() + seconds
    free = free_bytes(node.id) or node.free_bytes
    wanted = max(_LEAST_PIECES, min(_MOST_PIECES, 2 * _shared_cache_bytes(cpus) // _PIECE_BYTES))
    most = min(wanted, free // 4 // _PIECE_BYTES)  # leaves the node most of what it has
    if most == 0:
        problem = (
            f"node {node.id} has {gibibytes(free)} free: too little to measure it with, which takes "
            f"{gibibytes(4 * _PIECE_BYTES)}"
        )
        return NodeMeasurement(node.id, cpus, (), 0.0, 0, problem=problem)
    os.sched_setaffinity(0, cpus[:1])
    begin, num_pieces = time.perf_counter(), 0
    try:
        arena = Arena(most, (_PIECE_BYTES,), torch.uint8, name="measuring", nodes=topology.limits.nodes)
        while num_pieces < most and (num_pieces == 0 or time.perf_counter() - begin < seconds / 3):
            arena.bind([num_pieces], node.id)
            num_pieces += 1
    except (OSError, PlacementError) as error:
        return NodeMeasurement(node.id, cpus, (), 0.0, 0, problem=f"node {node.id}: {error}")
    buffer = arena.pages[:num_pieces]
    begin, worked = time.perf_counter(), time.thread_time()
    latency = _cpu.chase(buffer.data_ptr(), buffer.nbytes, _READS)
    share = min(1.0, (time.thread_time() - worked) / (time.perf_counter() - begin))
    bandwidth: dict[int, float] = {}
    for count in _counts(len(cpus)):
        if bandwidth and time.perf_counter() + _SECONDS_PER_COUNT > end:
            break
        # The caller is one of the threads: it sits where the pool's thread for it would.
        os.sched_setaffinity(0, cpus[:1])
        with AttentionPool(count, cpus=cpus[:count], nodes=[node.id] * count) as pool:
            bandwidth[count] = _read_bandwidth(
                pool, buffer, min(_SECONDS_PER_COUNT, end - time.perf_counter())
            )
    return NodeMeasurement(node.id, cpus, tuple(sorted(bandwidth.items())), latency, buffer.nbytes, share)


def _shared_cache_bytes(cpus: Sequence[int], root: Path = CPUS) -> int:
    """Of the caches that cores share, together; 0 where the system does not say."""
    sizes: dict[str, int] = {}
    for cpu in cpus:
        folder = root / f"cpu{cpu}/cache/index3"
        try:
            sizes[(folder / "shared_cpu_list").read_text()] = int(
                (folder / "size").read_text().strip().rstrip("K")
            )
        except (OSError, ValueError):
            continue
    return 1024 * sum(sizes.values())


def _read_bandwidth(pool: AttentionPool, buffer: Tensor, seconds: float) -> float:
    """Bytes a second of the best pass of at least one: whatever disturbs a pass only makes it slower."""
    best = float("inf")
    end = time.perf_counter() + seconds
    while True:
        begin = time.perf_counter()
        pool.plain_read(buffer)
        now = time.perf_counter()
        best = min(best, now - begin)
        if now + best > end:
            return buffer.nbytes / best


def _counts(num_cores: int) -> Sequence[int]:
    """All cores, one, and powers of two between: in the order of what is most wanted, should time run out."""
    powers = [1 << power for power in range(num_cores.bit_length()) if 1 < 1 << power < num_cores]
    return [*dict.fromkeys((num_cores, 1)), *sorted(powers, reverse=True)]


def _load(path: Path, key: str) -> Measurements | None:
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=Measurements)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        _log.warning("%s cannot be read (%s); measuring again", path, error)
        return None
    if kept.fingerprint != key:
        _log.warning("%s is of another machine; measuring again", path)
        return None
    return kept


def _save(path: Path, measurements: Measurements) -> None:
    """Whole or not at all; whoever may not write there measures again next time."""
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            temporary = file.name
            file.write(msgspec.json.format(msgspec.json.encode(measurements), indent=1) + b"\n")
        os.replace(temporary, path)
    except OSError as error:
        _log.warning("measurements could not be kept in %s: %s", path, error)
        if temporary:
            Path(temporary).unlink(missing_ok=True)
