"""The engine loop: refusals, aborts, ends, and what it does with a model that fails."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from hybridgen.configs.settings import EngineSettings
from hybridgen.engine.build import build_engine
from hybridgen.engine.core import EngineCore
from hybridgen.engine.request import Output, Request, SamplingParams
from tests.models import save_model

ENDLESS = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_model("llama", path)
    return path


@pytest.fixture
def core(folder: Path) -> EngineCore:
    return build_engine(EngineSettings(model=str(folder), num_host_pages=32, page_size=16, max_num_seqs=4))


def drain(core: EngineCore) -> list[Output]:
    outputs = []
    while core.has_work():
        outputs += core.step()
        core.check_integrity()
    return outputs


def request(name: str, params: SamplingParams = ENDLESS, prompt: tuple[int, ...] = (1, 2, 3)) -> Request:
    return Request(id=name, prompt=list(prompt), params=params)


@pytest.mark.parametrize(
    ("bad", "message", "field"),
    [
        (request("x", prompt=()), "empty", "prompt"),
        (request("x", prompt=(1, 320)), "320 is outside the vocabulary of 320", "prompt"),
        (request("x", prompt=(1, -5)), "-5 is outside", "prompt"),
        (request("x", prompt=(1,) * 512), "512 tokens; the prompt has 512", "max_tokens"),
        (request("x", prompt=(1,) * 500), "the prompt has 500 and 100 were asked for", "max_tokens"),
        (request("x", SamplingParams(temperature=-1.0)), "temperature", "temperature"),
        (request("x", SamplingParams(logit_bias={320: 1.0})), "320", "logit_bias"),
    ],
)
def test_a_request_that_cannot_be_served_is_answered_with_the_reason(
    core: EngineCore, bad: Request, message: str, field: str
) -> None:
    core.add(bad)
    (output,) = drain(core)
    assert output.finish_reason == "error"
    assert output.refused == field
    assert output.error is not None
    assert message in output.error


def test_a_penalty_at_the_edge_of_float32_does_not_end_the_engine(core: EngineCore) -> None:
    core.add(request("good", SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)))
    for number, penalty in enumerate((1e39, 1e-44, 1e3, 1e-3)):
        params = SamplingParams(max_tokens=3, repetition_penalty=penalty, ignore_eos=True)
        core.add(request(str(number), params))
    outputs = drain(core)
    ends = {output.id: output.finish_reason for output in outputs if output.finish_reason}
    assert ends == {"good": "length", "0": "error", "1": "error", "2": "length", "3": "length"}
    assert {output.refused for output in outputs if output.error} == {"repetition_penalty"}


@pytest.mark.parametrize("part", ["_sampler", "_scheduler"])
def test_a_failure_while_one_request_is_added_leaves_nothing_of_it(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    target = getattr(core, part)
    add = target.add
    calls = []

    def failing(*args: object, **kwargs: object) -> None:
        calls.append(args)
        if len(calls) == 3:  # the second choice of two that were added before it
            raise RuntimeError("broken")
        add(*args, **kwargs)

    monkeypatch.setattr(target, "add", failing)
    short = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    core.add(request("good", short))
    core.add(request("bad", SamplingParams(n=3, max_tokens=3, ignore_eos=True)))
    monkeypatch.setattr(target, "add", add)
    core.check_integrity()
    outputs = drain(core)
    ends = {output.id: output.finish_reason for output in outputs if output.finish_reason}
    assert ends == {"good": "length", "bad": "error"}
    core.add(request("bad", short))
    assert drain(core)[-1].finish_reason == "length"


def test_an_id_in_use_is_refused_and_the_first_goes_on(core: EngineCore) -> None:
    core.add(request("x", SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)))
    core.add(request("x"))
    outputs = drain(core)
    assert sum(len(output.tokens) for output in outputs) == 3
    assert Counter(output.refused for output in outputs if output.finish_reason) == {"request_id": 1, None: 1}


def test_an_abort_in_any_state_frees_everything_and_is_said_once(core: EngineCore) -> None:
    for number in range(8):  # 4 run, 4 wait
        core.add(request(str(number)))
    for _ in range(3):
        core.step()
    assert (core.stats().num_running, core.stats().num_waiting) == (4, 4)
    core.abort([str(number) for number in range(8)] + ["never there", "0"])
    reasons = Counter((output.id, output.finish_reason) for output in drain(core))
    assert reasons == {(str(number), "abort"): 1 for number in range(8)}
    stats = core.stats()
    assert stats.num_free_pages + stats.num_cached_pages == stats.num_pages == 32


def test_aborting_one_choice_leaves_the_others(core: EngineCore) -> None:
    core.add(request("x", SamplingParams(n=3, max_tokens=6, seed=1, ignore_eos=True)))
    core.step()
    core.abort_choice("x", 1)
    ends = {output.index: output.finish_reason for output in drain(core) if output.finish_reason}
    assert ends == {0: "length", 1: "abort", 2: "length"}


def test_aborting_the_first_choice_does_not_hold_back_the_others(core: EngineCore) -> None:
    core.add(request("x", SamplingParams(n=2, max_tokens=2, seed=1, ignore_eos=True)))
    core.abort_choice("x", 0)
    ends = {output.index: output.finish_reason for output in drain(core) if output.finish_reason}
    assert ends == {0: "abort", 1: "length"}


def test_a_stop_token_ends_and_is_named(core: EngineCore) -> None:
    core.add(request("free", SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)))
    tokens = [token for output in drain(core) for token in output.tokens]
    stop = tokens[3]
    core.add(request("x", SamplingParams(max_tokens=8, temperature=0.0, stop_token_ids=(stop,))))
    outputs = drain(core)
    ended = tokens[: tokens.index(stop) + 1]
    assert [token for output in outputs for token in output.tokens] == ended
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", stop)


def test_end_of_text_ends_unless_it_is_ignored(folder: Path, core: EngineCore) -> None:
    core.add(request("free", SamplingParams(max_tokens=8, temperature=0.0)))
    tokens = [token for output in drain(core) for token in output.tokens]
    assert len(tokens) == 8  # this checkpoint names no end-of-text
    config = folder / "generation_config.json"
    before = config.read_text()
    config.write_text(f'{{"eos_token_id": [{tokens[2]}, 319]}}')
    try:
        ending = build_engine(EngineSettings(model=str(folder), num_host_pages=32, page_size=16))
    finally:
        config.write_text(before)
    ending.add(request("x", SamplingParams(max_tokens=8, temperature=0.0)))
    outputs = drain(ending)
    assert [token for output in outputs for token in output.tokens] == tokens[: tokens.index(tokens[2]) + 1]
    assert (outputs[-1].finish_reason, outputs[-1].stop_reason) == ("stop", None)
    ending.add(request("y", SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)))
    assert [token for output in drain(ending) for token in output.tokens] == tokens


def test_priority_is_served_before_arrival(core: EngineCore) -> None:
    short = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    for number in range(8):
        core.add(Request(id=str(number), prompt=[1, 2, 3], params=short, priority=0 if number == 7 else 1))
    finished = [output.id for output in drain(core) if output.finish_reason]
    assert "7" in finished[:4]
    assert [name for name in finished if name != "7"] == [str(number) for number in range(7)]


def test_nan_logits_end_that_request_alone_and_leave_no_page_to_find(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = core._runner
    run = runner.run
    prompt = tuple(range(40))
    short = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)

    def poisoned(*args: object, **kwargs: object) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        logits, hidden = run(*args, **kwargs)  # type: ignore[arg-type]
        logits = logits.clone()
        logits[0] = torch.nan
        return logits, hidden

    core.add(request("bad", short, prompt))
    core.add(request("good", short, (9, 8, 7)))
    monkeypatch.setattr(runner, "run", poisoned)
    outputs = core.step()
    monkeypatch.setattr(runner, "run", run)
    outputs += drain(core)
    ends = {output.id: output.finish_reason for output in outputs if output.finish_reason}
    assert ends == {"bad": "error", "good": "length"}
    (failure,) = [output for output in outputs if output.error is not None]
    assert failure.refused is None
    core.add(request("again", short, prompt))
    assert drain(core)[0].num_cached_tokens == 0


def test_settings_that_do_not_fit_are_refused_with_the_numbers(folder: Path) -> None:
    from hybridgen.engine.kv_store import NotEnoughMemory

    with pytest.raises(NotEnoughMemory, match=r"--max-model-len 512 needs 32 pages .* has 8 "):
        build_engine(EngineSettings(model=str(folder), num_host_pages=8, page_size=16, max_model_len=512))
    with pytest.raises(NotEnoughMemory, match="holds no page"):
        build_engine(EngineSettings(model=str(folder), kv_cache_memory_bytes=10))
    with pytest.raises(NotEnoughMemory, match="bytes of memory are available"):
        build_engine(EngineSettings(model=str(folder), num_host_pages=1 << 40))
    with pytest.raises(ValueError, match="exceeds the 512 positions"):
        build_engine(EngineSettings(model=str(folder), num_host_pages=64, max_model_len=1000))
    auto = build_engine(EngineSettings(model=str(folder), num_host_pages=8, page_size=16))
    assert auto.ready.max_model_len == 128
