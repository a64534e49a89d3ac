import dataclasses
import logging
import math
import os
from pathlib import Path

import pytest

from hybridgen.kernels import measure as measure_module
from hybridgen.kernels.measure import _counts, cache_folder, fingerprint, measure, measurements_of
from hybridgen.kernels.measurements import Measurements, NodeMeasurement, measured_nodes
from hybridgen.kernels.numa import Access, Topology, read_topology

GIB = 1 << 30


def figures(node: int, **changes: object) -> NodeMeasurement:
    measurement = NodeMeasurement(node, (0, 1), ((1, 12e9), (2, 20e9)), 100e-9, 1 << 28)
    return dataclasses.replace(measurement, **changes)  # type: ignore[arg-type]


@pytest.fixture
def topology() -> Topology:
    return read_topology()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Measuring without the work; the fingerprints measured."""
    calls: list[str] = []

    def instead(topology: Topology) -> Measurements:
        key = fingerprint(topology)
        calls.append(key)
        return Measurements(key, float(len(calls)), 0.1, (figures(0),))

    monkeypatch.setattr(measure_module, "measure", instead)
    return calls


def test_every_usable_node_is_measured_within_three_seconds(topology: Topology) -> None:
    affinity = os.sched_getaffinity(0)
    measured = measure(topology)
    assert [node.node for node in measured.nodes] == [node.id for node in topology.usable]
    assert measured.took_s < 3
    assert os.sched_getaffinity(0) == affinity
    for node in measured.nodes:
        if node.problem:
            continue
        assert set(node.cpus) <= set(topology.nearest_cpus(node.node))
        assert [count for count, _ in node.read_bandwidth][-1] == len(node.cpus)
        assert 1e-9 < node.latency_s < 1e-4
        assert 1e7 < node.best_bandwidth < 1e13
        # A chain of reads, each waiting for the one before, is slower than reading in order.
        assert 64 / node.latency_s < node.best_bandwidth


def test_a_node_without_free_memory_gets_a_sentence(
    topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure_module, "free_bytes", lambda node: 100 << 20)
    (node, *_) = measure(topology).nodes
    assert (
        node.problem
        == f"node {node.node} has 100 MiB free: too little to measure it with, which takes 128 MiB"
    )
    assert node.read_bandwidth == ()
    with pytest.raises(ValueError, match="too little to measure"):
        _ = node.best_bandwidth


@pytest.mark.parametrize(
    ("cores", "counts"),
    [(1, [1]), (2, [2, 1]), (3, [3, 1, 2]), (4, [4, 1, 2]), (12, [12, 1, 8, 4, 2])],
)
def test_all_cores_come_first_then_one_then_what_lies_between(cores: int, counts: list[int]) -> None:
    assert list(_counts(cores)) == counts


def test_figures_are_measured_once_and_then_kept(
    topology: Topology, calls: list[str], tmp_path: Path
) -> None:
    first = measurements_of(topology, folder=tmp_path / "new")
    assert measurements_of(topology, folder=tmp_path / "new") == first
    assert len(calls) == 1
    again = measurements_of(topology, refresh=True, folder=tmp_path / "new")
    assert len(calls) == 2
    assert measurements_of(topology, folder=tmp_path / "new") == again
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"memory-{calls[0]}.json"]


def test_another_machine_has_figures_of_its_own(topology: Topology, calls: list[str], tmp_path: Path) -> None:
    measurements_of(topology, folder=tmp_path)
    measurements_of(dataclasses.replace(topology, cpu_model="another"), folder=tmp_path)
    limits = dataclasses.replace(topology.limits, cpus=topology.limits.cpus[:1], cpu_quota=0.5)
    measurements_of(dataclasses.replace(topology, limits=limits), folder=tmp_path)
    assert len(set(calls)) == 3
    assert len(list(tmp_path.iterdir())) == 3


def test_free_memory_is_no_part_of_what_a_machine_is(topology: Topology) -> None:
    nodes = tuple(dataclasses.replace(node, free_bytes=1, cached_bytes=2) for node in topology.nodes)
    assert fingerprint(dataclasses.replace(topology, nodes=nodes)) == fingerprint(topology)


@pytest.mark.parametrize("content", ["", "{", '{"fingerprint": 3}', "[]"])
def test_a_cache_that_cannot_be_read_is_measured_anew_with_a_line_in_the_log(
    topology: Topology, calls: list[str], tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"memory-{fingerprint(topology)}.json"
    path.write_text(content)
    kept = measurements_of(topology, folder=tmp_path)
    assert len(calls) == 1
    assert f"{path} cannot be read" in caplog.text
    assert measurements_of(topology, folder=tmp_path) == kept
    assert len(calls) == 1


def test_a_folder_that_may_not_be_written_costs_the_cache_and_no_more(
    topology: Topology, calls: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert measurements_of(topology, folder=tmp_path / "file").nodes
    assert "could not be kept" in caplog.text


def test_figures_got_beside_other_work_are_not_kept(
    topology: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disturbed = Measurements(fingerprint(topology), 0.0, 0.1, (figures(0, cpu_share=0.5),))
    monkeypatch.setattr(measure_module, "measure", lambda topology: disturbed)
    with caplog.at_level(logging.WARNING):
        assert measurements_of(topology, folder=tmp_path) == disturbed
    assert "nodes 0 were measured while other work ran" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_the_cache_lies_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert cache_folder() == Path("/var/cache/me/hybridgen")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/hybridgen")


def test_plans_get_the_best_figures_and_the_firmwares_where_nothing_was_measured(
    topology: Topology, caplog: pytest.LogCaptureFixture
) -> None:
    node = dataclasses.replace(
        topology.usable[0], id=0, tier="dram", total_bytes=4 * GIB, free_bytes=GIB, cached_bytes=GIB
    )
    told = Access(
        (0,), read_bandwidth=32e9, write_bandwidth=32e9, read_latency_s=250e-9, write_latency_s=250e-9
    )
    untold = dataclasses.replace(node, id=3, tier="cxl", from_cpus=None, from_any=None)
    nodes = (dataclasses.replace(node, id=2, tier="cxl", from_cpus=told), node, untold)
    limits = dataclasses.replace(topology.limits, nodes=(0, 2, 3), memlock_bytes=math.inf)
    machine = dataclasses.replace(topology, nodes=nodes, limits=limits)
    measured = Measurements(
        "", 0.0, 0.0, (figures(0), figures(2, read_bandwidth=(), problem="node 2 is full"))
    )
    dram, cxl = measured_nodes(machine, measured)
    assert (dram.id, dram.name, dram.tier, dram.read_bandwidth, dram.latency_s) == (
        0,
        "dram0",
        "dram",
        20e9,
        100e-9,
    )
    assert (dram.capacity_bytes, dram.source) == (2 * GIB, "measured")
    assert (cxl.id, cxl.tier, cxl.read_bandwidth, cxl.latency_s, cxl.source) == (
        2,
        "cxl",
        32e9,
        250e-9,
        "firmware",
    )
    assert "node 3 is left out of plans, since its speed is not known: it was not measured" in caplog.text
