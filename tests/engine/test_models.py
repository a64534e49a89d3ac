"""The decoder against transformers, and tokens that do not depend on how the work was cut up."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hybridgen.configs.settings import EngineSettings
from hybridgen.engine.build import build_engine
from hybridgen.engine.core import EngineCore
from hybridgen.engine.request import Request, SamplingParams
from tests.models import CONFIGS, VOCAB_SIZE, generate, save_model

NUM_TOKENS = 64
PROMPT_LENS = (1, 2, 15, 16, 17, 33, 50, 100)
SEEDED = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.9, top_p=0.95, top_k=50, seed=7, ignore_eos=True)
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)


def prompts(seed: int = 0) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(VOCAB_SIZE) for _ in range(length)] for length in PROMPT_LENS]


@dataclass(frozen=True)
class Checkpoint:
    """A saved model and what transformers makes of `prompts()`."""

    folder: Path
    expected: tuple[tuple[int, ...], ...]


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp(request.param)
    model = save_model(request.param, folder)
    return Checkpoint(folder, tuple(tuple(generate(model, prompt, NUM_TOKENS)) for prompt in prompts()))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("llama")
    model = save_model("llama", folder)
    return Checkpoint(folder, tuple(tuple(generate(model, prompt, NUM_TOKENS)) for prompt in prompts()))


def engine(folder: Path, **settings: Any) -> EngineCore:
    values: dict[str, Any] = {
        "num_host_pages": 256,
        "page_size": 16,
        "threads": 1,
        "max_num_seqs": 16,
        **settings,
    }
    return build_engine(EngineSettings(model=str(folder), **values))


def run(
    core: EngineCore, requests: Mapping[str, tuple[Sequence[int], SamplingParams]]
) -> dict[str, list[int]]:
    """Serve all at once and return each request's tokens, checking the books after every step."""
    for name, (prompt, params) in requests.items():
        core.add(Request(id=name, prompt=list(prompt), params=params))
    tokens: dict[str, list[int]] = {name: [] for name in requests}
    while core.has_work():
        for output in core.step():
            assert output.error is None, output.error
            tokens[output.id] += output.tokens
        core.check_integrity()
    return tokens


def greedy(core: EngineCore, chosen: Sequence[int] = range(len(PROMPT_LENS))) -> list[tuple[int, ...]]:
    """The greedy continuations of the chosen prompts, all in flight together."""
    everything = prompts()
    tokens = run(core, {str(index): (everything[index], GREEDY) for index in chosen})
    return [tuple(tokens[str(index)]) for index in chosen]


def test_a_prompt_alone_continues_as_in_transformers(checkpoint: Checkpoint) -> None:
    core = engine(checkpoint.folder, enable_prefix_caching=False)
    for index, expected in enumerate(checkpoint.expected):
        assert greedy(core, [index]) == [expected]


def test_a_batch_of_mixed_lengths_continues_as_in_transformers(checkpoint: Checkpoint) -> None:
    assert tuple(greedy(engine(checkpoint.folder))) == checkpoint.expected


@pytest.mark.parametrize("max_num_batched_tokens", [7, 33])
def test_the_size_of_prefill_chunks_changes_no_token(
    checkpoint: Checkpoint, max_num_batched_tokens: int
) -> None:
    core = engine(checkpoint.folder, max_num_batched_tokens=max_num_batched_tokens)
    assert tuple(greedy(core)) == checkpoint.expected


@pytest.mark.parametrize("max_num_batched_tokens", [1, 16])
def test_extreme_prefill_chunks_change_no_token(llama: Checkpoint, max_num_batched_tokens: int) -> None:
    core = engine(llama.folder, max_num_batched_tokens=max_num_batched_tokens)
    assert tuple(greedy(core)) == llama.expected


def test_a_prefix_hit_changes_no_token(checkpoint: Checkpoint) -> None:
    core = engine(checkpoint.folder)
    assert tuple(greedy(core)) == checkpoint.expected
    assert core.stats().num_prefix_hits_total == 0
    assert tuple(greedy(core)) == checkpoint.expected
    # Whole pages of 16 tokens, never the last token: 16 of 17, 32 of 33, 48 of 50, 96 of 100.
    assert core.stats().num_prefix_hits_total == 16 + 32 + 48 + 96


@pytest.mark.parametrize("enable_prefix_caching", [True, False], ids=["prefix-cache", "no-prefix-cache"])
def test_preemption_and_resumption_change_no_token(
    checkpoint: Checkpoint, enable_prefix_caching: bool
) -> None:
    # 8 sequences want 49 pages at their ends; the longest alone wants 11.
    core = engine(
        checkpoint.folder, num_host_pages=16, max_model_len=200, enable_prefix_caching=enable_prefix_caching
    )
    assert tuple(greedy(core)) == checkpoint.expected
    assert core.stats().num_preemptions_total > 0


@pytest.mark.parametrize("page_size", [32, 64])
def test_the_page_size_changes_no_token(llama: Checkpoint, page_size: int) -> None:
    assert tuple(greedy(engine(llama.folder, page_size=page_size))) == llama.expected


def test_the_number_of_threads_changes_no_token(llama: Checkpoint) -> None:
    assert tuple(greedy(engine(llama.folder, threads=2))) == llama.expected


def test_sampled_tokens_of_a_seed_do_not_depend_on_the_batch(checkpoint: Checkpoint) -> None:
    prompt = prompts()[5]
    core = engine(checkpoint.folder)
    alone = run(core, {"x": (prompt, SEEDED)})["x"]
    others = {
        str(index): (other, SamplingParams(max_tokens=40 + 5 * index, temperature=1.2, ignore_eos=True))
        for index, other in enumerate(prompts(seed=1))
    }
    crowd = run(
        core, {**dict(list(others.items())[:4]), "x": (prompt, SEEDED), **dict(list(others.items())[4:])}
    )
    assert crowd["x"] == alone
    scarce = engine(checkpoint.folder, num_host_pages=16, max_model_len=200, max_num_batched_tokens=24)
    assert run(scarce, {**others, "x": (prompt, SEEDED)})["x"] == alone
    assert scarce.stats().num_preemptions_total > 0


def test_unseeded_requests_differ(llama: Checkpoint) -> None:
    params = SamplingParams(max_tokens=16, temperature=1.0, ignore_eos=True)
    tokens = run(engine(llama.folder), {str(index): (prompts()[5], params) for index in range(4)})
    assert len({tuple(row) for row in tokens.values()}) == 4


def test_n_choices_share_the_prompt_and_equal_n_requests_with_successive_seeds(llama: Checkpoint) -> None:
    core = engine(llama.folder)
    prompt = prompts()[7]
    singles = [run(core, {"x": (prompt, _seeded(7 + index, n=1))})["x"] for index in range(3)]
    fresh = engine(llama.folder)
    fresh.add(Request(id="x", prompt=prompt, params=_seeded(7, n=3)))
    choices: dict[int, list[int]] = {0: [], 1: [], 2: []}
    while fresh.has_work():
        for output in fresh.step():
            choices[output.index] += output.tokens
    assert [choices[index] for index in range(3)] == singles
    assert fresh.stats().num_prefix_hits_total == 2 * 96


def _seeded(seed: int, *, n: int) -> SamplingParams:
    return SamplingParams(max_tokens=16, temperature=1.0, seed=seed, n=n, ignore_eos=True)
