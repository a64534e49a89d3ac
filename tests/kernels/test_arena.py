"""On this machine's kernel, whatever its nodes; `make test-numa` has several nodes."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from hybridgen.kernels import arena as arena_module
from hybridgen.kernels.arena import Arena, stride_bytes, stripe
from hybridgen.kernels.memory import HUGE_PAGE_BYTES, PAGE_BYTES, NodeFull, NodeUnavailable
from hybridgen.kernels.numa import allowed_nodes

NODE = allowed_nodes()[0]
ABSENT = max(allowed_nodes()) + 1


def several(num_pages: int, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Arena:
    """An arena that takes this for a machine with another node, so that every call reaches the kernel."""
    return Arena(num_pages, shape, dtype, nodes=[NODE, ABSENT])


@pytest.mark.parametrize(
    ("piece", "stride"),
    [
        (1, PAGE_BYTES),
        (PAGE_BYTES, PAGE_BYTES),
        (PAGE_BYTES + 1, 2 * PAGE_BYTES),
        (1 << 20, 1 << 20),
        (HUGE_PAGE_BYTES, HUGE_PAGE_BYTES),
        (HUGE_PAGE_BYTES + 1, HUGE_PAGE_BYTES + PAGE_BYTES),
        (20 * HUGE_PAGE_BYTES - 1000, 20 * HUGE_PAGE_BYTES),
        (20 * HUGE_PAGE_BYTES + 1, 21 * HUGE_PAGE_BYTES),
    ],
)
def test_pieces_are_padded_to_system_pages_and_to_huge_ones_where_that_wastes_little(
    piece: int, stride: int
) -> None:
    assert stride_bytes(piece) == stride


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_pages_are_zeros_at_addresses_a_stride_apart(dtype: torch.dtype) -> None:
    arena = Arena(3, (5, 300, 7), dtype)
    assert arena.pages.shape == (3, 5, 300, 7)
    assert arena.pages.stride(0) * dtype.itemsize == arena.stride_bytes
    assert arena.stride_bytes % PAGE_BYTES == 0
    assert arena.stride_bytes - arena.piece_bytes < PAGE_BYTES
    for page in range(3):
        assert arena.pages[page].data_ptr() == arena.address + page * arena.stride_bytes
        assert arena.pages[page].is_contiguous()
    assert not arena.pages.any()


@pytest.mark.parametrize(("num_pages", "shape"), [(0, (4,)), (3, (0,))])
def test_an_arena_may_be_empty(num_pages: int, shape: tuple[int, ...]) -> None:
    arena = several(num_pages, shape)
    assert arena.num_bytes == 0
    assert arena.pages.shape == (num_pages, *shape)
    assert arena.node_bytes() == {}
    assert arena.lock()


def test_untouched_pages_lie_nowhere_and_bound_ones_on_their_node() -> None:
    arena = several(8, (1 << 20,))
    assert arena.nodes_of(range(8)) == ((),) * 8
    arena.bind([1, 2, 6], NODE)
    assert arena.nodes_of(range(8)) == ((), (NODE,), (NODE,), (), (), (), (NODE,), ())
    assert arena.node_bytes() == {NODE: 3 * arena.stride_bytes}


def test_reading_an_untouched_page_does_not_place_it() -> None:
    arena = several(2, (1 << 14,))
    assert not arena.pages[1].any()
    assert arena.nodes_of([1]) == ((),)


def test_a_page_that_lies_where_it_is_bound_keeps_what_it_holds() -> None:
    arena = several(2, (1 << 14,))
    arena.bind([0], NODE)
    arena.pages[0] = 3
    arena.bind([0, 1], NODE)
    arena.migrate([0, 1], NODE)
    assert bool((arena.pages[0] == 3).all())


def test_a_page_half_written_is_bound_whole() -> None:
    arena = several(1, (1 << 16,))
    arena.pages[0, : PAGE_BYTES // 2] = 1
    arena.bind([0], NODE)
    assert arena.node_bytes() == {NODE: arena.stride_bytes}


def test_binding_leaves_neighbours_alone() -> None:
    arena = several(5, (1 << 14,))
    arena.pages.copy_(torch.arange(5)[:, None].expand(5, 1 << 14))
    arena.bind([1, 3], NODE)
    assert [int(page[0]) for page in arena.pages] == list(range(5))


def test_a_node_that_is_not_there_is_refused_by_name() -> None:
    arena = several(1, (1 << 14,))
    for refused in (arena.bind, arena.migrate):
        with pytest.raises(NodeUnavailable, match=f"node {ABSENT} has gone: .* there is memory on nodes"):
            refused([0], ABSENT)
        with pytest.raises(NodeUnavailable, match=f"node {ABSENT + 5} is not one that memory may come from"):
            refused([0], ABSENT + 5)
    assert arena.nodes_of([0]) == ((),)


def test_a_node_without_room_is_an_error_with_numbers_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a full node: the pages are there, on another one, and cannot be moved."""
    arena = several(4, (1 << 14,))
    arena.bind([0], NODE)
    arena.pages[0] = 7
    monkeypatch.setattr(arena_module, "allowed_nodes", lambda: (NODE, ABSENT))
    monkeypatch.setattr(arena_module, "set_policy", lambda *arguments: None)
    monkeypatch.setattr(arena_module, "move_to", lambda addresses, node: None)
    with pytest.raises(NodeFull, match=f"node {ABSENT} has no room for 65536 of 65536 bytes") as caught:
        arena.bind([1, 2], ABSENT)
    assert (caught.value.node, caught.value.missing_bytes) == (ABSENT, 2 * arena.stride_bytes)
    assert arena.nodes_of(range(4)) == ((NODE,), (), (), ())
    assert bool((arena.pages[0] == 7).all())


def test_a_locked_arena_can_be_bound_and_discarded() -> None:
    code = f"""
from hybridgen.kernels.arena import Arena
from hybridgen.kernels.memory import discard
import resource, torch
arena = Arena(4, (1 << 14,), torch.bfloat16, nodes=[{NODE}, {ABSENT}])
if arena.lock():
    arena.bind([0, 1], {NODE})
    arena.pages[0] = 1
    discard(arena.address, arena.stride_bytes)
    assert arena.nodes_of([0, 1]) == ((), ({NODE},)), arena.nodes_of([0, 1])
    assert not arena.pages[0].any()
    assert "VmLck:\t       0 kB" not in open("/proc/self/status").read()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_what_may_not_be_locked_is_one_warning_with_the_limit() -> None:
    """Without the privilege, which root has."""
    code = """
import os, resource, torch
from hybridgen.kernels.arena import Arena
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
if os.getuid() == 0:
    os.setuid(65534)
assert not Arena(16, (1 << 14,), torch.bfloat16, name="keys").lock()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True
    )
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(
        "keys: 524288 bytes could not be locked in memory (ENOMEM; the limit is 65536 bytes)"
    )
    assert "ulimit -l unlimited" in line
    assert "demotion_enabled" in line


FORBID = """
import ctypes, errno, platform
libc = ctypes.CDLL(None, use_errno=True)
# A filter that answers EPERM to the calls, as containers' profiles do: number, jump if equal, allow, refuse.
class Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_ushort), ("jt", ctypes.c_ubyte), ("jf", ctypes.c_ubyte), ("k", ctypes.c_uint)]
class Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.POINTER(Instruction))]
def forbid(calls):
    steps = [(0x20, 0, 0, 0)]
    steps += [(0x15, len(calls) - i, 0, call) for i, call in enumerate(calls)]
    steps += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050000 | errno.EPERM)]
    program = Program(len(steps), (Instruction * len(steps))(*(Instruction(*step) for step in steps)))
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0
MBIND, MOVE_PAGES = {"x86_64": (237, 279), "aarch64": (235, 239)}[platform.machine()]
"""


def test_where_placing_is_forbidden_it_is_an_error_that_says_what_to_allow() -> None:
    code = f"""
{FORBID}
import torch
from hybridgen.kernels.arena import Arena
from hybridgen.kernels.memory import PlacementForbidden
for call in (MOVE_PAGES, MBIND):
    forbid([call])
    arena = Arena(2, (1 << 14,), torch.bfloat16, nodes=[{NODE}, {ABSENT}])
    for call in (arena.bind, arena.migrate):
        try:
            call([0], {NODE})
        except PlacementForbidden as error:
            assert "is forbidden to this process (Operation not permitted)" in str(error), error
            assert "--cap-add SYS_NICE" in str(error)
        else:
            raise AssertionError("not forbidden")
    arena.pages[0] = 1  # it is memory all the same
only = Arena(2, (1 << 14,), torch.bfloat16, nodes=[{NODE}])
only.bind([0, 1], {NODE})  # with one node there is nothing to place
assert only.migrate([0], {NODE}).moved_bytes == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_interleaving_over_one_node_is_the_kernels() -> None:
    arena = several(4, (1 << 14,))
    assert arena.interleave({NODE: 1})
    arena.pages.fill_(1)
    assert set(arena.node_bytes()) == {NODE}


def test_interleaving_over_a_node_that_is_not_there_is_refused() -> None:
    with pytest.raises(NodeUnavailable):
        several(1, (1 << 14,)).interleave({NODE: 1, ABSENT: 1})


def test_pages_bound_one_by_one_remain_one_mapping() -> None:
    """A process may have 65,530 mappings; a page with a policy of its own would be one each."""
    arena = several(64, (1 << 14,))
    for page in range(0, 64, 2):
        arena.bind([page], NODE)
    starts = [int(line.split("-")[0], 16) for line in Path("/proc/self/maps").read_text().splitlines()]
    assert sum(arena.address < start < arena.address + arena.num_bytes for start in starts) == 0


def test_readers_see_their_pages_while_others_are_bound() -> None:
    arena = several(64, (1 << 14,))
    arena.bind([0], NODE)
    arena.pages[0] = 9
    wrong, done = [], threading.Event()

    def read() -> None:
        while not done.is_set():
            wrong.append(not bool((arena.pages[0] == 9).all()))

    reader = threading.Thread(target=read)
    reader.start()
    arena.bind(range(64), NODE)
    done.set()
    reader.join()
    assert wrong
    assert not any(wrong)


@pytest.mark.parametrize(
    ("num_pages", "weights", "nodes"),
    [
        (0, {0: 1}, ()),
        (4, {0: 1, 1: 1}, (0, 1, 0, 1)),
        (8, {0: 3, 2: 1}, (0, 0, 2, 0, 0, 0, 2, 0)),
        (3, {0: 0, 5: 2}, (5, 5, 5)),
    ],
)
def test_stripes_give_each_node_its_share_of_any_run(
    num_pages: int, weights: dict[int, int], nodes: tuple[int, ...]
) -> None:
    assert stripe(num_pages, weights) == nodes


def test_stripes_keep_close_to_their_share_everywhere() -> None:
    weights = {0: 200, 1: 200, 2: 36, 3: 36}
    nodes = stripe(472, weights)
    for end in range(1, 473):
        for node, weight in weights.items():
            assert abs(nodes[:end].count(node) - end * weight / 472) < 1.5


@pytest.mark.parametrize("weights", [{}, {0: 0}, {0: 2, 1: -1}])
def test_weights_that_say_nothing_are_refused(weights: dict[int, int]) -> None:
    with pytest.raises(ValueError, match="weights"):
        stripe(1, weights)
