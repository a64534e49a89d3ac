"""The `hybridgen` command as a user runs it: help, mistakes, chat and bench against a server process."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hybridgen.server.bench_serve import Load, Timing, arrivals, percentile, summarize
from hybridgen.server.cli import main
from tests.server.processes import Server

HYBRIDGEN = (sys.executable, "-P", "-m", "hybridgen")


@pytest.fixture(scope="module")
def server(model_folder: Path) -> Iterator[Server]:
    server = Server(str(model_folder), "--served-model-name", "stub", "--port", "0", "--api-key", "sesame")
    server.await_ready()
    yield server
    server.process.terminate()
    server.end()


def run(*arguments: str, text: str = "", key: str = "sesame") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*HYBRIDGEN, *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "HYBRIDGEN_API_KEY": key},
    )


def test_help_and_version_need_neither_torch_nor_the_server() -> None:
    heavy = ("torch", "transformers", "fastapi", "uvicorn", "zmq")
    script = (
        "import sys; from hybridgen.server.cli import main\n"
        "try: main(['serve', '--help'])\n"
        f"finally: print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=False)
    assert "--max-num-seqs" in done.stdout
    assert done.stdout.endswith("[]\n")


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == "hybridgen 0.1.0\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--port", "70000"], "hybridgen serve: error: --port: input should be less than or equal to 65535"),
        (["serve", "--device", "cuda"], "hybridgen serve: error: --device: cuda is not supported by this version"),
        (["serve", "a", "--model", "b"], "hybridgen serve: error: MODEL a and --model b differ"),
        (["serve", "--config", "/no/file.toml"], "--config /no/file.toml: No such file or directory"),
        (["serve", "--api-key-file", "/no/keys"], "--api-key-file /no/keys: No such file or directory"),
        (["serve", "--chat-template", "/no/t"], "--chat-template /no/t: No such file or directory; nor is it a t"),
        (["serve", "--host", "256.0.0.1"], "hybridgen serve: error: cannot listen on 256.0.0.1 port 8000: "),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["serve", "--no-such-flag"], ["bench", "serve", "--num-prompts", "0"]]
)
def test_wrong_usage_exits_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage:" in capsys.readouterr().err


def test_chat_answers_a_pipe_once(server: Server) -> None:
    done = run("chat", "--url", server.url, "--max-tokens", "5", text="hi\n")
    # The prompt begins with "<" (of "<user>"), and the stub counts on from its first token.
    assert (done.returncode, done.stdout, done.stderr) == (0, "<=>?@\n", "")


def test_chat_sends_the_system_message_first_and_its_own_key(server: Server) -> None:
    arguments = [
        "chat",
        "--url",
        f"{server.url}/v1",
        "--system",
        "s",
        "--max-tokens",
        "1",
        "--api-key",
        "sesame",
    ]
    assert run(*arguments, text="hi", key="").stdout == "<\n"


def test_chat_tells_what_the_server_refuses(server: Server) -> None:
    wrong_key = run("chat", "--url", server.url, text="hi", key="wrong")
    assert (wrong_key.returncode, wrong_key.stderr[:20]) == (1, "hybridgen chat: 401:")
    wrong_model = run("chat", "--url", server.url, "--model", "nope", text="hi")
    assert wrong_model.returncode == 1
    assert "nope" in wrong_model.stderr
    nobody = run("chat", "--url", "http://127.0.0.1:9", text="hi")
    assert "nothing answers at http://127.0.0.1:9" in nobody.stderr
    assert run("chat", "--url", server.url, text="").stderr.endswith("nothing on standard input\n")


def test_chat_tells_what_is_not_text(server: Server) -> None:
    done = subprocess.run(
        [*HYBRIDGEN, "chat", "--url", server.url, "--api-key", "sesame"], input=b"ab\xff", capture_output=True
    )
    assert done.returncode == 1
    assert done.stderr == b"hybridgen chat: standard input is not UTF-8: invalid start byte at byte 2\n"


class Terminal:
    """A chat on a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self._own, other = pty.openpty()
        self.process = subprocess.Popen(
            [*HYBRIDGEN, "chat", *arguments],
            stdin=other,
            stdout=other,
            stderr=other,
            env={**os.environ, "HYBRIDGEN_API_KEY": "sesame", "TERM": "dumb"},
            start_new_session=True,
        )
        os.close(other)
        self._read = ""

    def await_text(self, text: str) -> None:
        """Wait until `text` appears after what was awaited before."""
        deadline = time.monotonic() + 30
        while text not in self._read:
            assert time.monotonic() < deadline, f"{text!r} is not in {self._read!r}"
            if select.select([self._own], [], [], 0.1)[0]:
                self._read += os.read(self._own, 4096).decode()
        self._read = self._read.split(text, 1)[1]

    def type(self, line: str) -> None:
        os.write(self._own, f"{line}\n".encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._own)


def test_chat_in_a_terminal_answers_stops_forgets_and_leaves(server: Server) -> None:
    terminal = Terminal("--url", server.url)
    try:
        terminal.await_text("> ")
        terminal.type("hi")
        terminal.await_text("<=>?@")
        # Without --max-tokens the stub would go on for thousands of tokens.
        terminal.process.send_signal(2)
        terminal.await_text("(stopped)")
        terminal.await_text("> ")
        terminal.type("/clear")
        terminal.await_text("forgotten")
        terminal.await_text("> ")
        terminal.type("/what")
        terminal.await_text("unknown command")
        terminal.await_text("> ")
        terminal.type("/exit")
        assert terminal.process.wait(20) == 0
    finally:
        terminal.close()


def test_bench_counts_what_was_asked_for_and_saves_it(server: Server, tmp_path: Path) -> None:
    saved = tmp_path / "result.json"
    done = run(
        "bench", "serve", "--base-url", server.url, "--num-prompts", "6", "--max-concurrency", "3",
        "--random-input-len", "16", "--random-output-len", "8", "--random-vocab-size", "128", "--ignore-eos",
        "--save-result", str(saved),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "6 answers" in done.stdout
    content = json.loads(saved.read_text())
    assert content["load"]["model"] == "stub"
    result = content["result"]
    assert (result["completed"], result["failed"]) == (6, 0)
    assert (result["prompt_tokens"], result["output_tokens"]) == (6 * 16, 6 * 8)
    assert len(content["requests"]) == 6
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        assert set(result[name]) == {"mean", "p50", "p90", "p99"}
    assert result["tpot_ms"]["mean"] >= 4.9  # the stub's step takes 5 ms
    assert result["e2e_ms"]["p50"] >= result["ttft_ms"]["p50"] + 7 * 4.9


def test_bench_refuses_a_file_that_it_could_not_write_before_it_runs(tmp_path: Path) -> None:
    file = tmp_path / "missing" / "result.json"
    done = run("bench", "serve", "--base-url", "http://127.0.0.1:9", "--save-result", str(file))
    assert done.returncode == 1
    assert done.stderr == (
        f"hybridgen bench serve: error: cannot write {file}: {file.parent} does not exist\n"
    )


def test_bench_fails_when_the_server_refuses(server: Server) -> None:
    done = run(
        "bench", "serve", "--base-url", server.url, "--random-input-len", "5000", "--random-vocab-size", "128"
    )
    assert done.returncode == 1
    assert "the first request failed: 400" in done.stderr


def load(**values: object) -> Load:
    defaults = {"base_url": "", "model": "m", "num_prompts": 50, "input_len": 100, "output_len": 10}
    return Load(**(defaults | values))  # type: ignore[arg-type]


def test_equal_seeds_send_equal_loads() -> None:
    assert arrivals(load(seed=1, request_rate=5.0)) == arrivals(load(seed=1, request_rate=5.0))
    assert arrivals(load(seed=1)) != arrivals(load(seed=2))


def test_an_infinite_rate_sends_all_at_once_and_a_finite_one_spreads_them() -> None:
    assert {arrival.at_s for arrival in arrivals(load())} == {0.0}
    spread = arrivals(load(num_prompts=2000, input_len=1, request_rate=10.0))
    assert spread[0].at_s == 0
    assert spread[-1].at_s == pytest.approx(200, rel=0.1)  # the standard deviation is 2 %


def test_lengths_vary_within_their_range() -> None:
    lengths = {len(arrival.prompt) for arrival in arrivals(load(range_ratio=0.5))}
    assert min(lengths) >= 50
    assert max(lengths) <= 150
    assert len(lengths) > 10
    assert {len(arrival.prompt) for arrival in arrivals(load())} == {100}


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([3.0], 99, 3.0), ([1.0, 2.0], 50, 1.5), ([4.0, 1.0, 3.0, 2.0, 5.0], 50, 3.0), ([0.0, 10.0], 90, 9.0)],
)
def test_percentiles_are_linear_between_ranks(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == pytest.approx(expected)


def test_figures_follow_from_the_timings() -> None:
    timings = [
        Timing(ttft_s=0.1, gaps_s=(0.2, 0.2), e2e_s=0.5, prompt_tokens=10, output_tokens=3),
        Timing(ttft_s=0.3, e2e_s=0.3, prompt_tokens=10, output_tokens=1),
        Timing(error="refused"),
    ]
    figures = summarize(timings, duration_s=2.0)
    assert (figures["completed"], figures["failed"]) == (2, 1)
    assert (figures["requests_per_s"], figures["output_tokens_per_s"]) == (1.0, 2.0)
    assert figures["ttft_ms"]["mean"] == pytest.approx(200)
    assert figures["tpot_ms"]["p50"] == pytest.approx(200)
    assert figures["itl_ms"]["p99"] == pytest.approx(200)
    assert "e2e_ms" not in summarize([Timing(error="refused")], duration_s=1.0)


def test_map_prints_where_pages_lie(server: Server) -> None:
    done = run("map", "--url", server.url)
    assert (done.stdout, done.returncode) == ("all pages\n", 0)
    done = run("map", "--explain", "5", "--url", server.url)
    assert (done.stdout, done.returncode) == ("page 5\n", 0)


def test_map_says_why_there_is_no_answer(server: Server) -> None:
    done = run("map", "--url", server.url, key="wrong")
    assert done.returncode == 1
    assert "answered 401" in done.stderr
    done = run("map", "--url", "http://127.0.0.1:1")
    assert done.returncode == 1
    assert "no answer from http://127.0.0.1:1" in done.stderr
