"""64 streams at once against a real server process, a third of them hung up midway."""

import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.models import save_byte_tokenizer, save_model

NUM_STREAMS = 64
NUM_PAGES = 96  # of 16 tokens: the 64 requests want about 500, so queueing and preemption both happen


@dataclass(frozen=True)
class Plan:
    """One client: what it asks for, and after how many chunks it hangs up (0: never)."""

    prompt: tuple[int, ...]
    max_tokens: int
    hang_up_after: int


def plans(seed: int) -> list[Plan]:
    generator = random.Random(seed)
    made = []
    for number in range(NUM_STREAMS):
        prompt = tuple(generator.randrange(256) for _ in range(generator.randint(1, 200)))
        max_tokens = generator.randint(8, 60)
        made.append(Plan(prompt, max_tokens, generator.randint(1, max_tokens // 2) if number % 3 == 0 else 0))
    return made


@pytest.fixture(scope="module", params=[0, 24], ids=lambda n: f"device={n}")
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("llama")
    save_model("llama", folder)
    save_byte_tokenizer(folder)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-P", "-m", "hybridgen", "serve", str(folder), "--port", str(port)]
    command += ["--threads", "1", "--served-model-name", "tiny", "--block-size", "16"]
    command += ["--device-pages", str(request.param), "--host-pages", str(NUM_PAGES - request.param)]
    command += ["--max-num-seqs", "32", "--max-num-batched-tokens", "128"]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        base = f"http://127.0.0.1:{port}"
        wait_until_ready(process, base, log)
        yield base
        process.terminate()
        assert process.wait(timeout=30) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def wait_until_ready(process: "subprocess.Popen[bytes]", base: str, log: Path) -> None:
    deadline_s = time.monotonic() + 120
    while time.monotonic() < deadline_s:
        assert process.poll() is None, log.read_text()
        try:
            if httpx.get(f"{base}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"not ready after 120 s:\n{log.read_text()}")


def gauges(base: str) -> dict[str, float]:
    """Pages by state, and the requests that run or wait."""
    found = {}
    for line in httpx.get(f"{base}/metrics").text.splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith(
            ("hybridgen:kv_pages{", "vllm:num_requests_running", "vllm:num_requests_waiting{")
        ):
            key = name.split('state="')[1].split('"')[0] if "state=" in name else name.split("{")[0]
            found[key] = found.get(key, 0.0) + float(value)  # over both tiers
    return found


async def stream(client: httpx.AsyncClient, plan: Plan) -> tuple[int, str | None]:
    """Tokens that arrived and the finish reason; None for a client that hung up."""
    body = {
        "model": "tiny",
        "prompt": list(plan.prompt),
        "max_tokens": plan.max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    reason = None
    num_chunks = num_tokens = 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        ended = False
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                assert line == "" or line.startswith(":"), line
                continue
            assert not ended, "data after [DONE]"
            if line == "data: [DONE]":
                ended = True
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            if event.get("usage"):
                num_tokens = event["usage"]["completion_tokens"]
            for choice in event["choices"]:
                assert reason is None, "a chunk after the finish reason"
                reason = choice["finish_reason"]
            num_chunks += 1
            if num_chunks == plan.hang_up_after:
                return num_chunks, None
        assert ended, "the stream ended without [DONE]"
    return num_tokens, reason


async def run_all(base: str, seed: int) -> list[tuple[int, str | None]]:
    limits = httpx.Limits(max_connections=NUM_STREAMS)
    async with httpx.AsyncClient(base_url=base, timeout=120, limits=limits) as client:
        return await asyncio.gather(*(stream(client, plan) for plan in plans(seed)))


@pytest.mark.parametrize("seed", [1, 2])
async def test_hang_ups_neither_harm_other_streams_nor_leak_pages(url: str, seed: int) -> None:
    before = gauges(url)
    assert before["held"] == 0
    assert before["free"] + before["cached"] == NUM_PAGES
    answers = await run_all(url, seed)
    for plan, (num_tokens, reason) in zip(plans(seed), answers, strict=True):
        if plan.hang_up_after:
            assert reason is None
        else:
            assert (num_tokens, reason) == (plan.max_tokens, "length")
    # The last hang-up reaches the engine a step later.
    deadline_s = time.monotonic() + 10
    after = gauges(url)
    while after["held"] and time.monotonic() < deadline_s:
        await asyncio.sleep(0.05)
        after = gauges(url)
    assert after["held"] == 0
    assert after["free"] + after["cached"] == NUM_PAGES
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
