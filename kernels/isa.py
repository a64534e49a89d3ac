"""Which instruction-set path the C++ kernels take: the best this CPU has, or the one asked for by name.

`scalar`, `avx2`, `avx512`, `avx512_bf16`, `amx`; and `amx_model`, which is `amx` with its tile instructions modelled in
software, slow and never chosen by itself: for testing that path on machines without AMX.
"""

import os

from hybridgen.kernels import _cpu

ISA_VARIABLE = "HYBRIDGEN_CPU_ISA"


class UnsupportedIsa(ValueError):
    """The path asked for is unknown, was not built, or cannot run on this CPU. Unset or correct the name."""


def supported_isas() -> tuple[str, ...]:
    """Names of the paths this machine can run, slowest first; `scalar` is always there."""
    return tuple(_cpu.supported_isas())


def select_isa(name: str | None = None) -> str:
    """The path called `name`, else the one that HYBRIDGEN_CPU_ISA names, else the fastest supported."""
    supported = supported_isas()
    source = "isa" if name else ISA_VARIABLE
    name = name or os.environ.get(ISA_VARIABLE)
    if not name:
        return supported[-1]
    if name not in supported:
        raise UnsupportedIsa(
            f"{source}={name!r} cannot be used: this machine supports {', '.join(supported)}"
        )
    return name
