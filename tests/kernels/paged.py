"""Random paged KV and mixed batches for the attention tests."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hybridgen.kernels import reference
from hybridgen.kernels.attention import AttentionPool, AttentionStep, KVLayout, allocate_pages

# (kv_len, num_q) around every boundary: group of 16, page of 32, block of 512
MIXED = (
    *((0, 0), (0, 1), (1, 1), (15, 1), (16, 2), (17, 17), (31, 1), (32, 1), (33, 2), (100, 64), (100, 1)),
    *((512, 1), (513, 2), (1000, 17), (1000, 1), (641, 64)),
)


@dataclass
class Batch:
    """A batch whose pages are scattered and whose unused slots hold NaN."""

    layout: KVLayout
    lens: tuple[tuple[int, int], ...] = MIXED
    group: int = 1
    layer: int = 0
    seed: int = 0
    logit_size: float = 2.0  # standard deviation of the logits
    padding: float = float("nan")
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        layout = self.layout
        self.scale = layout.head_dim**-0.5
        self.num_heads = layout.num_kv_heads * self.group
        self.kv_len = [kv_len for kv_len, _ in self.lens]
        self.query_begin = [0]
        for _, num_q in self.lens:
            self.query_begin.append(self.query_begin[-1] + num_q)
        needed = [-(-kv_len // layout.page_size) for kv_len in self.kv_len]
        num_pages = sum(needed) + 3
        order = torch.randperm(num_pages, generator=generator).tolist()
        width = max([*needed, 1])
        self.block_table = []
        for count in needed:
            pages, order = order[:count], order[count:]
            self.block_table.append(
                pages + [-7] * (width - count)
            )  # what lies past the last page is not read

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(layout.dtype)

        self.pages = allocate_pages(layout, num_pages)
        self.k_pages, self.v_pages = self.pages.k, self.pages.v
        self.k_pages.fill_(self.padding)
        self.v_pages.fill_(self.padding)
        for kv_len, pages in zip(self.kv_len, self.block_table, strict=True):
            if kv_len == 0:
                continue
            size = kv_len, layout.num_kv_heads, layout.head_dim
            reference.store(
                self.layer, draw(*size) * self.logit_size, draw(*size), self.k_pages, self.v_pages,
                query_begin=[0, kv_len], kv_len=[kv_len], block_table=[pages],
            )  # fmt: skip
        self.q = draw(self.query_begin[-1], self.num_heads, layout.head_dim)

    def step(self, pool: AttentionPool) -> AttentionStep:
        return AttentionStep(
            pool, self.pages, query_begin=self.query_begin, kv_len=self.kv_len,
            block_table=self.block_table, num_heads=self.num_heads, scale=self.scale,
        )  # fmt: skip

    def expected(self, **options: Any) -> tuple[Tensor, Tensor]:
        return reference.attend(
            self.layer, self.q, self.k_pages, self.v_pages, query_begin=self.query_begin, kv_len=self.kv_len,
            block_table=self.block_table, scale=self.scale, **options,
        )  # fmt: skip
