"""`hybridgen topology`: what memory this machine has, what it does, and what stands in the way of using it."""

import math
import sys
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from hybridgen.configs.settings import SettingsError, load_settings
from hybridgen.engine.machine import Access, Measurements, Topology, describe_memory, format_list, gibibytes

_UNTOLD = "-"


def topology(*, as_json: bool, refresh: bool, measured: bool, tiers: list[str] | None) -> int:
    """Print it; return the exit status.

    Args:
        tiers: of the command line; those of the environment where it gives none.
    """
    try:
        settings = load_settings({} if tiers is None else {"memory_tiers": tiers})
    except SettingsError as error:
        print(f"hybridgen topology: error: {error}", file=sys.stderr)
        return 2
    found, measurements = describe_memory(settings.memory_tiers, measured=measured, refresh=refresh)
    if as_json:
        content: dict[str, Any] = {"topology": found, "measurements": measurements if measured else None}
        print(msgspec.json.format(msgspec.json.encode(content), indent=2).decode())
        return 0
    console = Console()
    console.print(
        f"{found.cpu_model}, Linux {found.kernel.release}; this process may use CPUs {format_list(found.limits.cpus)}"
        f" and memory of nodes {format_list(found.limits.nodes)}",
        highlight=False,
    )
    console.print(nodes_table(found))
    console.print(speed_table(found, measurements))
    if found.cxl_devices:
        console.print(cxl_table(found))
    for line in facts(found):
        console.print(line, highlight=False)
    problems = [node.problem for node in measurements.nodes if node.problem]
    problems += [
        f"node {node.node} was measured while other work ran on its CPUs; measure again when they are idle (--refresh)"
        for node in measurements.nodes
        if node.was_disturbed
    ]
    for warning in (*found.warnings, *problems):
        console.print(f"[yellow]warning:[/] {warning}", highlight=False)
    return 0


def nodes_table(found: Topology) -> Table:
    """A row for each node: what it has, and what it is taken for."""
    table = Table(title="memory nodes", title_justify="left")
    for column in ("node", "tier", "CPUs", "memory", "free", "distances", "why this tier"):
        table.add_column(column, justify="right" if column in ("node", "memory", "free") else "left")
    for node in found.nodes:
        table.add_row(
            str(node.id),
            node.tier if node in found.usable else f"{node.tier}, not used",
            format_list(node.cpus) or "none",
            gibibytes(node.total_bytes),
            gibibytes(node.free_bytes),
            " ".join(str(distance) for _, distance in node.distances) or _UNTOLD,
            node.tier_reason,
        )
    return table


def speed_table(found: Topology, measurements: Measurements) -> Table:
    """A row for each node: what the firmware says of it, how the kernel ranks it, what was measured from which CPUs."""
    table = Table(title="reading them, from the nearest CPUs", title_justify="left")
    table.add_column("node", justify="right")
    table.add_column("kernel's rank", justify="right")
    table.add_column("firmware", justify="right")
    table.add_column("measured GB/s (threads)")
    table.add_column("measured ns", justify="right")
    table.add_column("from CPUs")
    by_node = {node.node: node for node in measurements.nodes}
    for node in found.nodes:
        measured = by_node.get(node.id)
        bandwidth, latency = _UNTOLD, _UNTOLD
        if measured is not None and measured.read_bandwidth:
            bandwidth = ", ".join(f"{rate / 1e9:.3g} ({count})" for count, rate in measured.read_bandwidth)
            latency = f"{measured.latency_s * 1e9:.0f}"
        table.add_row(
            str(node.id),
            str(node.memory_tier or _UNTOLD),
            _firmware(node.access),
            bandwidth,
            latency,
            format_list(found.nearest_cpus(node.id)),
        )
    return table


def cxl_table(found: Topology) -> Table:
    """A row for each memory expander."""
    table = Table(title="CXL devices", title_justify="left")
    for column in ("device", "volatile", "persistent", "hangs on node", "memory is node"):
        table.add_column(column)
    regions = ", ".join(
        f"{node.id} ({', '.join(node.cxl_regions)})" for node in found.nodes if node.cxl_regions
    )
    for device in found.cxl_devices:
        table.add_row(
            device.name,
            gibibytes(device.volatile_bytes),
            gibibytes(device.persistent_bytes),
            str(device.near_node) if device.near_node >= 0 else _UNTOLD,
            regions or "none yet",
        )
    return table


def facts(found: Topology) -> list[str]:
    """A line for each thing beside the nodes that decides how memory behaves."""
    kernel, limits = found.kernel, found.limits
    huge = {node.id: node.free_huge_pages for node in found.nodes if node.free_huge_pages}
    weights = ", ".join(f"{node}: {weight}" for node, weight in kernel.interleave_weights)
    return [
        f"huge pages: transparent {kernel.transparent_huge_pages or 'not built in'}"
        + "".join(f", {count} of 2 MiB free on node {node}" for node, count in huge.items()),
        f"weighted interleave: {weights or 'this kernel has none'}",
        f"moved behind our back: demotion {_on(kernel.demotion)}, NUMA balancing {_on(kernel.numa_balancing)}, "
        f"swap {gibibytes(kernel.swap_bytes) if kernel.swap_bytes else 'off'}, zswap {_on(kernel.zswap)}",
        f"limits: CPU quota {_limit(limits.cpu_quota, '{:.3g}')}, memory that may be locked "
        + (gibibytes(limits.memlock_bytes) if math.isfinite(limits.memlock_bytes) else "unlimited"),
    ]


def _firmware(access: Access | None) -> str:
    if access is None:
        return _UNTOLD
    return f"{access.read_bandwidth / 1e9:.3g} GB/s, {access.read_latency_s * 1e9:.0f} ns"


def _on(value: bool) -> str:
    return "on" if value else "off"


def _limit(value: float, form: str) -> str:
    return form.format(value) if math.isfinite(value) else "none"
