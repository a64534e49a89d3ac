"""The controller in the engine: what it is told, what it moves, and that tokens do not change."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hybridgen.configs.settings import EngineSettings
from hybridgen.engine.build import build_engine
from hybridgen.engine.core import EngineCore
from hybridgen.engine.request import Request, SamplingParams
from hybridgen.kernels.page_memory import NodeSpeed
from hybridgen.kernels.pool import AttentionPool
from tests.models import VOCAB_SIZE, save_model

needs_two_cores = pytest.mark.skipif(
    len(AttentionPool.default_cpus()) < 2, reason="device and host need a core each"
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_model("llama", folder)
    return folder


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    allowed, num_threads = os.sched_getaffinity(0), torch.get_num_threads()
    yield
    os.sched_setaffinity(0, allowed)
    torch.set_num_threads(num_threads)


def engine(folder: Path, **changes: object) -> EngineCore:
    settings = {
        "max_model_len": 512,
        "max_num_seqs": 2,
        "num_device_pages": 64,
        "num_host_pages": 64,
        "page_size": 16,
        "threads": 2,
        "device_threads": 1,
    }
    return build_engine(EngineSettings(model=str(folder), **(settings | changes)))  # type: ignore[arg-type]


def generate(core: EngineCore, *, num_prompts: int = 2, num_tokens: int = 40) -> list[list[int]]:
    tokens: dict[str, list[int]] = {}
    for number in range(num_prompts):
        rng = random.Random(number)
        tokens[str(number)] = []
        core.add(
            Request(
                id=str(number),
                prompt=[rng.randrange(VOCAB_SIZE) for _ in range(300)],
                params=SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True),
            )
        )
    while core.has_work():
        for output in core.step():
            tokens[output.id] += output.tokens
    core.check_integrity()
    return list(tokens.values())


@pytest.fixture(scope="module")
def expected(llama: Path) -> list[list[int]]:
    return generate(engine(llama, num_device_pages=0, device_threads=0))


@needs_two_cores
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_fixed_share_is_kept_and_changes_no_token(
    llama: Path, expected: list[list[int]], share: float
) -> None:
    core = engine(llama, feedback="fixed", device_share=share)
    assert generate(core) == expected
    balance = core.stats().balance
    assert balance is not None
    assert balance.reason == "fixed"
    # A sequence keeps its sink and the page that it writes to.
    assert balance.actual_share == pytest.approx(max(share, 2 / 22), abs=0.06)


@needs_two_cores
@pytest.mark.parametrize("mode", ["measured", "predicted"])
def test_whatever_is_decided_changes_no_token(llama: Path, expected: list[list[int]], mode: str) -> None:
    core = engine(llama, feedback=mode)
    assert generate(core) == expected
    balance = core.stats().balance
    assert balance is not None
    assert balance.device_s_total > 0
    assert balance.message


@needs_two_cores
def test_a_host_that_becomes_slow_loses_its_pages_to_the_device(llama: Path) -> None:
    core = engine(llama, max_num_seqs=1)
    os.sched_setaffinity(0, AttentionPool.default_cpus()[:1])  # as the engine's process does
    store, balance = core._runner.store, core._balance
    assert balance is not None
    core.add(
        Request(
            id="a",
            prompt=[index % VOCAB_SIZE for index in range(400)],
            params=SamplingParams(max_tokens=100, temperature=0, ignore_eos=True),
        )
    )
    core.step()
    (key,) = core._choices
    core._scheduler.set_split(key, 5)
    core._balance = None
    for _ in range(10):
        core.step()
    assert core._scheduler._sequences[key].table.num_device_pages <= 7
    store.host.memory.set_speed(0, NodeSpeed(bandwidth=2e6, latency_s=1e-4))
    core._balance = balance
    for _ in range(40):
        core.step()
    share = core.stats().balance
    assert share is not None
    assert share.actual_share > 0.8
    assert share.device_wait_s_total > 0
    core.abort(["a"])


def test_one_pool_for_both_tiers_balances_nothing(llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    core = engine(llama, device_threads=0, feedback="fixed")
    assert "--feedback has no effect" in caplog.text
    generate(core, num_prompts=1, num_tokens=2)
    assert core.stats().balance is None


def test_device_threads_without_device_pages_are_refused(llama: Path) -> None:
    with pytest.raises(ValueError, match="give --device-pages"):
        engine(llama, num_device_pages=0)


def test_device_threads_that_leave_the_host_no_core_are_refused(llama: Path) -> None:
    with pytest.raises(ValueError, match="leaves the host none"):
        engine(llama, device_threads=len(AttentionPool.default_cpus()))
