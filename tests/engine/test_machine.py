from hybridgen.engine.machine import describe_memory, memory_nodes
from hybridgen.kernels.measurements import Measurements, NodeMeasurement
from hybridgen.scheduler.machine import Tier


def test_measured_nodes_become_the_schedulers() -> None:
    topology, nothing = describe_memory({}, measured=False)
    assert nothing.nodes == ()
    usable = topology.usable
    figures = tuple(NodeMeasurement(node.id, (0,), ((1, 10e9),), 90e-9, 1 << 28) for node in usable)
    nodes = memory_nodes(topology, Measurements("", 0.0, 0.0, figures))
    assert [node.id for node in nodes] == [node.id for node in usable]
    assert all((node.read_bandwidth, node.latency_s, node.emulated) == (10e9, 90e-9, False) for node in nodes)
    assert all(node.tier in (Tier.DRAM, Tier.CXL) and node.capacity_bytes > 0 for node in nodes)


def test_what_the_settings_take_out_is_left_out() -> None:
    everything, _ = describe_memory({}, measured=False)
    none, _ = describe_memory({node.id: "none" for node in everything.nodes}, measured=False)
    assert none.usable == ()
