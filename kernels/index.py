"""An int8 index of K: nearly every key's logit at half the bytes of bfloat16, and which tokens hold the softmax mass.

K is quantised with a scale per token and 32 dims, so an estimated logit is off by some 0.7 % of the logits' standard
deviation for Gaussian keys. The `mass` policy (`kernels/policies/mass.py`) scans the index of every token of a
sequence, then attends exactly to the few tokens that matter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hybridgen.kernels import _cpu
from hybridgen.kernels.isa import select_isa
from hybridgen.kernels.layout import GROUP_TOKENS, KVLayout, is_packed
from hybridgen.kernels.memory import map_zeros
from hybridgen.kernels.pool import AttentionPool

UNIT_TOKENS = 32


@dataclass(frozen=True, slots=True)
class KVIndex:
    """The index of a tier's pages, page first.

    A group of 16 tokens is `[dims / 4, 16, 4]` codes (K / scale, rounded, plus 128), then `[dims / 32, 16]` scales
    in float16, padded to 64 bytes; dims: head_dim rounded up to 32. A scale of NaN marks a key that is not finite.

    Attributes:
        k: uint8 [num_pages, num_layers, num_kv_heads, page_size / 16, group_bytes]
        v_sum: float32 [num_pages, num_layers, num_kv_heads, head_dim]  sum of V over the page, once it is full.
    """

    k: Tensor
    v_sum: Tensor

    def __post_init__(self) -> None:
        if not (is_packed(self.k) and is_packed(self.v_sum)):
            raise ValueError("each page of an index must be contiguous")

    @property
    def k_stride(self) -> int:
        """Bytes from a page to the next."""
        return self.k.stride(0) if len(self.k) > 1 else self.k[:1].nbytes

    @property
    def v_sum_stride(self) -> int:
        """Floats from a page to the next."""
        return self.v_sum.stride(0) if len(self.v_sum) > 1 else self.v_sum[:1].numel()

    @property
    def page_bytes(self) -> int:
        return (self.k[:1].nbytes + self.v_sum[:1].nbytes) if len(self.k) else 0


@dataclass(frozen=True, slots=True)
class Selection:
    """The fewest tokens that hold a share of one KV head's softmax mass, by the estimates.

    Attributes:
        tokens: int32, ascending.
        lse: [group]  of all tokens; natural log.
        rest: [group]  mass of the tokens that were left out, per query head.
    """

    tokens: Tensor
    lse: Tensor
    rest: Tensor


class NotEstimable(Exception):
    """A key or query is not finite, or too large to estimate logits with. Routine: attend to every token instead."""


def allocate_index(layout: KVLayout, num_pages: int) -> KVIndex:
    """A zeroed index; as with `allocate_pages`, memory is provided as it is written.

    Raises:
        OSError: the address space or the overcommit limit does not allow it.
    """
    codes, sums = index_shapes(layout)
    return KVIndex(map_zeros((num_pages, *codes), torch.uint8), map_zeros((num_pages, *sums), torch.float32))


def index_shapes(layout: KVLayout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of one page: the codes of K in uint8, the sums of V in float32."""
    heads = (layout.num_layers, layout.num_kv_heads)
    groups = layout.page_size // GROUP_TOKENS
    return (*heads, groups, _cpu.index_group_bytes(layout.head_dim)), (*heads, layout.head_dim)


def build_index(
    pool: AttentionPool, layout: KVLayout, k: Tensor, v: Tensor, index: KVIndex, pages: Sequence[int]
) -> None:
    """Quantise K and add up V of whole pages, all layers and heads; the same bits on every instruction set.

    Args:
        k, v: [num_pages, num_layers, num_kv_heads, page_size, head_dim], equally far apart.
        pages: ids in [0, num_pages). Slots that hold no token yet give index entries that are never read.
    """
    num_pages = len(index.k)
    if any(not 0 <= page < num_pages for page in pages):
        raise ValueError(f"pages {list(pages)} are not all in [0, {num_pages})")
    packed = k[:1].numel()
    _handle(layout, index, page_stride=k.stride(0) if num_pages > 1 else packed).build(
        pool.handle, pool.isa, k.data_ptr(), v.data_ptr(), list(pages)
    )


def estimate(
    layout: KVLayout,
    index: KVIndex,
    q: Tensor,
    *,
    layer: int,
    kv_head: int,
    block_table: Sequence[int],
    num_tokens: int,
    scale: float,
    soft_cap: float = 0.0,
    isa: str | None = None,
) -> Tensor:
    """Estimated logits of one KV head, in the calling thread.

    Args:
        q: [group, head_dim], contiguous, of the layout's dtype.
        block_table: pages of the tokens, in order.

    Returns:
        [group, num_tokens] float32, natural units. NaN where the key or the query is not finite.
    """
    group = q.shape[0]
    units = -(-num_tokens // UNIT_TOKENS)
    out = torch.empty(units, group, UNIT_TOKENS)
    _handle(layout, index).estimate(
        select_isa(isa),
        q.data_ptr(),
        group,
        scale,
        soft_cap,
        layer * layout.num_kv_heads + kv_head,
        list(block_table),
        num_tokens,
        out.data_ptr(),
    )
    return out.transpose(0, 1).reshape(group, -1)[:, :num_tokens] * 0.6931471805599453


def select(
    layout: KVLayout,
    index: KVIndex,
    q: Tensor,
    *,
    layer: int,
    kv_head: int,
    block_table: Sequence[int],
    num_tokens: int,
    scale: float,
    mass: float,
    soft_cap: float = 0.0,
    num_sinks: int = 0,
    always_begin: int | None = None,
    isa: str | None = None,
) -> Selection:
    """The fewest tokens whose estimated softmax probabilities, averaged over the query heads, add up to `mass`.

    Tokens of equal probability to within 6 % are taken or left together, so there may be a few more than needed.
    Tokens [0, num_sinks) and [always_begin, num_tokens) are taken in any case. Arguments as `estimate` takes them.

    Raises:
        NotEstimable: logits cannot be estimated.
    """
    estimated, tokens, lse, rest = _handle(layout, index).select(
        select_isa(isa),
        q.data_ptr(),
        q.shape[0],
        scale,
        soft_cap,
        layer * layout.num_kv_heads + kv_head,
        list(block_table),
        num_tokens,
        num_sinks,
        num_tokens if always_begin is None else always_begin,
        mass,
    )
    if not estimated:
        raise NotEstimable(f"keys or queries of layer {layer}, KV head {kv_head} are not finite or too large")
    return Selection(torch.tensor(tokens, dtype=torch.int32), torch.tensor(lse), torch.tensor(rest))


def _handle(layout: KVLayout, index: KVIndex, *, page_stride: int = 0) -> _cpu.IndexPages:
    return _cpu.IndexPages(
        str(layout.dtype).removeprefix("torch."),
        layout.num_layers,
        layout.num_kv_heads,
        layout.head_dim,
        layout.page_size,
        page_stride,
        index.k.data_ptr(),
        index.k_stride,
        index.v_sum.data_ptr(),
        index.v_sum_stride,
    )
