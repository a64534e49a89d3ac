import os
import subprocess
import sys

import pytest

from hybridgen.kernels.isa import ISA_VARIABLE, UnsupportedIsa, select_isa, supported_isas
from hybridgen.kernels.pool import AttentionPool


def test_the_fastest_supported_path_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    assert supported_isas()[0] == "scalar"
    assert select_isa() == supported_isas()[-1]


def test_the_environment_forces_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, "scalar")
    assert select_isa() == "scalar"
    with AttentionPool(1) as pool:
        assert pool.isa == "scalar"


def test_an_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, "sse9")
    assert select_isa("scalar") == "scalar"


def test_an_unknown_path_is_refused_with_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ISA_VARIABLE, "sse9")
    with pytest.raises(UnsupportedIsa, match=r"HYBRIDGEN_CPU_ISA='sse9' .* supports scalar"):
        AttentionPool(1)


FORK = """
import os, torch
from hybridgen.kernels.attention import AttentionPool, AttentionStep, KVLayout, allocate_pages
layout = KVLayout(1, 4, 64, 32, torch.float32)
pool = AttentionPool(2)
step = AttentionStep(
    pool, allocate_pages(layout, 64), query_begin=[0, 2048], kv_len=[2048], block_table=[list(range(64))],
    num_heads=4, scale=0.125,
)
q = torch.randn(2048, 4, 64)
step.store(0, q, q)
expected = step.attend(0, q)
child = os.fork()
if child == 0:
    same = torch.equal(step.attend(0, q), expected)
    pool.close()
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(step.attend(0, q), expected)
"""


def test_a_forked_child_can_attend_and_close() -> None:
    """In a process of its own: forking one with threads warns."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # torch's own OpenMP threads do not survive a fork; ours must not need them.
    done = subprocess.run([sys.executable, "-c", FORK], env=environment, timeout=60, check=False)
    assert done.returncode == 0
