"""The hybridgen policy against its PyTorch specification, on integers: logits are exact on every path, and many tie."""

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridgen.kernels import reference
from hybridgen.kernels.attention import AttentionPool, AttentionStep, KVLayout
from hybridgen.kernels.ops import merge
from hybridgen.kernels.policies.hybridgen import HybridGenPolicy, LayerTopK, RatioController
from tests.kernels.paged import Batch

LAYOUT = KVLayout(2, 2, 64, 32, torch.bfloat16)


def draw(layout: KVLayout, *lens: tuple[int, int], group: int = 4, seed: int = 0) -> Batch:
    """Sequences of (kv_len, num_q) tokens; q and k are small integers."""
    batch = Batch(layout, lens=lens, group=group, layer=layout.num_layers - 1, seed=seed)
    batch.k_pages.round_()
    batch.q.mul_(2).round_()
    return batch


def keys_and_values(batch: Batch, seq: int) -> tuple[Tensor, Tensor]:
    """[tokens, num_kv_heads, head_dim] of a sequence"""
    size = batch.layout.page_size
    pages = batch.block_table[seq][: -(-batch.kv_len[seq] // size)]
    k, v = (
        half[pages, batch.layer].transpose(1, 2).flatten(0, 1)[: batch.kv_len[seq]]
        for half in (batch.k_pages, batch.v_pages)
    )
    return k, v


def attend(
    policy: HybridGenPolicy, batch: Batch, pool: AttentionPool, **options: Any
) -> tuple[Tensor, Tensor]:
    return policy.submit(batch.step(pool), batch.layer, batch.q, **options).wait()


def fixed(ratio: float, min_tokens: int = 1) -> HybridGenPolicy:
    return HybridGenPolicy(2, ratio=ratio, adapt=False, min_tokens=min_tokens)


def tolerance(pool: AttentionPool, dtype: torch.dtype) -> float:
    """Values are of size 1. Where weights are rounded to bfloat16, each is off by up to 2^-9."""
    rounds = pool.isa in ("avx512_bf16", "amx", "amx_model")
    return 0.02 if rounds and dtype == torch.bfloat16 else 1e-5


@pytest.mark.parametrize(("ratio", "soft_cap"), [(0.001, 0.0), (0.05, 20.0), (0.45, 0.0)])
def test_matches_the_reference_where_logits_tie(
    pool: AttentionPool, dtype: torch.dtype, ratio: float, soft_cap: float
) -> None:
    lens = (1500, 1), (600, 1), (513, 1), (7, 1)
    batch = draw(KVLayout(2, 2, 64, 32, dtype), *lens)
    out, lse = attend(fixed(ratio), batch, pool, soft_cap=soft_cap)
    for seq, (kv_len, _) in enumerate(lens):
        k, v = keys_and_values(batch, seq)
        top_k = max(1, int(ratio * kv_len))
        expected, expected_lse = reference.attend_top_k(batch.q[seq], k, v, top_k, batch.scale, soft_cap)
        torch.testing.assert_close(out[seq].double(), expected, atol=tolerance(pool, dtype), rtol=0)
        torch.testing.assert_close(lse[seq].double(), expected_lse, atol=1e-5, rtol=1e-6)


def test_the_earlier_of_equal_tokens_is_attended(pool: AttentionPool) -> None:
    batch = draw(LAYOUT, (1000, 1))
    batch.k_pages.masked_fill_(~batch.k_pages.isnan(), 1)
    out, lse = attend(fixed(0.1), batch, pool)
    _, v = keys_and_values(batch, 0)
    expected = v[:100].double().mean(0).repeat_interleave(4, dim=0)
    torch.testing.assert_close(out[0].double(), expected, atol=2e-3, rtol=0)
    logits = batch.q[0].double().sum(-1) * batch.scale
    torch.testing.assert_close(
        lse[0].double(), logits + torch.tensor(100.0).log().double(), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(("head_dim", "group"), [(80, 7), (128, 1)], ids=str)
def test_all_tokens_are_exact_attention(
    pool: AttentionPool, dtype: torch.dtype, head_dim: int, group: int
) -> None:
    batch = Batch(KVLayout(2, 2, head_dim, 16, dtype), lens=((1500, 1), (100, 1)), group=group, layer=1)
    policy = fixed(1.0)
    out, lse = attend(policy, batch, pool, soft_cap=5.0)
    expected, expected_lse = batch.step(pool).submit(1, batch.q, soft_cap=5.0).wait()
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    stats = policy.stats()[1]
    assert stats.mean == pytest.approx(1, abs=1e-5)
    assert stats.scanned == stats.attended == 1600 * 2 * group


def test_the_retained_mass_is_measured(pool: AttentionPool) -> None:
    batch = draw(LAYOUT, (1500, 1), (700, 1))
    policy = fixed(0.05)
    _, lse = attend(policy, batch, pool)
    _, exact_lse = batch.step(pool).submit(1, batch.q).wait()
    mass = (lse - exact_lse).double().exp()
    stats = policy.stats()[1]
    assert 0.5 < mass.min() < 0.95
    assert stats.count == 16
    assert stats.mean == pytest.approx(mass.mean().item(), rel=1e-4)
    assert stats.minimum == pytest.approx(mass.min().item(), rel=1e-4)
    assert (stats.scanned, stats.attended) == (8 * 2200, 8 * (75 + 35))
    assert policy.stats()[1] == LayerTopK(0, 1.0, 1.0, 0, 0)


@pytest.mark.parametrize("lens", [(5000,), (3000, 1100, 20)], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(lens: tuple[int, ...]) -> None:
    batch = draw(LAYOUT, *((length, 1) for length in lens))
    results = []
    for num_threads in (1, 2, 5):
        with AttentionPool(num_threads) as pool:
            policy = fixed(0.3)
            results.append((*attend(policy, batch, pool), policy.stats()))
    for out, lse, stats in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])
        assert stats == results[0][2]


def test_prompt_chunks_short_sequences_and_sliding_windows_are_attended_in_full(pool: AttentionPool) -> None:
    batch = draw(LAYOUT, (700, 70), (300, 1), (700, 1), (0, 1), (399, 1))
    policy = fixed(0.05, min_tokens=400)
    out, lse = attend(policy, batch, pool)
    exact_out, exact_lse = batch.step(pool).submit(1, batch.q).wait()
    others = [row for row in range(74) if row != 71]
    assert torch.equal(out[others], exact_out[others])
    assert torch.equal(lse[others], exact_lse[others])
    assert (lse[71] < exact_lse[71]).all()
    assert policy.stats()[1].count == 8
    out, _ = attend(policy, batch, pool, sliding_window=500)
    assert torch.equal(out, batch.step(pool).submit(1, batch.q, sliding_window=500).wait()[0])
    assert policy.stats()[1].count == 0


def test_a_key_that_is_not_a_number_is_attended_and_shows(pool: AttentionPool) -> None:
    batch = draw(LAYOUT, (700, 1), (700, 1))
    batch.k_pages[batch.block_table[0][10], 1, 0, 5, 3] = torch.nan
    out, _ = attend(fixed(0.01), batch, pool)
    assert out[0, :4].isnan().all()
    assert out[0, 4:].isfinite().all()
    assert out[1].isfinite().all()


def tier_step(batch: Batch, pool: AttentionPool, tier: range) -> AttentionStep:
    """Of the pages of the batch, those at these places of each sequence's block table lie on the tier."""
    here = [
        [page if i in tier else len(batch.k_pages) for i, page in enumerate(row)] for row in batch.block_table
    ]
    return AttentionStep(
        pool, batch.pages, query_begin=batch.query_begin, kv_len=batch.kv_len, block_table=here,
        num_heads=batch.num_heads, scale=batch.scale, total_pages=len(batch.k_pages) + 1,
    )  # fmt: skip


def test_host_and_device_merge_to_one_softmax_over_the_concatenated_logits(pool: AttentionPool) -> None:
    batch = draw(LAYOUT, (1000, 1))
    host = tier_step(batch, pool, range(2, 25))
    device = [*range(64), *range(800, 1000)]
    out, lse = fixed(0.05).submit(host, 1, batch.q).wait()
    k, v = keys_and_values(batch, 0)
    device_out, device_lse = reference.attend_top_k(
        batch.q[0], k[device], v[device], len(device), batch.scale
    )
    merged = merge(
        out, lse, device_out.float()[None], device_lse.float()[None], out=torch.empty_like(out), pool=pool
    )
    for head in range(batch.num_heads):
        logits = k[:, head // 4].double() @ batch.q[0, head].double() * batch.scale
        chosen = 64 + logits[64:800].argsort(descending=True, stable=True)[: int(0.05 * 736)]
        tokens = [*device, *chosen.tolist()]
        expected = torch.softmax(logits[tokens], 0) @ v[tokens, head // 4].double()
        torch.testing.assert_close(merged[0, head].double(), expected, atol=0.01, rtol=0)


def test_a_layer_ahead_logits_are_those_of_the_foretold_query(pool: AttentionPool) -> None:
    batch = draw(LAYOUT, (700, 1), (700, 70), (900, 1))
    policy = fixed(0.05)
    step = tier_step(batch, pool, range(20))
    rows = policy.ahead_rows(step)
    assert rows is not None
    assert rows.tolist() == [0, 71]
    foretold = batch.q.flip(0).contiguous()
    policy.ahead(step, 1, foretold[rows])
    out, lse = policy.submit(step, 1, batch.q).wait()
    policy.end_step()
    assert policy.stats()[1].count == 16
    for q, expected_rows in ((foretold, [0, 71]), (batch.q, list(range(1, 71)))):
        expected, expected_lse = policy.submit(step, 1, q).wait()
        assert torch.equal(out[expected_rows], expected[expected_rows])
        assert torch.equal(lse[expected_rows], expected_lse[expected_rows])


def test_sequences_that_store_their_newest_token_on_the_tier_are_not_foretold(pool: AttentionPool) -> None:
    batch = draw(LAYOUT, (700, 1))
    policy = fixed(0.05)
    assert policy.ahead_rows(tier_step(batch, pool, range(22))) is None
    assert policy.ahead_rows(tier_step(batch, pool, range(21))) is not None
    with pytest.raises(ValueError, match="no row"):
        policy.ahead(batch.step(pool), 1, batch.q)


def test_the_ratio_grows_while_the_host_is_not_slower_and_shrinks_while_it_is() -> None:
    controller = RatioController(0.05, interval=2)
    controller = controller.observe(host_s=1.0, device_s=3.0)
    assert controller.ratio == 0.05
    controller = controller.observe(host_s=3.0, device_s=1.0)  # as much as the device, together
    assert controller == RatioController(0.05 * 1.2, interval=2)
    for _ in range(2):
        controller = controller.observe(host_s=1.1, device_s=1.0)
    assert controller.ratio == 0.05 * 1.2 * 0.8


@pytest.mark.parametrize(("host_s", "bound"), [(0.0, 0.5), (2.0, 0.01)])
def test_the_ratio_stays_within_its_published_bounds(host_s: float, bound: float) -> None:
    controller = RatioController(0.05, interval=1)
    for _ in range(20):
        controller = controller.observe(host_s, device_s=1.0)
    assert controller.ratio == bound


def ticks(step_s: float) -> Iterator[float]:
    return (number * step_s for number in count())


@pytest.mark.parametrize(("step_s", "ratio"), [(0.0, 0.08), (10.0, 0.12)], ids=["slow host", "slow device"])
def test_the_ratio_follows_the_times_of_steps_that_were_scored(
    pool: AttentionPool, step_s: float, ratio: float
) -> None:
    batch, prompt = draw(LAYOUT, (700, 1)), draw(LAYOUT, (700, 3))
    clock = ticks(step_s)
    policies = [
        HybridGenPolicy(2, ratio=0.1, adapt=adapt, interval=2, min_tokens=1, clock=lambda: next(clock))
        for adapt in (True, False)
    ]
    for policy in policies:
        for step in (batch, prompt, batch):
            assert policy.controller.ratio == 0.1
            attend(policy, step, pool)
            policy.end_step()
    assert [policy.controller.ratio for policy in policies] == pytest.approx([ratio, 0.1])
    policies[0].stats()
    attend(policies[0], batch, pool)
    assert policies[0].stats()[1].attended == 8 * int(ratio * 700)


def test_ratios_and_intervals_that_make_no_sense_are_refused() -> None:
    for ratio in (0.0, -0.1, 1.1):
        with pytest.raises(ValueError, match="ratio"):
            HybridGenPolicy(2, ratio=ratio)
    with pytest.raises(ValueError, match="interval"):
        HybridGenPolicy(2, interval=0)
