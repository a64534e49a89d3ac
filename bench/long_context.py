"""A context far beyond the device: `python -m bench.long_context` prints what it took as JSON.

A small model with random weights continues a long prompt twice: with all KV pages on the host, and with a few percent
of them on the device and the rest demoted there step by step. The tokens must be equal, and the memory that a run
takes beyond what the process had before must be what its page counts say. Each run is a process of its own.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOLERANCE = 0.10  # of the bytes that the page counts say
PAGE_SIZE = 32
VOCAB_SIZE = 512
NUM_LAYERS, NUM_HEADS, HEAD_DIM = 2, 4, 64  # as many KV heads as heads
PAGE_BYTES = 2 * NUM_LAYERS * NUM_HEADS * HEAD_DIM * PAGE_SIZE * 4  # K and V in float32


def write_model(folder: Path, max_tokens: int) -> None:
    """Two layers in float32, with weights wide enough that greedy choices do not hang on rounding."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=max_tokens,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def status_bytes(field: str) -> int:
    """A size from /proc/self/status: VmRSS is what the process has now, VmHWM the most it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def serve(
    folder: Path, *, num_tokens: int, num_new: int, num_device_pages: int, chunk: int
) -> dict[str, Any]:
    """One run in this process: tokens, times and memory."""
    from hybridgen.configs.settings import EngineSettings, allowed_cpus
    from hybridgen.engine.build import build_engine
    from hybridgen.engine.request import Request, SamplingParams

    num_pages = -(-(num_tokens + num_new) // PAGE_SIZE)
    core = build_engine(
        EngineSettings(
            model=str(folder),
            page_size=PAGE_SIZE,
            num_device_pages=num_device_pages,
            num_host_pages=num_pages - num_device_pages,
            max_num_batched_tokens=chunk,
            enable_prefix_caching=False,
            threads=allowed_cpus(),
        )
    )

    def run(name: str, length: int, max_tokens: int) -> tuple[list[int], list[float]]:
        prompt = random.Random(length).choices(range(VOCAB_SIZE), k=length)
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        core.add(Request(id=name, prompt=prompt, params=params))
        tokens: list[int] = []
        times = [time.perf_counter()]
        while core.has_work():
            for output in core.step():
                assert output.error is None, output.error
                tokens += output.tokens
                times.append(time.perf_counter())
        return tokens, times

    # What a step of such chunks takes besides pages, at its highest: threads, activations, buffers.
    warm_length = min(3 * chunk, num_tokens)
    num_warm_pages = -(-(warm_length + 2) // PAGE_SIZE)
    run("first", warm_length, 2)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    run("warm", warm_length, 2)
    base_bytes = status_bytes("VmHWM")
    before = core.stats()
    tokens, times = run("long", num_tokens, num_new)
    peak_bytes = status_bytes("VmHWM")
    core.check_integrity()
    stats = core.stats()
    pages_bytes = num_pages * PAGE_BYTES
    # The pages of the warm-up are among them already.
    grown_bytes = peak_bytes - base_bytes + num_warm_pages * PAGE_BYTES
    return {
        "tokens": tokens,
        "device_pages": num_device_pages,
        "host_pages": num_pages - num_device_pages,
        "pages_bytes": pages_bytes,
        "grown_bytes": grown_bytes,
        "grown_over_pages": round(grown_bytes / pages_bytes, 4),
        "process_bytes": peak_bytes,
        "demoted_pages": stats.num_demoted_pages_total - before.num_demoted_pages_total,
        "device_tokens_attended": stats.num_device_tokens_total - before.num_device_tokens_total,
        "host_tokens_attended": stats.num_host_tokens_total - before.num_host_tokens_total,
        "time_to_first_token_s": round(times[1] - times[0], 3),
        "time_per_token_ms": round(1e3 * (times[-1] - times[1]) / max(1, len(times) - 2), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65536, help="length of the prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--device-share", type=float, default=0.05, help="of the pages, on the device")
    parser.add_argument("--chunk", type=int, default=2048, help="most tokens in a step")
    parser.add_argument("--serve", nargs=2, metavar=("FOLDER", "DEVICE_PAGES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    num_tokens, num_new, chunk = arguments.tokens, arguments.new_tokens, arguments.chunk
    if arguments.serve:
        folder, num_device_pages = arguments.serve
        run = serve(
            Path(folder),
            num_tokens=num_tokens,
            num_new=num_new,
            num_device_pages=int(num_device_pages),
            chunk=chunk,
        )
        print(json.dumps(run))
        return 0
    num_pages = -(-(num_tokens + num_new) // PAGE_SIZE)
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), num_tokens + num_new)
        for name, num_device_pages in {"host": 0, "split": round(arguments.device_share * num_pages)}.items():
            command = [sys.executable, "-m", "bench.long_context", "--serve", folder, str(num_device_pages)]
            command += ["--tokens", str(num_tokens), "--new-tokens", str(num_new), "--chunk", str(chunk)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs[name] = json.loads(done.stdout.splitlines()[-1])
    equal = runs["host"].pop("tokens") == runs["split"].pop("tokens")
    fits = all(abs(run["grown_over_pages"] - 1) <= TOLERANCE for run in runs.values())
    report = {
        "prompt_tokens": num_tokens,
        "new_tokens": num_new,
        "page_size": PAGE_SIZE,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "tokens_equal": equal,
        "memory_as_counted": fits,
        "runs": runs,
    }
    print(json.dumps(report, indent=2))
    return 0 if equal and fits else 1


if __name__ == "__main__":
    sys.exit(main())
