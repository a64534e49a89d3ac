"""Where the mapper puts pages, against the rules that others use, simulated: `python -m bench.mapper`.

Random machines, models and loads; every rule places the same pages. A step reads in phases (`mass`: the index, then the
rest; `hybridgen`: K, then V), and each takes as long as the slowest node needs for what is read of it. Migrations go on
all the while, on both of their nodes: each phase has a part of them by its length. No memory is read: the times are
bytes / bandwidth. What a page is read is drawn here, and shown to the mapper only after the step, with noise.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hybridgen.scheduler.machine import MemoryNode, Tier
from hybridgen.scheduler.placements import (
    INDEX_FIRST,
    K_FIRST,
    PageReads,
    PageShape,
    ReadPattern,
    RuleBase,
)
from hybridgen.scheduler.rules import RULES

CXL_BANDWIDTH, CXL_LATENCY_S = 36e9, 250e-9
PAGE_SIZE = 32
POLICIES = ("exact", "mass", "hybridgen")


@dataclass(frozen=True, slots=True)
class Load:
    """What is drawn from a seed.

    Attributes:
        zipf: exponent of what pages are read, by rank.
        drift: share of the pages whose ranks are drawn anew each step.
        num_shared: first pages of all sequences.
        budget: bytes that may migrate in a step.
    """

    seed: int
    policy: str
    nodes: tuple[MemoryNode, ...]
    shape: PageShape
    pattern: ReadPattern
    contexts: tuple[int, ...]
    num_shared: int
    zipf: float
    drift: float
    tight: bool
    budget: int

    @property
    def name(self) -> str:
        num_cxl = sum(node.tier is Tier.CXL for node in self.nodes)
        return f"{self.policy}, {num_cxl} CXL, {'tight' if self.tight else 'loose'}"


def draw(seed: int, *, max_pages: int = 12_000, shrink_to: int | None = None) -> Load:
    """A load of at most about `max_pages` host pages: contexts of 8k to 256k tokens, as many as fit.

    `shrink_to` makes contexts, capacities and the budget of migrations smaller, for tests: the same loads with no
    more pages.
    """
    rng = np.random.default_rng(seed)
    policy = POLICIES[seed % len(POLICIES)]
    layers, heads = int(rng.choice([28, 32, 40, 64])), int(rng.choice([4, 8]))
    half = layers * heads * 128 * 2 * PAGE_SIZE
    selects = policy == "mass"
    # 34 bytes of index stand for 32 dims, 64 bytes, of K; sums are float32, one for the page.
    shape = PageShape(half * 34 // 64 if selects else 0, half * 2 // PAGE_SIZE if selects else 0, half, half)
    sparse = float(rng.uniform(0.03, 0.3))
    pattern = {
        "exact": ReadPattern(0, 0, 1, 1),
        "mass": ReadPattern(1, 0.25, sparse, sparse, INDEX_FIRST),
        "hybridgen": ReadPattern(0, 0, 1, sparse, K_FIRST),
    }[policy]
    contexts: list[int] = []
    wanted = int(rng.integers(1, 17))
    while len(contexts) < wanted:
        pages = int(2 ** rng.uniform(13, 18)) // PAGE_SIZE
        if sum(contexts) + pages > max_pages:
            contexts = contexts or [max_pages]
            break
        contexts.append(pages)
    shrink = 1.0 if shrink_to is None else max(1.0, sum(contexts) / shrink_to)
    contexts = [int(pages / shrink) for pages in contexts]
    shared = int(rng.choice([0, 0, min(contexts) // 4]))
    total_bytes = sum(shape.role_bytes) * sum(contexts) * 1.1
    tight = bool(rng.random() < 0.5)
    num_cxl = int(rng.choice([1, 2, 4, 8]))
    num_dram = int(rng.choice([1, 2]))
    dram_bytes = total_bytes * (rng.uniform(0.25, 0.6) if tight else rng.uniform(1.2, 2.0))
    cxl_bytes = total_bytes * (rng.uniform(1.1, 1.3) - dram_bytes / total_bytes if tight else 2.0)
    dram_bandwidth = float(rng.uniform(100e9, 300e9))
    nodes = [
        MemoryNode(i, f"dram{i}", Tier.DRAM, dram_bandwidth / num_dram, 100e-9, int(dram_bytes / num_dram))
        for i in range(num_dram)
    ] + [
        MemoryNode(8 + i, f"cxl{i}", Tier.CXL, CXL_BANDWIDTH, CXL_LATENCY_S, int(cxl_bytes / num_cxl))
        for i in range(num_cxl)
    ]
    return Load(
        seed,
        policy,
        tuple(nodes),
        shape,
        pattern,
        tuple(contexts),
        shared,
        zipf=float(rng.uniform(0.6, 1.3)),
        drift=float(rng.choice([0, 0.001, 0.01])),
        tight=tight,
        budget=max(int((64 << 20) / shrink), 2 * half),  # a piece, and what it changes places with
    )


@dataclass(frozen=True, slots=True)
class Result:
    """One rule on one load.

    Attributes:
        read_s: of all steps.
        moved_bytes: of all steps.
        plan_s: spent in `observe` and `plan`, of this machine's time.
    """

    read_s: float
    moved_bytes: float
    plan_s: float


def run(rule: RuleBase, load: Load, *, steps: int) -> Result:
    """Let the load decode: pages grow, ranks drift, and every so often a sequence ends and another one comes."""
    rng = np.random.default_rng(10_000 + load.seed)
    books = rule.books
    free = list(range(len(books.readers)))[::-1]
    shared = [free.pop() for _ in range(load.num_shared)]
    waiting = sum(load.contexts) - load.num_shared * len(load.contexts)
    if shared:
        rule.place(shared, readers=len(load.contexts), coming=waiting)
    owned = []
    for pages in load.contexts:
        owned.append([free.pop() for _ in range(pages - load.num_shared)])
        for begin in range(0, len(owned[-1]), 64):  # as chunks of a prompt would
            chunk = owned[-1][begin : begin + 64]
            waiting -= len(chunk)
            rule.place(chunk, coming=waiting)
    rank = rng.permutation(len(books.readers)) + 1.0
    sparse = np.array([0 < share < 1 for share in load.pattern.shares])
    read_s = moved_bytes = plan_s = 0.0
    for step in range(steps):
        live = np.array([page for pages in (shared, *owned) for page in pages])
        drifting = rng.random(len(rank)) < load.drift
        fresh = rng.integers(1, len(rank) + 1, size=len(rank))
        rank = np.where(drifting, fresh, rank)
        heat = rank[live] ** -load.zipf
        noise = np.exp(rng.normal(0, 0.2, size=len(live)))
        shares = np.tile(np.array(load.pattern.shares), (len(live), 1))
        for column in np.flatnonzero(sparse):
            mean = load.pattern.shares[column]
            shares[:, column] = np.minimum(1.0, noise * _with_mean(heat, mean))
        where = books.node_of[live]
        reads = shares * books.role_bytes * books.readers[live, None]
        present = where >= 0
        begin_s = time.perf_counter()
        moves = rule.plan(load.budget)
        plan_s += time.perf_counter() - begin_s
        traffic = np.zeros_like(books.phase_loads)
        np.add.at(
            traffic, (np.broadcast_to(books.phase_of, where.shape)[present], where[present]), reads[present]
        )
        copied = np.zeros(len(books.nodes))
        for move in moves:
            size = books.shape.role_bytes[list(type(move.role)).index(move.role)]
            moved_bytes += size
            copied[books.position[move.source]] += size
            copied[books.position[move.target]] += size
        lengths = (traffic / books.bandwidth).max(axis=1)
        traffic += np.outer(lengths / lengths.sum(), copied)
        read_s += float((traffic / books.bandwidth).max(axis=1).sum())
        begin_s = time.perf_counter()
        rule.apply(moves)
        if load.policy == "exact":
            rule.observe(PageReads(live))
        else:
            mass = heat / heat.sum()
            k_share = shares[:, 2] if sparse[2] else None
            rule.observe(PageReads(live, k_share=k_share, v_share=shares[:, 3], mass=mass))
        plan_s += time.perf_counter() - begin_s
        if step % PAGE_SIZE == PAGE_SIZE - 1:
            for own in owned:
                if free:
                    own.append(free.pop())
                    rule.place(own[-1:])
        if step % 50 == 49:
            position = int(rng.integers(len(owned)))
            rule.release(owned[position])
            free += owned[position][::-1]
            owned[position] = [free.pop() for _ in range(load.contexts[position] - load.num_shared)]
            for begin in range(0, len(owned[position]), 64):
                rest = owned[position][begin:]
                rule.place(rest[:64], coming=len(rest) - len(rest[:64]))
    return Result(read_s, moved_bytes, plan_s / steps)


def _with_mean(heat: npt.NDArray[np.float64], mean: float) -> npt.NDArray[np.float64]:
    """Proportional to `heat`, but at most 1, with this mean."""
    scale = mean / heat.mean()
    for _ in range(30):
        capped = np.minimum(1.0, scale * heat)
        scale *= mean / capped.mean()
    return np.asarray(np.minimum(1.0, scale * heat))


def compare(load: Load, *, steps: int, rules: Sequence[str] = tuple(RULES)) -> dict[str, Result]:
    """Every rule on the same load."""
    num_pages = int(1.08 * sum(load.contexts)) + 64
    return {
        name: run(RULES[name](load.nodes, load.shape, load.pattern, num_pages), load, steps=steps)
        for name in rules
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--max-pages", type=int, default=12_000)
    parser.add_argument("--json", type=Path, default=Path("bench/results/mapper_simulated.json"))
    options = parser.parse_args()
    lines: list[dict[str, Any]] = []
    others = [name for name in RULES if name != "mapper"]
    for seed in range(options.seeds):
        load = draw(seed, max_pages=options.max_pages)
        results = compare(load, steps=options.steps)
        ours = results["mapper"]
        ratios = {name: round(results[name].read_s / ours.read_s, 4) for name in others}
        lines.append(
            {
                "seed": seed,
                "load": load.name,
                "pages": sum(load.contexts),
                "v_share": round(load.pattern.v, 3),
                "read_ms": round(1e3 * ours.read_s / options.steps, 3),
                "moved_mib_a_step": round(ours.moved_bytes / options.steps / 2**20, 2),
                "plan_ms": round(1e3 * ours.plan_s, 3),
                "times_as_long": ratios,
            }
        )
        print(
            f"{seed:3d}  {load.name:26s}", "  ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
        )
    summary = {}
    for name in others:
        ratios_of = sorted(line["times_as_long"][name] for line in lines)
        summary[name] = {
            "minimum": ratios_of[0],
            "median": round(statistics.median(ratios_of), 3),
            "maximum": ratios_of[-1],
            "share_of_loads_at_1.3_or_more": sum(ratio >= 1.3 for ratio in ratios_of) / len(ratios_of),
        }
        print(f"{name:12s}", summary[name])
    print("plan and observe, median ms a step:", statistics.median(line["plan_ms"] for line in lines))
    found = {
        "title": "simulated: predicted read time of placement rules, in multiples of the mapper's",
        "command": f"python -m bench.mapper --seeds {options.seeds} --steps {options.steps}"
        f" --max-pages {options.max_pages}",
        "summary": summary,
        "loads": lines,
    }
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
