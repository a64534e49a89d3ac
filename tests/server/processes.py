"""Server processes for tests: `hybridgen serve` around the stub engine."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

STUB_SERVE = Path(__file__).with_name("stub_serve.py")


class Server:
    """One server process under test."""

    def __init__(self, *arguments: str, load_s: float = 0.0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(STUB_SERVE), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "STUB_LOAD_S": str(load_s), "STUB_STEP_S": "0.005"},
        )

    def await_ready(self) -> str:
        """The line that it prints when ready; empty when it ends first."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.url = line.split()[-1] if line else ""
        return line

    def engine(self) -> psutil.Process:
        [engine] = psutil.Process(self.process.pid).children()
        return engine

    def status(self, path: str) -> int:
        return httpx.get(f"{self.url}{path}").status_code

    def complete(self, max_tokens: int = 4) -> httpx.Response:
        body = {"model": "stub", "prompt": [40], "max_tokens": max_tokens}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=30)

    def end(self) -> tuple[int, str]:
        """Wait for the process; its exit status and what it logged."""
        _, errors = self.process.communicate(timeout=20)
        return self.process.returncode, errors


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)
