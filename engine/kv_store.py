"""The tensors behind the scheduler's page numbers, and the attention over them."""

from pathlib import Path

import torch

from hybridgen.engine.batch import Batch
from hybridgen.engine.model_spec import ModelSpec
from hybridgen.kernels.attention import AttentionPool, AttentionStep, KVLayout, allocate_pages


class NotEnoughMemory(Exception):
    """The KV cache asked for does not fit, or is too small to serve one sequence; the message has the numbers."""


class KVStore:
    """K and V pages of all layers in host memory, attended by the CPU pool."""

    def __init__(self, spec: ModelSpec, layout: KVLayout, num_pages: int, pool: AttentionPool) -> None:
        self._spec = spec
        self._pool = pool
        self._pages = allocate_pages(layout, num_pages)

    def attention(self, batch: Batch) -> AttentionStep:
        """The attention of one step, for `Decoder.forward`."""
        return AttentionStep(
            self._pool,
            self._pages,
            query_begin=batch.query_begin,
            kv_len=batch.kv_len,
            block_table=batch.block_table,
            num_heads=self._spec.num_heads,
            scale=self._spec.head_dim**-0.5,
        )


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


def choose_num_pages(
    layout: KVLayout, *, num_pages: int | None, cache_bytes: int, useful_tokens: int, available_bytes: int
) -> int:
    """How many pages to allocate: `num_pages` if given, otherwise what `cache_bytes` holds.

    Args:
        useful_tokens: of as many slots every sequence of the fullest batch has its own; more are not allocated.
        available_bytes: memory that may be taken.

    Raises:
        NotEnoughMemory: the pages exceed the memory.
    """
    if num_pages is None:
        num_pages = min(cache_bytes // layout.page_bytes, -(-useful_tokens // layout.page_size))
    if num_pages * layout.page_bytes > available_bytes:
        raise NotEnoughMemory(
            f"a KV cache of {num_pages} pages takes {num_pages * layout.page_bytes} bytes; {available_bytes} bytes of "
            "memory are available. Lower --kv-cache-memory-bytes or --device-pages"
        )
    return num_pages


def choose_max_model_len(
    layout: KVLayout, *, num_pages: int, asked: int | None, model_limit: int | None
) -> int:
    """The longest sequence to serve, in tokens: what was asked for, otherwise as much as model and pages allow.

    Args:
        model_limit: positions that the model can represent; None if it has no table that ends.

    Raises:
        NotEnoughMemory: the pages cannot hold one sequence of the length asked for, or no token at all.
        ValueError: the length exceeds the model's learned positions.
    """
    capacity = num_pages * layout.page_size
    if capacity == 0:
        raise NotEnoughMemory(
            f"the KV cache holds no page: one takes {layout.page_bytes} bytes. Raise --kv-cache-memory-bytes"
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
            "`auto`), or raise --kv-cache-memory-bytes or --device-pages"
        )
    return asked
