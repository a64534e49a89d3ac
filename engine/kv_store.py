"""The tensors behind the scheduler's page numbers, and the attention over them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hybridgen.engine.balance import StepClocks
from hybridgen.engine.batch import Batch
from hybridgen.engine.host_memory import HostMemory
from hybridgen.engine.model_spec import ModelSpec
from hybridgen.kernels.attention import AttentionStep, KVLayout, KVPages, allocate_pages, copy_pages
from hybridgen.kernels.index import allocate_index
from hybridgen.kernels.ops import merge
from hybridgen.kernels.page_memory import NodeReads
from hybridgen.kernels.policies.base import Policy
from hybridgen.kernels.policies.exact import ExactPolicy
from hybridgen.kernels.policies.hybridgen import HybridGenPolicy
from hybridgen.kernels.policies.mass import MassPolicy
from hybridgen.kernels.pool import AttentionPool
from hybridgen.scheduler.step import PageMove, Step


class NotEnoughMemory(Exception):
    """The KV cache asked for does not fit, or is too small to serve one sequence; the message has the numbers."""


@dataclass(slots=True)
class RetainedMass:
    """Sums over all steps and layers; `lowest` is the last step's that measured any."""

    num_heads: int = 0  # query heads measured
    mass: float = 0.0  # the sum of theirs
    lowest: float = 1.0
    num_scanned: int = 0  # tokens per KV head
    num_selected: int = 0


class KVStore:
    """K and V pages of all layers on two tiers: device pages [0, num_device_pages), host pages after them.

    On a CPU both lie in its memory; the device tier stands for one, so that what depends on the split runs as it does
    on two processors. The same threads attend both, unless the device has a pool of its own.

    Args:
        host: the host's pages.
        pool: attends the host's pages, and the device's if there is no `device_pool`.
        policy: reads the host pages, in full or in part.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layout: KVLayout,
        *,
        num_device_pages: int,
        host: HostMemory,
        pool: AttentionPool,
        policy: Policy,
        device_pool: AttentionPool | None = None,
    ) -> None:
        self._spec = spec
        self._pool = pool
        self._device_pool = device_pool
        self._policy = policy
        self._device = allocate_pages(layout, num_device_pages)
        self.host = host
        self._host = host.pages
        self.retained = RetainedMass()
        self.last_lowest_mass: float | None = (
            None  # that a head retained in the last step; None if none was measured
        )
        self._coming_pages = 0  # that are known to follow those of the step under way
        self.clocks = StepClocks()  # of the step under way, or the last one
        self.looks_ahead = True  # whether the policy is told a layer ahead, if the decoder can

    def begin_step(self, step: Step, num_coming: int = 0) -> None:
        """Give the host pages that the step writes their nodes, and carry out its moves.

        Args:
            num_coming: tokens of the step's prompts that are still to be computed after it.
        """
        self._coming_pages = num_coming // self._host.layout.page_size
        self.clocks = StepClocks()
        num_device, page_size = self._device.num_pages, self._device.layout.page_size
        begin_s = time.perf_counter()
        self.carry_out(step.moves)
        if not num_device:
            written: list[int] = []
            for item in step.sequences:
                first = -(-item.begin // page_size)  # pages whose first slot is written
                written += item.block_table[first : -(-item.end // page_size)]
            self.host.prepare(written, coming=self._coming_pages)
        self.clocks.moved_s = time.perf_counter() - begin_s if step.moves else 0.0

    def carry_out(self, moves: Sequence[PageMove]) -> None:
        """Copy pages from tier to tier, as if one after the other."""
        num_device = self._device.num_pages
        run: list[PageMove] = []
        targets: set[int] = set()
        for move in moves:
            # Copies of one direction do not disturb each other unless the second writes over the first.
            if run and (move.target in targets or (run[0].source < num_device) != (move.source < num_device)):
                self._copy(run)
                run, targets = [], set()
            run.append(move)
            targets.add(move.target)
        if run:
            self._copy(run)

    def _copy(self, moves: Sequence[PageMove]) -> None:
        num_device = self._device.num_pages
        sources, targets = [move.source for move in moves], [move.target for move in moves]
        if sources[0] < num_device:
            host_ids = [target - num_device for target in targets]
            # Now, not earlier: a move before these may have read what they overwrite.
            self.host.prepare(host_ids, coming=self._coming_pages)
            copy_pages(self._pool, self._device, sources, self._host, host_ids)
        else:
            host_ids = [source - num_device for source in sources]
            copy_pages(self._pool, self._host, host_ids, self._device, targets)

    def attention(self, batch: Batch) -> "StepAttention":
        """The attention of one step, for `Decoder.forward`."""
        num_device = self._device.num_pages
        if batch.has_host_pages and self.host.wants_reads:
            self.host.begin_step([self._host_pages(batch)])
        device_pool = self._device_pool or self._pool
        device = self._step(batch, self._device, 0, device_pool) if batch.has_device_pages else None
        host = self._step(batch, self._host, num_device, self._pool) if batch.has_host_pages else None
        return StepAttention(
            device,
            host,
            self._policy,
            self._pool,
            clocks=None if self._device_pool is None else self.clocks,
            looks_ahead=self.looks_ahead,
        )

    def _host_pages(self, batch: Batch) -> npt.NDArray[np.int64]:
        """Host pages of the step's sequences, counted from 0; one that several of them hold, several times."""
        table = batch.block_table.numpy()
        num_pages = -(-batch.kv_len.numpy() // self._host.layout.page_size)
        pages = (
            table[np.arange(table.shape[1]) < num_pages[:, None]].astype(np.int64) - self._device.num_pages
        )
        return pages[pages >= 0]

    def end_step(self) -> NodeReads:
        """The forward pass is over: let go of what was kept for it, and note what it retained.

        Returns:
            What the step read of the host's memory nodes.
        """
        self._policy.end_step()
        self._note_retained()
        return self.host.end_step()

    def _note_retained(self) -> None:
        if not isinstance(self._policy, MassPolicy | HybridGenPolicy):
            return
        retained, lowest = self.retained, None
        self.last_lowest_mass = None
        for layer in self._policy.stats():
            if layer.count:
                retained.num_heads += layer.count
                retained.mass += layer.count * layer.mean
                retained.num_scanned += layer.scanned
                retained.num_selected += layer.attended
                lowest = layer.minimum if lowest is None else min(lowest, layer.minimum)
        if lowest is not None:
            retained.lowest = self.last_lowest_mass = lowest

    def _step(self, batch: Batch, pages: KVPages, first_page: int, pool: AttentionPool) -> AttentionStep:
        return AttentionStep(
            pool,
            pages,
            query_begin=batch.query_begin,
            kv_len=batch.kv_len,
            block_table=batch.block_table,
            num_heads=self._spec.num_heads,
            scale=self._spec.head_dim**-0.5,
            first_page=first_page,
            total_pages=self._device.num_pages + self._host.num_pages,
        )


class StepAttention:
    """One step's attention over the tiers that its pages lie on: the partials of both, merged exactly.

    Args:
        clocks: to add each layer's times to, where the device is a processor of its own: it waits for the host then,
            and does not help. None: one pool attends both.
    """

    def __init__(
        self,
        device: AttentionStep | None,
        host: AttentionStep | None,
        policy: Policy,
        pool: AttentionPool,
        *,
        clocks: StepClocks | None = None,
        looks_ahead: bool = True,
    ) -> None:
        assert device is not None or host is not None, "a step without pages"
        self._policy = policy
        self._pool = pool
        self._device = device
        self._host = host
        self._clocks = clocks
        self._looks_ahead = looks_ahead
        self._foretold: tuple[int, Tensor] | None = None

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write this step's keys and values, [tokens, kv_heads, head_dim], to the tier that is written to."""
        written = self._host if self._device is None else self._device
        assert written is not None
        written.store(layer, k, v)

    @property
    def ahead_rows(self) -> Tensor | None:
        """What the policy wants foretold of the tokens that have host pages."""
        if self._host is None or not self._looks_ahead:
            return None
        return self._policy.ahead_rows(self._host)

    def ahead(self, layer: int, q: Tensor) -> None:
        """Kept until the layer before has been submitted, which comes first."""
        self._foretold = layer, q

    def attend(self, layer: int, q: Tensor, *, sliding_window: int = 0) -> Tensor:
        """q [tokens, heads, head_dim] -> the same shape."""
        device, host, clocks = self._device, self._host, self._clocks
        begin_s = time.perf_counter()
        if host is None or (device is None and isinstance(self._policy, ExactPolicy)):
            only = device or host
            assert only is not None
            out = only.attend(layer, q, sliding_window=sliding_window)
            if clocks is not None and only is device:
                clocks.device_s += time.perf_counter() - begin_s
            return out
        ticket = self._policy.submit(host, layer, q, sliding_window=sliding_window)
        device_out, device_lse = None, None
        if device is not None:
            device_out, device_lse = device.attend(layer, q, sliding_window=sliding_window, return_lse=True)
        # After the device's part, which the pool would do later otherwise, and before waiting, so that it has work.
        if self._foretold is not None:
            self._policy.ahead(host, *self._foretold)
            self._foretold = None
        if clocks is not None and device is not None:
            device_end_s = time.perf_counter()
            while not ticket.is_done():
                pass  # as a device waits: without helping
            host_end_s = ticket.ended_s() or time.perf_counter()
            clocks.device_s += device_end_s - begin_s
            clocks.host_s += host_end_s - begin_s
            clocks.device_wait_s += max(0.0, host_end_s - device_end_s)
            clocks.host_wait_s += max(0.0, device_end_s - host_end_s)
        host_out, host_lse = ticket.wait()
        if device_out is None or device_lse is None:
            return host_out.to(q.dtype)
        out = torch.empty(q.shape, dtype=q.dtype)
        return merge(device_out, device_lse, host_out, host_lse, out=out, pool=self._pool)


def kv_layout(spec: ModelSpec, page_size: int, dtype: torch.dtype) -> KVLayout:
    """How this model's KV lies in a page."""
    return KVLayout(spec.num_layers, spec.num_kv_heads, spec.head_dim, page_size, dtype)


def available_host_bytes() -> int:
    """Memory that could be taken now: what the kernel says is available, less what a cgroup withholds."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()))
    return max(0, available)


def choose_num_host_pages(
    layout: KVLayout,
    *,
    num_device_pages: int,
    num_host_pages: int | None,
    with_index: bool,
    cache_bytes: int,
    useful_tokens: int,
    available_bytes: int,
) -> int:
    """How many host pages to allocate: `num_host_pages` if given, otherwise what `cache_bytes` holds.

    Args:
        num_device_pages: taken from the same memory.
        with_index: whether host pages come with an index of K.
        useful_tokens: of as many slots every sequence of the fullest batch has its own; more are not allocated.
        available_bytes: memory that may be taken.

    Raises:
        NotEnoughMemory: the pages exceed the memory.
    """
    host_page_bytes = layout.page_bytes + (allocate_index(layout, 1).page_bytes if with_index else 0)
    if num_host_pages is None:
        useful_pages = -(-useful_tokens // layout.page_size)
        num_host_pages = min(cache_bytes // host_page_bytes, useful_pages)
    num_bytes = num_device_pages * layout.page_bytes + num_host_pages * host_page_bytes
    if num_bytes > available_bytes:
        num_pages = num_device_pages + num_host_pages
        raise NotEnoughMemory(
            f"a KV cache of {num_pages} pages takes {num_bytes} bytes; {available_bytes} bytes of "
            "memory are available. Lower --kv-cache-memory-bytes, --host-pages or --device-pages"
        )
    return num_host_pages


def choose_max_model_len(
    layout: KVLayout,
    *,
    num_device_pages: int,
    num_host_pages: int,
    num_sink_pages: int,
    asked: int | None,
    model_limit: int | None,
) -> int:
    """The longest sequence to serve, in tokens: what was asked for, otherwise as much as model and pages allow.

    Args:
        num_sink_pages: device pages that every sequence keeps besides the one it writes to.
        model_limit: positions that the model can represent; None if it has no table that ends.

    Raises:
        NotEnoughMemory: the pages cannot hold one sequence of the length asked for, or no token at all.
        ValueError: the length exceeds the model's learned positions.
    """
    num_pages = num_device_pages + num_host_pages
    capacity = num_pages * layout.page_size
    if capacity == 0:
        raise NotEnoughMemory(
            f"the KV cache holds no page: one takes {layout.page_bytes} bytes. Raise --kv-cache-memory-bytes"
        )
    if num_host_pages and 0 < num_device_pages <= num_sink_pages:
        raise NotEnoughMemory(
            f"a sequence needs {num_sink_pages + 1} device pages, the {num_sink_pages} of --sink-pages and one to "
            f"write to; --device-pages is {num_device_pages}"
        )
    if asked is None:
        return capacity if model_limit is None else min(capacity, model_limit)
    if model_limit is not None and asked > model_limit:
        raise ValueError(f"--max-model-len {asked} exceeds the {model_limit} positions of the model")
    if asked > capacity:
        needed = -(-asked // layout.page_size)
        raise NotEnoughMemory(
            f"one sequence of --max-model-len {asked} needs {needed} pages ({needed * layout.page_bytes} bytes); "
            f"the KV cache has {num_pages} ({num_pages * layout.page_bytes} bytes). Lower --max-model-len (or give "
            "`auto`), or raise --kv-cache-memory-bytes or --host-pages"
        )
    return asked
