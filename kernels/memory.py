"""Large zeroed regions of host memory, and the kernel's calls on where their pages lie.

The calls go to the kernel, not to libnuma, which only passes them on, and does not know of weighted interleaving.
"""

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from hybridgen.kernels import _cpu

HUGE_PAGE_BYTES = 2 << 20
PAGE_BYTES = mmap.PAGESIZE

# Of <linux/mman.h>; Python has no names for them.
_POPULATE_WRITE = 23
_DONTNEED_LOCKED = 24

UNTOUCHED = -errno.ENOENT  # what `page_nodes` says of a page that was never written
_MOVE_BYTES = 16 << 20  # asked of the kernel at a time, so that whoever else needs its locks gets a turn
_ATTEMPTS = 3  # at moving pages that are busy: being read through, or on their way to the kernel's lists


class PlacementError(Exception):
    """Memory does not lie where it was to lie; the text says what to do about it."""


class PlacementForbidden(PlacementError):
    """The system forbids placing memory, as containers do: allow the calls, or do without placement."""


class NodeUnavailable(PlacementError):
    """The node has no memory online, or this process may not use it."""


class NodeFull(PlacementError):
    """The node has less free memory than asked for.

    Attributes:
        node: the kernel's number.
        missing_bytes: of those asked for, found no place.
        free_bytes: of the node, after the attempt.
    """

    def __init__(self, what: str, node: int, asked_bytes: int, missing_bytes: int, free_bytes: int) -> None:
        super().__init__(
            f"{what}: node {node} has no room for {missing_bytes} of {asked_bytes} bytes ({free_bytes} bytes are "
            "free); give KV less memory there, or stop what else uses the node"
        )
        self.node = node
        self.missing_bytes = missing_bytes
        self.free_bytes = free_bytes


class Policy(IntEnum):
    """Where the kernel takes a page from when it is first touched, as mbind(2) numbers it."""

    PREFERRED = 1  # one node; others when it is full
    BIND = 2  # the given nodes alone: with no room there the kernel ends the process
    INTERLEAVE = 3
    LOCAL = 4  # the node of the CPU that touches it
    WEIGHTED_INTERLEAVE = 6


def map_bytes(num_bytes: int, *, huge: bool) -> Tensor:
    """Zeroed bytes that the system provides page by page as they are written; they begin at a huge-page boundary.

    Args:
        huge: in huge pages where the system grants them; else never.

    Raises:
        OSError: the address space or the overcommit limit does not allow it.
    """
    if num_bytes == 0:
        return torch.zeros(0, dtype=torch.uint8)
    # Private: the kernel gives huge pages to shared mappings by another rule, which is mostly "never".
    region = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    region.madvise(_huge_advice(huge))
    # Parts that are given a policy of their own, and then the common one again, become one mapping only if they were
    # touched as one before. The last byte is never part of the tensor.
    region[-1] = 0
    # The tensor keeps the mapping alive; skip to the first huge-page boundary in it.
    whole = torch.frombuffer(region, dtype=torch.uint8)
    skipped = -whole.data_ptr() % HUGE_PAGE_BYTES
    return whole[skipped : skipped + num_bytes]


def map_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that the system provides piece by piece as they are written, in huge pages where it grants them.

    Raises:
        OSError: the address space or the overcommit limit does not allow it.
    """
    count = 1
    for size in shape:
        count *= size
    return map_bytes(count * dtype.itemsize, huge=True).view(dtype).view(shape)


def set_policy(address: int, num_bytes: int, policy: Policy, nodes: Sequence[int] = ()) -> None:
    """Decide for pages of a range that are not there yet. The kernel leaves a range with a policy out of its balancing.

    Raises:
        PlacementForbidden: the system does not let this process.
        NodeUnavailable: no memory of `nodes` is online and allowed.
        OSError: anything else; EINVAL also for a policy that this kernel does not know.
    """
    error = _cpu.set_policy(address, num_bytes, policy, nodes)
    if error in (errno.EPERM, errno.ENOSYS):
        raise PlacementForbidden(forbidden("mbind", error))
    if error == errno.EINVAL and nodes and policy in (Policy.PREFERRED, Policy.BIND):
        raise NodeUnavailable(
            f"nodes {', '.join(map(str, nodes))}: no memory online that this process may use"
        )
    _raise(error)


def check_placement() -> None:
    """Try placing memory, and asking where it lies.

    Raises:
        PlacementForbidden: the system does not let this process.
    """
    memory = map_bytes(PAGE_BYTES, huge=False)
    set_policy(memory.data_ptr(), PAGE_BYTES, Policy.LOCAL)
    page_nodes(np.array([memory.data_ptr()], np.uint64))


def advise_huge(address: int, num_bytes: int, *, huge: bool) -> None:
    """Whether what is touched from now on comes in huge pages, where the system grants them."""
    _raise(_cpu.advise(address, num_bytes, _huge_advice(huge)))


def populate(address: int, num_bytes: int) -> None:
    """Have every page of a range there, zeroed where it was not."""
    if num_bytes == 0:
        return
    error = _cpu.advise(address, num_bytes, _POPULATE_WRITE)
    if error == errno.EINVAL:  # before Linux 5.14
        for page in range(address, address + num_bytes, PAGE_BYTES):
            ctypes.memset(page, 0, 1)
    else:
        _raise(error)


def discard(address: int, num_bytes: int) -> None:
    """Give the pages of a range back to the system; they read as zeros and are untouched again."""
    error = _cpu.advise(address, num_bytes, mmap.MADV_DONTNEED)
    if error == errno.EINVAL:  # locked
        error = _cpu.advise(address, num_bytes, _DONTNEED_LOCKED)
        if error == errno.EINVAL:  # before Linux 5.18
            _raise(_cpu.unlock(address, num_bytes))
            _raise(_cpu.advise(address, num_bytes, mmap.MADV_DONTNEED))
            error = _cpu.lock_on_fault(address, num_bytes)
    _raise(error)


def lock_on_fault(address: int, num_bytes: int) -> int:
    """Keep a range's pages in memory, on the node they are on, from their first touch on; 0 or the errno."""
    return _cpu.lock_on_fault(address, num_bytes)


def page_nodes(addresses: np.ndarray) -> np.ndarray:
    """The node that each page of the system lies on now.

    Args:
        addresses: [n] uint64, multiples of PAGE_BYTES.

    Returns:
        [n] int32: a node, UNTOUCHED, or another negative errno.

    Raises:
        PlacementForbidden: the system does not let this process ask.
    """
    status = np.full(len(addresses), UNTOUCHED, np.int32)
    if len(addresses):
        error, _ = _cpu.move_pages(addresses.ctypes.data, len(addresses), 0, status.ctypes.data)
        if error in (errno.EPERM, errno.ENOSYS):
            raise PlacementForbidden(forbidden("move_pages", error))
        _raise(error)
    # A page that reads as zeros without ever having been written is all processes' common page.
    status[status == -errno.EFAULT] = UNTOUCHED
    return status


def move_to(addresses: np.ndarray, node: int) -> np.ndarray:
    """Move pages of the system to a node, content and addresses staying as they are; readers wait at most for a page.

    Args:
        addresses: [n] uint64, multiples of PAGE_BYTES. Untouched pages stay so.

    Returns:
        [n] int32: 0, or the errno of why a page that is there lies on another node still.

    Raises:
        PlacementForbidden: the system does not let this process.
        NodeUnavailable: no memory of the node is online and allowed.
    """
    errors = np.zeros(len(addresses), np.int32)
    step = _MOVE_BYTES // PAGE_BYTES
    for begin in range(0, len(addresses), step):
        piece = addresses[begin : begin + step]
        errors[begin : begin + step] = _move_piece(piece, node)
    return errors


def _move_piece(addresses: np.ndarray, node: int) -> np.ndarray:
    errors = np.zeros(len(addresses), np.int32)
    at = page_nodes(addresses)
    left = np.flatnonzero((at >= 0) & (at != node))
    for _ in range(_ATTEMPTS):
        if not len(left):
            break
        chosen = np.ascontiguousarray(addresses[left])
        nodes = np.full(len(left), node, np.int32)
        status = np.full(len(left), -errno.EAGAIN, np.int32)  # stays with those that the kernel gave up on
        error, _ = _cpu.move_pages(chosen.ctypes.data, len(chosen), nodes.ctypes.data, status.ctypes.data)
        if error in (errno.EPERM, errno.ENOSYS):
            raise PlacementForbidden(forbidden("move_pages", error))
        if error in (errno.ENODEV, errno.EACCES):
            reason = (
                "has no memory online" if error == errno.ENODEV else "is not allowed to this process (cpuset)"
            )
            raise NodeUnavailable(f"node {node} {reason}")
        if error not in (0, errno.ENOMEM, errno.EBUSY, errno.EAGAIN):
            _raise(error)
        errors[left] = error or np.where(status < 0, -status, errno.EBUSY)
        at = page_nodes(addresses)
        moved = len(left)
        left = np.flatnonzero((at >= 0) & (at != node))
        if error == errno.ENOMEM and len(left) == moved:
            break
    still = np.zeros(len(addresses), bool)
    still[left] = True
    errors[~still] = 0
    return errors


def forbidden(call: str, error: int) -> str:
    """What to do where the system forbids one of the calls."""
    return (
        f"{call} is forbidden to this process ({os.strerror(error)}), so that memory cannot be placed on chosen nodes. "
        "In a container, allow it: --cap-add SYS_NICE, and a seccomp profile that has mbind and move_pages "
        "(or --security-opt seccomp=unconfined)"
    )


def _huge_advice(huge: bool) -> int:
    return mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE


def _raise(error: int) -> None:
    if error:
        raise OSError(error, os.strerror(error))
