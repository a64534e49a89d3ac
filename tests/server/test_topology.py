import dataclasses
import json

import pytest
from rich.console import Console

from hybridgen.engine.machine import describe_memory
from hybridgen.kernels.measurements import Measurements, NodeMeasurement
from hybridgen.kernels.numa import Access, CxlDevice
from hybridgen.server import topology as command
from hybridgen.server.cli import main


@pytest.fixture(autouse=True)
def _no_tiers_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYBRIDGEN_MEMORY_TIERS", raising=False)


def shown(renderable: object) -> str:
    console = Console(width=160, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_json_has_everything_and_nothing_else_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["topology", "--json", "--no-measure"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["measurements"] is None
    (node, *_) = content["topology"]["nodes"]
    assert node["total_bytes"] > 0
    assert {"cpus", "distances", "tier", "tier_reason", "from_cpus", "memory_tier"} <= set(node)
    assert {"limits", "kernel", "cxl_devices", "warnings"} <= set(content["topology"])


def test_the_settings_word_on_a_node_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["topology", "--json", "--no-measure", "--memory-tiers", "0=cxl"]) == 0
    (node, *_) = json.loads(capsys.readouterr().out)["topology"]["nodes"]
    assert (node["tier"], node["tier_reason"]) == ("cxl", "the settings say so")


def test_the_environments_word_counts_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HYBRIDGEN_MEMORY_TIERS", "0=none,77=cxl")
    assert main(["topology", "--no-measure"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "the settings say so" in text
    assert "none, not used" in text
    assert "warning: --memory-tiers names node 77, which is not online" in text


def test_a_tier_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["topology", "--memory-tiers", "0=fast"]) == 2
    assert capsys.readouterr().err == (
        "hybridgen topology: error: --memory-tiers: write NODE=dram, NODE=cxl or NODE=none, got '0=fast'\n"
    )


def test_tables_show_what_was_measured_and_what_the_firmware_says() -> None:
    found, _ = describe_memory({}, measured=False)
    told = Access((0,), read_bandwidth=32e9, write_bandwidth=1.0, read_latency_s=250e-9, write_latency_s=1.0)
    node = dataclasses.replace(found.nodes[0], id=2, from_cpus=told, tier="cxl", memory_tier=78, cpus=())
    machine = dataclasses.replace(
        found, nodes=(found.nodes[0], node), cxl_devices=(CxlDevice("mem0", 128 << 30, 0, 0),)
    )
    measured = NodeMeasurement(2, (0,), ((1, 9.5e9), (4, 30.25e9)), 312e-9, 1 << 28)
    speed = shown(command.speed_table(machine, Measurements("", 0.0, 0.0, (measured,))))
    assert "32 GB/s, 250 ns" in speed
    assert "9.5 (1), 30.2 (4)" in speed
    assert "312" in speed
    assert "78" in speed
    nodes = shown(command.nodes_table(machine))
    assert "cxl" in nodes
    assert "none" in nodes
    devices = shown(command.cxl_table(machine))
    assert "mem0" in devices
    assert "128 GiB" in devices
    assert "none yet" in devices


def test_a_node_that_could_not_be_measured_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = describe_memory({}, measured=False)
    problem = NodeMeasurement(
        0, (0,), (), 0.0, 0, problem="node 0 has 5 MiB free: too little to measure it with"
    )
    disturbed = NodeMeasurement(1, (0,), ((1, 1e9),), 1e-7, 1 << 28, cpu_share=0.5)
    measurements = Measurements("", 0.0, 0.0, (problem, disturbed))
    monkeypatch.setattr(command, "describe_memory", lambda *_, **__: (found, measurements))
    assert main(["topology"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "warning: node 0 has 5 MiB free: too little to measure it with" in text
    assert "node 1 was measured while other work ran on its CPUs" in text
