import json
from pathlib import Path

import pytest

from bench.checkpoints import num_parameters
from bench.client import Reply, RequestFailed
from bench.decode import CELLS, CONFIG, Cell, Native, markdown, parse, step_seconds
from hybridgen.kernels import _cpu


def test_a_step_reads_every_linear_weight_once_and_the_kv_of_every_sequence() -> None:
    kv_of_a_token = 2 * 2 * 14 * 3 * 64  # K and V in bfloat16, layers, KV heads, head_dim
    weights = 2 * (num_parameters(CONFIG) - 32000 * 768)
    assert Cell(128, 1).step_bytes(64) == weights + 160 * kv_of_a_token
    assert Cell(8192, 8).step_bytes(0) == weights + 8 * 8192 * kv_of_a_token


def test_only_the_time_in_which_all_sequences_decode_counts() -> None:
    # The first sequence is alone for two seconds, the second one for five.
    early = Reply(0.0, tuple(1.0 * i for i in range(1, 9)), 8)
    late = Reply(0.0, tuple(1.0 * i for i in range(3, 14)), 11)
    assert step_seconds([early, late]) == pytest.approx(1.0)


def test_tokens_that_arrive_a_moment_apart_are_of_one_step() -> None:
    times = [0.1 * i for i in range(20)]
    jittered = Reply(0.0, tuple(time + 0.004 for time in times), 20)
    assert step_seconds([Reply(0.0, tuple(times), 20), jittered]) == pytest.approx(0.1, rel=0.01)


def test_sequences_that_never_decode_together_are_no_measurement() -> None:
    first, second = Reply(0.0, (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), 6), Reply(0.0, (5.5, 6.5, 7.5, 8.5, 9.5), 5)
    with pytest.raises(RequestFailed, match="decoded together"):
        step_seconds([first, second])


def test_merged_tokens_are_no_measurement() -> None:
    with pytest.raises(RequestFailed, match="several tokens"):
        step_seconds([Reply(0.0, tuple(1.0 * i for i in range(9)), 12)])


def test_time_in_the_extension_is_counted_and_nothing_is_left_behind() -> None:
    original = _cpu.Pool.close
    pool = _cpu.Pool([0], [0], "scalar")
    with Native() as native:
        pool.close()
        assert _cpu.Pool.close is not original
    assert 0 < native.seconds < 5
    assert _cpu.Pool.close is original


def test_the_table_has_a_row_for_each_cell_measured_or_not(tmp_path: Path) -> None:
    servers = {
        "tokens_per_s": {"hybridgen": 60.0, "vllm": 30.0},
        "share_of_roofline": {"hybridgen": 0.7, "vllm": 0.35},
        "times_as_fast_as_vllm": 2.0,
    }
    profile = {"python_share": 0.08, "python_ms": 1.25}
    offline = {"tokens_per_s": 65.0, "share_of_roofline": 0.75, "profile": profile}
    results = json.loads(json.dumps({"cells": {"128:1": {"servers": servers, "offline": offline}}}))
    rows = markdown(results).splitlines()[4:]
    assert rows[0] == "| 128 | 1 | 60.0 (70 %) | 30.0 (35 %) | 2.00x | 65.0 (75 %) | 8 % (1.25 ms) |"
    assert rows[1] == "| 8,192 | 1 | - | - | - | - | - |"
    assert len(rows) == len(CELLS)


def test_the_command_line_has_defaults() -> None:
    options = parse([])
    assert options.vllm_python is None
    assert options.parts == ["servers", "offline"]
