"""A timeline of looking one layer ahead: `python -m bench.layer_ahead`.

Decodes with `--host-attention mass --layer-ahead` and traces the pool: how much of the next layer's scan and selection
passes in the pool's threads while the calling thread does something else (matrix products, the attention of the layer
before), and one layer's events. On a CPU both sides share the cores: what is shown is overlap, not a gain.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

from hybridgen.configs.settings import EngineSettings
from hybridgen.engine.build import build_engine
from hybridgen.engine.core import EngineCore
from hybridgen.engine.request import Request, SamplingParams
from hybridgen.kernels.pool import AttentionPool, TraceEvent

AHEAD = "foretell"  # the name of the job in the trace


def decode(core: EngineCore, tokens: int) -> None:
    """Until the request has `tokens` more tokens, or has ended."""
    produced = 0
    while core.has_work() and produced < tokens:
        produced += sum(len(output.tokens) for output in core.step())


def overlap(events: Sequence[TraceEvent], num_threads: int) -> dict[str, float]:
    """Milliseconds of the next layer's scan: in all, in pool threads, and of these outside of the caller's waits."""
    waits = [(event.begin_ns, event.end_ns) for event in events if event.name == "wait"]
    total = by_pool = hidden = 0
    for event in events:
        if event.name != AHEAD:
            continue
        span = event.end_ns - event.begin_ns
        total += span
        if event.thread >= num_threads:
            continue
        by_pool += span
        hidden += span - sum(
            max(0, min(event.end_ns, end) - max(event.begin_ns, begin)) for begin, end in waits
        )
    return {name: round(value * 1e-6, 3) for name, value in (
        ("ahead_ms", total), ("in_pool_threads_ms", by_pool), ("while_the_caller_worked_ms", hidden),
    )}  # fmt: skip


def timeline(events: Sequence[TraceEvent], num_threads: int, layer: int) -> list[str]:
    """What happened from the first event of `layer` to the last of the next one, microseconds from the first."""
    ordered = sorted(events, key=lambda event: event.begin_ns)
    first = next((event for event in ordered if event.layer == layer), None)
    if first is None:
        return []
    end = max(event.end_ns for event in ordered if event.layer == layer + 1)
    lines = []
    for event in ordered:
        if first.begin_ns <= event.begin_ns <= end:
            who = f"thread {event.thread}" if event.thread < num_threads else "caller  "
            begin, stop = ((at - first.begin_ns) / 1e3 for at in (event.begin_ns, event.end_ns))
            lines.append(
                f"{begin:9.1f} - {stop:9.1f} us  {who}  layer {event.layer:2d}  {event.name} {event.phase}"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(Path(__file__).parents[1] / "configs" / "embedded"))
    parser.add_argument("--context", type=int, default=7_900)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device-pages", type=int, default=16)
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    core = build_engine(
        EngineSettings(
            model=options.model,
            host_attention="mass",
            layer_ahead=True,
            num_device_pages=options.device_pages,
            max_num_seqs=1,
            threads=len(AttentionPool().cpus),
        )
    )
    pool = core._runner._store._pool
    rng = random.Random(0)
    prompt = [rng.randrange(300, core.ready.vocab_size) for _ in range(options.context)]
    params = SamplingParams(max_tokens=options.steps + 10, temperature=0, ignore_eos=True)
    core.add(Request(id="timeline", prompt=prompt, params=params))
    decode(core, 4)
    pool.start_trace()
    decode(core, options.steps)
    events = pool.stop_trace()
    found = overlap(events, pool.num_threads) | {"steps": options.steps, "context": options.context}
    lines = timeline(events, pool.num_threads, options.layer)
    print("\n".join(lines))
    print(json.dumps(found))
    if options.json is not None:
        options.json.write_text(json.dumps(found | {"timeline": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
