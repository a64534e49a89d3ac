"""A peer's attention operator in a process of its own, told what to do in lines of words.

    (first line from the peer)                                      what it is, for the record
    prepare KV_LEN NUM_KV_HEADS GROUP HEAD_DIM NUM_LAYERS        -> ready
    measure SECONDS                                              -> SECONDS_OF_THE_BEST_PASS PASSES

A pass is one token's attention over every layer, each of its own random K and V, so that nothing is in the cache
when its turn comes again. A peer checks its own output against plain arithmetic before it says ready, and
rests without spinning until it is asked to measure.
"""

import queue
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from bench.servers import without_paths


class PeerFailed(Exception):
    """The process ended, or did not answer in time; the text ends with the last lines of its log."""


class Peer:
    """One such process, from start to `close`."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name = name
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                list(command),
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self._process.stdout is not None
        self._replies: queue.Queue[str] = queue.Queue()
        # A thread, since a pipe cannot be read with a time limit.
        threading.Thread(target=_read_lines, args=(self._process.stdout, self._replies), daemon=True).start()
        try:
            self.version = self._reply(300.0)
        except PeerFailed:
            self.close()
            raise

    def prepare(
        self,
        *,
        kv_len: int,
        num_kv_heads: int,
        group: int,
        head_dim: int,
        num_layers: int,
        timeout_s: float = 120.0,
    ) -> None:
        """Replace what is held by new K and V of this shape.

        Raises:
            PeerFailed: no memory, or its output is wrong.
        """
        answer = self._ask(f"prepare {kv_len} {num_kv_heads} {group} {head_dim} {num_layers}", timeout_s)
        if answer != "ready":
            raise PeerFailed(f"{self.name} said {answer!r}")

    def measure(self, seconds: float) -> float:
        """Seconds of the fastest pass within about `seconds`."""
        best, _ = self._ask(f"measure {seconds}", 60.0 + 10 * seconds).split()
        return float(best)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, line: str, timeout_s: float) -> str:
        assert self._process.stdin is not None
        try:
            print(line, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise PeerFailed(self._death()) from None
        return self._reply(timeout_s)

    def _reply(self, timeout_s: float) -> str:
        try:
            line = self._replies.get(timeout=timeout_s)
        except queue.Empty:
            raise PeerFailed(f"{self.name} did not answer within {timeout_s:.0f} s") from None
        if not line:
            raise PeerFailed(self._death())
        return line.strip()

    def _death(self) -> str:
        self._process.kill()
        status = self._process.wait()
        lines = self._log.read_text(errors="replace").splitlines()
        return without_paths("\n".join([f"{self.name} ended with status {status}:", *lines[-8:]]))


def _read_lines(pipe: IO[str], lines: "queue.Queue[str]") -> None:
    """Pass every line on; an empty one says that the other side has ended."""
    for line in pipe:
        lines.put(line)
    lines.put("")
