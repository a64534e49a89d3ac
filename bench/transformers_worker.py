"""`transformers.generate` behind a pipe: a JSON job per line on stdin, its reply per line on stdout.

A process of its own so that neither its threads nor its memory are there when another system is measured.
Job: {"prompts": [[token ids], ...], "output_len": int}; the prompts are answered as one batch and have equal
lengths. Reply: {"start_s": float, "times_s": [float, ...]}, one time per token, of the monotonic clock.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer


class _Clock(BaseStreamer):
    """Notes when each step's tokens are known; the first call brings the prompt and is not a token."""

    def __init__(self) -> None:
        self._calls_s: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self._calls_s.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def times_s(self) -> list[float]:
        return self._calls_s[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # transformers prints to stdout here and there; the pipe must carry nothing but replies.
    replies, sys.stdout = sys.stdout, sys.stderr
    # Any: the stubs of `generate` do not admit the classes that `from_pretrained` returns.
    model: Any = AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    model.eval()
    # With no end token the answer has exactly the length asked for.
    model.generation_config.eos_token_id = None
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    print(json.dumps(versions), file=replies, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        clock = _Clock()
        start_s = time.perf_counter()
        prompts = torch.tensor(job["prompts"])
        output = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=job["output_len"],
            do_sample=False,
            streamer=clock,
        )
        if output.shape[1] != prompts.shape[1] + job["output_len"]:
            raise RuntimeError(f"{output.shape[1] - prompts.shape[1]} tokens instead of {job['output_len']}")
        print(json.dumps({"start_s": start_s, "times_s": clock.times_s}), file=replies, flush=True)


if __name__ == "__main__":
    main()
