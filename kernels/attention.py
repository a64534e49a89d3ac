"""Attention over paged KV on the CPU: decode and extend (chunked prefill, prefix hits) in one exact kernel.

Keys are read in blocks of 512 tokens at absolute positions; each block is attended with its own maximum and
the blocks are merged from left to right, as in FlashAttention (arXiv 2205.14135) and Flash-Decoding. A row's
result therefore depends on its own query and keys only: not on the number of threads, the other sequences of
the batch or the way the prompt was cut into chunks, bit for bit.

Arithmetic is float32. Softmax weights have a relative error of 3e-7; on `avx512_bf16` and `amx` with bfloat16 KV it is
3e-6, and each weight is rounded to bfloat16 for its product with V, which costs 2^-9 as the output's rounding
does.

Keys and values lie in pages as rows, a token after the other, on every tier. The kernels repack 64 of them at a time,
in the L1 cache, into the order that dot-product instructions want; that hides behind the reading of memory, and
allows them to attend a list of keys as well as a run of pages.

In csrc/, `attend_inl.h` is the algorithm, `pool.h` the threads and `step.h` the sharing-out of work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, overload

import torch
from torch import Tensor

from hybridgen.kernels import _cpu
from hybridgen.kernels.index import KVIndex, allocate_index, build_index
from hybridgen.kernels.layout import DTYPE_NAMES, is_packed
from hybridgen.kernels.layout import KVLayout as KVLayout
from hybridgen.kernels.memory import map_zeros
from hybridgen.kernels.page_memory import PageMemory
from hybridgen.kernels.pool import AttentionPool as AttentionPool


@dataclass(frozen=True, slots=True)
class KVPages:
    """The pages of one tier."""

    layout: KVLayout
    k: Tensor  # [num_pages, num_layers, num_kv_heads, page_size, head_dim]; pages may be apart
    v: Tensor  # like k
    index: KVIndex | None = None  # of K; written as tokens are stored and pages copied
    memory: PageMemory | None = None  # where the pages lie; counts what is read of them

    def __post_init__(self) -> None:
        shape = self.layout.shape(self.num_pages)
        for pages in (self.k, self.v):
            if pages.shape != shape:
                raise ValueError(f"pages of shape {tuple(pages.shape)} do not have the layout {self.layout}")
            if pages.dtype != self.layout.dtype or pages.device.type != "cpu" or not is_packed(pages):
                raise ValueError(f"pages must be packed {self.layout.dtype} in host memory")
        if self.num_pages and self.k.stride(0) != self.v.stride(0):
            raise ValueError(f"pages of K are {self.k.stride(0)} elements apart, of V {self.v.stride(0)}")
        if self.memory is not None and self.memory.num_pages != self.num_pages:
            raise ValueError(f"there are labels for {self.memory.num_pages} of {self.num_pages} pages")

    @property
    def num_pages(self) -> int:
        return self.k.shape[0]

    @property
    def page_stride(self) -> int:
        """Elements from a page to the next, in K and in V: what a page has, or more."""
        return self.k.stride(0) if self.num_pages > 1 else self.layout.page_bytes // 2 // self.k.itemsize


def allocate_pages(layout: KVLayout, num_pages: int, *, with_index: bool = False) -> KVPages:
    """Zeroed pages, and an index of K if a policy is to read less than all of them. The system provides the memory
    piece by piece as it is written, in huge pages where it grants them, so a large cache costs nothing at start-up.

    Raises:
        OSError: the address space or the overcommit limit does not allow it.
    """
    shape = layout.shape(num_pages)
    index = allocate_index(layout, num_pages) if with_index else None
    return KVPages(layout, map_zeros(shape, layout.dtype), map_zeros(shape, layout.dtype), index)


def copy_pages(
    pool: AttentionPool,
    source: KVPages,
    source_pages: Sequence[int],
    target: KVPages,
    target_pages: Sequence[int],
) -> None:
    """Make page `target_pages[i]` of one tier what page `source_pages[i]` of another, or of the same, is.

    Args:
        source_pages, target_pages: counted from the first page of their tier; none is in both lists of one tier.

    Raises:
        ValueError: the tiers' pages differ in shape, or a page is not there; nothing was copied.
    """
    if source.layout != target.layout:
        raise ValueError(f"pages of {source.layout} cannot become pages of {target.layout}")
    if len(source_pages) != len(target_pages):
        raise ValueError(f"{len(source_pages)} pages cannot become {len(target_pages)}")
    for pages, tier in ((source_pages, source), (target_pages, target)):
        for page in pages:
            if not 0 <= page < tier.num_pages:
                raise ValueError(f"page {page} is not in [0, {tier.num_pages})")
    _cpu.copy_pages(
        pool.handle,
        source.k.data_ptr(),
        source.v.data_ptr(),
        target.k.data_ptr(),
        target.v.data_ptr(),
        source_pages,
        target_pages,
        source.layout.page_bytes // 2,
        source.page_stride * source.k.itemsize,
        target.page_stride * target.k.itemsize,
    )
    if target.index is not None:
        build_index(pool, target.layout, target.k, target.v, target.index, target_pages)


class Job(Protocol):
    """Work that a pool has taken."""

    def wait(self) -> None: ...

    def is_done(self) -> bool: ...

    def ended_ns(self) -> int: ...


class Ticket:
    """Attention that was submitted. It holds its tensors until it is done; dropped, it waits."""

    __slots__ = ("_handle", "_lse", "_out", "_q")

    def __init__(self, handle: Job, q: Tensor, out: Tensor, lse: Tensor) -> None:
        self._handle = handle
        self._q = q
        self._out = out
        self._lse = lse

    def is_done(self) -> bool:
        return self._handle.is_done()

    def ended_s(self) -> float | None:
        """When the pool was done, as time.perf_counter counts; None if it ran in the caller. After `wait`."""
        return self._handle.ended_ns() * 1e-9 or None

    def wait(self) -> tuple[Tensor, Tensor]:
        """Help until it is done: (out, lse) as `AttentionStep.attend` returns them with `return_lse`."""
        self._handle.wait()
        return self._out, self._lse


class AttentionStep:
    """One tier's part in the attention of one forward pass: built once, then `store` and `attend` for each layer.

    Sequence s has the query rows `[query_begin[s], query_begin[s + 1])`, the last of its `kv_len[s]` tokens.
    Its keys lie in the pages of `block_table[s]`, in token order; entries past its last page are not read.
    Page ids are of one numbering over all tiers. This step stores to and attends the pages numbered
    `[first_page, first_page + pages.num_pages)` and passes over the others, whose part comes from elsewhere.

    Args:
        pages: not copied, and kept alive.
        query_begin: [num_seqs + 1]
        kv_len: [num_seqs]  tokens after this step's have been stored; 0 for a sequence without keys.
        block_table: [num_seqs, max_pages]  page ids.
        scale: positive; multiplies the logits.
        total_pages: of all tiers together; default: this tier ends the numbering.

    Raises:
        ValueError: a length or page id does not fit; nothing was read or written.
    """

    def __init__(
        self,
        pool: AttentionPool,
        pages: KVPages,
        *,
        query_begin: Sequence[int] | Tensor,
        kv_len: Sequence[int] | Tensor,
        block_table: Sequence[Sequence[int]] | Tensor,
        num_heads: int,
        scale: float,
        first_page: int = 0,
        total_pages: int | None = None,
    ) -> None:
        begins, lens = _int32(query_begin), _int32(kv_len)
        num_seqs = lens.numel()
        table = (
            _int32(block_table).reshape(num_seqs, -1) if num_seqs else torch.zeros(0, 0, dtype=torch.int32)
        )
        if begins.numel() != num_seqs + 1:
            raise ValueError(f"query_begin has {begins.numel()} entries for {num_seqs} sequences")
        layout = pages.layout
        self.num_tokens = int(begins[-1])
        self.num_heads = num_heads
        self.pool = pool
        self.pages = pages
        self._q_shape = (self.num_tokens, num_heads, layout.head_dim)
        self._kv_shape = (self.num_tokens, layout.num_kv_heads, layout.head_dim)
        self.handle = _cpu.Step(
            pool.handle,
            layout.num_layers,
            layout.num_kv_heads,
            layout.head_dim,
            layout.page_size,
            DTYPE_NAMES[layout.dtype],
            pages.page_stride,
            pages.k.data_ptr(),
            pages.v.data_ptr(),
            first_page,
            pages.num_pages,
            first_page + pages.num_pages if total_pages is None else total_pages,
            num_seqs,
            begins.data_ptr(),
            lens.data_ptr(),
            table.data_ptr(),
            table.shape[1],
            num_heads,
            scale,
        )
        if pages.index is not None:
            index = pages.index
            self.handle.keep_index(
                pool.isa, index.k.data_ptr(), index.k_stride, index.v_sum.data_ptr(), index.v_sum_stride
            )
        if pages.memory is not None:
            self.handle.keep_memory(pages.memory.handle)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write this step's keys and values to their slots, those that are on this tier.

        Args:
            k, v: [tokens, num_kv_heads, head_dim]; rows may be apart (views of a fused projection).
        """
        k_stride = self._row_stride(k, self._kv_shape)
        v_stride = self._row_stride(v, self._kv_shape)
        self.handle.store(layer, k.data_ptr(), k_stride, v.data_ptr(), v_stride)

    @overload
    def attend(
        self,
        layer: int,
        q: Tensor,
        *,
        sliding_window: int = 0,
        soft_cap: float = 0.0,
        out: Tensor | None = None,
        return_lse: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def attend(
        self,
        layer: int,
        q: Tensor,
        *,
        sliding_window: int = 0,
        soft_cap: float = 0.0,
        out: Tensor | None = None,
        return_lse: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    def attend(
        self,
        layer: int,
        q: Tensor,
        *,
        sliding_window: int = 0,
        soft_cap: float = 0.0,
        out: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from each query to this tier's keys at its own and earlier positions.

        Args:
            q: [tokens, num_heads, head_dim]; rows may be apart.
            sliding_window: keys that a query sees, its own included; 0: all.
            soft_cap: logits become `soft_cap * tanh(logit / soft_cap)`; 0: as they are.
            out: [tokens, num_heads, head_dim] to write to; float32 if `return_lse`, else of q's dtype.

        Returns:
            out, or (out, lse) as `merge` takes them: out in float32, lse [tokens, num_heads], natural log.
            A query that sees no key gives out = 0 and lse = -inf.
        """
        q_stride = self._row_stride(q, self._q_shape)
        out_dtype = torch.float32 if return_lse else q.dtype
        if out is None:
            out = torch.empty(self._q_shape, dtype=out_dtype)
        out_stride = self._row_stride(out, self._q_shape, out_dtype)
        lse = torch.empty(self._q_shape[:2], dtype=torch.float32) if return_lse else None
        self.handle.attend(
            layer,
            q.data_ptr(),
            q_stride,
            out.data_ptr(),
            out_stride,
            return_lse,
            lse.data_ptr() if lse is not None else 0,
            sliding_window,
            soft_cap,
        )
        return out if lse is None else (out, lse)

    def submit(self, layer: int, q: Tensor, *, sliding_window: int = 0, soft_cap: float = 0.0) -> Ticket:
        """Begin `attend(.., return_lse=True)`. The pool's threads work on it while the caller goes on, except the one
        of the CPU that the caller runs on; `Ticket.wait` gives the result. Several may be in flight.

        Args:
            q: [tokens, num_heads, head_dim]; rows may be apart. Not to be changed before the result is there.
        """
        q_stride = self.query_stride(q)
        out = torch.empty(self._q_shape, dtype=torch.float32)
        lse = torch.empty(self._q_shape[:2], dtype=torch.float32)
        handle = self.handle.submit(
            layer,
            q.data_ptr(),
            q_stride,
            out.data_ptr(),
            self._q_shape[1] * self._q_shape[2],
            True,
            lse.data_ptr(),
            sliding_window,
            soft_cap,
        )
        return Ticket(handle, q, out, lse)

    def query_stride(self, q: Tensor, num_rows: int | None = None) -> int:
        """Elements between the rows of q, which is to be [tokens, num_heads, head_dim] and of the pages' dtype.

        Args:
            num_rows: that q is to have, if not one for each token.

        Raises:
            ValueError: it is not.
        """
        rows, heads, dim = self._q_shape
        return self._row_stride(q, (rows if num_rows is None else num_rows, heads, dim))

    def _row_stride(self, rows: Tensor, shape: tuple[int, int, int], dtype: torch.dtype | None = None) -> int:
        row, head, dim = rows.stride() if rows.dim() == 3 else (0, 0, 0)
        # A dimension of one element may carry any stride.
        packed = dim == 1 and (head == shape[2] or shape[1] == 1)
        if (
            rows.shape != shape
            or rows.dtype != (dtype or self.pages.layout.dtype)
            or not (packed or rows.numel() == 0)
        ):
            raise ValueError(
                f"expected {dtype or self.pages.layout.dtype} {shape} with packed heads, "
                f"got {rows.dtype} {tuple(rows.shape)} with strides {rows.stride()}"
            )
        return row


def _int32(values: Sequence[int] | Sequence[Sequence[int]] | Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device="cpu").contiguous()
