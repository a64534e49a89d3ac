"""One role's pieces of all host KV pages: addresses that never change, on memory nodes that may.

Page i's piece is contiguous, at `address + i * stride_bytes`. Placing and moving it is the kernel's work on that range,
so block tables and views stay valid, and a thread may move pages while others read them.
"""

import errno
import logging
import resource
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hybridgen.kernels.memory import (
    HUGE_PAGE_BYTES,
    PAGE_BYTES,
    NodeFull,
    NodeUnavailable,
    PlacementForbidden,
    Policy,
    advise_huge,
    discard,
    lock_on_fault,
    map_bytes,
    move_to,
    page_nodes,
    populate,
    set_policy,
)
from hybridgen.kernels.numa import ROOT, allowed_nodes, format_list, free_bytes, read_topology

_log = logging.getLogger(__name__)

# Rounding a piece up to huge pages may waste this much of it.
_MOST_PADDING = 1 / 16
# What may lie on other nodes for a moment while a full one is made to take it.
_POPULATE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Migration:
    """What became of a call of `Arena.migrate`.

    Attributes:
        moved_bytes: that lie on the wanted node now and did not before.
        failed: page to the name of the errno that kept it, whole, where it was; ENOMEM: the node is full.
    """

    moved_bytes: int
    failed: Mapping[int, str]


class Arena:
    """Pieces of `num_pages` pages, each on a node of its own choosing.

    Memory is given by the system when a page is bound or first written, and read as zeros before.

    Args:
        shape: of a page's piece.
        name: for messages.
        nodes: that memory may come from; default: as the system says. With one, nothing is ever placed or refused.

    Attributes:
        pages: [num_pages, *shape]; stride(0) is `stride_bytes`, which is a multiple of the system's page.
        address: of page 0.
        huge: whether memory is asked for in huge pages: where pieces are made of whole ones, or all memory is one node.

    Raises:
        OSError: the address space or the overcommit limit does not allow it.
    """

    def __init__(
        self,
        num_pages: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        name: str = "arena",
        nodes: Sequence[int] | None = None,
    ) -> None:
        self.name = name
        self.num_pages = num_pages
        self.nodes = tuple(allowed_nodes() if nodes is None else nodes)
        self.piece_bytes = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        one_node = len(self.nodes) == 1
        self.stride_bytes = stride_bytes(self.piece_bytes)
        self.huge = one_node or self.stride_bytes % HUGE_PAGE_BYTES == 0
        self._memory = map_bytes(num_pages * self.stride_bytes, huge=self.huge)
        self.address = self._memory.data_ptr()
        self.pages = _view(self._memory, num_pages, shape, dtype, self.stride_bytes)
        self._policy: tuple[Policy, tuple[int, ...]] = (Policy.LOCAL, ())
        self._forbidden = ""
        if not one_node and self.num_bytes:
            try:
                set_policy(self.address, self.num_bytes, *self._policy)
            except PlacementForbidden as error:
                self._forbidden = str(error)

    @property
    def num_bytes(self) -> int:
        """Of address space; memory is used by pages that were bound or written."""
        return self.num_pages * self.stride_bytes

    def bind(self, pages: Sequence[int], node: int) -> None:
        """Have pages that are about to be overwritten lie on a node, every byte of them, and have their memory now.

        What they held is lost unless they were there already. The kernel is not left to place them when they are
        written: with a strict policy and no room on the node it would end the process.

        Raises:
            NodeFull: nothing was bound, and the pages that were not on the node before are untouched.
            NodeUnavailable: the node has no memory online, or this process may not use it.
            PlacementForbidden: the system does not let this process place memory.
        """
        self._check(node)
        if len(self.nodes) == 1:
            for begin, end in _runs(pages):
                populate(*self._range(begin, end))
            return
        if self._forbidden:
            raise PlacementForbidden(self._forbidden)
        elsewhere = self._pages_not_on(pages, node)
        if not elsewhere:
            return
        asked_bytes = len(elsewhere) * self.stride_bytes
        step = max(1, _POPULATE_BYTES // self.stride_bytes)
        for first in range(0, len(elsewhere), step):
            left = self._populate(elsewhere[first : first + step], node)
            if left and self.huge:
                # The kernel does not drop files' cached pages for the sake of a huge page; for small ones it does.
                left = self._populate(left, node, huge=False)
            if left:
                missing = (len(left) + len(elsewhere[first + step :])) * self.stride_bytes
                for begin, end in _runs(elsewhere):
                    discard(*self._range(begin, end))
                raise NodeFull(self.name, node, asked_bytes, missing, free_bytes(node))

    def _populate(self, pages: Sequence[int], node: int, *, huge: bool = True) -> list[int]:
        """Zeros on a node in place of what the pages held; those of them that the node had no room for.

        Preferred, then verified: the kernel takes another node's memory where this one's has run out, instead of
        killing somebody for it. The policy goes again, since each range that differs from the next costs one of the
        process's 65,530 mappings.
        """
        for begin, end in _runs(pages):
            address, num_bytes = self._range(begin, end)
            discard(address, num_bytes)
            if not huge:
                advise_huge(address, num_bytes, huge=False)
            set_policy(address, num_bytes, Policy.PREFERRED, [node])
            try:
                populate(address, num_bytes)
            finally:
                set_policy(address, num_bytes, *self._policy)
        # Moving has the kernel drop files' cached pages that fill the node; touching had it look elsewhere.
        move_to(self._addresses(pages), node)
        if not huge:
            for begin, end in _runs(pages):
                advise_huge(*self._range(begin, end), huge=True)
        # Counted, not believed: a huge page of zeros that cannot be moved is split and dropped (Linux 6.12).
        return self._pages_not_on(pages, node)

    def migrate(self, pages: Sequence[int], node: int) -> Migration:
        """Move pages to a node with what they hold. Other threads may read them meanwhile, and write.

        A page that cannot be moved whole goes back to where it was; untouched pages are left alone.

        Raises:
            NodeUnavailable: the node has no memory online, or this process may not use it; nothing was moved.
            PlacementForbidden: the system does not let this process move memory; nothing was moved.
        """
        self._check(node)
        if len(self.nodes) == 1:
            return Migration(0, {})
        if self._forbidden:
            raise PlacementForbidden(self._forbidden)
        addresses = self._addresses(pages)
        before = page_nodes(addresses)
        errors = move_to(addresses, node).reshape(len(pages), -1)
        was_elsewhere = ((before >= 0) & (before != node)).reshape(errors.shape)
        failed = {
            page: errno.errorcode[int(row.max())]
            for page, row in zip(pages, errors, strict=True)
            if row.any()
        }
        half_moved = np.repeat(errors.any(axis=1), errors.shape[1]) & was_elsewhere.ravel()
        for source in np.unique(before[half_moved]):
            move_to(np.ascontiguousarray(addresses[half_moved & (before == source)]), int(source))
        moved = was_elsewhere & (page_nodes(addresses).reshape(errors.shape) == node)
        return Migration(int(np.count_nonzero(moved)) * PAGE_BYTES, failed)

    def nodes_of(self, pages: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """The nodes that each page lies on, as the kernel says: none where untouched, several where it was not bound.

        Raises:
            PlacementForbidden: the system does not let this process ask.
        """
        status = page_nodes(self._addresses(pages)).reshape(len(pages), -1)
        return tuple(tuple(int(node) for node in np.unique(row) if node >= 0) for row in status)

    def node_bytes(self) -> dict[int, int]:
        """Bytes of the arena by node, as the kernel says; untouched ones are nowhere.

        Raises:
            PlacementForbidden: the system does not let this process ask.
        """
        totals: dict[int, int] = {}
        for begin in range(0, self.num_pages, 1024):
            status = page_nodes(self._addresses(range(begin, min(begin + 1024, self.num_pages))))
            for node, count in zip(*np.unique(status[status >= 0], return_counts=True), strict=True):
                totals[int(node)] = totals.get(int(node), 0) + int(count) * PAGE_BYTES
        return totals

    def interleave(self, weights: Mapping[int, int]) -> bool:
        """Spread what is touched from now on over nodes in proportion to `weights`, system page by system page.

        Returns:
            False, nothing being changed, where the kernel cannot: it has no weighted interleaving (before Linux 6.9),
            or its weights, which are the whole system's, say otherwise. Then bind pages as `stripe` says.

        Raises:
            NodeUnavailable: a node has no memory online, or this process may not use it.
            PlacementForbidden: the system does not let this process place memory.
        """
        for node in weights:
            self._check(node)
        if self._forbidden:
            raise PlacementForbidden(self._forbidden)
        nodes = tuple(sorted(weights))
        equal = len(set(weights.values())) == 1
        system = dict(read_topology(ROOT).kernel.interleave_weights)
        agrees = all(
            weights[node] * system.get(nodes[0], 0) == weights[nodes[0]] * system.get(node, 0)
            for node in nodes
        )
        if not equal and not (system and agrees):
            return False
        policy = Policy.INTERLEAVE if equal else Policy.WEIGHTED_INTERLEAVE
        try:
            set_policy(self.address, self.num_bytes, policy, nodes)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
        self._policy = policy, nodes
        return True

    def lock(self) -> bool:
        """Keep the kernel from swapping pages out or moving them to slower nodes; where it may not, warn in the log.

        Memory is not taken by it: pages are locked as they come.
        """
        if not self.num_bytes:
            return True
        error = lock_on_fault(self.address, self.num_bytes)
        if error:
            limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
            _log.warning(
                "%s: %d bytes could not be locked in memory (%s; the limit is %s bytes): the kernel may swap KV pages "
                "out or move them to slower nodes. Raise it (ulimit -l unlimited; LimitMEMLOCK=infinity; docker "
                "--ulimit memlock=-1), or write false to /sys/kernel/mm/numa/demotion_enabled and run swapoff",
                self.name,
                self.num_bytes,
                errno.errorcode.get(error, error),
                limit,
            )
        return not error

    def _check(self, node: int) -> None:
        if node not in self.nodes:
            raise NodeUnavailable(
                f"{self.name}: node {node} is not one that memory may come from, which are {format_list(self.nodes)}"
            )
        if len(self.nodes) > 1 and node not in (online := allowed_nodes()):
            raise NodeUnavailable(
                f"{self.name}: node {node} has gone: its memory is offline, or no longer allowed to this process; "
                f"there is memory on nodes {format_list(online)}"
            )

    def _pages_not_on(self, pages: Sequence[int], node: int) -> list[int]:
        status = page_nodes(self._addresses(pages)).reshape(len(pages), -1)
        elsewhere = (status != node).any(axis=1)
        return [page for page, other in zip(pages, elsewhere, strict=True) if other]

    def _range(self, begin: int, end: int) -> tuple[int, int]:
        """Address and bytes of pages [begin, end)."""
        return self.address + begin * self.stride_bytes, (end - begin) * self.stride_bytes

    def _addresses(self, pages: Sequence[int]) -> np.ndarray:
        """Of the system's pages that KV pages are made of, in their order: [pages * system pages of one] uint64."""
        for page in pages:
            assert 0 <= page < self.num_pages, f"{self.name}: no page {page}"
        begins = np.asarray(pages, np.uint64).reshape(-1, 1) * np.uint64(self.stride_bytes)
        offsets = np.arange(0, self.stride_bytes, PAGE_BYTES, dtype=np.uint64)
        return (np.uint64(self.address) + begins + offsets).ravel()


def stride_bytes(piece_bytes: int) -> int:
    """From one page's piece to the next: whole pages of the system, huge ones where that wastes little."""
    huge = _round_up(piece_bytes, HUGE_PAGE_BYTES)
    if huge - piece_bytes <= piece_bytes * _MOST_PADDING:
        return huge
    return _round_up(piece_bytes, PAGE_BYTES)


def stripe(num_pages: int, weights: Mapping[int, int]) -> tuple[int, ...]:
    """A node for each page, so that any run of pages is spread over nodes in proportion to `weights`."""
    total = sum(weights.values())
    if total <= 0 or any(weight < 0 for weight in weights.values()):
        raise ValueError(f"weights must not be negative, and one of them more than 0: {dict(weights)}")
    owed = dict.fromkeys(sorted(weights), 0)
    nodes: list[int] = []
    for _ in range(num_pages):
        for node in owed:
            owed[node] += weights[node]
        most = max(owed, key=lambda node: owed[node])
        owed[most] -= total
        nodes.append(most)
    return tuple(nodes)


def _view(memory: Tensor, num_pages: int, shape: tuple[int, ...], dtype: torch.dtype, stride: int) -> Tensor:
    inner = torch.empty(shape, dtype=dtype, device="meta").stride()
    return memory.view(dtype).as_strided((num_pages, *shape), (stride // dtype.itemsize, *inner))


def _runs(pages: Iterable[int]) -> list[tuple[int, int]]:
    """Pages as half-open ranges that touch no other."""
    runs: list[list[int]] = []
    for page in sorted(set(pages)):
        if runs and page == runs[-1][1]:
            runs[-1][1] = page + 1
        else:
            runs.append([page, page + 1])
    return [(begin, end) for begin, end in runs]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
