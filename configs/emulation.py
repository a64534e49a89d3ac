"""Memory nodes that are emulated: read from text as `NAME:bandwidth=36GB,latency=250ns[,capacity=64GiB]`."""

import re
from collections.abc import Callable
from dataclasses import dataclass

_TIME_UNITS = {"ns": 1e9, "us": 1e6, "ms": 1e3, "s": 1.0}  # to a second


@dataclass(frozen=True, slots=True)
class EmulatedNode:
    """A part of DRAM that stands for a CXL node.

    Attributes:
        bandwidth: bytes a second, of all threads together.
        latency_s: added to each item of work that reads of the node.
        capacity_bytes: of KV; None: as much as the KV cache.
    """

    name: str
    bandwidth: float
    latency_s: float = 0.0
    capacity_bytes: int | None = None


def parse_emulated_node(text: str, parse_count: Callable[[str], object]) -> EmulatedNode:
    """
    Args:
        parse_count: of "36GB" and the like to bytes.

    Raises:
        ValueError: with what is wrong.
    """
    name, colon, rest = text.partition(":")
    if not colon or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ValueError(f"write NAME:bandwidth=36GB,latency=250ns,capacity=64GiB, got {text!r}")
    given: dict[str, str] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = (word.strip() for word in part.partition("="))
        if not equals or key not in ("bandwidth", "latency", "capacity") or key in given:
            raise ValueError(f"{name}: bandwidth, latency and capacity can be given, once each, got {part!r}")
        given[key] = value
    if "bandwidth" not in given:
        raise ValueError(f"{name}: its bandwidth is missing (bandwidth=36GB, in bytes a second)")
    bandwidth = parse_count(given["bandwidth"].removesuffix("/s"))
    capacity = parse_count(given["capacity"]) if "capacity" in given else None
    if not isinstance(bandwidth, int) or bandwidth <= 0 or (isinstance(capacity, int) and capacity <= 0):
        raise ValueError(f"{name}: bandwidth and capacity must be more than 0, got {text!r}")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ns|us|ms|s)", given.get("latency", "0ns"))
    if match is None:
        raise ValueError(f"{name}: write latency=250ns, us, ms or s, got {given['latency']!r}")
    latency_s = float(match[1]) / _TIME_UNITS[match[2]]
    return EmulatedNode(name, float(bandwidth), latency_s, capacity if isinstance(capacity, int) else None)
