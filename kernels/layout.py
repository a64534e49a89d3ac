"""The shape of a KV page, on every tier."""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP_TOKENS = 16  # keys that are repacked together
MAX_HEAD_DIM = 512

DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Shape of a KV page. A page holds `page_size` tokens of one sequence, for all layers and KV heads.

    K and V are two tensors of the same shape with the page first, so that they can be placed apart.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int  # even, up to 512
    page_size: int  # tokens; a multiple of 16
    dtype: torch.dtype  # float32, bfloat16 or float16

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_NAMES:
            raise ValueError(f"KV dtype {self.dtype} is not one of {', '.join(DTYPE_NAMES.values())}")
        if self.num_layers < 1 or self.num_kv_heads < 1:
            raise ValueError(f"{self.num_layers} layers of {self.num_kv_heads} KV heads hold no KV")
        if self.head_dim < 2 or self.head_dim % 2 or self.head_dim > MAX_HEAD_DIM:
            raise ValueError(f"head_dim {self.head_dim} is not an even number up to {MAX_HEAD_DIM}")
        if self.page_size < GROUP_TOKENS or self.page_size % GROUP_TOKENS:
            raise ValueError(f"page_size {self.page_size} is not a multiple of {GROUP_TOKENS}")

    def shape(self, num_pages: int) -> tuple[int, int, int, int, int]:
        """Of K, and of V: [num_pages, num_layers, num_kv_heads, page_size, head_dim]"""
        return (num_pages, self.num_layers, self.num_kv_heads, self.page_size, self.head_dim)

    @property
    def page_bytes(self) -> int:
        """K and V together."""
        elements = self.num_layers * self.num_kv_heads * self.head_dim * self.page_size
        return 2 * elements * self.dtype.itemsize


def is_packed(pages: Tensor) -> bool:
    """Whether each page, the first dimension, is contiguous; pages may be apart."""
    return len(pages) == 0 or pages[0].is_contiguous()
