import os
import shutil
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from hybridgen.configs.settings import allowed_cpus
from hybridgen.kernels.numa import cores, node_of_cpus
from hybridgen.kernels.pool import AttentionPool

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "kernels" / "csrc"
COMPILER = os.environ.get("CXX", "g++")


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="needs a C++ compiler")
def test_the_pool_passes_its_own_test(tmp_path: Path) -> None:
    """Without sanitizers; `make sanitize` has those."""
    binary = tmp_path / "pool_test"
    sources = [CSRC / "pool.cpp", CSRC / "read.cpp", ROOT / "tests/kernels/csrc/pool_test.cpp"]
    subprocess.run([COMPILER, "-std=gnu++20", "-pthread", *sources, "-o", binary], check=True)
    done = subprocess.run([binary], timeout=120, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_threads_are_one_per_core_within_the_quota_by_default() -> None:
    with AttentionPool() as pool:
        assert pool.num_threads == min(allowed_cpus(), len(cores(os.sched_getaffinity(0), node_of_cpus())))
        assert set(pool.cpus) <= os.sched_getaffinity(0)
        assert len(set(pool.cpus)) == pool.num_threads


def test_a_process_confined_to_one_cpu_gets_one_thread() -> None:
    code = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from hybridgen.kernels.pool import AttentionPool
with AttentionPool() as pool:
    assert pool.cpus == tuple(os.sched_getaffinity(0)), pool.cpus
"""
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)


def machine(root: Path, nodes: dict[str, str], siblings: dict[int, str]) -> None:
    for node, cpus in nodes.items():
        (root / node).mkdir()
        (root / node / "cpulist").write_text(cpus + "\n")
    for cpu, text in siblings.items():
        (root / f"cpu{cpu}" / "topology").mkdir(parents=True)
        (root / f"cpu{cpu}" / "topology" / "thread_siblings_list").write_text(text + "\n")


def test_cores_of_two_nodes_take_turns_and_siblings_are_one_core(tmp_path: Path) -> None:
    machine(
        tmp_path,
        {"node0": "0-1,4-5", "node1": "2-3,6-7", "node2": ""},  # a node without CPUs, as CXL memory is
        {cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)},
    )
    nodes = node_of_cpus(tmp_path)
    assert nodes == {0: 0, 1: 0, 4: 0, 5: 0, 2: 1, 3: 1, 6: 1, 7: 1}
    assert cores(range(8), nodes, tmp_path) == [[0, 4], [2, 6], [1, 5], [3, 7]]
    assert cores([1, 5, 6], nodes, tmp_path) == [[1, 5], [6]]


def test_a_machine_that_says_nothing_has_one_node_and_a_core_for_each_cpu(tmp_path: Path) -> None:
    assert node_of_cpus(tmp_path) == {}
    assert cores([3, 1], {}, tmp_path) == [[1], [3]]


def test_threads_of_a_node_are_a_group() -> None:
    cpu = min(os.sched_getaffinity(0))
    with AttentionPool(cpus=[cpu] * 4, nodes=[3, 1, 3, 1]) as pool:
        assert pool.nodes == (1, 3)
        assert pool.num_groups == 2
        assert pool.num_threads == 4


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="num_threads is 0"):
        AttentionPool(0)
    with pytest.raises(ValueError, match="at least one CPU"):
        AttentionPool(cpus=[])
    with pytest.raises(ValueError, match="1 nodes are given for 2 CPUs"):
        AttentionPool(cpus=[0, 0], nodes=[0])
    with pytest.raises(ValueError, match="nodes are given for given CPUs"):
        AttentionPool(nodes=[0])


@pytest.mark.parametrize("num_bytes", [0, 7, 8, 1000, (9 << 20) + 24])
def test_plain_read_sums_the_words(num_bytes: int) -> None:
    values = torch.randint(
        0, 256, (num_bytes,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    words = values[: num_bytes // 8 * 8].numpy().view(np.uint64)
    with AttentionPool(2) as pool:
        assert pool.plain_read(values) == int(words.sum(dtype=np.uint64))


def test_plain_read_takes_contiguous_host_memory_only() -> None:
    with AttentionPool(1) as pool, pytest.raises(ValueError, match="contiguous"):
        pool.plain_read(torch.zeros(4, 4).t()[1:])


def test_a_job_of_no_layer_is_traced_and_not_counted() -> None:
    values = torch.zeros(64 << 20, dtype=torch.uint8)
    with AttentionPool(2) as pool:
        pool.start_trace()
        begin = time.perf_counter_ns()
        pool.plain_read(values)
        end = time.perf_counter_ns()
        events = pool.stop_trace()
        stats = pool.stats()
    assert stats.items.sum() == 0
    assert {event.name for event in events} <= {"read", "wait"}
    assert any(event.name == "read" and event.layer == -1 and event.phase == 0 for event in events)
    assert all(begin <= event.begin_ns <= event.end_ns <= end for event in events)
    assert all(first.begin_ns <= second.begin_ns for first, second in pairwise(events))


def test_python_threads_read_at_the_same_time() -> None:
    values = torch.ones(1 << 20, dtype=torch.int64)
    sums = []
    with AttentionPool(2) as pool:

        def read() -> None:
            sums.extend(pool.plain_read(values) for _ in range(20))

        threads = [threading.Thread(target=read) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sums == [1 << 20] * 120


def test_a_pool_can_be_made_anew() -> None:
    values = torch.ones(1 << 20, dtype=torch.int64)
    for _ in range(3):
        with AttentionPool(2) as pool:
            assert pool.plain_read(values) == 1 << 20
        assert pool.plain_read(values) == 1 << 20  # closed: in this thread
