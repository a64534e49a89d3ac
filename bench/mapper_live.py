"""Where the mapper puts pages, against other rules, live on emulated nodes: `python -m bench.mapper_live`.

A node of DRAM and one that stands for CXL memory, both read no faster than their emulated bandwidth, which is well
below what this machine can read: so the nodes are what a step waits for, as they are where many threads share them. The
embedded model reads the same context under each rule and decodes. Beside a step's time stands that of the same steps on
nodes as fast as they are, and what the rule's own books predict for reading: the slowest node's bytes / bandwidth,
summed over phases.

DRAM is large enough for everything ("roomy"), or for 60 % of it ("tight"; without an index pages are smaller: 83 %).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bench.record_kv import token_ids
from bench.throughput import commit, machine
from hybridgen.configs.emulation import EmulatedNode
from hybridgen.configs.settings import EMBEDDED_MODEL, EngineSettings, PlacementRule
from hybridgen.engine.build import build_engine
from hybridgen.engine.core import EngineCore
from hybridgen.engine.request import Request, SamplingParams
from hybridgen.kernels.page_memory import NodeSpeed
from hybridgen.kernels.pool import AttentionPool
from hybridgen.scheduler.rules import RULES

PAGE = 32
POLICIES = ("exact", "mass", "hybridgen")
ROOM = {"roomy": 1.0, "tight": 0.6}  # of the context's bytes, that DRAM has room for


def median_ms(core: EngineCore, count: int) -> float:
    took = []
    for _ in range(count):
        begin_s = time.perf_counter()
        core.step()
        took.append(time.perf_counter() - begin_s)
    return 1e3 * statistics.median(took)


def measure(
    rule: PlacementRule, policy: str, room: float, prompt: list[int], options: argparse.Namespace
) -> dict[str, Any]:
    num_pages = -(-(len(prompt) + 8 * options.steps) // PAGE)
    # A page's roles take no more than this, padding included.
    page_bytes = 2 * 32 * 1024 + 24 * 1024
    dram = EmulatedNode("dram0", options.dram_gb_s * 1e9, 0.0, int(room * num_pages * page_bytes))
    cxl = EmulatedNode("cxl0", options.cxl_gb_s * 1e9, options.cxl_latency_us * 1e-6, num_pages * page_bytes)
    core = build_engine(
        EngineSettings(
            model=str(EMBEDDED_MODEL),
            num_host_pages=num_pages,
            max_model_len=num_pages * PAGE,
            max_num_seqs=1,
            host_attention=policy,  # type: ignore[arg-type]
            hybridgen_adapt=False,
            placement=rule,
            emulate_node=(dram, cxl),
            enable_prefix_caching=False,
            threads=len(AttentionPool.default_cpus()),
            log_level="warning",
        )
    )
    host = core._runner.store.host
    books = host.rule
    assert books is not None

    def emulate(*, on: bool) -> None:
        for position, node in enumerate(host.nodes):
            host.memory.set_speed(
                position, NodeSpeed(node.read_bandwidth, node.latency_s) if on else NodeSpeed()
            )

    emulate(on=False)  # the prompt is not what this is about
    params = SamplingParams(temperature=0.0, max_tokens=8 * options.steps - 1, ignore_eos=True)
    core.add(Request(id="1", prompt=prompt, params=params))
    while not any(output.tokens for output in core.step()):
        pass
    emulate(on=True)
    median_ms(core, 2 * options.steps)  # until the rule has seen what is read, and moved what it wants
    emulated, free = [], []
    for _ in range(2):
        emulate(on=True)
        emulated.append(median_ms(core, options.steps))
        emulate(on=False)
        free.append(median_ms(core, options.steps))
    counts = host.counts()
    core.abort(["1"])
    return {
        "step_ms": round(statistics.median(emulated), 3),
        "step_without_emulation_ms": round(statistics.median(free), 3),
        "predicted_read_ms": round(1e3 * books.books.read_seconds(), 3),
        "pieces": {
            node.name: [row[position] for row in counts.pages] for position, node in enumerate(host.nodes)
        },
        "migrated": sum(counts.migrated.values()),
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    began = datetime.now(UTC).isoformat(timespec="seconds")
    tokenizer = Tokenizer.from_file(str(EMBEDDED_MODEL / "tokenizer.json"))
    prompt = token_ids(tokenizer, "needle", options.context, seed=1)
    cells: dict[str, Any] = {}
    for policy in options.policies:
        for name, room in ROOM.items():
            rules: dict[str, Any] = {}
            for rule in RULES:
                rules[rule] = measure(rule, policy, room, prompt, options)  # type: ignore[arg-type]
                print(f"{policy} {name} {rule}: {json.dumps(rules[rule])}", file=sys.stderr, flush=True)
            ours = rules["mapper"]
            for figures in rules.values():
                figures["times_the_mappers_step"] = round(figures["step_ms"] / ours["step_ms"], 3)
                figures["times_the_mappers_prediction"] = round(
                    figures["predicted_read_ms"] / ours["predicted_read_ms"], 3
                )
            cells[f"{policy} {name}"] = rules
    return {
        "title": "live, on emulated nodes",
        "began": began,
        "commit": commit(),
        "machine": machine(),
        "options": {
            "context": len(prompt),
            "dram_gb_s": options.dram_gb_s,
            "cxl_gb_s": options.cxl_gb_s,
            "cxl_latency_us": options.cxl_latency_us,
        },
        "cells": cells,
    }


def markdown(results: dict[str, Any]) -> str:
    """A row a cell: each rule's step as a multiple of the mapper's, its prediction of reading in brackets."""
    lines = ["| policy, DRAM | " + " | ".join(RULES) + " |", "|---|" + "--:|" * len(RULES)]
    for cell, rules in results["cells"].items():
        columns = [
            f"{figures['step_ms']:.2f} ms ({figures['predicted_read_ms']:.2f})"
            if rule == "mapper"
            else f"{figures['times_the_mappers_step']:.2f}x ({figures['times_the_mappers_prediction']:.2f}x)"
            for rule, figures in rules.items()
        ]
        lines.append(f"| {cell} | " + " | ".join(columns) + " |")
    return "\n".join(lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.mapper_live", description=__doc__)
    parser.add_argument("--context", type=int, default=7000, metavar="N", help="tokens (default: 7000)")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--dram-gb-s", type=float, default=2.0, metavar="X", help="(default: 2)")
    parser.add_argument("--cxl-gb-s", type=float, default=0.7, metavar="X", help="(default: 0.7)")
    parser.add_argument("--cxl-latency-us", type=float, default=0.25, metavar="X", help="(default: 0.25)")
    parser.add_argument("--steps", type=int, default=32, metavar="N", help="of a measurement (default: 32)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    results = run(options)
    print(markdown(results))
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
