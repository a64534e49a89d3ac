"""Descriptions of machines for planning: TOML files in `machines/`, or anybody's own. Data sheets, no measurements.

A figure of a data sheet stands beside the share of it that programs reach, so that each has its own source. Sizes and
rates carry their unit in the key; unknown keys are refused.
"""

import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

_FOLDER = Path(__file__).resolve().parent / "machines"
MAX_CXL = 16

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


class MachineError(ValueError):
    """There is no such description, or it cannot be read; the message says which file, which key, what is allowed."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MemoryDescription(_Part):
    """One memory of the host."""

    capacity_gib: Positive
    usable_share: Share  # that KV may take
    bandwidth_gb_s: Positive  # of the data sheet, reading
    bandwidth_share: Share  # reached by all threads together
    latency_ns: Positive


class DramDescription(MemoryDescription):
    name: str


class DeviceDescription(_Part):
    """A GPU and its link to the host."""

    name: str
    memory_gib: Positive
    usable_share: Share  # that weights and KV may take
    memory_bandwidth_gb_s: Positive
    memory_bandwidth_share: Share
    matmul_tflops: Positive  # dense, of the weights' dtype
    matmul_share: Share
    link_bandwidth_gb_s: Positive  # one way
    link_bandwidth_share: Share


class CpuDescription(_Part):
    """The cores that attend.

    Attributes:
        core_gflops: of one core in attention, keys and values in its cache, 4 query heads a KV head.
        core_fixed_share: of the time at 4 query heads that does not grow with their number (loads, repacking).
    """

    name: str
    num_cores: Annotated[int, Field(ge=1)]
    core_gflops: Positive
    core_fixed_share: Annotated[float, Field(ge=0, le=1)]


class MachineDescription(_Part):
    """A machine. `cxl` is one expander, of which a plan may have none or several."""

    name: str
    device: DeviceDescription | None = None
    cpu: CpuDescription
    dram: Annotated[tuple[DramDescription, ...], Field(min_length=1)]
    cxl: MemoryDescription | None = None


def machine_names() -> tuple[str, ...]:
    """Names that `read_machine` knows, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


def read_machine(name: str) -> MachineDescription:
    """The description of that name, or in the TOML file at that path.

    Raises:
        MachineError: it is not there or not right.
    """
    known = machine_names()
    path = _FOLDER / f"{name.removesuffix('.toml')}.toml"
    if path.stem not in known or "/" in name:
        path = Path(name)
    if not path.is_file():
        raise MachineError(f"no machine {name!r}; known are {', '.join(known)}, or the path of a TOML file")
    try:
        return MachineDescription.model_validate(tomllib.loads(path.read_text()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise MachineError(f"{path}: {error}") from error
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()
        )
        raise MachineError(f"{path}: {problems}") from error
