"""From a description of a machine (`configs/machines.py`) to what it can do (`scheduler/machine.py`)."""

from dataclasses import replace

from hybridgen.configs.machines import MAX_CXL, MachineDescription, MachineError, MemoryDescription
from hybridgen.scheduler.cost import CostFactors
from hybridgen.scheduler.machine import Device, Machine, MemoryNode, Tier

DEVICE_NODE = -1


def machine_of(description: MachineDescription, *, num_cxl: int = 0) -> Machine:
    """The machine with so many CXL expanders, each a node of its own.

    The device's capacity is what weights and KV may take together.

    Raises:
        MachineError: it has no expander to add, or there would be too many.
    """
    if not 0 <= num_cxl <= MAX_CXL:
        raise MachineError(f"{num_cxl} CXL expanders; from 0 to {MAX_CXL} can be planned")
    if num_cxl and description.cxl is None:
        raise MachineError(f"{description.name}: the description has no [cxl], so --cxl must be 0")
    nodes = [_node(id, part.name, Tier.DRAM, part) for id, part in enumerate(description.dram)]
    if description.cxl is not None:
        nodes += [
            _node(len(description.dram) + index, f"cxl{index}", Tier.CXL, description.cxl)
            for index in range(num_cxl)
        ]
    device = None
    if (gpu := description.device) is not None:
        memory = MemoryNode(
            id=DEVICE_NODE,
            name=gpu.name,
            tier=Tier.DEVICE,
            read_bandwidth=gpu.memory_bandwidth_gb_s * gpu.memory_bandwidth_share * 1e9,
            latency_s=1e-6,  # no dependent reads are modelled on the device
            capacity_bytes=int(gpu.memory_gib * gpu.usable_share * 2**30),
        )
        device = Device(
            name=gpu.name,
            memory=memory,
            link_bandwidth=gpu.link_bandwidth_gb_s * gpu.link_bandwidth_share * 1e9,
            matmul_flops=gpu.matmul_tflops * gpu.matmul_share * 1e12,
        )
    return Machine(
        name=description.name + (f", {num_cxl} x CXL" if num_cxl else ""),
        device=device,
        nodes=tuple(nodes),
        num_cores=description.cpu.num_cores,
        core_flops=description.cpu.core_gflops * 1e9,
        source="data sheets and assumptions, see the description",
    )


def _node(id: int, name: str, tier: Tier, part: MemoryDescription) -> MemoryNode:
    return MemoryNode(
        id=id,
        name=name,
        tier=tier,
        read_bandwidth=part.bandwidth_gb_s * part.bandwidth_share * 1e9,
        latency_s=part.latency_ns * 1e-9,
        capacity_bytes=int(part.capacity_gib * part.usable_share * 2**30),
    )


def factors_of(description: MachineDescription) -> CostFactors:
    """The default factors, with what the description says of its cores."""
    return replace(CostFactors(), core_fixed_share=description.cpu.core_fixed_share)
