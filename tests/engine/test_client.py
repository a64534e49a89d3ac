"""EngineClient and the engine process, each for real, around a core without a model."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from hybridgen.configs.settings import EngineSettings
from hybridgen.engine.client import EngineClient, EngineDead, EngineStartFailed
from hybridgen.engine.request import EngineStats, Output, Request, SamplingParams

STUB = Path(__file__).with_name("stub_engine.py")
COMMAND = (sys.executable, "-P", str(STUB))
REFUSED, RAISES = 400, 500


def request(id: str, first: int = 10, *, max_tokens: int | None = 3, n: int = 1) -> Request:
    return Request(id=id, prompt=[first], params=SamplingParams(max_tokens=max_tokens, n=n))


async def start(model: str = "stub", threads: int = 3) -> EngineClient:
    return await EngineClient.start(EngineSettings(model=model, threads=threads), command=COMMAND)


async def collect(client: EngineClient, request: Request) -> list[Output]:
    return [output async for output in client.generate(request)]


async def until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.005)


def alive(pid: int) -> bool:
    try:
        # A zombie has ended; its parent has only not been told yet.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest_asyncio.fixture
async def client() -> AsyncIterator[EngineClient]:
    client = await start()
    yield client
    await client.close()


async def test_outputs_arrive_in_order_and_end_with_the_finish_reason(client: EngineClient) -> None:
    outputs = await collect(client, request("a", 10))
    assert [output.tokens for output in outputs] == [(10,), (11,), (12,)]
    assert [output.finish_reason for output in outputs] == [None, None, "length"]
    assert client.num_requests == 0


async def test_concurrent_requests_get_their_own_outputs(client: EngineClient) -> None:
    answers = await asyncio.gather(*(collect(client, request(f"r{i}", i, max_tokens=5)) for i in range(40)))
    for first, outputs in enumerate(answers):
        assert [token for output in outputs for token in output.tokens] == list(range(first, first + 5))


async def test_every_choice_of_a_request_is_awaited(client: EngineClient) -> None:
    outputs = await collect(client, request("a", n=3))
    assert sorted(output.index for output in outputs if output.finish_reason) == [0, 1, 2]


async def test_what_the_engine_said_when_ready_and_its_threads_are_known(client: EngineClient) -> None:
    assert client.ready.max_model_len == 4096
    assert client.ready.num_parameters == 3  # the stub answers with OMP_NUM_THREADS


async def test_closing_a_generator_aborts_in_the_engine(client: EngineClient) -> None:
    stream = client.generate(request("a", max_tokens=None))
    assert (await anext(stream)).tokens == (10,)
    assert client.stats.num_running == 1
    await stream.aclose()
    assert client.num_requests == 0
    await until(lambda: client.stats.num_running == 0)  # told although no step follows
    assert [o.tokens for o in await collect(client, request("a", 20, max_tokens=1))] == [(20,)]


async def test_cancelling_a_consumer_aborts_in_the_engine(client: EngineClient) -> None:
    task = asyncio.create_task(collect(client, request("a", max_tokens=None)))
    await until(lambda: client.stats.num_running == 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: client.stats.num_running == 0)


async def test_an_aborted_choice_is_silent_and_the_others_go_on(client: EngineClient) -> None:
    after: list[int] = []
    aborted = False
    async for output in client.generate(request("a", max_tokens=20, n=2)):
        if aborted:
            after.append(output.index)
        elif output.index == 0:
            client.abort_choice("a", 0)
            aborted = True
    assert set(after) == {1}
    assert client.num_requests == 0


async def test_a_request_ends_when_its_last_choice_is_aborted_while_it_waits(client: EngineClient) -> None:
    task = asyncio.create_task(collect(client, request("a", max_tokens=None)))
    await until(lambda: client.stats.num_running == 1)
    client.abort_choice("a", 0)
    client.abort_choice("a", 0)  # a second time, and unknown ones, are of no effect
    client.abort_choice("gone", 0)
    assert all(output.finish_reason is None for output in await task)
    await until(lambda: client.stats.num_running == 0)


async def test_abort_all_gives_every_choice_a_last_output(client: EngineClient) -> None:
    tasks = [asyncio.create_task(collect(client, request(f"r{i}", max_tokens=None, n=2))) for i in range(3)]
    await until(lambda: client.stats.num_running == 3)
    client.abort_all()
    for outputs in await asyncio.gather(*tasks):
        ends = [(output.index, output.finish_reason) for output in outputs if output.finish_reason]
        assert ends == [(0, "abort"), (1, "abort")]
    await until(lambda: client.stats.num_running == 0)


async def test_a_refusal_ends_the_request_with_its_reason(client: EngineClient) -> None:
    [output] = await collect(client, request("a", REFUSED, n=2))
    assert (output.finish_reason, output.error) == ("error", "too long: 9 > 8")


async def test_an_id_in_use_is_refused(client: EngineClient) -> None:
    stream = client.generate(request("a", max_tokens=None))
    await anext(stream)
    with pytest.raises(ValueError, match="'a' is in use"):
        await collect(client, request("a"))
    assert (await anext(stream)).tokens  # the first is unharmed
    await stream.aclose()


async def test_a_killed_engine_ends_every_waiter_promptly() -> None:
    client = await start()
    tasks = [asyncio.create_task(collect(client, request(f"r{i}", max_tokens=None))) for i in range(8)]
    await until(lambda: client.stats.num_running == 8)
    begin = time.monotonic()
    os.kill(client.process_id, signal.SIGKILL)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert time.monotonic() - begin < 1.0
    assert all(isinstance(result, EngineDead) and "SIGKILL" in str(result) for result in results)
    assert await client.wait_failed() == client.failure
    with pytest.raises(EngineDead, match="SIGKILL"):
        await collect(client, request("later"))
    await client.close()


async def test_an_exception_in_a_step_reaches_the_waiters_in_its_own_words() -> None:
    client = await start()
    with pytest.raises(EngineDead, match="RuntimeError: page 7 released twice"):
        await collect(client, request("a", RAISES))
    await until(lambda: not alive(client.process_id))
    await client.close()


@pytest.mark.parametrize(
    ("model", "reason"), [("missing", "FileNotFoundError: no such model: missing"), ("exits", "status 3")]
)
async def test_a_failed_start_says_why(model: str, reason: str) -> None:
    with pytest.raises(EngineStartFailed, match=reason):
        await start(model)


async def test_close_ends_the_process_and_removes_its_sockets() -> None:
    client = await start()
    folder = client._folder
    assert folder.stat().st_mode & 0o777 == 0o700
    task = asyncio.create_task(collect(client, request("a", max_tokens=None)))
    await until(lambda: client.stats.num_running == 1)
    await client.close()
    with pytest.raises(EngineDead, match="shut down"):
        await task
    assert not alive(client.process_id)
    assert not folder.exists()


async def test_close_kills_an_engine_that_does_not_answer() -> None:
    client = await start()
    os.kill(client.process_id, signal.SIGSTOP)
    await client.close(timeout_s=0.2)
    assert not alive(client.process_id)


async def test_the_engine_ignores_the_signals_that_its_group_gets() -> None:
    client = await start()
    os.kill(client.process_id, signal.SIGINT)
    os.kill(client.process_id, signal.SIGTERM)
    assert len(await collect(client, request("a"))) == 3
    await client.close()


def test_a_killed_parent_leaves_no_engine_and_no_sockets(tmp_path: Path) -> None:
    script = f"""
        import asyncio, sys
        from hybridgen.configs.settings import EngineSettings
        from hybridgen.engine.client import EngineClient

        async def main():
            client = await EngineClient.start(EngineSettings(model="stub"), command={COMMAND!r})
            print(client.process_id, client._folder, flush=True)
            await asyncio.sleep(60)

        asyncio.run(main())
    """
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    with parent:
        assert parent.stdout is not None
        pid, folder = parent.stdout.readline().split()
        assert alive(int(pid))
        parent.kill()
    deadline = time.monotonic() + 5
    while alive(int(pid)) or Path(folder).exists():
        assert time.monotonic() < deadline, "the engine outlived its parent"
        time.sleep(0.01)


async def test_thousands_of_tokens_a_second_pass_through_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    # 64 requests of 100 tokens. The floor is far below what an idle machine does (bench it there): it is to
    # catch a mistake that makes the path slow as such, such as waiting once per token.
    monkeypatch.setenv("STUB_STEP_S", "0")
    client = await start()
    begin = time.monotonic()
    answers = await asyncio.gather(*(collect(client, request(f"r{i}", 0, max_tokens=100)) for i in range(64)))
    elapsed_s = time.monotonic() - begin
    assert sum(len(outputs) for outputs in answers) == 6400
    assert 6400 / elapsed_s > 2000
    assert client.stats != EngineStats()
    await client.close()


async def test_a_page_is_explained_between_two_steps(client: EngineClient) -> None:
    stream = client.generate(request("a", max_tokens=None))
    await anext(stream)
    assert await asyncio.gather(client.explain(), client.explain(7)) == [("all pages",), ("page 7",)]
    await stream.aclose()


async def test_a_question_ends_when_the_engine_dies(client: EngineClient) -> None:
    os.kill(client.process_id, signal.SIGSTOP)  # alive, and silent
    question = asyncio.create_task(client.explain())
    await asyncio.sleep(0)
    os.kill(client.process_id, signal.SIGKILL)
    with pytest.raises(EngineDead):
        await question
    with pytest.raises(EngineDead):
        await client.explain()
