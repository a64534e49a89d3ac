"""`hybridgen bench serve`: load for any OpenAI-compatible server, and how long its answers took.

Streams /v1/completions with prompts of random token ids, so that neither a tokenizer nor a prefix cache has a
say. Token counts are the server's own (`stream_options.include_usage`).
"""

import asyncio
import dataclasses
import itertools
import json
import os
import platform
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

import hybridgen
from hybridgen.configs.settings import client_api_key
from hybridgen.server.chat import api_root, event_data, refusal

FIRST_TOKEN_ID = 16  # smaller ids tend to be special tokens
PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """What is sent, and how fast. Equal loads send equal prompts at equal moments."""

    base_url: str
    model: str | None  # None: the server's first
    num_prompts: int
    input_len: int  # tokens
    output_len: int  # tokens
    request_rate: float = float("inf")  # requests per second; inf: all at once
    max_concurrency: int | None = None
    range_ratio: float = 0.0  # lengths are drawn from [(1 - r) * len, (1 + r) * len]
    vocab_size: int = 1000
    num_warmups: int = 1
    seed: int = 0
    ignore_eos: bool = False
    temperature: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a load."""

    at_s: float  # since the start of the run
    prompt: list[int]
    max_tokens: int


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """How one request went. Times are seconds; those of a failed request mean nothing."""

    ttft_s: float = 0.0
    gaps_s: tuple[float, ...] = ()  # between one piece of text and the next
    e2e_s: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def tpot_s(self) -> float:
        """Mean time of an output token after the first; of two tokens at least."""
        return (self.e2e_s - self.ttft_s) / (self.output_tokens - 1)


def bench_serve(load: Load, *, api_key: str | None = None, save_result: str | None = None) -> int:
    """Run `load`, print the figures, and write them where asked; return 1 when a request failed."""
    try:
        if save_result is not None:
            _check_can_write(Path(save_result))
        model, timings, duration_s = asyncio.run(_run(load, api_key or client_api_key()))
    except BenchError as error:
        print(f"hybridgen bench serve: error: {error}", file=sys.stderr)
        return 1
    result = summarize(timings, duration_s)
    _print(model, result)
    for reason, count in _failures(timings).items():
        print(f"{count} requests failed: {reason}", file=sys.stderr)
    if save_result is not None:
        content = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "hybridgen": hybridgen.__version__,
            "machine": {"system": platform.platform(), "processor": platform.machine()},
            "load": {
                **dataclasses.asdict(load),
                "model": model,
                "request_rate": str(load.request_rate)
                if load.request_rate == float("inf")
                else load.request_rate,
            },
            "result": result,
            "requests": [dataclasses.asdict(timing) for timing in timings],
        }
        Path(save_result).write_text(json.dumps(content, indent=1) + "\n")
    return 1 if result["failed"] else 0


def _check_can_write(path: Path) -> None:
    """Before the run, so that an hour's measurements are not lost to a misspelt folder."""
    if path.is_dir():
        raise BenchError(f"cannot write {path}: it is a folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = "may not be written to" if path.parent.is_dir() else "does not exist"
        raise BenchError(f"cannot write {path}: {path if path.exists() else path.parent} {reason}")


class BenchError(Exception):
    """The run cannot begin; the text says why."""


def arrivals(load: Load) -> list[Arrival]:
    """The requests of a load: prompts, lengths and moments drawn from its seed."""
    rng = random.Random(load.seed)
    at_s = 0.0
    requests = []
    for _ in range(load.num_prompts):
        length = _vary(rng, load.input_len, load.range_ratio)
        prompt = [rng.randrange(FIRST_TOKEN_ID, load.vocab_size) for _ in range(length)]
        requests.append(Arrival(at_s, prompt, _vary(rng, load.output_len, load.range_ratio)))
        # expovariate(inf) is 0: all at once.
        at_s += rng.expovariate(load.request_rate)
    return requests


def summarize(timings: Sequence[Timing], duration_s: float) -> dict[str, Any]:
    """The figures of a run: counts, throughput per second, and the spread of each time in milliseconds.

    A spread without measurements (no request succeeded, or none had a second token) is absent.
    """
    done = [timing for timing in timings if timing.error is None]
    prompt_tokens = sum(timing.prompt_tokens for timing in done)
    output_tokens = sum(timing.output_tokens for timing in done)
    figures: dict[str, Any] = {
        "completed": len(done),
        "failed": len(timings) - len(done),
        "duration_s": duration_s,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "requests_per_s": len(done) / duration_s,
        "output_tokens_per_s": output_tokens / duration_s,
        "total_tokens_per_s": (prompt_tokens + output_tokens) / duration_s,
    }
    times_s = {
        "ttft_ms": [timing.ttft_s for timing in done],
        "tpot_ms": [timing.tpot_s for timing in done if timing.output_tokens > 1],
        "itl_ms": list(itertools.chain.from_iterable(timing.gaps_s for timing in done)),
        "e2e_ms": [timing.e2e_s for timing in done],
    }
    return figures | {name: _spread(values) for name, values in times_s.items() if values}


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest of the sorted `values`, of which there is at least one."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def _spread(values_s: Sequence[float]) -> dict[str, float]:
    spread = {"mean": statistics.fmean(values_s) * 1000}
    return spread | {f"p{percent}": percentile(values_s, percent) * 1000 for percent in PERCENTILES}


def _vary(rng: random.Random, length: int, ratio: float) -> int:
    return max(1, rng.randint(round(length * (1 - ratio)), round(length * (1 + ratio))))


async def _run(load: Load, api_key: str | None) -> tuple[str, list[Timing], float]:
    """The model's name, each request's timing, and the seconds from the first request to the last answer."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    async with httpx.AsyncClient(
        base_url=api_root(load.base_url),
        headers=headers,
        timeout=None,
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
    ) as client:
        model = load.model or await _first_model(client)
        requests = arrivals(load)
        for number in range(load.num_warmups):
            warmup = await _request(client, load, model, requests[number % len(requests)])
            if warmup.error is not None:
                raise BenchError(f"the first request failed: {warmup.error}")
        places = asyncio.Semaphore(load.max_concurrency or load.num_prompts)
        begin = time.perf_counter()

        async def send(arrival: Arrival) -> Timing:
            await asyncio.sleep(begin + arrival.at_s - time.perf_counter())
            async with places:
                return await _request(client, load, model, arrival)

        timings = await asyncio.gather(*(send(arrival) for arrival in requests))
        return model, timings, time.perf_counter() - begin


async def _first_model(client: httpx.AsyncClient) -> str:
    try:
        response = await client.get("/models")
    except httpx.HTTPError as error:
        raise BenchError(f"nothing answers at {client.base_url}: {error}") from error
    if response.status_code != 200:
        raise BenchError(refusal(response))
    return str(response.json()["data"][0]["id"])


async def _request(client: httpx.AsyncClient, load: Load, model: str, arrival: Arrival) -> Timing:
    body = {
        "model": model,
        "prompt": arrival.prompt,
        "max_tokens": arrival.max_tokens,
        "temperature": load.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if load.ignore_eos:
        body["ignore_eos"] = True
    moments: list[float] = []
    usage: dict[str, int] = {}
    begin = time.perf_counter()
    try:
        async with client.stream("POST", "/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                return Timing(error=refusal(response))
            async for line in response.aiter_lines():
                event = event_data(line)
                if event is None:
                    continue
                if "error" in event:
                    return Timing(error=str(event["error"]["message"]))
                if event["choices"]:
                    moments.append(time.perf_counter())
                if event.get("usage"):
                    usage = event["usage"]
    except httpx.HTTPError as error:
        return Timing(error=f"{type(error).__name__}: {error}")
    if not moments or not usage:
        return Timing(error="the stream ended without text or without its token counts")
    return Timing(
        ttft_s=moments[0] - begin,
        gaps_s=tuple(later - earlier for earlier, later in itertools.pairwise(moments)),
        e2e_s=moments[-1] - begin,
        prompt_tokens=usage["prompt_tokens"],
        output_tokens=usage["completion_tokens"],
    )


def _failures(timings: Sequence[Timing]) -> Counter[str]:
    return Counter(timing.error for timing in timings if timing.error is not None)


def _print(model: str, result: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(
        f"{model}: {result['completed']} answers in {result['duration_s']:.2f} s, {result['failed']} failed, "
        f"{result['prompt_tokens']} prompt and {result['output_tokens']} output tokens",
        markup=False,
        soft_wrap=True,
    )
    console.print(
        f"{result['requests_per_s']:.2f} requests/s, {result['output_tokens_per_s']:.1f} output tokens/s, "
        f"{result['total_tokens_per_s']:.1f} tokens/s",
        soft_wrap=True,
    )
    table = Table("ms", "mean", *(f"p{percent}" for percent in PERCENTILES))
    names = {
        "ttft_ms": "time to first token",
        "tpot_ms": "time per output token",
        "itl_ms": "between pieces of text",
        "e2e_ms": "whole answer",
    }
    for key, name in names.items():
        if key in result:
            table.add_row(name, *(f"{value:.2f}" for value in result[key].values()))
    console.print(table)
