"""In the guest: the daemon answers, its KV pages lie where its rule says, and the answer is that of one node.

Where pages lie is asked of the kernel from outside, by process id: of each page by move_pages(2), and of whole arenas
by numa_maps. Everything that is started here takes a while to import, since the processor is emulated: so there is one
daemon, and the engines to compare it with are built in this process while it starts.
"""

import contextlib
import ctypes
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import checks
from machine import NODES

DRAM = {node.id for node in NODES if node.has_cpu}
CPU_LESS = {node.id for node in NODES} - DRAM
NUM_PAGES = 96
SYSTEM_PAGE = 4096
MOVE_PAGES = 279  # the system call's number on x86-64
ARENA = re.compile(
    r"host (\w+): (\d+) pieces of \d+ bytes, (\d+) bytes apart, from address (0x\w+) on: see /proc/(\d+)/"
)

CITIES = (
    "Paris",
    "Rome",
    "Lima",
    "Oslo",
    "Cairo",
    "Delhi",
    "Quito",
    "Berlin",
    "Tokyo",
    "Madrid",
    "Vienna",
)
ANIMALS = ("cat", "dog", "horse", "owl", "fox", "bear", "wolf", "hen")


def prompt(*cities: str) -> str:
    """About a hundred tokens for each."""
    return "".join(
        f"The {animal} of {city} has the number {number}. "
        for number, (city, animal) in enumerate(product(cities, ANIMALS), 1000)
    )


SHORT, OTHER, LONG = (
    prompt(*CITIES[:2]),
    prompt(*CITIES[2:4]),
    prompt(*CITIES),
)  # of the long one `mass` reads a part


class Pieces(NamedTuple):
    """A role's arena."""

    num_pages: int
    stride_bytes: int
    address: int


class Answer(NamedTuple):
    tokens: list[str]
    logprobs: list[float]
    num_prompt_tokens: int


def difference(one: Answer, other: Answer) -> str:
    """The largest of the log-probabilities, of answers whose tokens are equal."""
    assert one.tokens == other.tokens, (one.tokens, other.tokens)
    return f"{max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True)):.1e}"


def nodes_by_move_pages(pid: int, pieces: Pieces) -> list[set[int]]:
    """The nodes of each page's piece; none where it was never written."""
    count = pieces.num_pages * pieces.stride_bytes // SYSTEM_PAGE
    addresses = (ctypes.c_uint64 * count)(*(pieces.address + i * SYSTEM_PAGE for i in range(count)))
    status = (ctypes.c_int * count)()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.argtypes = [ctypes.c_long] * 3 + [ctypes.c_void_p] * 3 + [ctypes.c_long]
    error = libc.syscall(MOVE_PAGES, pid, count, addresses, None, status, 0)
    assert error == 0, os.strerror(ctypes.get_errno())
    each = pieces.stride_bytes // SYSTEM_PAGE
    return [
        {node for node in status[page * each : (page + 1) * each] if node >= 0}
        for page in range(pieces.num_pages)
    ]


def kibibytes_by_numa_maps(pid: int, pieces: Pieces) -> dict[int, int]:
    """Of the whole arena, by node."""
    end = pieces.address + pieces.num_pages * pieces.stride_bytes
    totals: Counter[int] = Counter()
    for line in Path(f"/proc/{pid}/numa_maps").read_text().splitlines():
        if pieces.address <= int(line.split()[0], 16) < end:
            size = int((re.search(r"kernelpagesize_kB=(\d+)", line) or ["", "4"])[1])
            for node, pages in re.findall(r"\bN(\d+)=(\d+)", line):
                totals[int(node)] += int(pages) * size
    return dict(sorted(totals.items()))


def verify(
    pid: int, arenas: Mapping[str, Pieces], explain: Callable[[int | None], Sequence[str]]
) -> dict[str, dict[int, int]]:
    """Compare what is said of each page that holds KV with what the kernel says; pieces by role and node."""
    num_placed = sum(int(count) for line in explain(None) for count in re.findall(r"(\d+) k\b", line))
    said: dict[int, dict[str, int]] = {}
    for page in range(NUM_PAGES):
        if len(said) == num_placed:
            break
        lines = explain(page)
        places = [re.match(r"  (index|v_sums|k|v): \D+(\d+)", line) for line in lines]
        roles = {match[1]: int(match[2]) for match in places if match}
        assert bool(roles) != lines[0].endswith("is free"), lines
        if roles:
            assert set(roles) == set(arenas), lines
            said[page] = roles
    assert len(said) == num_placed > 0
    counts: dict[str, dict[int, int]] = {}
    for role, pieces in arenas.items():
        true = nodes_by_move_pages(pid, pieces)
        wrong = {
            page: (true[page], roles[role]) for page, roles in said.items() if true[page] != {roles[role]}
        }
        assert not wrong, f"{role}: by page, the kernel's word and ours: {wrong}"
        counts[role] = dict(sorted(Counter(roles[role] for roles in said.values()).items()))
        # Pages that are free again keep their memory.
        kibibytes = Counter(node for nodes in true for node in nodes)
        expected = {node: count * pieces.stride_bytes // 1024 for node, count in sorted(kibibytes.items())}
        found = kibibytes_by_numa_maps(pid, pieces)
        assert found == expected, (role, found, expected)
    return counts


class Daemon:
    """`hybridgen serve` with the embedded model, and what it logs."""

    def __init__(self, *arguments: str) -> None:
        self._begin = time.monotonic()
        command = [sys.executable, "-m", "hybridgen", "serve", "--port", "0", "--log-level", "debug"]
        command += ["--host-pages", str(NUM_PAGES), "--max-num-seqs", "4", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.log: list[str] = []
        self.arenas: dict[str, Pieces] = {}
        self.engine_pid = 0
        self.url = ""
        self.ready_s = 0.0
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line)
            if match := ARENA.search(line):
                self.arenas[match[1]] = Pieces(int(match[2]), int(match[3]), int(match[4], 16))
                self.engine_pid = int(match[5])
            if not self.url and (match := re.search(r" at (http:\S+)", line)):
                self.url = match[1]
                self.ready_s = time.monotonic() - self._begin
                self._ready.set()
        self._ready.set()

    def wait(self) -> None:
        """Until it takes requests."""
        self._ready.wait()
        assert self.url, "it ended before it was ready"

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=120) as response:
            text: str = response.read().decode()
        return text

    def explain(self, page: int | None) -> list[str]:
        lines: list[str] = json.loads(self.get("/placement" if page is None else f"/placement?page={page}"))[
            "lines"
        ]
        return lines

    def answer(self, prompt: str, num_tokens: int) -> Answer:
        body = {
            "prompt": prompt,
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 1,
        }
        request = urllib.request.Request(
            self.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=200) as response:
            answer: dict[str, Any] = json.load(response)
        logprobs = answer["choices"][0]["logprobs"]
        return Answer(logprobs["tokens"], logprobs["token_logprobs"], answer["usage"]["prompt_tokens"])


@contextlib.contextmanager
def daemon(*arguments: str) -> Iterator[Daemon]:
    server = Daemon(*arguments)
    try:
        yield server
    except BaseException:
        print("".join(server.log[-60:]), flush=True)
        raise
    finally:
        server.process.terminate()
        status = server.process.wait(60)
    assert status == 0, "".join(server.log[-60:])


class Engine:
    """The same engine without the daemon, in this process."""

    def __init__(self, **settings: Any) -> None:
        from hybridgen.engine.llm import LLM

        with contextlib.redirect_stderr(io.StringIO()):  # a bar of progress
            self._llm = LLM(host_pages=NUM_PAGES, max_num_seqs=4, **settings)
        self.core = self._llm._core
        self.explain = self.core.explain
        self.arenas = {
            str(role): Pieces(arena.num_pages, arena.stride_bytes, arena.address)
            for role, arena in self.core._runner.store.host.arenas.items()
        }

    def answer(self, prompt: str, num_tokens: int) -> Answer:
        from hybridgen.engine.request import SamplingParams

        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True, logprobs=1)
        (output,) = self._llm.generate([prompt], params)
        choice, tokenizer = output.outputs[0], self._llm.get_tokenizer()
        tokens = [tokenizer.decode([token]) for token in choice.token_ids]
        return Answer(tokens, [one.logprob for one in choice.logprobs or ()], len(output.prompt_token_ids))


def on_one_node(policy: str, prompts: Sequence[str], num_tokens: int) -> list[Answer]:
    """The answers with all pages on node 0, where they are verified to lie."""
    engine = Engine(host_attention=policy, memory_tiers={node.id: "none" for node in NODES if node.id})
    answers = [engine.answer(prompt, num_tokens) for prompt in prompts]
    counts = verify(os.getpid(), engine.arenas, engine.explain)
    assert all(set(nodes) == {0} for nodes in counts.values()), counts
    return answers


@contextlib.contextmanager
def filled(node: int) -> Iterator[int]:
    """A node that other memory takes all of; how many MiB that took."""
    import torch

    from hybridgen.kernels.arena import Arena
    from hybridgen.kernels.memory import NodeFull

    kept: list[Arena] = []
    for piece_bytes, at_once in ((2 << 20, 25), (32 << 10, 16), (32 << 10, 1)):
        kept.append(Arena((1200 << 20) // piece_bytes, (piece_bytes,), torch.uint8, name="other memory"))
        with contextlib.suppress(NodeFull):
            for first in range(0, kept[-1].num_pages, at_once):
                kept[-1].bind(range(first, first + at_once), node)
    yield sum(sum(arena.node_bytes().values()) for arena in kept) >> 20


def map_explains(url: str, page: int) -> str:
    """What `hybridgen map --explain` prints."""
    from hybridgen.server.placement import placement

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert placement(url=url, page=page, api_key=None) == 0
    return printed.getvalue()


def the_daemon_keeps_keys_in_dram_and_values_on_cpu_less_nodes() -> str:
    with daemon("--placement", "paper") as server:
        expected, expected_other = on_one_node("exact", (SHORT, OTHER), 16)
        compared_s = time.monotonic() - server._begin
        server.wait()
        begin = time.monotonic()
        answer = server.answer(SHORT, 16)
        answered_s = time.monotonic() - begin
        counts = verify(server.engine_pid, server.arenas, server.explain)
        assert set(counts) == {"k", "v"}
        assert set(counts["k"]) == DRAM, counts
        assert set(counts["v"]) == CPU_LESS, counts
        explained = map_explains(server.url, 0)
        assert re.search(r"by the kernel's word, NUMA nodes: k on [01], v on [23]\n", explained), explained
        print(explained, end="")
        kibibytes = {
            role: kibibytes_by_numa_maps(server.engine_pid, pieces) for role, pieces in server.arenas.items()
        }
        with filled(2) as mebibytes:
            other = server.answer(OTHER, 16)
        both = verify(server.engine_pid, server.arenas, server.explain)
        assert DRAM & set(both["v"]), both
        (first, *_) = [
            re.sub(r".*host_memory: ", "", line) for line in server.log if " pieces went to " in line
        ]
    print(f"{mebibytes} MiB of other memory on node 2, then: {first}", end="")
    same, same_other = difference(answer, expected), difference(other, expected_other)
    return (
        f"ready after {server.ready_s:.0f} s, the engine to compare with done after {compared_s:.0f} s; "
        f"{answer.num_prompt_tokens} prompt tokens answered in {answered_s:.1f} s; pieces by node {counts}, KiB by "
        f"/proc/PID/numa_maps {kibibytes}; "
        f"node 2 filled, another answer: {both}; 2 x {len(answer.tokens)} tokens equal those of one node "
        f"(log-probabilities differ by {same}, {same_other}): {''.join(answer.tokens)!r}"
    )


def with_the_mapper_labels_are_true_and_migrations_change_no_token() -> str:
    expected = on_one_node("mass", (LONG, LONG), 24)  # the second time from the prefix cache
    engine = Engine(placement="mapper", host_attention="mass")
    figures: list[str] = []
    for same in expected:
        answer = engine.answer(LONG, 24)
        engine.core._runner.store.host._finish_moves(wait=True)  # that the last steps began
        counts = verify(os.getpid(), engine.arenas, engine.explain)
        stats = engine.core.stats()
        num_migrated = sum(move.num_total for move in stats.migrations)
        figures.append(
            f"{stats.num_prefix_hits_total} cached tokens, pieces by node {counts}, {num_migrated} migrated, "
            f"log-probabilities differ by {difference(answer, same)}"
        )
    assert num_migrated > 0
    assert stats.num_prefix_hits_total > 0
    assert any(len(nodes) > 1 for nodes in counts.values()), counts
    print("\n".join(engine.explain(None)))
    return f"{answer.num_prompt_tokens} prompt tokens, the tokens are those of one node; {'; again: '.join(figures)}"


if __name__ == "__main__":
    checks.run(
        [
            the_daemon_keeps_keys_in_dram_and_values_on_cpu_less_nodes,
            with_the_mapper_labels_are_true_and_migrations_change_no_token,
        ]
    )
