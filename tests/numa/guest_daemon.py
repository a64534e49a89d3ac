"""In the guest: the daemon answers, its KV pages lie where its rule says, and the answer is that of one node.

Where pages lie is asked of the kernel from outside of the daemon, by the engine's process id: of each page by
move_pages(2), and of whole arenas by numa_maps.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import checks
from machine import NODES

DRAM = {node.id for node in NODES if node.has_cpu}
CPU_LESS = {node.id for node in NODES} - DRAM
NUM_PAGES = 128
SYSTEM_PAGE = 4096
MOVE_PAGES = 279  # the system call's number on x86-64
ARENA = re.compile(
    r"host (\w+): (\d+) pieces of \d+ bytes, (\d+) bytes apart, from address (0x\w+) on: see /proc/(\d+)/"
)

NUM_TOKENS = 40
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
    "Dublin",
)
ANIMALS = ("cat", "dog", "horse", "owl", "fox", "bear", "wolf", "hen")


def prompt(*cities: str) -> str:
    """About a hundred tokens for each."""
    return "".join(
        f"The {animal} of {city} has the number {number}. "
        for number, (city, animal) in enumerate(product(cities, ANIMALS), 1000)
    )


SHORT, OTHER, LONG = (
    prompt(*CITIES[:4]),
    prompt(*CITIES[4:8]),
    prompt(*CITIES),
)  # of the long one `mass` reads a part


class Pieces(NamedTuple):
    """A role's arena, as the engine's log describes it."""

    num_pages: int
    stride_bytes: int
    address: int


class Daemon:
    """`hybridgen serve` with the embedded model, and the log of it."""

    def __init__(self, *arguments: str) -> None:
        begin = time.monotonic()
        command = [sys.executable, "-m", "hybridgen", "serve", "--port", "0", "--log-level", "debug"]
        command += ["--kv-cache-memory-bytes", "16MiB", "--host-pages", str(NUM_PAGES), "--max-num-seqs", "4"]
        self.process = subprocess.Popen(
            [*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.log: list[str] = []
        self.pieces: dict[str, Pieces] = {}
        self.engine_pid = 0
        self.url = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line)
            if match := ARENA.search(line):
                self.pieces[match[1]] = Pieces(int(match[2]), int(match[3]), int(match[4], 16))
                self.engine_pid = int(match[5])
            if match := re.search(r" at (http:\S+)", line):
                self.url = match[1]
                break
        assert self.url, "".join(self.log)
        self.ready_s = time.monotonic() - begin
        self._reader = threading.Thread(
            target=lambda: self.log.extend(self.process.stdout or ()), daemon=True
        )
        self._reader.start()

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=120) as response:
            text: str = response.read().decode()
        return text

    def complete(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        body = {
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 1,
        }
        request = urllib.request.Request(
            self.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=200) as response:
            answer: dict[str, Any] = json.load(response)
        assert answer["usage"]["completion_tokens"] == max_tokens, answer
        return answer

    def said(self) -> dict[int, dict[str, int]]:
        """What the daemon says of each page that holds KV: role to node."""
        found: dict[int, dict[str, int]] = {}
        for page in range(NUM_PAGES):
            lines = json.loads(self.get(f"/placement?page={page}"))["lines"]
            places = [re.match(r"  (index|v_sums|k|v): \D+(\d+)", line) for line in lines]
            roles = {match[1]: int(match[2]) for match in places if match}
            assert bool(roles) != lines[0].endswith("is free"), lines
            if roles:
                found[page] = roles
        return found

    def true(self, role: str) -> list[set[int]]:
        """The nodes of each page's piece, by move_pages(2); none where it was never written."""
        pieces = self.pieces[role]
        count = pieces.num_pages * pieces.stride_bytes // SYSTEM_PAGE
        addresses = (ctypes.c_uint64 * count)(*(pieces.address + i * SYSTEM_PAGE for i in range(count)))
        status = (ctypes.c_int * count)()
        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall.argtypes = [ctypes.c_long] * 3 + [ctypes.c_void_p] * 3 + [ctypes.c_long]
        assert libc.syscall(MOVE_PAGES, self.engine_pid, count, addresses, None, status, 0) == 0, os.strerror(
            ctypes.get_errno()
        )
        each = pieces.stride_bytes // SYSTEM_PAGE
        return [
            {node for node in status[page * each : (page + 1) * each] if node >= 0}
            for page in range(pieces.num_pages)
        ]

    def mapped(self, role: str) -> dict[int, int]:
        """KiB of the role's arena by node, as numa_maps counts them."""
        pieces = self.pieces[role]
        end = pieces.address + pieces.num_pages * pieces.stride_bytes
        totals: Counter[int] = Counter()
        for line in Path(f"/proc/{self.engine_pid}/numa_maps").read_text().splitlines():
            if pieces.address <= int(line.split()[0], 16) < end:
                size = int((re.search(r"kernelpagesize_kB=(\d+)", line) or ["", "4"])[1])
                for node, pages in re.findall(r"\bN(\d+)=(\d+)", line):
                    totals[int(node)] += int(pages) * size
        return dict(sorted(totals.items()))

    def verify(self) -> dict[str, dict[int, int]]:
        """Compare what the daemon says with what the kernel says; pieces by role and node."""
        said = self.said()
        counts: dict[str, dict[int, int]] = {}
        for role, pieces in self.pieces.items():
            true = self.true(role)
            wrong = {p: (true[p], roles[role]) for p, roles in said.items() if true[p] != {roles[role]}}
            assert not wrong, f"{role}: by page, the kernel's word and the daemon's: {wrong}"
            counts[role] = dict(sorted(Counter(roles[role] for roles in said.values()).items()))
            kibibytes = {node: count * pieces.stride_bytes // 1024 for node, count in counts[role].items()}
            assert self.mapped(role) == kibibytes, (role, self.mapped(role), kibibytes)
        return counts

    def metric(self, name: str) -> float:
        """The sum over its labels; 0 where there is none."""
        values = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", self.get("/metrics"), re.MULTILINE)
        return sum(map(float, values))


@contextmanager
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


class Answer(NamedTuple):
    tokens: list[str]
    logprobs: list[float]
    num_prompt_tokens: int


def answer_of(server: Daemon, prompt: str, max_tokens: int) -> Answer:
    answer = server.complete(prompt, max_tokens)
    logprobs = answer["choices"][0]["logprobs"]
    return Answer(logprobs["tokens"], logprobs["token_logprobs"], answer["usage"]["prompt_tokens"])


def difference(one: Answer, other: Answer) -> str:
    """The largest of the log-probabilities, of answers whose tokens are equal."""
    assert one.tokens == other.tokens, (one.tokens, other.tokens)
    return f"{max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True)):.1e}"


def on_one_node(policy: str, *prompts: str) -> list[Answer]:
    """The answers with all pages on node 0, where they are verified to lie, of an engine in this process."""
    # Not above: importing takes as long as the daemon's own, which is not to wait for it.
    from hybridgen.engine.llm import LLM
    from hybridgen.engine.request import SamplingParams

    llm = LLM(
        host_pages=NUM_PAGES,
        max_num_seqs=4,
        host_attention=policy,
        memory_tiers={node.id: "none" for node in NODES if node.id},
    )
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, logprobs=1)
    answers: list[Answer] = []
    for prompt in prompts:
        (output,) = llm.generate([prompt], params)
        choice = output.outputs[0]
        tokens = [llm.get_tokenizer().decode([token]) for token in choice.token_ids]
        logprobs = [one.logprob for one in choice.logprobs or ()]
        answers.append(Answer(tokens, logprobs, len(output.prompt_token_ids)))
    arenas = llm._core._runner.store.host.arenas
    assert all(set(arena.node_bytes()) == {0} for arena in arenas.values())
    return answers


@contextmanager
def filled(nodes: Iterable[int]) -> Iterator[int]:
    """Nodes that other memory takes all of; how many MiB that took."""
    import torch

    from hybridgen.kernels.arena import Arena
    from hybridgen.kernels.memory import NodeFull

    kept: list[Arena] = []
    for node in nodes:
        for piece_bytes, at_once in ((2 << 20, 25), (32 << 10, 16), (32 << 10, 1)):
            kept.append(Arena((1200 << 20) // piece_bytes, (piece_bytes,), torch.uint8, name="other memory"))
            with suppress(NodeFull):
                for first in range(0, kept[-1].num_pages, at_once):
                    kept[-1].bind(range(first, first + at_once), node)
    yield sum(sum(arena.node_bytes().values()) for arena in kept) >> 20


def with_the_paper_rule_keys_lie_in_dram_and_values_on_cpu_less_nodes() -> str:
    with daemon("--placement", "paper") as server:
        answer = answer_of(server, SHORT, NUM_TOKENS)
        counts = server.verify()
        assert set(server.pieces) == {"k", "v"}
        assert set(counts["k"]) == DRAM, counts
        assert set(counts["v"]) == CPU_LESS, counts
        explained = subprocess.run(
            [sys.executable, "-m", "hybridgen", "map", "--url", server.url, "--explain", "0"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert re.search(r"by the kernel's word, NUMA nodes: k on [01], v on [23]\n", explained), explained
        print(explained, end="")
        maps = {role: server.mapped(role) for role in server.pieces}
        with filled(CPU_LESS) as mebibytes:
            other = answer_of(server, OTHER, NUM_TOKENS)
        both = server.verify()
        told = [
            re.sub(r".*host_memory: ", "", line).strip() for line in server.log if " pieces went to " in line
        ]
    assert both["v"][0] + both["v"].get(1, 0) > 0, both
    assert told
    expected, expected_other = on_one_node("exact", SHORT, OTHER)
    same, same_other = difference(answer, expected), difference(other, expected_other)
    print(f"{mebibytes} MiB of other memory on nodes 2 and 3, then «{told[0]}»")
    return (
        f"ready after {server.ready_s:.0f} s; {answer.num_prompt_tokens} prompt tokens; pieces by node {counts}, KiB "
        f"by /proc/PID/numa_maps {maps}; nodes 2 and 3 filled, another answer: {both}; 2 x {len(answer.tokens)} tokens "
        f"equal those of one node (log-probabilities differ by {same}, {same_other}): {''.join(answer.tokens)!r}"
    )


def with_the_mapper_labels_are_true_and_migrations_change_no_token() -> str:
    with daemon("--placement", "mapper", "--host-attention", "mass") as server:
        first = answer_of(server, LONG, NUM_TOKENS)
        time.sleep(1)  # for migrations that the last steps began
        counts = server.verify()
        migrated = server.metric("hybridgen:migrated_pieces_total")
        again = answer_of(server, LONG, NUM_TOKENS)
        time.sleep(1)
        counts_again = server.verify()
        hits = server.metric("vllm:prefix_cache_hits_total")
        migrated_again = server.metric("hybridgen:migrated_pieces_total")
        summary = json.loads(server.get("/placement"))["lines"]
        print("\n".join(summary))
    assert migrated > 0, counts
    assert hits > 0
    (expected,) = on_one_node("mass", LONG)
    same, same_again = difference(first, expected), difference(again, expected)
    return (
        f"pieces by node {counts}, {migrated:.0f} migrated, then {counts_again}, {migrated_again:.0f} migrated; the "
        f"answer, and again with {hits:.0f} cached tokens, equal that of one node (log-probabilities differ by {same}, "
        f"{same_again})"
    )


if __name__ == "__main__":
    checks.run(
        [
            with_the_paper_rule_keys_lie_in_dram_and_values_on_cpu_less_nodes,
            with_the_mapper_labels_are_true_and_migrations_change_no_token,
        ]
    )
