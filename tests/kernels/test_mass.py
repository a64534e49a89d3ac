"""The mass policy against float64 attention over all tokens.

With eps the true mass of the tokens left out and e that of the tail term, the error is at most max(eps, e) times the
diameter of the values. eps is read off lse: without the tail term, lse is that of the tokens attended.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hybridgen.kernels import reference
from hybridgen.kernels.attention import (
    AttentionPool,
    AttentionStep,
    KVLayout,
    KVPages,
    allocate_pages,
    copy_pages,
)
from hybridgen.kernels.index import allocate_index, build_index
from hybridgen.kernels.policies.exact import ExactPolicy
from hybridgen.kernels.policies.mass import LayerMass, MassPolicy
from hybridgen.kernels.policies.registry import POLICIES


@dataclass
class Context:
    """Sequences of one query each (or several), their pages scattered and unused slots NaN."""

    layout: KVLayout
    lens: tuple[int, ...]
    num_queries: tuple[int, ...]
    k: list[Tensor]  # [tokens, num_kv_heads, head_dim] of the last layer
    v: list[Tensor]
    q: Tensor  # [queries, num_heads, head_dim]
    pages: KVPages
    block_table: list[list[int]]
    scale: float

    def step(self, pool: AttentionPool) -> AttentionStep:
        begins = [0]
        for num in self.num_queries:
            begins.append(begins[-1] + num)
        return AttentionStep(
            pool, self.pages, query_begin=begins, kv_len=self.lens, block_table=self.block_table,
            num_heads=self.q.shape[1], scale=self.scale,
        )  # fmt: skip

    @property
    def layer(self) -> int:
        return self.layout.num_layers - 1

    def probabilities(self, seq: int, soft_cap: float = 0.0) -> Tensor:
        """[num_heads, tokens] of a sequence with one query, float64"""
        row = sum(self.num_queries[:seq])
        group = self.q.shape[1] // self.layout.num_kv_heads
        k = self.k[seq].double().repeat_interleave(group, dim=1)
        logits = torch.einsum("hd,thd->ht", self.q[row].double(), k) * self.scale
        return torch.softmax(soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits, dim=-1)

    def expected(self, seq: int, soft_cap: float = 0.0) -> Tensor:
        v = self.v[seq].double().repeat_interleave(self.q.shape[1] // self.layout.num_kv_heads, dim=1)
        return torch.einsum("ht,thd->hd", self.probabilities(seq, soft_cap), v)


def make_context(
    pool: AttentionPool,
    layout: KVLayout,
    lens: tuple[int, ...],
    *,
    group: int = 4,
    size: float = 3.0,
    num_queries: tuple[int, ...] | None = None,
    seed: int = 0,
    correlated: float = 0.0,
) -> Context:
    """`size`: standard deviation of the logits; `correlated`: how much the queries of a group are alike."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    scale = layout.head_dim**-0.5
    num_queries = num_queries or (1,) * len(lens)
    num_heads = layout.num_kv_heads * group
    shared = draw(sum(num_queries), layout.num_kv_heads, 1, layout.head_dim)
    own = draw(sum(num_queries), layout.num_kv_heads, group, layout.head_dim)
    q = (shared * correlated + own * (1 - correlated**2) ** 0.5) * size
    q = q.reshape(-1, num_heads, layout.head_dim).to(layout.dtype)
    needed = [-(-length // layout.page_size) for length in lens]
    order = torch.randperm(sum(needed) + 2, generator=generator).tolist()
    pages = allocate_pages(layout, len(order), with_index=True)
    pages.k.fill_(torch.nan)
    pages.v.fill_(torch.nan)
    table, ks, vs = [], [], []
    for length, count in zip(lens, needed, strict=True):
        own_pages, order = order[:count], order[count:]
        table.append(own_pages + [-7] * (max(needed) - count))
        k = draw(length, layout.num_kv_heads, layout.head_dim).to(layout.dtype)
        v = draw(length, layout.num_kv_heads, layout.head_dim).to(layout.dtype)
        ks.append(k)
        vs.append(v)
    context = Context(layout, lens, num_queries, ks, vs, q, pages, table, scale)
    store(pool, context)
    return context


def store(pool: AttentionPool, context: Context, chunk: int = 1000) -> None:
    """All tokens of all sequences, a chunk at a time."""
    for length, table, k, v in zip(context.lens, context.block_table, context.k, context.v, strict=True):
        for begin in range(0, length, chunk):
            end = min(begin + chunk, length)
            step = AttentionStep(
                pool, context.pages, query_begin=[0, end - begin], kv_len=[end], block_table=[table],
                num_heads=context.q.shape[1], scale=1.0,
            )  # fmt: skip
            step.store(context.layer, k[begin:end], v[begin:end])


def diameter(v: Tensor) -> Tensor:
    """An upper bound of the largest distance between two rows, per KV head: [num_kv_heads]."""
    return 2 * (v.double() - v.double().mean(0)).norm(dim=-1).amax(0)


def rounding(isa: str, context: Context) -> float:
    """Of a row of values. Where weights are rounded to bfloat16: 2^-9 of the largest row, and of the sum as much."""
    return (
        0.06
        if isa in ("avx512_bf16", "amx", "amx_model") and context.layout.dtype == torch.bfloat16
        else 1e-4
    )


LAYOUT = KVLayout(2, 2, 64, 32, torch.bfloat16)


def assert_bounded(
    context: Context, pool: AttentionPool, mass: float, *, size: float, soft_cap: float = 0.0
) -> float:
    """The bounds of the module hold for every head with and without the tail term. Returns the smallest true mass."""
    layer = context.layer
    _, exact_lse = context.step(pool).submit(layer, context.q, soft_cap=soft_cap).wait()
    without, with_tail = (MassPolicy(layer + 1, mass=mass, tail=tail, min_tokens=1) for tail in (False, True))
    out, lse = without.submit(context.step(pool), layer, context.q, soft_cap=soft_cap).wait()
    tail_out, tail_lse = with_tail.submit(context.step(pool), layer, context.q, soft_cap=soft_cap).wait()
    left_out = 1 - (lse - exact_lse).double().exp().clamp(max=1)  # [queries, heads]
    estimated = 1 - (lse - tail_lse).double().exp().clamp(max=1)
    group = context.q.shape[1] // context.layout.num_kv_heads
    for seq in range(len(context.lens)):
        expected = context.expected(seq, soft_cap)
        widest = diameter(context.v[seq]).repeat_interleave(group)
        slack = rounding(pool.isa, context) + 1e-5 * widest  # of masses from differences of lse
        assert ((out[seq].double() - expected).norm(dim=-1) <= left_out[seq] * widest + slack).all()
        bound = torch.maximum(left_out[seq], estimated[seq]) * widest + slack
        assert ((tail_out[seq].double() - expected).norm(dim=-1) <= bound).all()
    stats, tail_stats = without.stats()[layer], with_tail.stats()[layer]
    assert stats == tail_stats
    # Measured against true: three standard deviations of an estimate's error are 3 % of that of the logits, and a
    # weight is off by 4 %.
    error = math.expm1(0.03 * size) + 0.04
    assert abs((1 - stats.mean) - left_out.mean()) <= error * left_out.mean() + 1e-4
    assert abs((1 - stats.minimum) - left_out.max()) <= error * left_out.max() + 1e-4
    return 1 - left_out.max().item()


@pytest.mark.parametrize(("head_dim", "group"), [(64, 1), (64, 4), (80, 7), (128, 8), (26, 16)], ids=str)
def test_what_is_left_out_bounds_the_error(
    pool: AttentionPool, dtype: torch.dtype, head_dim: int, group: int
) -> None:
    layout = KVLayout(2, 2, head_dim, 32, dtype)
    context = make_context(pool, layout, (1500, 5000), group=group, size=4.0, correlated=0.95)
    assert assert_bounded(context, pool, 0.99, size=4.0) >= 0.979
    policy = MassPolicy(2, mass=0.99)
    policy.submit(context.step(pool), 1, context.q).wait()
    stats = policy.stats()[1]
    assert stats.count == 2 * 2 * group
    assert stats.scanned == 2 * (1500 + 5000)
    assert stats.attended < 0.7 * stats.scanned
    assert stats.full == 0
    assert policy.stats()[1] == LayerMass(0, 1.0, 1.0, 0, 0, 0, 0, 0, 0)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    size=st.sampled_from([0.0, 0.3, 1.0, 3.0, 6.0, 30.0]),
    group=st.integers(1, 17),
    head_dim=st.sampled_from([16, 64, 72, 128]),
    page_size=st.sampled_from([16, 32, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    lens=st.lists(st.integers(1, 3000), min_size=1, max_size=3),
    mass=st.sampled_from([0.5, 0.9, 0.99, 0.999]),
    correlated=st.sampled_from([0.0, 0.9, 1.0]),
    soft_cap=st.sampled_from([0.0, 0.0, 10.0]),
)
def test_the_bound_holds_for_every_draw(
    seed: int, size: float, group: int, head_dim: int, page_size: int, dtype: torch.dtype, lens: list[int],
    mass: float, correlated: float, soft_cap: float,
) -> None:  # fmt: skip
    layout = KVLayout(1, 1, head_dim, page_size, dtype)
    with AttentionPool(2) as pool:
        context = make_context(
            pool, layout, tuple(lens), group=group, size=size, seed=seed, correlated=correlated
        )
        least = assert_bounded(context, pool, mass, size=size, soft_cap=soft_cap)
    assert least >= max(1 - 2 * (1 - mass), mass / 2) - 0.15 * (1 - mass) - 1e-4


@pytest.mark.parametrize("size", [1e3, 1e4])
def test_huge_logits_are_attended_to_a_hair(pool: AttentionPool, size: float) -> None:
    context = make_context(pool, replace(LAYOUT, dtype=torch.float32), (2000,), size=size)
    policy = MassPolicy(2, mass=0.99)
    out, _ = policy.submit(context.step(pool), 1, context.q).wait()
    torch.testing.assert_close(out[0].double(), context.expected(0), atol=0.01, rtol=0)


def test_flat_heads_become_exact_by_themselves(pool: AttentionPool) -> None:
    context = make_context(pool, LAYOUT, (3000,), size=0.1)
    policy = MassPolicy(2, mass=0.99)
    out, lse = policy.submit(context.step(pool), 1, context.q).wait()
    exact_out, exact_lse = context.step(pool).submit(1, context.q).wait()
    torch.testing.assert_close(out, exact_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, exact_lse)
    assert policy.stats()[1] == LayerMass(8, 1.0, 1.0, 6000, 6000, 0, 2, 0, 0)


def test_a_head_below_the_floor_widens_its_group(pool: AttentionPool) -> None:
    context = make_context(pool, LAYOUT, (4000,), group=8, size=8.0, correlated=1.0)
    context.q[:, ::8] *= 0.4  # flatter than the other seven, whose mean hides it
    floors = [MassPolicy(2, mass=0.99, floor=floor) for floor in (0.01, 0.985)]
    below, above = [(p.submit(context.step(pool), 1, context.q).wait(), p.stats()[1])[1] for p in floors]
    assert below.minimum < 0.985
    assert below.widened == 0
    assert above.minimum >= 0.985
    assert above.widened == 2
    assert below.attended < above.attended < above.scanned
    assert_bounded(context, pool, 0.99, size=8.0)


def test_a_floor_that_estimates_cannot_vouch_for_leads_to_all_tokens(pool: AttentionPool) -> None:
    context = make_context(pool, LAYOUT, (4000,), size=4.0, correlated=1.0)
    policy = MassPolicy(2, mass=0.99999, floor=0.99999)
    out, lse = policy.submit(context.step(pool), 1, context.q).wait()
    exact_out, exact_lse = context.step(pool).submit(1, context.q).wait()
    torch.testing.assert_close(out, exact_out, atol=0.02, rtol=0)
    torch.testing.assert_close(lse, exact_lse, atol=1e-4, rtol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_key_that_is_not_finite_gives_what_attending_to_all_gives(
    pool: AttentionPool, value: float
) -> None:
    context = make_context(pool, LAYOUT, (2000, 2000), size=3.0)
    context.k[0][777, 0, 5] = value
    store(pool, context)
    policy = MassPolicy(2, mass=0.9)
    out, _ = policy.submit(context.step(pool), 1, context.q).wait()
    exact_out, _ = context.step(pool).submit(1, context.q).wait()
    assert torch.equal(out[0].isnan(), exact_out[0].isnan())
    assert out[0, :4].isnan().any()
    assert out[0, 4:].isfinite().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("lens", [(9000,), (9000, 2500, 1100), (3000,) * 5], ids=str)
def test_results_do_not_depend_on_the_number_of_threads(lens: tuple[int, ...]) -> None:
    results = []
    for num_threads in (1, 2, 3, 8):
        with AttentionPool(num_threads) as pool:
            context = make_context(pool, LAYOUT, lens, size=4.0, correlated=0.9)
            policy = MassPolicy(2, mass=0.98)
            results.append((*policy.submit(context.step(pool), 1, context.q).wait(), policy.stats()))
    for out, lse, stats in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])
        assert stats == results[0][2]


def test_prompt_chunks_and_short_sequences_are_attended_in_full_beside_long_ones(pool: AttentionPool) -> None:
    context = make_context(pool, LAYOUT, (3000, 100, 3000, 0, 1023), num_queries=(70, 1, 1, 1, 1), size=4.0)
    policy = MassPolicy(2)
    out, lse = policy.submit(context.step(pool), 1, context.q).wait()
    exact_out, exact_lse = context.step(pool).submit(1, context.q).wait()
    others = [row for row in range(74) if row != 71]
    assert torch.equal(out[others], exact_out[others])
    assert torch.equal(lse[others], exact_lse[others])
    assert policy.stats()[1].count == 8
    torch.testing.assert_close(lse[71], exact_lse[71], atol=0.02, rtol=0)


def test_a_sliding_window_is_attended_in_full(pool: AttentionPool) -> None:
    context = make_context(pool, LAYOUT, (3000,))
    policy = MassPolicy(2)
    out, _ = policy.submit(context.step(pool), 1, context.q, sliding_window=2000).wait()
    expected, _ = ExactPolicy().submit(context.step(pool), 1, context.q, sliding_window=2000).wait()
    assert torch.equal(out, expected)
    assert policy.stats()[1].count == 0


def test_storing_tokens_keeps_the_index_that_building_it_gives(
    pool: AttentionPool, dtype: torch.dtype
) -> None:
    layout = replace(LAYOUT, dtype=dtype)
    context = make_context(pool, layout, (333, 64, 1))
    rebuilt = allocate_index(layout, context.pages.num_pages)
    build_index(pool, layout, context.pages.k, context.pages.v, rebuilt, range(context.pages.num_pages))
    copy = allocate_pages(layout, context.pages.num_pages, with_index=True)
    everything = list(range(copy.num_pages))
    copy_pages(pool, context.pages, everything, copy, everything)
    assert context.pages.index is not None
    assert copy.index is not None
    for seq, length in enumerate(context.lens):
        for token in range(length):
            page, offset = context.block_table[seq][token // 32], token % 32
            entries = [
                reference.unpack_index(index.k[page, 1], 64)
                for index in (context.pages.index, copy.index, rebuilt)
            ]
            for codes, scales in entries[1:]:
                assert torch.equal(codes[:, offset], entries[0][0][:, offset])
                assert torch.equal(scales[:, offset], entries[0][1][:, offset])
        for page in context.block_table[seq][: length // 32]:
            sums = [index.v_sum[page, 1] for index in (context.pages.index, copy.index, rebuilt)]
            assert torch.equal(sums[0], sums[1])
            assert torch.equal(sums[0], sums[2])


def test_only_the_pages_of_the_tier_are_attended(pool: AttentionPool) -> None:
    context = make_context(pool, LAYOUT, (4000,), size=4.0, correlated=0.9)
    num_pages = context.pages.num_pages
    table = context.block_table[0]
    here = set(table[:100])  # the last 25 of its pages lie on another tier
    numbers = [page if page in here else num_pages + page for page in table]
    step = AttentionStep(
        pool, context.pages, query_begin=[0, 1], kv_len=[4000], block_table=[numbers], num_heads=8,
        scale=context.scale, total_pages=2 * num_pages,
    )  # fmt: skip
    policy = MassPolicy(2)
    out, lse = policy.submit(step, 1, context.q).wait()
    exact_out, exact_lse = step.submit(1, context.q).wait()
    assert policy.stats()[1].scanned == 2 * 3200
    torch.testing.assert_close(lse, exact_lse, atol=0.02, rtol=0)
    torch.testing.assert_close(out, exact_out, atol=0.2, rtol=0)


def test_pages_without_an_index_and_masses_that_make_no_sense_are_refused(pool: AttentionPool) -> None:
    context = make_context(pool, LAYOUT, (100,))
    bare = replace(context, pages=replace(context.pages, index=None))
    with pytest.raises(ValueError, match="an index"):
        MassPolicy(2).submit(bare.step(pool), 0, context.q)
    for mass, floor in ((1.0, None), (0.0, None), (0.9, 0.95)):
        with pytest.raises(ValueError, match="floor"):
            MassPolicy(2, mass=mass, floor=floor)


def test_policies_are_found_by_name(pool: AttentionPool) -> None:
    context = make_context(pool, LAYOUT, (2000,), size=4.0)
    lse = {
        name: make(2, 0.99).submit(context.step(pool), 1, context.q).wait()[1]
        for name, make in POLICIES.items()
    }
    torch.testing.assert_close(lse["mass"], lse["exact"], atol=0.02, rtol=0)
    assert (lse["hybridgen"] < lse["exact"]).all()


def foretell(policy: MassPolicy, step: AttentionStep, q: Tensor, *, wrong: float, seed: int = 9) -> None:
    """Queries that are off by `wrong` times their own length, in a random direction."""
    rows = policy.ahead_rows(step)
    assert rows is not None
    noise = torch.randn(q.shape, generator=torch.Generator().manual_seed(seed))
    policy.ahead(step, 1, (q + noise * q.float().std() * wrong).to(q.dtype)[rows])


@pytest.mark.parametrize("lens", [(5000,), (4097, 1500, 3000)], ids=str)
def test_what_was_foretold_is_attended_to_with_the_true_query(
    pool: AttentionPool, lens: tuple[int, ...]
) -> None:
    context = make_context(pool, LAYOUT, lens, size=4.0, correlated=0.95)
    policy = MassPolicy(2, mass=0.99, floor=0.95, tail=False)
    step = context.step(pool)
    foretell(policy, step, context.q, wrong=0.1)
    out, lse = policy.submit(step, 1, context.q).wait()
    _, exact_lse = context.step(pool).submit(1, context.q).wait()
    left_out = 1 - (lse - exact_lse).double().exp().clamp(max=1)
    for seq in range(len(lens)):
        widest = diameter(context.v[seq]).repeat_interleave(4)
        slack = rounding(pool.isa, context) + 1e-5 * widest
        error = (out[seq].double() - context.expected(seq)).norm(dim=-1)
        assert (error <= left_out[seq] * widest + slack).all()
    stats = policy.stats()[1]
    assert stats.foretold == 2 * len(lens)
    assert stats.rescanned == 0
    assert stats.attended < 0.8 * stats.scanned
    assert left_out.max() < 0.02
    # Measured by a sample: to a half of what was left out.
    assert abs((1 - stats.mean) - left_out.mean()) <= 0.5 * left_out.mean()
    policy.submit(step, 1, context.q).wait()
    assert policy.stats()[1].foretold == 0


def test_a_stale_selection_is_noticed_and_made_again(pool: AttentionPool) -> None:
    context = make_context(pool, LAYOUT, (4000, 3000), size=4.0, correlated=0.95)
    policy = MassPolicy(2, mass=0.99)
    step = context.step(pool)
    expected = policy.submit(step, 1, context.q).wait()
    policy.stats()
    foretell(policy, step, context.q, wrong=3.0)
    out, lse = policy.submit(step, 1, context.q).wait()
    stats = policy.stats()[1]
    assert stats.rescanned == stats.foretold == 4
    assert stats.count == 16
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def test_the_newest_token_is_attended_to_though_its_key_came_after_the_scan(pool: AttentionPool) -> None:
    for length in (2000, 2016, 2017):  # 2016 tokens fill their pages
        context = make_context(pool, LAYOUT, (length,), size=4.0, correlated=0.95)
        step, table, layer = context.step(pool), context.block_table[0], context.layer
        page, offset = table[(length - 1) // 32], (length - 1) % 32
        # Half of all mass is the newest token's; where it will lie is a key that is not finite.
        context.k[0][-1] = context.q[0].view(2, 4, 64).float().mean(1) * 0.6
        context.pages.k[page, layer, :, offset] = torch.nan
        assert context.pages.index is not None
        build_index(pool, LAYOUT, context.pages.k, context.pages.v, context.pages.index, [page])
        policy = MassPolicy(2)
        foretell(policy, step, context.q, wrong=0.05)
        step.store(layer, context.k[0][-1:], context.v[0][-1:])
        out, _ = policy.submit(step, layer, context.q).wait()
        exact_out, _ = context.step(pool).submit(layer, context.q).wait()
        stats = policy.stats()[1]
        assert (stats.foretold, stats.rescanned) == (2, 0)
        torch.testing.assert_close(out, exact_out, atol=0.1, rtol=0)


def test_what_was_foretold_does_not_depend_on_the_number_of_threads() -> None:
    results = []
    for num_threads in (1, 2, 8):
        with AttentionPool(num_threads) as pool:
            context = make_context(pool, LAYOUT, (6000, 2500), size=4.0, correlated=0.9)
            policy = MassPolicy(2, mass=0.98)
            step = context.step(pool)
            foretell(policy, step, context.q, wrong=0.3)
            results.append((*policy.submit(step, 1, context.q).wait(), policy.stats()))
    for out, lse, stats in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])
        assert stats == results[0][2]


def test_a_foretelling_that_nobody_asks_for_is_dropped(pool: AttentionPool) -> None:
    context = make_context(pool, LAYOUT, (3000,), size=4.0)
    policy = MassPolicy(2)
    step = context.step(pool)
    foretell(policy, step, context.q, wrong=0.1)
    policy.submit(step, 1, context.q, sliding_window=100).wait()
    foretell(policy, step, context.q, wrong=0.1)
    policy.end_step()
    policy.submit(context.step(pool), 1, context.q).wait()
    assert policy.stats()[1].foretold == 0
    with pytest.raises(ValueError, match="contiguous"):
        policy.ahead(step, 1, context.q[:, :3])
