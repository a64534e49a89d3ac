"""Throws random batches at the C++ attention and compares every path with the scalar one:
`python -m bench.fuzz_attention --minutes 10`.

Batches have random layouts, block tables, tiers, lengths, windows and threads; what lies outside of the sequences'
keys is NaN. Between them come tables and lengths that do not fit, which must be refused. The seed is printed with every
round, and `--seed` with it repeats that round first.
"""

import argparse
import json
import random
import time

import torch
from torch import Tensor

from hybridgen.kernels.attention import AttentionStep, KVLayout, KVPages, allocate_pages
from hybridgen.kernels.isa import supported_isas
from hybridgen.kernels.ops import merge
from hybridgen.kernels.pool import AttentionPool

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING_ISAS = ("avx512_bf16", "amx", "amx_model")  # of softmax weights, to bfloat16


class Mismatch(Exception):
    """Two paths disagree; the message has the seed and the numbers."""


def tolerance(isa: str, dtype: torch.dtype, largest: float) -> float:
    """Of an output element, where values are at most `largest`."""
    weight = 2**-8 if isa in ROUNDING_ISAS and dtype == torch.bfloat16 else 1e-5
    return 2 * weight * largest


class Round:
    """One random batch and what every path makes of it."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = random.Random(seed)
        self.seed = seed
        torch.manual_seed(seed)
        self.layout = KVLayout(
            num_layers=rng.randint(1, 3),
            num_kv_heads=rng.randint(1, 4),
            head_dim=rng.choice([64, 80, 96, 128, 256, 2 * rng.randint(1, 128)]),
            page_size=16 * rng.choice([1, 2, 2, 3, 8]),
            dtype=rng.choice(DTYPES),
        )
        self.num_heads = self.layout.num_kv_heads * rng.randint(1, 16)
        self.layer = rng.randrange(self.layout.num_layers)
        self.kv_len: list[int] = []
        self.query_begin = [0]
        for _ in range(rng.choice([1, 1, 2, 5])):
            length = rng.choice([0, 1, rng.randint(0, 40), rng.randint(0, 600), rng.randint(0, 1500)])
            self.kv_len.append(length)
            self.query_begin.append(
                self.query_begin[-1]
                + rng.choice([1, 1, 1, rng.randint(0, 50), min(length, 120) + rng.randint(0, 2)])
            )
        needed = [-(-length // self.layout.page_size) for length in self.kv_len]
        self.num_pages = max(1, sum(needed) + rng.randint(0, 5))
        free = rng.sample(range(self.num_pages), self.num_pages)
        width = max([*needed, 1]) + rng.randint(0, 2)
        self.block_table = [[free.pop() for _ in range(count)] for count in needed]
        # Some sequences share a head, as prefix hits do.
        for seq in range(1, len(needed)):
            if rng.random() < 0.2:
                shared = min(needed[seq], needed[seq - 1])
                self.block_table[seq][:shared] = self.block_table[seq - 1][:shared]
        self.block_table = [row + [-5] * (width - len(row)) for row in self.block_table]
        self.split = rng.choice([0, 0, rng.randint(0, self.num_pages), self.num_pages])
        self.window = rng.choice([0, 0, 0, 1, rng.randint(1, 700)])
        self.soft_cap = rng.choice([0.0, 0.0, 0.0, rng.uniform(1, 50)])
        self.scale = self.layout.head_dim**-0.5 * 10 ** rng.uniform(-1, 0.7)
        self.pages = self.fill()
        q = torch.randn(self.query_begin[-1], self.num_heads, self.layout.head_dim)
        self.q = q.to(self.layout.dtype)

    def fill(self) -> KVPages:
        """Pages of random numbers, and of NaN where no sequence has a key."""
        pages = allocate_pages(self.layout, self.num_pages)
        pages.k.fill_(torch.nan)
        pages.v.fill_(torch.nan)
        page_size = self.layout.page_size
        for length, row in zip(self.kv_len, self.block_table, strict=True):
            for index in range(-(-length // page_size)):
                used = min(page_size, length - index * page_size)
                for half in (pages.k, pages.v):
                    slots = half[row[index], :, :, :used]
                    slots.copy_(torch.where(slots.isnan(), torch.randn(slots.shape).to(half.dtype), slots))
        return pages

    def attend(self, pool: AttentionPool) -> tuple[Tensor, Tensor]:
        """By one or two tiers, whose parts are merged."""
        parts: list[tuple[Tensor, Tensor]] = []
        for begin, end in ((0, self.split), (self.split, self.num_pages)):
            if begin == end:
                continue
            tier = KVPages(self.layout, self.pages.k[begin:end], self.pages.v[begin:end])
            step = AttentionStep(
                pool, tier, query_begin=self.query_begin, kv_len=self.kv_len, block_table=self.block_table,
                num_heads=self.num_heads, scale=self.scale, first_page=begin, total_pages=self.num_pages,
            )  # fmt: skip
            parts.append(
                step.submit(self.layer, self.q, sliding_window=self.window, soft_cap=self.soft_cap).wait()
            )
        if len(parts) == 1:
            return parts[0]
        out, lse = torch.empty_like(parts[0][0]), torch.empty_like(parts[0][1])
        merge(*parts[0], *parts[1], out=out, lse=lse)
        return out, lse

    def compare(self, expected: tuple[Tensor, Tensor], pool: AttentionPool) -> None:
        """Raises Mismatch."""
        out, lse = self.attend(pool)
        largest = max(1.0, self.pages.v.nan_to_num(0).abs().max().item())
        limit = tolerance(pool.isa, self.layout.dtype, largest)
        error = (out - expected[0]).abs().max().item() if out.numel() else 0.0
        empty = expected[1].isinf()
        same = torch.equal(lse.isinf(), empty)
        off = (lse - expected[1]).masked_fill(empty, 0.0).abs()
        lse_error = (
            (off - 2e-5 * expected[1].abs().masked_fill(empty, 0.0)).max().item() if off.numel() else 0.0
        )
        if not (same and error <= limit and lse_error <= 2e-5):  # NaN fails too
            raise Mismatch(
                f"seed {self.seed}, {pool.isa}, {pool.num_threads} threads: out is off by {error:.3g} (at most "
                f"{limit:.3g}), lse by {lse_error:.3g}; {self.layout}, {self.num_heads} heads, "
                f"kv_len {self.kv_len}, query_begin {self.query_begin}, "
                f"split {self.split} of {self.num_pages} pages, window {self.window}"
            )

    def refuse(self, pool: AttentionPool) -> int:
        """Break the tables in several ways; each must be refused. Returns how many were."""
        page = self.num_pages + self.rng.randint(0, 3)
        long = len(self.block_table[0]) * self.layout.page_size + 1
        tables = self.query_begin, self.kv_len, self.block_table
        broken: list[tuple[list[int], list[int], list[list[int]]]] = [
            (tables[0], [long, *self.kv_len[1:]], tables[2]),
            (tables[0], [-1, *self.kv_len[1:]], tables[2]),
            ([1, *self.query_begin[1:]], tables[1], tables[2]),
        ]
        if self.kv_len[0]:
            for wrong in (page, -1):
                rows = [[wrong, *self.block_table[0][1:]], *self.block_table[1:]]
                broken.append((tables[0], tables[1], rows))
        for query_begin, kv_len, block_table in broken:
            try:
                AttentionStep(
                    pool, self.pages, query_begin=query_begin, kv_len=kv_len, block_table=block_table,
                    num_heads=self.num_heads, scale=self.scale,
                )  # fmt: skip
            except ValueError:
                continue
            raise Mismatch(f"seed {self.seed}: {query_begin}, {kv_len}, {block_table} was taken")
        return len(broken)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="of the first round; default: the clock")
    options = parser.parse_args()
    seed = time.time_ns() % (1 << 48) if options.seed is None else options.seed
    isas = supported_isas()
    pools = [AttentionPool(threads, isa=isa) for isa in isas for threads in (1, 2, 5)]
    scalar = pools[0]
    end = time.monotonic() + 60 * options.minutes
    counts = {"seed": seed, "rounds": 0, "comparisons": 0, "refusals": 0}
    print(json.dumps({"isas": isas, "first seed": seed}), flush=True)
    while time.monotonic() < end:
        batch = Round(seed + counts["rounds"])
        expected = batch.attend(scalar)
        for isa in isas:
            batch.compare(expected, batch.rng.choice([pool for pool in pools if pool.isa == isa]))
            counts["comparisons"] += 1
        counts["refusals"] += batch.refuse(scalar)
        counts["rounds"] += 1
        if counts["rounds"] % 100 == 0:
            print(json.dumps(counts), flush=True)
    print(json.dumps(counts | {"result": "no mismatch"}), flush=True)
    for pool in pools:
        pool.close()


if __name__ == "__main__":
    main()
