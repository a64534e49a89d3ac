import math
from pathlib import Path

import msgspec
import pytest

from hybridgen.configs.settings import MemoryTier
from hybridgen.kernels.numa import Topology, format_list, gibibytes, parse_list, read_topology

GIB_KB = 1 << 20


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")


def add_node(
    root: Path,
    number: int,
    *,
    cpus: str = "",
    total_gib: int = 64,
    free_gib: int = 32,
    distances: str = "10",
    hmat: tuple[int, int, int] | None = None,
) -> None:
    """hmat: nearest initiator, MB/s, ns."""
    folder = f"sys/devices/system/node/node{number}"
    write(root, f"{folder}/cpulist", cpus)
    write(root, f"{folder}/distance", distances)
    write(
        root,
        f"{folder}/meminfo",
        f"Node {number} MemTotal:  {total_gib * GIB_KB} kB\nNode {number} MemFree:   {free_gib * GIB_KB} kB\n"
        f"Node {number} Active(file):   {GIB_KB} kB\nNode {number} Inactive(file):   {2 * GIB_KB} kB",
    )
    if hmat is not None:
        near, bandwidth, latency = hmat
        for kind in ("access0", "access1"):
            initiators = f"{folder}/{kind}/initiators"
            (root / initiators / f"node{near}").mkdir(parents=True)
            for name, value in (("bandwidth", bandwidth), ("latency", latency)):
                write(root, f"{initiators}/read_{name}", str(value))
                write(root, f"{initiators}/write_{name}", str(value // 2))


def set_process(
    root: Path, *, cpus: str, nodes: str, memlock: str = "unlimited", capabilities: int = 0
) -> None:
    write(
        root,
        "proc/self/status",
        f"Name:\thybridgen\nCapEff:\t{capabilities:016x}\nCpus_allowed_list:\t{cpus}\nMems_allowed_list:\t{nodes}",
    )
    write(
        root,
        "proc/self/limits",
        f"Limit       Soft Limit   Hard Limit   Units\nMax locked memory  {memlock}  x  bytes",
    )


def four_nodes(root: Path, *, slow: int = 32_768, fast: int = 204_800) -> None:
    """Two sockets, and two nodes without CPUs behind them."""
    add_node(root, 0, cpus="0-3", distances="10 21 24 34", hmat=(0, fast, 90))
    add_node(root, 1, cpus="4-7", distances="21 10 34 24", hmat=(1, fast, 90))
    add_node(root, 2, distances="24 34 10 44", hmat=(0, slow, 250))
    add_node(root, 3, distances="34 24 44 10", hmat=(1, slow, 250))
    set_process(root, cpus="0-7", nodes="0-3")


def tiers(topology: Topology) -> list[MemoryTier]:
    return [node.tier for node in topology.nodes]


def test_a_machine_that_tells_nothing_has_one_node_with_all_there_is(tmp_path: Path) -> None:
    write(tmp_path, "sys/devices/system/cpu/online", "0-3")
    write(tmp_path, "proc/meminfo", "MemTotal:       1048576 kB\nMemFree:  524288 kB\nSwapTotal: 0 kB")
    topology = read_topology(tmp_path)
    (node,) = topology.nodes
    assert (node.id, node.cpus, node.total_bytes, node.free_bytes) == (0, (0, 1, 2, 3), 1 << 30, 1 << 29)
    assert node.tier == "dram"
    assert topology.usable == (node,)
    assert topology.nearest_cpus(0) == (0, 1, 2, 3)
    assert topology.warnings == ()
    assert topology.limits.memlock_bytes == topology.limits.cpu_quota == math.inf


def test_two_sockets_are_two_dram_nodes_with_their_own_cpus(tmp_path: Path) -> None:
    add_node(tmp_path, 0, cpus="0,2,4", distances="10 21")
    add_node(tmp_path, 1, cpus="1,3,5", distances="21 10")
    topology = read_topology(tmp_path)
    assert tiers(topology) == ["dram", "dram"]
    assert topology.node(0).distances == ((0, 10), (1, 21))
    assert [topology.nearest_cpus(node) for node in (0, 1)] == [(0, 2, 4), (1, 3, 5)]
    assert topology.node(1).cached_bytes == 3 << 30


def test_memory_without_cpus_and_slower_than_dram_is_cxl(tmp_path: Path) -> None:
    four_nodes(tmp_path)
    topology = read_topology(tmp_path)
    assert tiers(topology) == ["dram", "dram", "cxl", "cxl"]
    access = topology.node(2).access
    assert access is not None
    assert (access.initiators, access.read_bandwidth, access.write_bandwidth) == ((0,), 32.768e9, 16.384e9)
    assert access.read_latency_s == pytest.approx(250e-9)
    assert [topology.nearest_cpus(node) for node in (2, 3)] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert "32.8 GB/s where DRAM has 205" in topology.node(2).tier_reason
    assert [node.id for node in topology.usable] == [0, 1, 2, 3]


def test_memory_without_cpus_and_faster_than_dram_is_not_cxl(tmp_path: Path) -> None:
    four_nodes(tmp_path, slow=800_000)
    assert tiers(read_topology(tmp_path)) == ["dram", "dram", "dram", "dram"]


def test_without_attributes_the_kernels_rank_tells_faster_memory_and_distance_the_nearest_cpus(
    tmp_path: Path,
) -> None:
    add_node(tmp_path, 0, cpus="0-1", distances="10 21 30 17")
    add_node(tmp_path, 1, cpus="2-3", distances="21 10 17 30")
    add_node(tmp_path, 2, distances="30 17 10 40")
    add_node(tmp_path, 3, distances="17 30 40 10")
    write(tmp_path, "sys/devices/virtual/memory_tiering/memory_tier4/nodelist", "0-2")
    write(tmp_path, "sys/devices/virtual/memory_tiering/memory_tier2/nodelist", "3")
    topology = read_topology(tmp_path)
    # Node 2 has DRAM's rank, as CXL memory has on many machines: that does not make it DRAM.
    assert tiers(topology) == ["dram", "dram", "cxl", "dram"]
    assert [topology.nearest_cpus(node) for node in (2, 3)] == [(2, 3), (0, 1)]


def test_nodes_of_cxl_regions_are_cxl_and_devices_are_listed(tmp_path: Path) -> None:
    four_nodes(tmp_path, slow=800_000)
    devices = tmp_path / "sys/devices/platform/ACPI0017:00/root0/decoder0.0/region0/dax_region0/dax0.0"
    write(devices, "target_node", "2")
    nvdimm = tmp_path / "sys/devices/LNXSYSTM:00/ndbus0/region0/dax1.0/dax1.0"
    write(nvdimm, "target_node", "3")
    (tmp_path / "sys/bus/dax/devices").mkdir(parents=True)
    for device in (devices, nvdimm):
        (tmp_path / "sys/bus/dax/devices" / device.name).symlink_to(device)
    write(tmp_path, "sys/bus/cxl/devices/mem0/ram/size", "0x2000000000")
    write(tmp_path, "sys/bus/cxl/devices/mem0/pmem/size", "0x0")
    write(tmp_path, "sys/bus/cxl/devices/mem0/numa_node", "1")
    topology = read_topology(tmp_path)
    assert tiers(topology) == ["dram", "dram", "cxl", "dram"]
    assert topology.node(2).cxl_regions == ("region0",)
    (device,) = topology.cxl_devices
    assert (device.name, device.volatile_bytes, device.persistent_bytes, device.near_node) == (
        "mem0",
        128 << 30,
        0,
        1,
    )


def test_the_settings_go_before_what_is_detected(tmp_path: Path) -> None:
    four_nodes(tmp_path)
    topology = read_topology(tmp_path, {2: "dram", 3: "none", 9: "cxl"})
    assert tiers(topology) == ["dram", "dram", "dram", "none"]
    assert topology.node(2).tier_reason == "the settings say so"
    assert [node.id for node in topology.usable] == [0, 1, 2]
    assert any("names node 9, which is not online; nodes are 0-3" in warning for warning in topology.warnings)


def test_a_node_whose_memory_is_offline_is_not_used_and_named(tmp_path: Path) -> None:
    four_nodes(tmp_path)
    add_node(tmp_path, 3, total_gib=0, free_gib=0, distances="34 24 44 10")
    write(tmp_path, "sys/devices/system/memory/block_size_bytes", "8000000")
    for block in range(8):
        write(tmp_path, f"sys/devices/system/node/node3/memory{block}/state", "offline")
    topology = read_topology(tmp_path)
    assert [node.id for node in topology.usable] == [0, 1, 2]
    (warning,) = topology.warnings
    assert "node 3 has no memory online, and 1 GiB offline" in warning


def test_a_container_sees_what_its_cpuset_and_quota_leave_it(tmp_path: Path) -> None:
    four_nodes(tmp_path)
    set_process(tmp_path, cpus="2-5", nodes="0-1")
    write(tmp_path, "proc/self/cgroup", "0::/")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "150000 100000")
    topology = read_topology(tmp_path)
    assert (topology.limits.cpus, topology.limits.nodes) == ((2, 3, 4, 5), (0, 1))
    assert topology.limits.cpu_quota == 1.5
    assert [node.id for node in topology.usable] == [0, 1]
    assert topology.nearest_cpus(0) == (2, 3)
    warnings = "\n".join(topology.warnings)
    assert "node 2 (cxl, 64 GiB) may not be used: the cpuset allows memory of nodes 0-1" in warnings
    assert "node 3 (cxl, 64 GiB) may not be used" in warnings
    assert "quota is 1.5 CPUs, of 4" in warnings


def test_a_node_without_allowed_cpus_is_read_from_the_nearest_that_has_some(tmp_path: Path) -> None:
    four_nodes(tmp_path)
    set_process(tmp_path, cpus="4-5", nodes="0-3")
    topology = read_topology(tmp_path)
    assert [topology.nearest_cpus(node) for node in range(4)] == [(4, 5)] * 4


def test_the_memlock_limit_matters_where_the_kernel_may_move_pages(tmp_path: Path) -> None:
    four_nodes(tmp_path)
    set_process(tmp_path, cpus="0-7", nodes="0-3", memlock="8388608")
    assert read_topology(tmp_path).warnings == ()
    write(tmp_path, "sys/kernel/mm/numa/demotion_enabled", "true")
    (warning,) = read_topology(tmp_path).warnings
    assert warning.startswith("demotion to slower nodes can move KV pages, and only 8 MiB may be locked")
    # CAP_IPC_LOCK lifts the limit.
    set_process(tmp_path, cpus="0-7", nodes="0-3", memlock="8388608", capabilities=1 << 14)
    assert read_topology(tmp_path).warnings == ()


def test_switches_of_the_kernel_are_read(tmp_path: Path) -> None:
    four_nodes(tmp_path)
    write(tmp_path, "sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]")
    write(tmp_path, "proc/sys/kernel/numa_balancing", "1")
    write(tmp_path, "proc/sys/kernel/osrelease", "6.12.1")
    write(tmp_path, "sys/module/zswap/parameters/enabled", "Y")
    for node, weight in ((0, 5), (1, 5), (2, 1), (3, 1)):
        write(tmp_path, f"sys/kernel/mm/mempolicy/weighted_interleave/node{node}", str(weight))
    write(tmp_path, "sys/devices/system/node/node1/hugepages/hugepages-2048kB/free_hugepages", "7")
    topology = read_topology(tmp_path)
    kernel = topology.kernel
    assert (kernel.transparent_huge_pages, kernel.numa_balancing, kernel.zswap) == ("never", True, True)
    assert kernel.release == "6.12.1"
    assert kernel.interleave_weights == ((0, 5), (1, 5), (2, 1), (3, 1))
    assert [node.free_huge_pages for node in topology.nodes] == [0, 7, 0, 0]
    assert any(warning.startswith("huge pages are switched off") for warning in topology.warnings)


def test_a_node_that_is_not_there_is_named(tmp_path: Path) -> None:
    four_nodes(tmp_path)
    with pytest.raises(KeyError, match="node 7 is not online; nodes are 0, 1, 2, 3"):
        read_topology(tmp_path).node(7)


def test_a_topology_survives_json(tmp_path: Path) -> None:
    four_nodes(tmp_path)
    set_process(tmp_path, cpus="0-7", nodes="0-3", memlock="65536")
    topology = read_topology(tmp_path)
    again = msgspec.json.decode(msgspec.json.encode(topology))
    assert [node["tier"] for node in again["nodes"]] == ["dram", "dram", "cxl", "cxl"]
    assert again["limits"]["memlock_bytes"] == 65536


def test_this_machine_has_a_node_that_may_be_used() -> None:
    topology = read_topology()
    assert topology.usable
    for node in topology.usable:
        assert topology.nearest_cpus(node.id)
        assert 0 < node.free_bytes <= node.total_bytes


@pytest.mark.parametrize(("text", "numbers"), [("", []), ("3\n", [3]), ("0-3,8", [0, 1, 2, 3, 8])])
def test_lists_are_read_and_written_as_the_kernel_does(text: str, numbers: list[int]) -> None:
    assert parse_list(text) == numbers
    assert format_list(numbers) == text.strip()


def test_sizes_are_written_for_people() -> None:
    assert [gibibytes(size) for size in (8 << 20, 1 << 30, 3 << 29)] == ["8 MiB", "1 GiB", "1.5 GiB"]
