"""Emulated memory nodes, as they are written."""

import pytest

from hybridgen.configs.emulation import EmulatedNode
from hybridgen.configs.settings import Settings, SettingsError, engine_settings, load_settings


def test_bandwidth_latency_and_capacity_are_read_with_their_units() -> None:
    settings = load_settings({"emulate_node": ["cxl0:bandwidth=36GB,latency=250ns,capacity=2GiB"]})
    assert settings.emulate_node == (EmulatedNode("cxl0", 36e9, 250e-9, 2 << 30),)
    assert engine_settings(settings).emulate_node == settings.emulate_node


def test_latency_and_capacity_may_be_left_out_and_nodes_may_be_several() -> None:
    settings = load_settings({"emulate_node": ["a:bandwidth=1GB/s", "b:bandwidth=500MB,latency=1.5us"]})
    assert settings.emulate_node == (EmulatedNode("a", 1e9), EmulatedNode("b", 5e8, 1.5e-6))


def test_the_environment_separates_nodes_by_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRIDGEN_EMULATE_NODE", "a:bandwidth=1GB b:bandwidth=2GB,latency=3ms")
    assert Settings().emulate_node == (EmulatedNode("a", 1e9), EmulatedNode("b", 2e9, 3e-3))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("cxl0", "write NAME:bandwidth="),
        ("a b:bandwidth=1GB", "write NAME:bandwidth="),
        ("cxl0:latency=250ns", "bandwidth is missing"),
        ("cxl0:bandwidth=fast", "not a number"),
        ("cxl0:bandwidth=0", "more than 0"),
        ("cxl0:bandwidth=1GB,latency=250", "write latency=250ns"),
        ("cxl0:bandwidth=1GB,bandwidth=2GB", "once each"),
        ("cxl0:bandwidth=1GB,speed=2", "once each"),
        ("cxl0:bandwidth=1GB,capacity=0", "more than 0"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(text: str, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        load_settings({"emulate_node": [text]})


def test_two_nodes_of_one_name_are_refused() -> None:
    with pytest.raises(SettingsError, match="names of their own"):
        load_settings({"emulate_node": ["a:bandwidth=1GB", "a:bandwidth=2GB"]})
