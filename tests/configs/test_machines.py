from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import ValidationError

from hybridgen.configs.machines import MAX_CXL, MachineError, machine_names, read_machine
from hybridgen.scheduler.describe import factors_of, machine_of
from hybridgen.scheduler.machine import Tier

MINIMAL = """
name = "small"
[cpu]
name = "some CPU"
num_cores = 2
core_gflops = 50
core_fixed_share = 0.5
[[dram]]
name = "dram"
capacity_gib = 8
usable_share = 0.5
bandwidth_gb_s = 40
bandwidth_share = 0.75
latency_ns = 100
"""


def write(folder: Path, text: str) -> str:
    path = folder / "machine.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", ["a100-40g", "a100-80g", "h100", "h200", "rtx5090"])
def test_every_described_machine_can_be_read_and_takes_expanders(name: str) -> None:
    machine = machine_of(read_machine(name), num_cxl=4)
    assert machine.device is not None
    assert [node.tier for node in machine.nodes] == [Tier.DRAM, *[Tier.CXL] * 4]
    for node in machine.nodes[1:]:
        assert (node.read_bandwidth, node.latency_s) == (36e9, pytest.approx(250e-9))
    assert len({node.id for node in machine.nodes}) == len(machine.nodes)


def test_there_are_no_other_machines() -> None:
    assert machine_names() == ("a100-40g", "a100-80g", "h100", "h200", "rtx5090")


def test_every_figure_has_its_source_beside_it() -> None:
    for name in machine_names():
        path = Path(__file__).parents[2] / "configs" / "machines" / f"{name}.toml"
        lines = path.read_text().splitlines()
        for before, line in pairwise(lines):
            figure = any(
                f"{unit} =" in line for unit in ("_gib", "_gb_s", "_ns", "_tflops", "_gflops", "_share")
            )
            about_core = line.startswith("core_") and (before.startswith(("#", "core_")))
            assert not figure or line.endswith("= 1.0") or "#" in line or about_core, f"{path.name}: {line}"


def test_no_expander_leaves_the_machine_as_it_is() -> None:
    description = read_machine("h100")
    without = description.model_copy(update={"cxl": None})
    assert machine_of(description, num_cxl=0) == machine_of(without)


def test_shares_multiply_what_the_data_sheet_says(tmp_path: Path) -> None:
    description = read_machine(write(tmp_path, MINIMAL))
    machine = machine_of(description)
    (node,) = machine.nodes
    assert machine.device is None
    assert (node.read_bandwidth, node.capacity_bytes) == (30e9, 4 << 30)
    assert machine.core_flops == 50e9
    assert factors_of(description).core_fixed_share == 0.5


@pytest.mark.parametrize(
    ("text", "about"),
    [
        (MINIMAL.replace("latency_ns", "latency"), "dram.0.latency"),
        (MINIMAL + "speed = 1\n", "speed"),
        (MINIMAL.replace("usable_share = 0.5", "usable_share = 1.5"), "usable_share"),
        (MINIMAL.replace("num_cores = 2", "num_cores = 0"), "cpu.num_cores"),
        (MINIMAL.replace("bandwidth_gb_s = 40", "bandwidth_gb_s = inf"), "bandwidth_gb_s"),
        (MINIMAL.split("[[dram]]")[0], "dram"),
        ("name = ", "machine.toml"),
    ],
)
def test_a_wrong_description_is_refused_by_key(tmp_path: Path, text: str, about: str) -> None:
    with pytest.raises(MachineError, match=about):
        read_machine(write(tmp_path, text))


def test_an_unknown_machine_lists_the_known_ones() -> None:
    with pytest.raises(MachineError, match=r"no machine 'h300'; known are a100-40g, .*rtx5090"):
        read_machine("h300")


def test_a_name_may_end_in_toml() -> None:
    assert read_machine("h100.toml") == read_machine("h100")


def test_descriptions_are_frozen() -> None:
    with pytest.raises(ValidationError):
        read_machine("h100").name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("num_cxl", [-1, MAX_CXL + 1])
def test_a_number_of_expanders_out_of_range_is_refused(num_cxl: int) -> None:
    with pytest.raises(MachineError, match="can be planned"):
        machine_of(read_machine("h100"), num_cxl=num_cxl)


def test_expanders_need_a_description(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="no \\[cxl\\]"):
        machine_of(read_machine(write(tmp_path, MINIMAL)), num_cxl=1)
