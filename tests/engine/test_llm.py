"""Offline use, with a random model and a byte-level tokenizer of single bytes."""

from pathlib import Path

import pytest

from hybridgen import LLM, SamplingParams
from hybridgen.engine.request import InvalidRequest
from tests.models import save_byte_tokenizer, save_model

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_model("llama", path)
    save_byte_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), host_pages=64, block_size=16, threads=1)


def test_answers_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    together = llm.generate(["one prompt", "another", "x"], GREEDY)
    assert [answer.prompt for answer in together] == ["one prompt", "another", "x"]
    for answer in together:
        assert answer.prompt is not None
        (alone,) = llm.generate(answer.prompt, GREEDY)
        assert alone.outputs == answer.outputs
        assert len(answer.outputs[0].token_ids) == 12
        assert answer.outputs[0].finish_reason == "length"


def test_token_ids_are_a_prompt_too(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("one prompt")
    assert llm.generate([ids], GREEDY)[0].outputs == llm.generate("one prompt", GREEDY)[0].outputs


def test_a_stop_string_ends_the_text_before_it_and_frees_the_choice(llm: LLM) -> None:
    (free,) = llm.generate("one prompt", GREEDY)
    text = free.outputs[0].text
    stop = text[4:6]
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, stop=(stop,))
    (stopped,) = llm.generate("one prompt", params)
    assert stopped.outputs[0].text == text[: text.index(stop)]
    assert stopped.outputs[0].finish_reason == "stop"
    assert stopped.outputs[0].stop_reason == stop
    assert not llm._core.has_work()


def test_a_prompt_that_cannot_be_served_names_the_limit_and_leaves_nothing_running(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"maximum context length is 512 tokens.* 600 "):
        llm.generate([[1] * 600, [1, 2, 3]], GREEDY)
    assert not llm._core.has_work()
    llm._core.check_integrity()


def test_logprobs_of_the_prompt_equal_those_of_generating_it(llm: LLM) -> None:
    params = SamplingParams(max_tokens=8, temperature=0.0, logprobs=2, ignore_eos=True)
    (generated,) = llm.generate("one prompt", params)
    choice = generated.outputs[0]
    assert choice.logprobs is not None
    whole = generated.prompt_token_ids + choice.token_ids
    scoring = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=2, ignore_eos=True)
    (scored,) = llm.generate([whole], scoring)
    assert scored.prompt_logprobs is not None
    assert len(scored.prompt_logprobs) == len(whole)
    assert scored.prompt_logprobs[0] is None
    for got, expected in zip(scored.prompt_logprobs[-8:], choice.logprobs, strict=True):
        assert got is not None
        assert (got.token, got.rank) == (expected.token, 1)
        # float32 sums in another order: a prompt is computed in a block, generation token by token.
        assert got.logprob == pytest.approx(expected.logprob, abs=1e-4)


def test_a_resumed_prompt_keeps_its_log_probabilities(llm: LLM, folder: Path) -> None:
    params = SamplingParams(max_tokens=40, temperature=0.0, prompt_logprobs=0, ignore_eos=True)
    prompts = [[(7 * index + place) % 250 for place in range(60)] for index in range(4)]
    alone = [llm.generate([prompt], params)[0].prompt_logprobs for prompt in prompts]
    scarce = LLM(
        str(folder), host_pages=12, block_size=16, threads=1, max_model_len=150, max_num_batched_tokens=20
    )
    together = scarce.generate(prompts, params)
    assert scarce._core.stats().num_preemptions_total > 0
    for answer, expected in zip(together, alone, strict=True):
        assert answer.prompt_logprobs is not None
        assert expected is not None
        for got, wanted in zip(answer.prompt_logprobs[1:], expected[1:], strict=True):
            assert got is not None
            assert wanted is not None
            assert got.token == wanted.token
            assert got.logprob == pytest.approx(wanted.logprob, abs=1e-4)


def test_a_preset_without_a_tokenizer_answers_with_the_embedded_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    # The presets themselves are too large for a test: stand a small config in their place.
    (tmp_path / "small").mkdir()
    config = (folder / "config.json").read_text().replace('"vocab_size": 320', '"vocab_size": 4096')
    (tmp_path / "small" / "config.json").write_text(config)
    monkeypatch.setattr("hybridgen.configs.presets._FOLDER", tmp_path)
    small = LLM("small", load_format="dummy", host_pages=64, block_size=16, threads=1)
    (answer,) = small.generate("Once upon a time", GREEDY)
    assert len(answer.outputs[0].token_ids) == 12
