"""What memory this machine has, as the kernel tells it: nodes, CPUs, distances, attributes, CXL devices, limits.

Reads files below a root and nothing else, so that a folder of files can stand for any machine. Measures nothing
(`kernels/measure.py`) and places nothing (`kernels/arena.py`).
"""

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from hybridgen.configs.settings import MemoryTier, cgroup_cpu_quotas

ROOT = Path("/")
NODES = ROOT / "sys/devices/system/node"
CPUS = ROOT / "sys/devices/system/cpu"
MB = 1_000_000  # what the firmware's table of memory attributes counts bandwidth in, a second
KB = 1024  # what the kernel's "kB" is


@dataclass(frozen=True, slots=True)
class Access:
    """What the firmware (ACPI's HMAT) says of reaching a node from its nearest initiators; 0 where it says nothing."""

    initiators: tuple[int, ...]  # nodes
    read_bandwidth: float  # bytes a second
    write_bandwidth: float
    read_latency_s: float
    write_latency_s: float


@dataclass(frozen=True, slots=True)
class Node:
    """A NUMA node that is online.

    Attributes:
        total_bytes: of memory that is online; 0 for a node of CPUs alone, or one whose memory was taken offline.
        free_bytes: that nothing uses.
        cached_bytes: of files, which the kernel gives up when memory is asked for.
        offline_bytes: of memory that the kernel knows of and may not use.
        distances: to each online node, 10 being its own; as the firmware says.
        from_cpus, from_any: firmware's attributes for the nearest CPUs, and for the nearest initiator of any kind.
        memory_tier: the kernel's rank, smaller is faster; 0 where it ranks nothing.
        cxl_regions: that its memory comes from.
        free_huge_pages: of 2 MiB, reserved by the administrator and not in use.
        tier: what KV placement takes it for; "none" is kept out of it.
        tier_reason: why.
    """

    id: int
    cpus: tuple[int, ...]
    total_bytes: int
    free_bytes: int
    cached_bytes: int
    offline_bytes: int
    distances: tuple[tuple[int, int], ...]
    from_cpus: Access | None
    from_any: Access | None
    memory_tier: int
    cxl_regions: tuple[str, ...]
    free_huge_pages: int
    tier: MemoryTier
    tier_reason: str

    @property
    def access(self) -> Access | None:
        """The firmware's attributes as the CPUs see them, as far as it tells."""
        return self.from_cpus or self.from_any


@dataclass(frozen=True, slots=True)
class CxlDevice:
    """A memory expander."""

    name: str
    volatile_bytes: int
    persistent_bytes: int
    near_node: int  # of the bridge that it hangs on, which is not the node of its memory; -1: not told


@dataclass(frozen=True, slots=True)
class Limits:
    """What this process may use, whoever limits it: affinity, cpuset, cgroup."""

    cpus: tuple[int, ...]
    nodes: tuple[int, ...]  # that memory may come from
    cpu_quota: float  # CPUs' worth of time; inf: no quota
    memlock_bytes: float  # that may be locked in memory; inf: no limit


@dataclass(frozen=True, slots=True)
class KernelState:
    """Switches of the kernel that move memory behind a process's back, or give it huge pages."""

    release: str
    transparent_huge_pages: str  # always, madvise, never; empty: not built in
    demotion: bool  # moves cold memory to slower nodes when memory is short
    numa_balancing: bool  # moves memory to the CPUs that touch it
    zswap: bool
    swap_bytes: int
    # Node to weight: what MPOL_WEIGHTED_INTERLEAVE would go by; empty: the kernel has none.
    interleave_weights: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Topology:
    """
    Attributes:
        warnings: what an operator may want to change, a sentence each.
    """

    cpu_model: str
    nodes: tuple[Node, ...]
    cxl_devices: tuple[CxlDevice, ...]
    limits: Limits
    kernel: KernelState
    warnings: tuple[str, ...]

    def node(self, number: int) -> Node:
        """
        Raises:
            KeyError: no such node is online.
        """
        for node in self.nodes:
            if node.id == number:
                return node
        raise KeyError(
            f"node {number} is not online; nodes are {', '.join(str(node.id) for node in self.nodes)}"
        )

    @property
    def usable(self) -> tuple[Node, ...]:
        """Nodes whose memory may hold KV: online, allowed, and not taken out by the settings; DRAM first."""
        usable = [
            node
            for node in self.nodes
            if node.total_bytes and node.id in self.limits.nodes and node.tier != "none"
        ]
        return tuple(sorted(usable, key=lambda node: (node.tier != "dram", node.id)))

    def nearest_cpus(self, number: int) -> tuple[int, ...]:
        """The CPUs that should read a node's memory: its own; else those the firmware calls nearest; else by distance.

        Only CPUs that this process may use. Empty only if it may use none of any node.
        """
        node, allowed = self.node(number), set(self.limits.cpus)

        def of(nodes: Iterable[int]) -> tuple[int, ...]:
            wanted = set(nodes)
            return tuple(
                cpu for other in self.nodes if other.id in wanted for cpu in other.cpus if cpu in allowed
            )

        if own := of([number]):
            return own
        for access in (node.from_cpus, node.from_any):
            if access is not None and (near := of(access.initiators)):
                return near
        with_cpus = [(distance, other) for other, distance in node.distances if of([other])]
        shortest = min((distance for distance, _ in with_cpus), default=0)
        return of(other for distance, other in with_cpus if distance == shortest) or tuple(sorted(allowed))


def read_topology(root: Path = ROOT, tiers: Mapping[int, MemoryTier] | None = None) -> Topology:
    """The machine as the files below `root` describe it.

    Args:
        root: has `sys` and `proc`. What is missing there is taken for a kernel that does not tell: a machine
            without NUMA files has one node, 0, with all the memory and CPUs.
        tiers: the settings' word on what a node is; goes before what can be detected.
    """
    tiers = tiers or {}
    memory_tiers = _memory_tiers(root)
    regions = _cxl_regions(root)
    nodes = [
        _node(folder, memory_tiers, regions) for folder in _node_folders(root / "sys/devices/system/node")
    ]
    if not nodes:
        nodes = [_only_node(root)]
    limits = _limits(root, nodes)
    classified = tuple(_classify(node, nodes, tiers) for node in sorted(nodes, key=lambda node: node.id))
    kernel = _kernel(root)
    warnings = tuple(_warnings(classified, limits, kernel, tiers))
    return Topology(_cpu_model(root), classified, _cxl_devices(root), limits, kernel, warnings)


def cores(allowed: Iterable[int], node_of: Mapping[int, int], root: Path = CPUS) -> list[list[int]]:
    """The allowed CPUs of each core that has any, cores of different NUMA nodes taking turns."""
    siblings: dict[tuple[int, int], list[int]] = defaultdict(list)
    for cpu in sorted(allowed):
        try:
            first = min(parse_list((root / f"cpu{cpu}/topology/thread_siblings_list").read_text()))
        except (OSError, ValueError):
            first = cpu
        siblings[node_of.get(cpu, 0), first].append(cpu)
    by_node: dict[int, list[list[int]]] = defaultdict(list)
    for (node, _), core in sorted(siblings.items()):
        by_node[node].append(core)
    return [core for turn in zip_longest(*by_node.values()) for core in turn if core is not None]


def node_of_cpus(root: Path = NODES) -> dict[int, int]:
    """The NUMA node of each CPU; empty where the system does not say."""
    node_of = {}
    for folder in _node_folders(root):
        try:
            cpus = parse_list((folder / "cpulist").read_text())
        except (OSError, ValueError):
            continue
        node_of.update(dict.fromkeys(cpus, _number(folder)))
    return node_of


def parse_list(text: str) -> list[int]:
    """The kernel's lists of CPUs and nodes: "0-3,8" is 0, 1, 2, 3, 8."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def format_list(numbers: Iterable[int]) -> str:
    """The kernel's way of writing a list: 0, 1, 2, 3, 8 is "0-3,8"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def gibibytes(num_bytes: float) -> str:
    """For people: four digits and the unit."""
    return f"{num_bytes / (1 << 30):.4g} GiB" if num_bytes >= 1 << 30 else f"{num_bytes / (1 << 20):.4g} MiB"


def _node(folder: Path, memory_tiers: Mapping[int, int], regions: Mapping[int, tuple[str, ...]]) -> Node:
    number = _number(folder)
    memory = _node_memory(folder)
    distances = [int(word) for word in _read(folder / "distance").split()]
    numbers = sorted(_number(other) for other in _node_folders(folder.parent))
    total = memory.get("MemTotal", 0)
    return Node(
        id=number,
        cpus=tuple(parse_list(_read(folder / "cpulist"))),
        total_bytes=total,
        free_bytes=memory.get("MemFree", 0),
        cached_bytes=memory.get("Active(file)", 0) + memory.get("Inactive(file)", 0),
        offline_bytes=0 if total else _offline_bytes(folder),
        distances=tuple(zip(numbers, distances, strict=False)),
        from_cpus=_access(folder / "access1/initiators"),
        from_any=_access(folder / "access0/initiators"),
        memory_tier=memory_tiers.get(number, 0),
        cxl_regions=regions.get(number, ()),
        free_huge_pages=_int(folder / "hugepages/hugepages-2048kB/free_hugepages"),
        tier="dram",
        tier_reason="",
    )


def _only_node(root: Path) -> Node:
    """Of a kernel without NUMA."""
    memory = _fields(_read(root / "proc/meminfo"))
    return Node(
        id=0,
        cpus=tuple(parse_list(_read(root / "sys/devices/system/cpu/online"))),
        total_bytes=memory.get("MemTotal", 0),
        free_bytes=memory.get("MemFree", 0),
        cached_bytes=memory.get("Active(file)", 0) + memory.get("Inactive(file)", 0),
        offline_bytes=0,
        distances=((0, 10),),
        from_cpus=None,
        from_any=None,
        memory_tier=0,
        cxl_regions=(),
        free_huge_pages=_int(root / "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"),
        tier="dram",
        tier_reason="",
    )


def _classify(node: Node, nodes: Iterable[Node], tiers: Mapping[int, MemoryTier]) -> Node:
    tier, reason = _tier(node, nodes, tiers)
    return replace(node, tier=tier, tier_reason=reason)


def _tier(node: Node, nodes: Iterable[Node], tiers: Mapping[int, MemoryTier]) -> tuple[MemoryTier, str]:
    if node.id in tiers:
        return tiers[node.id], "the settings say so"
    if node.cxl_regions:
        return "cxl", f"its memory comes from {', '.join(node.cxl_regions)}"
    if node.cpus:
        return "dram", "it has CPUs"
    # Memory without CPUs may also be faster than DRAM, as that on a processor's package is. The kernel's tiers do not
    # tell by themselves: machines put all nodes into one.
    with_cpus = [other for other in nodes if other.cpus and other.total_bytes]
    dram = max((other.access.read_bandwidth for other in with_cpus if other.access is not None), default=0.0)
    own = node.access.read_bandwidth if node.access is not None else 0.0
    if dram and own:
        compared = f"no CPUs, and by the firmware {own / 1e9:.3g} GB/s where DRAM has {dram / 1e9:.3g}"
        return ("dram" if own >= dram else "cxl"), compared
    dram_tier = min((other.memory_tier for other in with_cpus if other.memory_tier), default=0)
    if dram_tier and node.memory_tier and node.memory_tier < dram_tier:
        return "dram", f"no CPUs, and the kernel ranks it {node.memory_tier}, before DRAM's {dram_tier}"
    return "cxl", "no CPUs, and nothing says that it is faster than DRAM"


def _warnings(
    nodes: tuple[Node, ...], limits: Limits, kernel: KernelState, tiers: Mapping[int, MemoryTier]
) -> Iterator[str]:
    known = {node.id for node in nodes}
    for number in sorted(set(tiers) - known):
        yield f"--memory-tiers names node {number}, which is not online; nodes are {format_list(known)}"
    for node in nodes:
        if node.offline_bytes:
            yield (
                f"node {node.id} has no memory online, and {gibibytes(node.offline_bytes)} offline: write "
                f"`online_movable` to state in /sys/devices/system/node/node{node.id}/memory*/"
            )
        elif node.total_bytes and node.id not in limits.nodes:
            yield (
                f"node {node.id} ({node.tier}, {gibibytes(node.total_bytes)}) may not be used: the cpuset allows "
                f"memory of nodes {format_list(limits.nodes)} (containers: --cpuset-mems)"
            )
    with_memory = [node for node in nodes if node.total_bytes and node.id in limits.nodes]
    online = {cpu for node in nodes for cpu in node.cpus}
    if limits.cpu_quota < len(online & set(limits.cpus)):
        yield (
            f"the cgroup's quota is {limits.cpu_quota:.3g} CPUs, of {len(limits.cpus)} that may be used: threads "
            "beyond it would be stopped for a part of each period"
        )
    total = sum(node.total_bytes for node in with_memory)
    moves = [
        name
        for name, on in (
            ("demotion to slower nodes", kernel.demotion and len(with_memory) > 1),
            ("swap", kernel.swap_bytes > 0),
        )
        if on
    ]
    if moves and limits.memlock_bytes < total:
        yield (
            f"{' and '.join(moves)} can move KV pages, and {_memlock(limits)} may be locked against it: raise the "
            "limit (ulimit -l unlimited; LimitMEMLOCK=infinity; docker --ulimit memlock=-1), or switch demotion off "
            "(/sys/kernel/mm/numa/demotion_enabled)"
        )
    if kernel.transparent_huge_pages == "never":
        yield (
            "huge pages are switched off: reads of KV miss the address caches more often; write madvise to "
            "/sys/kernel/mm/transparent_hugepage/enabled"
        )


def _memlock(limits: Limits) -> str:
    return f"only {gibibytes(limits.memlock_bytes)}" if limits.memlock_bytes else "nothing"


def _limits(root: Path, nodes: Iterable[Node]) -> Limits:
    status = dict(line.split(":", 1) for line in _read(root / "proc/self/status").splitlines() if ":" in line)
    online = [cpu for node in nodes for cpu in node.cpus]
    # The kernel lists every node that could ever be there, where no cpuset limits them.
    cpus = set(parse_list(status.get("Cpus_allowed_list", ""))) or set(online)
    memory = set(parse_list(status.get("Mems_allowed_list", ""))) or {node.id for node in nodes}
    match = re.search(r"^Max locked memory\s+(\S+)", _read(root / "proc/self/limits"), re.MULTILINE)
    memlock = math.inf if match is None or match[1] == "unlimited" else float(match[1])
    if int(status.get("CapEff", "0").strip(), 16) >> 14 & 1:  # CAP_IPC_LOCK
        memlock = math.inf
    return Limits(
        cpus=tuple(sorted(cpus & set(online))),
        nodes=tuple(sorted(memory & {node.id for node in nodes})),
        cpu_quota=min(cgroup_cpu_quotas(root / "sys/fs/cgroup", root / "proc/self/cgroup"), default=math.inf),
        memlock_bytes=memlock,
    )


def _kernel(root: Path) -> KernelState:
    mm = root / "sys/kernel/mm"
    chosen = re.search(r"\[(\w+)\]", _read(mm / "transparent_hugepage/enabled"))
    weights = mm / "mempolicy/weighted_interleave"
    return KernelState(
        release=_read(root / "proc/sys/kernel/osrelease").strip(),
        transparent_huge_pages=chosen[1] if chosen else "",
        demotion=_read(mm / "numa/demotion_enabled").strip() in ("true", "1"),
        numa_balancing=_int(root / "proc/sys/kernel/numa_balancing") != 0,
        zswap=_read(root / "sys/module/zswap/parameters/enabled").strip() == "Y",
        swap_bytes=_fields(_read(root / "proc/meminfo")).get("SwapTotal", 0),
        interleave_weights=tuple(
            sorted((_number(file), _int(file)) for file in weights.glob("node[0-9]*") if _int(file))
        ),
    )


def _access(folder: Path) -> Access | None:
    initiators = tuple(sorted(_number(link) for link in _node_folders(folder)))
    values = {
        name: _int(folder / name)
        for name in ("read_bandwidth", "write_bandwidth", "read_latency", "write_latency")
    }
    if not initiators and not any(values.values()):
        return None
    return Access(
        initiators,
        read_bandwidth=values["read_bandwidth"] * MB,
        write_bandwidth=values["write_bandwidth"] * MB,
        read_latency_s=values["read_latency"] / 1e9,
        write_latency_s=values["write_latency"] / 1e9,
    )


def _offline_bytes(folder: Path) -> int:
    """Of a node without memory: what lies in blocks that are offline."""
    blocks = sum(_read(block / "state").strip() == "offline" for block in folder.glob("memory[0-9]*"))
    size = _read(folder.parent.parent / "memory/block_size_bytes").strip()
    return blocks * int(size or "0", 16)


def _memory_tiers(root: Path) -> dict[int, int]:
    tiers: dict[int, int] = {}
    for folder in (root / "sys/devices/virtual/memory_tiering").glob("memory_tier[0-9]*"):
        nodes = parse_list(_read(folder / "nodelist") or _read(folder / "nodes"))
        tiers.update(dict.fromkeys(nodes, _number(folder)))
    return tiers


def _cxl_regions(root: Path) -> dict[int, tuple[str, ...]]:
    """Regions by the node that their memory is in; the region does not tell, the device made of it does."""
    found: dict[int, set[str]] = defaultdict(set)
    for device in (root / "sys/bus/dax/devices").glob("dax*"):
        parts = device.resolve().parts
        regions = [part for part in parts if re.fullmatch(r"region\d+", part)]
        # Regions of persistent memory on the memory bus have the same names.
        if regions and not any(part.startswith("ndbus") for part in parts):
            found[_int(device / "target_node", -1)].add(regions[-1])
    return {node: tuple(sorted(regions)) for node, regions in found.items()}


def _cxl_devices(root: Path) -> tuple[CxlDevice, ...]:
    folders = sorted((root / "sys/bus/cxl/devices").glob("mem[0-9]*"), key=_number)
    return tuple(
        CxlDevice(
            folder.name,
            volatile_bytes=int(_read(folder / "ram/size").strip() or "0", 0),
            persistent_bytes=int(_read(folder / "pmem/size").strip() or "0", 0),
            near_node=_int(folder / "numa_node", -1),
        )
        for folder in folders
    )


def _cpu_model(root: Path) -> str:
    match = re.search(r"^model name\s*: *(.+)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return match[1].strip() if match else os.uname().machine


def _node_memory(folder: Path) -> dict[str, int]:
    """Bytes by field. A node's lines read "Node 0 MemFree: 12 kB"."""
    return _fields(re.sub(r"^Node \d+ ", "", _read(folder / "meminfo"), flags=re.MULTILINE))


def _fields(text: str) -> dict[str, int]:
    return {
        match[1]: int(match[2]) * KB for match in re.finditer(r"^(\S+?):\s*(\d+) kB$", text, re.MULTILINE)
    }


def _node_folders(root: Path) -> list[Path]:
    return sorted(root.glob("node[0-9]*"), key=_number)


def _number(path: Path) -> int:
    return int(re.sub(r"\D", "", path.name))


def _int(path: Path, otherwise: int = 0) -> int:
    try:
        return int(_read(path).strip())
    except ValueError:
        return otherwise


def _read(path: Path) -> str:
    """Empty where the kernel has no such file, or does not let this process see it."""
    try:
        return path.read_text()
    except OSError:
        return ""


def free_bytes(node: int, root: Path = NODES) -> int:
    """Memory of a node that nothing uses now; 0 where the kernel has no such node."""
    return _node_memory(root / f"node{node}").get("MemFree", 0)


def nodes_with_memory(root: Path = NODES) -> tuple[int, ...]:
    """Nodes that have memory online now; node 0 where the kernel does not say."""
    return tuple(parse_list(_read(root / "has_memory"))) or (0,)


def allowed_nodes(root: Path = ROOT) -> tuple[int, ...]:
    """Nodes with memory online that this process may take it from."""
    match = re.search(r"^Mems_allowed_list:\s*(\S+)", _read(root / "proc/self/status"), re.MULTILINE)
    online = nodes_with_memory(root / "sys/devices/system/node")
    allowed = parse_list(match[1]) if match else online
    return tuple(node for node in online if node in allowed)
