"""In the guest: what is detected is what was passed to QEMU, and pages lie where they were bound, whatever happens."""

import contextlib
import ctypes
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import checks
import torch
from machine import NODES, access

from hybridgen.kernels.arena import Arena, stripe
from hybridgen.kernels.measure import measure
from hybridgen.kernels.memory import NodeFull, NodeUnavailable
from hybridgen.kernels.numa import read_topology

PIECE = (1 << 20,)  # of two-byte elements: 2 MiB
WEIGHTS = Path("/sys/kernel/mm/mempolicy/weighted_interleave")
MIB = 1 << 20


def arena(num_pages: int, name: str = "arena") -> Arena:
    return Arena(num_pages, PIECE, torch.int16, name=name)


def maps_bytes(arena: Arena) -> dict[int, int]:
    """Bytes by node of an arena, by another way than its own: the kernel's list of mappings."""
    totals: dict[int, int] = {}
    begins = {int(line.split("-")[0], 16) for line in Path("/proc/self/maps").read_text().splitlines()}
    assert begins
    for line in Path("/proc/self/numa_maps").read_text().splitlines():
        start = int(line.split()[0], 16)
        if not arena.address <= start < arena.address + arena.num_bytes:
            continue
        size = int((re.search(r"kernelpagesize_kB=(\d+)", line) or ["", "4"])[1]) * 1024
        for node, count in re.findall(r"\bN(\d+)=(\d+)", line):
            totals[int(node)] = totals.get(int(node), 0) + int(count) * size
    return totals


def nodes_and_attributes_are_those_of_the_machine() -> str:
    topology = read_topology()
    assert [node.id for node in topology.nodes] == [node.id for node in NODES]
    cpus = iter(range(len(NODES)))
    seen = []
    for node, given in zip(topology.nodes, NODES, strict=True):
        assert node.cpus == ((next(cpus),) if given.has_cpu else ()), node
        assert 0.9 * given.mebibytes * MIB < node.total_bytes <= given.mebibytes * MIB, node
        assert dict(node.distances) == {other.id: access(given, other).distance for other in NODES}, node
        near, told = access(NODES[given.near], given), node.access
        assert told is not None, node
        assert told.initiators == (given.near,), node
        assert round(told.read_bandwidth / 1e6) == round(told.write_bandwidth / 1e6) == near.bandwidth_mb, (
            node
        )
        assert round(told.read_latency_s * 1e9) == round(told.write_latency_s * 1e9) == near.latency_ns, node
        assert node.tier == ("dram" if given.has_cpu else "cxl"), node
        assert topology.nearest_cpus(node.id) == topology.node(given.near).cpus, node
        speed = f"{near.bandwidth_mb / 1000:g} GB/s {near.latency_ns} ns"
        seen.append(f"{node.id} {node.tier} {speed} kernel tier {node.memory_tier}")
    assert [node.id for node in topology.usable] == [0, 1, 2, 3]
    assert read_topology(tiers={2: "none", 3: "dram"}).node(3).tier == "dram"
    assert [node.id for node in read_topology(tiers={2: "none"}).usable] == [0, 1, 3]
    return "; ".join(seen)


def measuring_binds_to_every_node_and_ends_in_time() -> str:
    measured = measure(read_topology())
    assert [node.node for node in measured.nodes] == [0, 1, 2, 3]
    assert not any(node.problem for node in measured.nodes), measured
    assert [node.cpus for node in measured.nodes] == [(0,), (1,), (0,), (1,)]
    rates = ", ".join(f"node {node.node} {node.best_bandwidth / 1e9:.2f} GB/s" for node in measured.nodes)
    return f"{rates} (emulated processor: says nothing of memory), in {measured.took_s:.1f} s"


def every_role_lies_where_it_was_bound() -> str:
    places = {"index": 0, "v_sums": 1, "k": 1, "v": 2, "more v": 3}
    arenas = {name: arena(16, name) for name in places}
    for name, node in places.items():
        arenas[name].bind(range(16), node)
        arenas[name].pages.fill_(node + 1)
    for name, node in places.items():
        assert arenas[name].nodes_of(range(16)) == ((node,),) * 16, name
        assert arenas[name].node_bytes() == maps_bytes(arenas[name]) == {node: 32 * MIB}, (
            name,
            maps_bytes(arenas[name]),
        )
        assert bool((arenas[name].pages == node + 1).all())
    return ", ".join(f"{name} {arenas[name].node_bytes()}" for name in places)


def pages_of_one_role_lie_on_different_nodes() -> str:
    mixed = arena(64, "mixed")
    wanted = stripe(64, {0: 4, 1: 2, 2: 1, 3: 1})
    for node in range(4):
        mixed.bind([page for page in range(64) if wanted[page] == node], node)
    assert mixed.nodes_of(range(64)) == tuple((node,) for node in wanted)
    assert mixed.node_bytes() == {0: 64 * MIB, 1: 32 * MIB, 2: 16 * MIB, 3: 16 * MIB}
    # Ranges that differ in policy would be mappings of their own.
    num_maps = sum(
        mixed.address <= int(line.split("-")[0], 16) < mixed.address + mixed.num_bytes
        for line in Path("/proc/self/maps").read_text().splitlines()
    )
    assert num_maps <= 2, num_maps
    return f"{mixed.node_bytes()}, {num_maps} mapping(s)"


def a_page_bound_anew_moves_and_holds_nothing_old() -> str:
    pages = arena(4)
    pages.bind([0, 1, 2], 0)
    pages.pages[:3] = 7
    pages.bind([1], 2)
    assert pages.nodes_of(range(4)) == ((0,), (2,), (0,), ())
    assert [int(page[0]) for page in pages.pages] == [7, 0, 7, 0]
    pages.bind([1, 2], 2)  # 1 is there already and keeps what it has
    return str(pages.nodes_of(range(3)))


def pages_migrate_there_and_back_while_a_thread_reads_them() -> str:
    pages = arena(32, "moved")
    pages.bind(range(32), 0)
    for page in range(32):
        pages.pages[page] = torch.arange(PIECE[0]).remainder(251).add(page).to(torch.int16)
    expected = pages.pages.clone()
    reads, wrong, done = 0, 0, threading.Event()

    def read() -> None:
        nonlocal reads, wrong
        while not done.is_set():
            page = reads % 32
            wrong += not torch.equal(pages.pages[page], expected[page])
            reads += 1

    reader = threading.Thread(target=read)
    reader.start()
    begin, moved = time.monotonic(), 0
    for node in (2, 3, 1, 0):
        result = pages.migrate(range(32), node)
        assert not result.failed, result
        assert result.moved_bytes == 64 * MIB, result
        assert pages.nodes_of(range(32)) == ((node,),) * 32
        moved += result.moved_bytes
    seconds = time.monotonic() - begin
    done.set()
    reader.join()
    assert pages.migrate(range(32), 0).moved_bytes == 0
    assert wrong == 0
    assert torch.equal(pages.pages, expected)
    assert reads > 0
    return (
        f"{moved // MIB} MiB over nodes 2, 3, 1, 0 in {seconds:.1f} s; {reads} reads meanwhile, {wrong} wrong"
    )


def a_full_node_is_an_error_with_numbers_and_nothing_is_lost() -> str:
    kept = arena(8, "kept")
    kept.bind(range(8), 2)
    kept.pages.fill_(5)
    filler = arena(600, "filler")
    bound = 0
    try:
        while True:
            filler.bind(range(bound, bound + 25), 2)
            bound += 25
    except NodeFull as error:
        message, missing = str(error), error.missing_bytes
    assert 0 < bound < 600
    assert missing > 0
    assert filler.node_bytes() == {2: bound * 2 * MIB}, (
        filler.node_bytes()
    )  # none of the refused, none elsewhere
    assert kept.node_bytes() == {2: 16 * MIB}
    assert bool((kept.pages == 5).all())
    # The same for moving there: whole pages stay where they were.
    incoming = arena(64, "incoming")
    incoming.bind(range(64), 1)
    incoming.pages.fill_(6)
    result = incoming.migrate(range(64), 2)
    assert result.failed, result
    assert set(result.failed.values()) <= {"ENOMEM", "EBUSY", "EAGAIN"}, result
    where = incoming.nodes_of(range(64))
    assert all(where[page] == ((1,) if page in result.failed else (2,)) for page in range(64)), where
    assert result.moved_bytes == (64 - len(result.failed)) * 2 * MIB
    assert bool((incoming.pages == 6).all())
    reasons = sorted(set(result.failed.values()))
    return f"{bound * 2} MiB bound, then «{message}»; of 64 pages to move there {len(result.failed)} stayed ({reasons})"


def files_in_the_way_are_dropped_for_pages() -> str:
    """A node full of cached files is not full."""
    os.sched_setaffinity(0, {1})  # what this CPU reads is cached on its node
    with open("/dev/vda", "rb", buffering=0) as disk:
        while disk.read(MIB):
            pass
    os.sched_setaffinity(0, {0, 1})
    before = read_topology().node(1)
    num_pages = (before.free_bytes + min(300 * MIB, before.cached_bytes // 2)) // (2 * MIB)
    pages = arena(num_pages, "in place of files")
    pages.bind(range(num_pages), 1)
    assert pages.node_bytes() == {1: num_pages * 2 * MIB}
    free, cached = before.free_bytes // MIB, before.cached_bytes // MIB
    return f"{free} MiB free and {cached} MiB of cached files gave {num_pages * 2} MiB of pages"


def interleaving_follows_the_weights_of_the_system() -> str:
    if not WEIGHTS.is_dir():
        return "this kernel has no weighted interleaving"
    for node, weight in {0: 3, 1: 1, 2: 1, 3: 1}.items():
        (WEIGHTS / f"node{node}").write_text(str(weight))
    spread = Arena(64, (MIB // 2 + 64,), torch.int16, name="spread")  # no huge pages: 64 elements too long
    assert not spread.huge
    assert not spread.interleave({0: 2, 2: 1})
    assert spread.interleave({0: 6, 2: 2})
    spread.pages.fill_(1)
    found = spread.node_bytes()
    assert set(found) == {0, 2}
    assert abs(found[0] / found[2] - 3) < 0.05, found
    even = Arena(64, (MIB // 2 + 64,), torch.int16, name="even")
    assert even.interleave({1: 1, 3: 1})
    even.pages.fill_(1)
    assert abs(even.node_bytes()[1] / even.node_bytes()[3] - 1) < 0.05
    return f"3:1 gave {found}; even gave {even.node_bytes()}"


def in_child(check: Callable[[], str]) -> str:
    """Run in a process of its own, for what cannot be undone."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            text = check()
        except BaseException as error:
            text = f"FAILED {type(error).__name__}: {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    assert not text.startswith("FAILED"), text
    return text


def group(name: str, **values: str) -> Path:
    """A cgroup with these files; processes join by its cgroup.procs."""
    root = Path("/sys/fs/cgroup")
    if not (root / "cgroup.procs").exists():
        assert os.system("mount -t cgroup2 c /sys/fs/cgroup") == 0 or mount_cgroups(root)
    (root / "cgroup.subtree_control").write_text("+cpuset +memory")
    folder = root / name
    folder.mkdir(exist_ok=True)
    for file, value in values.items():
        (folder / file.replace("__", ".")).write_text(value)
    return folder


def mount_cgroups(root: Path) -> bool:
    return ctypes.CDLL(None, use_errno=True).mount(b"c", str(root).encode(), b"cgroup2", 0, None) == 0


def a_cpuset_limits_what_is_used_and_says_so() -> str:
    folder = group("container", cpuset__mems="0-1", cpuset__cpus="1")

    def check() -> str:
        (folder / "cgroup.procs").write_text(str(os.getpid()))
        topology = read_topology()
        assert topology.limits.nodes == (0, 1)
        assert topology.limits.cpus == (1,)
        assert [node.id for node in topology.usable] == [0, 1]
        assert topology.nearest_cpus(0) == (1,)
        told = [warning for warning in topology.warnings if "cpuset" in warning]
        assert len(told) == 2, topology.warnings
        pages = arena(4)
        pages.bind([0], 1)
        try:
            pages.bind([1], 2)
        except NodeUnavailable as error:
            return f"«{told[0]}»; «{error}»"
        return "FAILED: bound to a node outside the cpuset"

    return in_child(check)


def the_kernel_demotes_what_is_not_locked_and_leaves_what_is() -> str:
    folder = group("pressed")

    def check() -> str:
        (folder / "cgroup.procs").write_text(str(os.getpid()))
        Path("/sys/kernel/mm/numa/demotion_enabled").write_text("true")
        loose, locked = arena(32, "loose"), arena(32, "locked")
        assert locked.lock()
        for pages in (loose, locked):
            pages.bind(range(32), 0)
            pages.pages.fill_(3)
        # Where it frees less than it was asked to, writing fails; it may all the same have moved what it could.
        with contextlib.suppress(BlockingIOError):
            (folder / "memory.reclaim").write_text("64M")
        found = loose.node_bytes()
        assert locked.node_bytes() == {0: 64 * MIB}, locked.node_bytes()
        assert sum(found.values()) == 64 * MIB, found
        assert any(node != 0 for node in found), found
        assert bool((loose.pages == 3).all())
        return f"bound to node 0, then pressed: not locked {found}, locked {locked.node_bytes()}"

    try:
        return in_child(check)
    finally:
        Path("/sys/kernel/mm/numa/demotion_enabled").write_text("false")


def a_node_taken_offline_is_an_error_and_its_pages_survive() -> str:
    pages = arena(16, "kept")
    pages.bind(range(16), 3)
    for page in range(16):
        pages.pages[page] = page
    blocks = sorted(Path("/sys/devices/system/node/node3").glob("memory[0-9]*"))
    for block in blocks:
        (block / "state").write_text("offline")
    topology = read_topology()
    assert topology.node(3).total_bytes == 0
    assert 3 not in [node.id for node in topology.usable]
    told = [warning for warning in topology.warnings if "offline" in warning]
    assert len(told) == 1, topology.warnings
    where = pages.node_bytes()
    assert 3 not in where
    assert all(bool((pages.pages[page] == page).all()) for page in range(16))
    messages = []
    for refused in (lambda: pages.bind([0], 3), lambda: pages.migrate([0], 3)):
        try:
            refused()
        except NodeUnavailable as error:
            messages.append(str(error))
    assert len(messages) == 2
    for block in blocks:
        (block / "state").write_text("online_movable")
    pages.migrate(range(16), 3)
    assert pages.node_bytes() == {3: 32 * MIB}
    quoted = f"«{told[0]}»; «{messages[0]}»"
    return f"{len(blocks)} blocks offline, pages went to {where}; {quoted}; online again, moved back"


if __name__ == "__main__":
    torch.set_num_threads(1)  # OpenMP's threads do not live on in the children that some checks fork
    checks.run(
        [
            nodes_and_attributes_are_those_of_the_machine,
            measuring_binds_to_every_node_and_ends_in_time,
            every_role_lies_where_it_was_bound,
            pages_of_one_role_lie_on_different_nodes,
            a_page_bound_anew_moves_and_holds_nothing_old,
            pages_migrate_there_and_back_while_a_thread_reads_them,
            a_full_node_is_an_error_with_numbers_and_nothing_is_lost,
            files_in_the_way_are_dropped_for_pages,
            interleaving_follows_the_weights_of_the_system,
            a_cpuset_limits_what_is_used_and_says_so,
            the_kernel_demotes_what_is_not_locked_and_leaves_what_is,
            a_node_taken_offline_is_an_error_and_its_pages_survive,
        ]
    )
