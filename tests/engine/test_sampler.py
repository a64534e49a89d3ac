"""Sampling against a plain reference, row by row, and the independence of each row from the others."""

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hybridgen.engine import sampler as sampler_module
from hybridgen.engine.request import SamplingParams, TokenLogprob
from hybridgen.engine.sampler import Sampler

CPU = torch.device("cpu")


def make_sampler(vocab_size: int, *, eos_token_ids: Sequence[int] = ()) -> Sampler:
    return Sampler(vocab_size, eos_token_ids=eos_token_ids, device=CPU)


def random_logits(rows: int, vocab_size: int, *, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def reference_scores(
    logits: Tensor,
    params: SamplingParams,
    prompt: Sequence[int],
    generated: Sequence[int],
    eos: Sequence[int],
) -> list[float]:
    """One row, one token at a time, as vLLM's documentation has it: minimum length, bias, penalties."""
    scores = [float(value) for value in logits]
    if len(generated) < params.min_tokens:
        for token in {*eos, *params.stop_token_ids}:
            scores[token] = -math.inf
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    for token in {*prompt, *generated}:
        repetition = params.repetition_penalty
        scores[token] = scores[token] / repetition if scores[token] > 0 else scores[token] * repetition
    for token in set(generated):
        scores[token] -= params.frequency_penalty * list(generated).count(token) + params.presence_penalty
    return scores


def reference_probabilities(scores: Sequence[float], params: SamplingParams) -> list[float]:
    """temperature, min_p, top_k, top_p, in this order."""
    highest = max(scores)
    weights = [math.exp((score - highest) / params.temperature) for score in scores]
    weights = [weight if weight >= params.min_p else 0.0 for weight in weights]
    ranked = sorted(
        (token for token in range(len(weights)) if weights[token] > 0), key=lambda t: (-weights[t], t)
    )
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    mass = sum(weights[token] for token in ranked)
    kept, before = [], 0.0
    for token in ranked:
        if params.top_p == 1 or before < params.top_p * mass:
            kept.append(token)
        before += weights[token]
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(weights))]


def counts_of(params: SamplingParams, logits: Tensor, num_samples: int) -> list[int]:
    """How often each token comes first, over as many seeds."""
    sampler = make_sampler(len(logits))
    keys = range(num_samples)
    for key in keys:
        sampler.add(key, params, [0], seed=key)
    tokens = sampler.sample(logits.expand(num_samples, -1), keys).tokens
    return np.bincount(tokens, minlength=len(logits)).tolist()


def generate(sampler: Sampler, logits: Tensor, keys: Sequence[int], num_steps: int) -> dict[int, list[int]]:
    """The tokens of each key; row i of `logits` [steps, vocab] is what any of them sees in its step i."""
    tokens: dict[int, list[int]] = {key: [] for key in keys}
    for step in range(num_steps):
        sampled = sampler.sample(logits[step].expand(len(keys), -1), keys)
        for key, token in zip(keys, sampled.tokens, strict=True):
            tokens[key].append(token)
    return tokens


DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 2.0},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.02},
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("vocab_size", [12, 300])
def test_tokens_come_as_often_as_the_reference_says(vocab_size: int, name: str) -> None:
    params = SamplingParams(**DISTRIBUTIONS[name])
    logits = random_logits(1, vocab_size, seed=3, scale=1.5)[0]
    num_samples = 3000
    counts = counts_of(params, logits, num_samples)
    probabilities = reference_probabilities(logits.tolist(), params)
    assert all(count == 0 for count, p in zip(counts, probabilities, strict=True) if p == 0)
    # Pearson's statistic over tokens expected at least 5 times and one bin for the others: mean d, deviation
    # sqrt(2 d). The seeds are fixed, so this passes always or never.
    bins = [(count, p * num_samples) for count, p in zip(counts, probabilities, strict=True)]
    large = [item for item in bins if item[1] >= 5]
    rest = [sum(values) for values in zip((0, 0.0), *(item for item in bins if 0 < item[1] < 5), strict=True)]
    cells = [*large, rest] if rest[1] >= 1 else large
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    degrees = len(cells) - 1
    assert degrees >= 2
    assert statistic < degrees + 4 * math.sqrt(2 * degrees)


def test_the_steps_of_one_seed_are_independent_uniform_numbers() -> None:
    num_keys, num_steps, vocab_size = 100, 160, 16
    sampler = make_sampler(vocab_size)
    for key in range(num_keys):
        sampler.add(key, SamplingParams(), [0], seed=key)
    tokens = generate(sampler, torch.zeros(num_steps, vocab_size), range(num_keys), num_steps)
    grid = np.array(list(tokens.values()))  # [keys, steps]
    # A token against the next one of its seed, and against those of the next seed, in the same step and one on:
    # all pairs equally often.
    for first, second in [
        (grid[:, :-1], grid[:, 1:]),
        (grid[:-1], grid[1:]),
        (grid[:-1, 1:], grid[1:, :-1]),
        (grid[:-1, :-1], grid[1:, 1:]),
    ]:
        pairs = np.bincount((first * vocab_size + second).ravel(), minlength=vocab_size**2)
        expected = pairs.mean()
        assert ((pairs - expected) ** 2 / expected).sum() < 255 + 4 * math.sqrt(2 * 255)


MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7),
    SamplingParams(top_p=0.9),
    SamplingParams(top_k=5),
    SamplingParams(top_k=200, top_p=0.5),
    SamplingParams(temperature=1.5, min_p=0.1),
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
    SamplingParams(temperature=0, frequency_penalty=1.0),
    SamplingParams(logit_bias={3: 2.0, 7: -100.0}),
    SamplingParams(min_tokens=6, stop_token_ids=(5,), logprobs=3),
    SamplingParams(top_k=1),
    SamplingParams(temperature=1e-5, top_p=0.99),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequence_gets_the_same_tokens_alone_in_a_batch_in_any_order_and_among_comings_and_goings(
    dtype: torch.dtype,
) -> None:
    vocab_size, num_steps = 1000, 12
    logits = random_logits(num_steps, vocab_size, seed=1, scale=1.5).to(dtype)
    alone: dict[int, list[int]] = {}
    for key, params in enumerate(MIXED):
        sampler = make_sampler(vocab_size, eos_token_ids=[2])
        sampler.add(key, params, [1, 3, 5], seed=key)
        alone |= generate(sampler, logits, [key], num_steps)

    together = make_sampler(vocab_size, eos_token_ids=[2])
    for key, params in enumerate(MIXED):
        together.add(key, params, [1, 3, 5], seed=key)
    order = list(range(len(MIXED)))
    random.Random(0).shuffle(order)
    assert generate(together, logits, order, num_steps) == alone

    crowd = make_sampler(vocab_size, eos_token_ids=[2])
    source = random.Random(1)
    guests: list[int] = []
    progress: dict[int, list[int]] = {}
    for key, params in enumerate(MIXED):
        crowd.add(key, params, [1, 3, 5], seed=key)
        progress[key] = []
    while any(len(tokens) < num_steps for tokens in progress.values()):
        if guests and source.random() < 0.4:
            crowd.remove(guests.pop(source.randrange(len(guests))))
        if source.random() < 0.6:
            guests.append(max([100, *guests]) + 1)
            crowd.add(guests[-1], source.choice(MIXED), [9, 9, 9], seed=source.randrange(1 << 40))
        late = [key for key, tokens in progress.items() if len(tokens) < num_steps]
        keys = [*source.sample(late, source.randint(1, len(late))), *guests]
        source.shuffle(keys)
        rows = torch.stack([logits[len(progress[key]) if key in progress else 0] for key in keys])
        for key, token in zip(keys, crowd.sample(rows, keys).tokens, strict=True):
            if key in progress:
                progress[key].append(token)
    assert progress == alone


def test_a_sequence_that_was_removed_goes_on_where_it_stopped() -> None:
    logits = random_logits(10, 500, scale=1.0)
    for params in MIXED:
        sampler = make_sampler(500, eos_token_ids=[2])
        sampler.add(0, params, [1, 3, 5], seed=11)
        whole = generate(sampler, logits, [0], 10)[0]
        sampler.remove(0)
        sampler.add(7, params, [1, 3, 5], seed=11, generated=whole[:4])
        assert generate(sampler, logits[4:], [7], 6)[7] == whole[4:]


def test_seeds_of_64_bits_and_negative_ones_are_all_different() -> None:
    seeds = [0, 1, -1, 1 << 32, 1 << 62, -(1 << 63), (1 << 63) - 1]
    streams = set()
    for seed in seeds:
        sampler = make_sampler(100)
        sampler.add(0, SamplingParams(), [0], seed=seed)
        streams.add(tuple(generate(sampler, torch.zeros(8, 100), [0], 8)[0]))
    assert len(streams) == len(seeds)


SCORED: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.7},
    "repetition_below_1": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.8},
    "negative": {"presence_penalty": -1.0, "frequency_penalty": -0.5},
    "bias": {"logit_bias": {0: 5.0, 1: -5.0, 20: 0.5}},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": (4, 5)},
    "everything": {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.4,
        "logit_bias": {3: 1.0, 2: 3.0},
        "min_tokens": 9,
        "stop_token_ids": (3,),
    },
}


@pytest.mark.parametrize("name", SCORED)
def test_greedy_takes_what_the_formula_ranks_first(name: str) -> None:
    vocab_size, eos = 30, [2]
    params = SamplingParams(temperature=0, **SCORED[name])
    prompt, generated = [1, 6, 6, 8], [9, 9, 9, 8, 12, 25]
    for seed in range(20):
        logits = random_logits(1, vocab_size, seed=seed, scale=1.5)
        sampler = make_sampler(vocab_size, eos_token_ids=eos)
        sampler.add(0, params, prompt, seed=0, generated=generated)
        history = list(generated)
        for _ in range(6):
            scores = reference_scores(logits[0], params, prompt, history, eos)
            [token] = sampler.sample(logits, [0]).tokens
            assert token == scores.index(max(scores))
            history.append(token)


@pytest.mark.parametrize("name", SCORED)
def test_sampling_draws_from_the_scores_of_the_formula(name: str) -> None:
    vocab_size, eos, num_samples = 30, [2], 2000
    params = SamplingParams(**SCORED[name])
    prompt, generated = [1, 6, 6, 8], [9, 9, 9, 8, 12, 25]
    logits = random_logits(1, vocab_size, seed=5, scale=1.0)[0]
    sampler = make_sampler(vocab_size, eos_token_ids=eos)
    for key in range(num_samples):
        sampler.add(key, params, prompt, seed=key, generated=generated)
    tokens = sampler.sample(logits.expand(num_samples, -1), range(num_samples)).tokens
    counts = np.bincount(tokens, minlength=vocab_size)
    expected = np.array(
        reference_probabilities(reference_scores(logits, params, prompt, generated, eos), params)
    )
    assert (counts[expected == 0] == 0).all()
    common = expected * num_samples >= 5
    counts, expected = counts[common], expected[common] * num_samples
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < common.sum() + 4 * math.sqrt(2 * common.sum())


def test_min_tokens_keeps_ends_away_for_exactly_that_many_tokens_whether_or_not_eos_is_ignored() -> None:
    logits = torch.zeros(8, 10)
    logits[:, 2], logits[:, 3], logits[:, 4] = 9, 8, 7
    for ignore_eos in (False, True):
        params = SamplingParams(temperature=0, min_tokens=3, stop_token_ids=(3,), ignore_eos=ignore_eos)
        sampler = make_sampler(10, eos_token_ids=[2, 50])
        sampler.add(0, params, [0], seed=0)
        assert generate(sampler, logits, [0], 5)[0] == [4, 4, 4, 2, 2]


def test_a_bias_of_100_decides_and_one_of_minus_100_forbids() -> None:
    logits = random_logits(20, 50, scale=5.0)
    sampler = make_sampler(50)
    sampler.add(0, SamplingParams(logit_bias={17: 100.0}), [0], seed=0)
    sampler.add(
        1, SamplingParams(logit_bias={token: -100.0 for token in range(50) if token != 31}), [0], seed=0
    )
    tokens = generate(sampler, logits, [0, 1], 20)
    assert tokens == {0: [17] * 20, 1: [31] * 20}


@pytest.mark.parametrize("vocab_size", [1, 2, 127, 128, 129, 1000, 5000])
def test_greedy_takes_the_lowest_of_equals(vocab_size: int) -> None:
    # Few values, so that nearly every row has its maximum more than once.
    logits = torch.randint(0, 5, (64, vocab_size), generator=torch.Generator().manual_seed(0)).float()
    logits[0] = -7.0
    sampler = make_sampler(vocab_size)
    for key in range(64):
        sampler.add(key, SamplingParams(temperature=0), [0], seed=0)
    for dtype in (torch.float32, torch.bfloat16):
        tokens = sampler.sample(logits.to(dtype), range(64)).tokens
        assert tokens == [row.index(max(row)) for row in logits.tolist()]


@pytest.mark.parametrize("vocab_size", [5, 127, 128, 129, 1000, 5000])
@pytest.mark.parametrize("has_ties", [False, True], ids=["distinct", "ties"])
def test_top_k_and_top_p_keep_what_a_sort_of_the_whole_row_keeps(vocab_size: int, has_ties: bool) -> None:
    logits = random_logits(24, vocab_size, seed=2)
    if has_ties:
        logits = logits.bfloat16().float()
    weights = torch.softmax(logits, -1)
    some = [vocab_size, 1, 2, 7, 50, 127, 128, 129, 1023, 1024, 3000]
    top_k = np.array([min(some[row % len(some)], vocab_size) for row in range(24)])
    top_p = np.array([[1.0, 0.5, 0.9, 0.99, 0.1, 0.999, 1e-9][row % 7] for row in range(24)])
    kept = weights.clone()
    sampler_module._keep_top(kept, top_k, top_p)
    for row in range(24):
        values = weights[row].double().tolist()
        ranked = sorted(range(vocab_size), key=lambda t: (-values[t], t))[: top_k[row]]
        mass, before, expected = sum(values[t] for t in ranked), 0.0, set()
        for token in ranked:
            if top_p[row] == 1 or before < top_p[row] * mass:
                expected.add(token)
            before += values[token]
        assert set(kept[row].nonzero().flatten().tolist()) == expected
        assert torch.equal(kept[row][kept[row] > 0], weights[row][sorted(expected)])


@pytest.mark.parametrize("scale", [0.5, 3.0, 10.0], ids=lambda scale: f"scale={scale}")
def test_looking_at_the_largest_first_gives_what_sorting_everything_gives(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab_size = 3000
    logits = random_logits(60, vocab_size, seed=4, scale=scale)
    params = [
        SamplingParams(top_p=p, top_k=k)
        for p in (0.1, 0.5, 0.9, 0.99, 1.0)
        for k in (0, 2, 100, 128, 1500, 5000)
    ]

    def tokens() -> list[int]:
        sampler = make_sampler(vocab_size)
        for key in range(60):
            sampler.add(key, params[key % len(params)], [0], seed=key)
        return sampler.sample(logits, range(60)).tokens

    quick = tokens()
    monkeypatch.setattr(sampler_module, "_NARROW", vocab_size)
    monkeypatch.setattr(sampler_module, "_WIDE", vocab_size)
    assert tokens() == quick


@pytest.mark.parametrize("count", [1, 5, 31, 100, 1500, 3000])
def test_the_largest_values_of_a_row_are_found_block_by_block(count: int) -> None:
    values = random_logits(9, 3000).bfloat16().float().abs()
    assert torch.equal(
        sampler_module._largest(values, count), values.sort(-1, descending=True).values[:, :count]
    )


def test_a_tiny_temperature_is_greedy_and_an_extreme_row_is_no_accident() -> None:
    logits = torch.tensor(
        [[3e38, -3e38, 0.0, 2.9e38], [-torch.inf, -torch.inf, 1.0, -torch.inf], [0.0, 1e-30, 0.0, 0.0]]
    )
    for temperature in (0.0, 1e-7, 1e-5, 0.01, 2.0):
        sampler = make_sampler(4)
        for key in range(3):
            sampler.add(key, SamplingParams(temperature=temperature, top_p=0.95), [0], seed=key)
        sampled = sampler.sample(logits, range(3))
        assert sampled.invalid == ()
        assert sampled.tokens[:2] == [0, 2]
        assert sampled.tokens[2] == 1 or temperature > 1e-5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_token_to_give_is_reported_and_harms_no_other(temperature: float) -> None:
    vocab_size = 300
    good = random_logits(1, vocab_size, seed=6)[0]
    logits = good.repeat(6, 1)
    logits[1, 299] = torch.nan
    logits[2] = torch.nan
    logits[3] = -torch.inf
    logits[4, 7] = torch.inf
    sampler, lonely = make_sampler(vocab_size), make_sampler(vocab_size)
    params = SamplingParams(temperature=temperature, top_p=0.9, logprobs=2, presence_penalty=0.1)
    for key in range(6):
        sampler.add(key, params, [0], seed=1)
    lonely.add(0, params, [0], seed=1)
    for _ in range(3):
        sampled = sampler.sample(logits, range(6))
        [expected] = lonely.sample(good[None], [0]).tokens
        assert sampled.invalid == (1, 2, 3, 4)
        assert (sampled.tokens[0], sampled.tokens[5]) == (expected, expected)
        assert [entry is None for entry in sampled.logprobs] == [False, True, True, True, True, False]


def test_masking_every_token_is_reported_too() -> None:
    sampler = make_sampler(3, eos_token_ids=[0])
    sampler.add(0, SamplingParams(min_tokens=1, stop_token_ids=(1, 2)), [0], seed=0)
    assert sampler.sample(torch.zeros(1, 3), [0]).invalid == (0,)


def reference_logprob(row: Tensor, token: int, num_top: int) -> TokenLogprob:
    values = torch.log_softmax(row.double(), -1).tolist()
    ranked = sorted(range(len(values)), key=lambda t: (-float(row[t]), t))
    top = tuple((t, values[t]) for t in ranked[:num_top])
    return TokenLogprob(token, values[token], ranked.index(token) + 1, top)


def assert_close(actual: TokenLogprob | None, expected: TokenLogprob) -> None:
    assert actual is not None
    assert (actual.token, actual.rank) == (expected.token, expected.rank)
    assert [token for token, _ in actual.top] == [token for token, _ in expected.top]
    values = [actual.logprob, *(value for _, value in actual.top)]
    # float32 against float64.
    assert values == pytest.approx(
        [expected.logprob, *(value for _, value in expected.top)], abs=1e-5, rel=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logprobs_are_those_of_the_logits_as_they_came(dtype: torch.dtype) -> None:
    logits = random_logits(6, 200, seed=8).to(dtype)
    given = logits.clone()
    asked = [None, 0, 1, 5, -1, 500]
    sampler = make_sampler(200)
    for key, num in enumerate(asked):
        params = SamplingParams(
            logprobs=num, temperature=0.7, repetition_penalty=1.5, logit_bias={3: 9.0}, top_k=5
        )
        sampler.add(key, params, [1, 2], seed=key)
    sampled = sampler.sample(logits, range(6))
    assert torch.equal(logits, given)
    assert sampled.logprobs[0] is None
    for row, num in enumerate(asked):
        if num is not None:
            num_top = 200 if num in (-1, 500) else num
            assert_close(sampled.logprobs[row], reference_logprob(logits[row], sampled.tokens[row], num_top))


@pytest.mark.parametrize("num_tokens", [0, 1, 64, 65, 130])
def test_prompt_logprobs_score_each_token_by_the_row_before_it(num_tokens: int) -> None:
    logits = random_logits(num_tokens, 100, seed=9).bfloat16()
    following = [(7 * i) % 100 for i in range(num_tokens)]
    entries = make_sampler(100).prompt_logprobs(logits, following, 3)
    assert len(entries) == num_tokens
    for row, entry in enumerate(entries):
        assert_close(entry, reference_logprob(logits[row], following[row], 3))


def test_the_most_likely_token_leads_its_own_list_even_among_equals() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, [400, 401, 402]] = 1.0
    sampler = make_sampler(1000)
    sampler.add(0, SamplingParams(temperature=0, logprobs=4), [0], seed=0)
    sampled = sampler.sample(logits, [0])
    assert sampled.tokens == [400]
    assert sampled.logprobs[0] is not None
    assert sampled.logprobs[0].rank == 1
    assert [token for token, _ in sampled.logprobs[0].top] == [400, 401, 402, 0]


def test_an_empty_batch_is_no_tokens() -> None:
    sampled = make_sampler(10).sample(torch.zeros(0, 10), [])
    assert (sampled.tokens, sampled.logprobs, sampled.invalid) == ([], [], ())


def test_penalty_counts_exist_only_for_those_who_asked_and_start_clean() -> None:
    sampler = make_sampler(50)
    logits = torch.zeros(1, 50)
    logits[0, 4], logits[0, 5] = 2.0, 1.9
    for key in range(100):
        sampler.add(key, SamplingParams(temperature=0), [4], seed=0)
    assert len(sampler._penalties._factor) == 0
    for key in range(200, 220):
        sampler.add(key, SamplingParams(temperature=0, repetition_penalty=2.0), [], seed=0)
        # What the one before generated, in the slot it left, is forgotten.
        assert generate(sampler, logits.expand(2, -1), [key], 2)[key] == [4, 5]
        sampler.remove(key)
    assert len(sampler._penalties._factor) == 4
