"""KV pages that a sparse attention can be judged on: recorded from a model, or drawn with known logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from bench.record_kv import NUM_QUERIES, Recording
from hybridgen.kernels.attention import KVLayout, KVPages, allocate_pages, copy_pages
from hybridgen.kernels.pool import AttentionPool


@dataclass(frozen=True, slots=True)
class Decoding:
    """A sequence about to decode one token."""

    kv_len: int
    block_table: Tensor  # int32 [pages]
    q: Tensor  # [num_layers, num_heads, head_dim]


@dataclass(frozen=True, slots=True)
class Contexts:
    """Sequences and the pages of one tier, with its index, that hold them in random order."""

    pages: KVPages
    sequences: tuple[Decoding, ...]
    num_heads: int

    @property
    def kv_bytes(self) -> int:
        """K and V of all tokens that the queries see, in all layers."""
        layout = self.pages.layout
        return sum(sequence.kv_len for sequence in self.sequences) * layout.page_bytes // layout.page_size


def recorded_contexts(
    pool: AttentionPool, recordings: Sequence[Recording], *, copies: int, page_size: int, seed: int = 0
) -> Contexts:
    """`copies` sequences of each recording, taking turns, each with pages of its own and another of the queries."""
    num_layers, num_tokens, num_kv_heads, head_dim = recordings[0].k.shape
    layout = KVLayout(num_layers, num_kv_heads, head_dim, page_size, torch.bfloat16)
    pages_each = -(-num_tokens // page_size)
    num_sequences = copies * len(recordings)
    pages = allocate_pages(layout, num_sequences * pages_each, with_index=True)
    order = torch.randperm(pages.num_pages, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    staged = allocate_pages(layout, pages_each)
    tables: dict[int, Tensor] = {}
    for which, recording in enumerate(recordings):
        for rows, half in ((recording.k, staged.k), (recording.v, staged.v)):
            # [layers, tokens, heads, dim] -> [pages, layers, heads, page_size, dim]
            padded = torch.zeros(num_layers, pages_each * page_size, num_kv_heads, head_dim, dtype=rows.dtype)
            padded[:, :num_tokens] = rows
            split = padded.view(num_layers, pages_each, page_size, num_kv_heads, head_dim)
            half.copy_(split.permute(1, 0, 3, 2, 4))
        for copy in range(copies):
            place = copy * len(recordings) + which
            tables[place] = order[place * pages_each : (place + 1) * pages_each]
            copy_pages(pool, staged, range(pages_each), pages, tables[place].tolist())
    sequences = []
    for place in range(num_sequences):
        recording, query = recordings[place % len(recordings)], (place // len(recordings)) % NUM_QUERIES
        kv_len = num_tokens - NUM_QUERIES + query + 1
        sequences.append(Decoding(kv_len, tables[place], recording.q[:, query].contiguous()))
    return Contexts(pages, tuple(sequences), recordings[0].q.shape[2])


def synthetic_contexts(
    pool: AttentionPool,
    *,
    kv_len: int,
    num_layers: int,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    page_size: int,
    deviation: float,
    seed: int = 0,
) -> Contexts:
    """One sequence with independent keys, queries and values, so that every head's logits are N(0, deviation^2) and
    those of two heads of a group have nothing to do with each other: the hardest case for selection by KV head."""
    generator = torch.Generator().manual_seed(seed)
    layout = KVLayout(num_layers, num_kv_heads, head_dim, page_size, torch.bfloat16)
    num_pages = -(-kv_len // page_size)
    pages = allocate_pages(layout, num_pages, with_index=True)
    staged = allocate_pages(layout, 1)
    order = torch.randperm(num_pages, generator=generator)
    for page in order.tolist():
        for half in (staged.k, staged.v):
            half.copy_(torch.randn(half.shape, generator=generator))
        copy_pages(pool, staged, [0], pages, [page])
    q = torch.randn(num_layers, num_kv_heads * group, head_dim, generator=generator)
    # A logit is q.k / sqrt(head_dim), and q.k of Gaussian keys has the deviation |q|.
    q *= deviation * math.sqrt(head_dim) / q.norm(dim=-1, keepdim=True)
    sequence = Decoding(kv_len, order.to(torch.int32), q.to(torch.bfloat16))
    return Contexts(pages, (sequence,), num_kv_heads * group)


def gaussian_share(mass: float, deviation: float) -> float:
    """Share of the tokens that hold `mass` of the softmax when logits are N(0, deviation^2) and tokens are many.

    exp(x) tilts N(0, s^2) to N(s^2, s^2): the mass above t is P(s^2 + s z > t), the share above t is P(s z > t).
    """
    normal = NormalDist()
    return 1 - normal.cdf(deviation + normal.inv_cdf(1 - mass))
