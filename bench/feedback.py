"""The split between device and host as the controller finds it, against fixed ones, live: `python -m bench.feedback`.

One core stands for the device, computing linear layers and attending device pages; the others are the host's. A
sequence decodes while the controller moves its pages. Then the host is slowed down to a quarter of its speed (its
node's bandwidth is emulated), and given back its speed. In each of these conditions the steps with the controller are
compared with steps at fixed splits, all others being equal.

The weights are random: this is about time. With two cores, one of them is each side's.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.checkpoints import LLAMA_150M, write_checkpoint
from bench.throughput import commit, machine, make_prompts
from hybridgen.configs.settings import EngineSettings
from hybridgen.engine.build import build_engine
from hybridgen.engine.core import EngineCore
from hybridgen.engine.request import Request, SamplingParams
from hybridgen.kernels.page_memory import NodeSpeed
from hybridgen.kernels.pool import AttentionPool

ROOT = Path(__file__).resolve().parent.parent
# Little to compute and much to remember: attention is what a step is about.
CONFIG = {
    **LLAMA_150M,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "vocab_size": 2000,
}
PAGE = 32


class Decoding:
    """One sequence that goes on decoding."""

    def __init__(self, core: EngineCore, context: int, max_tokens: int) -> None:
        self._core = core
        self._balance = core._balance
        prompt = make_prompts(1, context, CONFIG["vocab_size"], seed=1)[0]
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        core.add(Request(id="1", prompt=prompt, params=params))
        while not any(output.tokens for output in core.step()):
            pass
        (self.key,) = core._choices

    def steps(self, count: int) -> list[float]:
        """Seconds of each."""
        took = []
        for _ in range(count):
            begin_s = time.perf_counter()
            self._core.step()
            took.append(time.perf_counter() - begin_s)
        return took

    def control(self, *, on: bool) -> None:
        """Let the controller decide, or nobody."""
        self._core._balance = self._balance if on else None

    @property
    def num_pages(self) -> int:
        return len(self._core._scheduler._sequences[self.key].table.pages)

    def keep(self, share: float) -> None:
        """So much of the pages on the device; all of them includes those to come."""
        count = self.num_pages + 1000 if share >= 1 else round(share * self.num_pages)
        self._core._scheduler.set_split(self.key, count)

    @property
    def num_device_pages(self) -> int:
        return self._core._scheduler._sequences[self.key].table.num_device_pages

    @property
    def reason(self) -> str:
        assert self._balance is not None
        decision = self._balance.decision
        return "" if decision is None else f"{decision.reason}: {decision.message}"


def measure(core: EngineCore, options: argparse.Namespace) -> dict[str, Any]:
    conditions = ["full speed", "a quarter of it", "full speed again"]
    per_condition = (
        options.steps
        + 2 * options.splits * (3 + options.measured)
        + 2 * options.turns * (8 + options.measured)
    )
    decoding = Decoding(core, options.context, len(conditions) * per_condition + 100)
    host = core._runner.store.host
    records: list[dict[str, Any]] = []
    rate = 0.0
    for condition in conditions:
        if condition == "a quarter of it":
            host.memory.set_speed(0, NodeSpeed(bandwidth=rate / 4))
        elif condition == "full speed again":
            host.memory.set_speed(0, NodeSpeed())
        decoding.control(on=True)
        shares_kept = []
        for _ in range(options.steps):
            decoding.steps(1)
            shares_kept.append(round(decoding.num_device_pages / decoding.num_pages, 4))
        settled = next(
            step
            for step in range(len(shares_kept))
            if all(abs(share - shares_kept[-1]) <= 0.05 for share in shares_kept[step:])
        )
        record: dict[str, Any] = {
            "condition": condition,
            "controlled_device_share": shares_kept[-1],
            "steps_until_within_5_percent": settled,
            "device_share_by_step": shares_kept,
            "reason": decoding.reason,
        }
        decoding.control(on=False)
        fixed: dict[str, list[float]] = {}
        # Up, then down again, so that a machine that gets slower meanwhile is not taken for a worse split.
        shares = [index / (options.splits - 1) for index in range(options.splits)]
        for share in (*shares, *reversed(shares)):
            decoding.keep(share)
            decoding.steps(3)
            fixed.setdefault(f"{share:.2f}", []).extend(decoding.steps(options.measured))
        if not rate:
            # What the host's threads read of KV with all of it, where nobody else had their cores.
            decoding.keep(0.0)
            decoding.steps(3)
            rates = []
            for _ in range(options.measured):
                before, host_s = host.counts().read_bytes[0], core._host_s
                decoding.steps(1)
                rates.append((host.counts().read_bytes[0] - before) / (core._host_s - host_s))
            rate = max(rates)
        medians = {share: round(1e3 * statistics.median(times), 3) for share, times in fixed.items()}
        best = min(medians, key=lambda share: medians[share])
        # In turns, since the machine is not the same from second to second.
        controlled_ms, best_ms = [], []
        for _ in range(options.turns):
            decoding.control(on=True)
            decoding.steps(8)
            controlled_ms.append(1e3 * statistics.median(decoding.steps(options.measured)))
            decoding.control(on=False)
            decoding.keep(float(best))
            decoding.steps(8)
            best_ms.append(1e3 * statistics.median(decoding.steps(options.measured)))
        ratios = [mine / theirs for mine, theirs in zip(controlled_ms, best_ms, strict=True)]
        record |= {
            "host_gb_s": round(rate / 1e9 / (4 if condition == "a quarter of it" else 1), 2),
            "fixed_ms": medians,
            "best_fixed_share": float(best),
            "controlled_ms": [round(value, 3) for value in controlled_ms],
            "best_fixed_again_ms": [round(value, 3) for value in best_ms],
            "controlled_over_best_fixed": round(statistics.median(ratios), 3),
        }
        records.append(record)
        print(
            f"{condition}: {json.dumps({**record, 'device_share_by_step': '..'})}",
            file=sys.stderr,
            flush=True,
        )
    return {"conditions": records}


def run(options: argparse.Namespace) -> dict[str, Any]:
    checkpoint = options.work_dir / "llama-feedback"
    write_checkpoint(checkpoint, CONFIG)
    num_pages = -(-(options.context + 4096) // PAGE)
    settings = EngineSettings(
        model=str(checkpoint),
        dtype="bfloat16",
        max_model_len=options.context + 4096,
        max_num_seqs=1,
        num_device_pages=num_pages + 8,
        num_host_pages=num_pages + 8,
        host_attention=options.policy,
        device_threads=1,
        threads=max(1, len(AttentionPool.default_cpus()) - 1),
        enable_prefix_caching=False,
        log_level="warning",
    )
    core = build_engine(settings)
    os.sched_setaffinity(0, AttentionPool.default_cpus()[:1])  # as the engine's process does
    return {
        "title": "live; a core stands for the device, and the host's slowness is emulated",
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "options": {"context": options.context, "policy": options.policy, "steps": options.steps},
        **measure(core, options),
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.feedback", description=__doc__)
    parser.add_argument("--context", type=int, default=8192, metavar="N", help="tokens (default: 8192)")
    parser.add_argument("--policy", choices=("exact", "mass"), default="exact")
    parser.add_argument(
        "--steps", type=int, default=320, metavar="N", help="with the controller (default: 320)"
    )
    parser.add_argument("--splits", type=int, default=11, metavar="N", help="fixed ones (default: 11)")
    parser.add_argument("--measured", type=int, default=12, metavar="N", help="steps of each (default: 12)")
    parser.add_argument("--turns", type=int, default=5, metavar="N", help="of each in the end (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "build" / "bench", metavar="DIR")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    results = run(options)
    for record in results["conditions"]:
        print(
            f"{record['condition']}: {statistics.median(record['controlled_ms'])} ms with the controller, "
            f"{statistics.median(record['best_fixed_again_ms'])} ms at the best fixed split "
            f"({record['controlled_over_best_fixed']:.2f}x), "
            f"settled after {record['steps_until_within_5_percent']} steps"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
