"""CPU attention against this machine's limits: `python -m bench.cpu_attention`.

Decode is compared with the rate at which as many threads read plain memory; extend is counted in FLOPs.
Every figure of a line comes from one process in one run; on a busy machine only the ratios mean something.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch

from hybridgen.kernels.attention import AttentionPool, AttentionStep, KVLayout, allocate_pages

PAGE_SIZE = 32


def best_seconds(fn: Callable[[], object], *, seconds: float) -> float:
    """The fastest call within about `seconds`; at least three are made."""
    best, end, calls = float("inf"), time.perf_counter() + seconds, 0
    while calls < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        fn()
        best = min(best, time.perf_counter() - begin)
        calls += 1
    return best


def pages_for(layout: KVLayout, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_pages = -(-num_tokens // PAGE_SIZE)
    k_pages, v_pages = allocate_pages(layout, num_pages)
    noise = torch.randn(1 << 20).to(layout.dtype)
    for pages in (k_pages, v_pages):
        flat = pages.view(-1)
        for begin in range(0, flat.numel(), noise.numel()):
            end = min(begin + noise.numel(), flat.numel())
            flat[begin:end] = noise[: end - begin]
    return k_pages, v_pages, torch.randperm(num_pages, dtype=torch.int32)[None]


def measure_decode(
    pool: AttentionPool, dtype: torch.dtype, head_dim: int, group: int, kv_len: int, seconds: float
) -> dict[str, object]:
    """One sequence, one token; layers enough that no KV is still in the cache when its turn comes again."""
    num_kv_heads = 4
    layer_bytes = 2 * num_kv_heads * head_dim * kv_len * dtype.itemsize
    layout = KVLayout(max(1, (256 << 20) // layer_bytes), num_kv_heads, head_dim, PAGE_SIZE, dtype)
    k_pages, v_pages, table = pages_for(layout, kv_len)
    num_heads = num_kv_heads * group
    step = AttentionStep(
        pool,
        layout,
        k_pages,
        v_pages,
        query_begin=[0, 1],
        kv_len=[kv_len],
        block_table=table,
        num_heads=num_heads,
        scale=head_dim**-0.5,
    )
    q = torch.randn(1, num_heads, head_dim).to(dtype)
    out = torch.empty_like(q)

    def attend_layers() -> None:
        for layer in range(layout.num_layers):
            step.attend(layer, q, out=out)

    read = k_pages.nbytes + v_pages.nbytes
    flat = k_pages.view(-1).view(torch.int64), v_pages.view(-1).view(torch.int64)
    # Interleaved, so that both see the same neighbours.
    ours = plain = float("inf")
    for _ in range(3):
        ours = min(ours, best_seconds(attend_layers, seconds=seconds / 6))
        plain = min(plain, best_seconds(lambda: [half.sum() for half in flat], seconds=seconds / 6))
    return {
        "attend_gb_s": round(read / ours / 1e9, 2),
        "plain_read_gb_s": round(read / plain / 1e9, 2),
        "ratio": round(plain / ours, 3),
    }


def measure_extend(
    pool: AttentionPool, dtype: torch.dtype, head_dim: int, group: int, num_tokens: int, seconds: float
) -> dict[str, object]:
    """A whole prompt at once."""
    num_kv_heads = 12 // group
    layout = KVLayout(1, num_kv_heads, head_dim, PAGE_SIZE, dtype)
    k_pages, v_pages, table = pages_for(layout, num_tokens)
    num_heads = num_kv_heads * group
    step = AttentionStep(
        pool,
        layout,
        k_pages,
        v_pages,
        query_begin=[0, num_tokens],
        kv_len=[num_tokens],
        block_table=table,
        num_heads=num_heads,
        scale=head_dim**-0.5,
    )
    q = torch.randn(num_tokens, num_heads, head_dim).to(dtype)
    out = torch.empty_like(q)
    flops = 4 * head_dim * num_heads * num_tokens * (num_tokens + 1) / 2
    took = best_seconds(lambda: step.attend(0, q, out=out), seconds=seconds)
    return {"gflop_s_per_thread": round(flops / took / 1e9 / pool.num_threads, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=None, help="default: every allowed CPU")
    parser.add_argument("--isa", default=None)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line")
    parser.add_argument("--kv-len", type=int, nargs="*", default=[8192, 65536])
    parser.add_argument("--group", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--head-dim", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--prompt", type=int, nargs="*", default=[2048, 8000])
    parser.add_argument(
        "--dtype", nargs="*", default=["bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    options = parser.parse_args()
    with AttentionPool(options.threads, isa=options.isa) as pool:
        torch.set_num_threads(pool.num_threads)
        for dtype in options.dtype:
            for head_dim in options.head_dim:
                common: dict[str, object] = {
                    "isa": pool.isa,
                    "threads": pool.num_threads,
                    "dtype": dtype,
                    "head_dim": head_dim,
                }
                for group in options.group:
                    for kv_len in options.kv_len:
                        line = {"decode": kv_len, **common, "group": group}
                        line |= measure_decode(
                            pool, getattr(torch, dtype), head_dim, group, kv_len, options.seconds
                        )
                        print(json.dumps(line), flush=True)
                for num_tokens in options.prompt:
                    line = {"extend": num_tokens, **common, "group": 4}
                    line |= measure_extend(
                        pool, getattr(torch, dtype), head_dim, 4, num_tokens, options.seconds
                    )
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
