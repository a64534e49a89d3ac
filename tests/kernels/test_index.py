"""The int8 index of K on every instruction set of this machine against the float64 reference.

Tolerances: an estimated logit is a float32 sum of at most 16 products of exact integers with scales: 1e-6 of the
largest. A token's weight is within 4 % of its probability, which is where the bounds on masses come from.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hybridgen.kernels import reference
from hybridgen.kernels.attention import KVLayout
from hybridgen.kernels.index import KVIndex, NotEstimable, allocate_index, build_index, estimate, select
from hybridgen.kernels.isa import supported_isas
from hybridgen.kernels.pool import AttentionPool

ISAS = pytest.mark.parametrize("isa", supported_isas())
LAYOUT = KVLayout(2, 2, 64, 32, torch.float32)
SCALE = 0.125


def pages_of(layout: KVLayout, tokens: Tensor, block_table: list[int], num_pages: int) -> Tensor:
    """[tokens, layers, heads, head_dim] in their pages; slots without a token hold NaN."""
    shape = (num_pages, layout.num_layers, layout.num_kv_heads, layout.page_size, layout.head_dim)
    pages = torch.full(shape, torch.nan).to(layout.dtype)
    for token, row in enumerate(tokens):
        pages[block_table[token // layout.page_size], :, :, token % layout.page_size] = row.to(layout.dtype)
    return pages


def draw(num_tokens: int, layout: KVLayout, *, size: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys [tokens, layers, heads, head_dim] and queries [4, head_dim] whose logits have this standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(num_tokens, layout.num_layers, layout.num_kv_heads, layout.head_dim, generator=generator)
    q = torch.randn(4, layout.head_dim, generator=generator) * size / (SCALE * layout.head_dim**0.5)
    return k.to(layout.dtype), q.to(layout.dtype)


def index_of(
    pool: AttentionPool, layout: KVLayout, k: Tensor, v: Tensor | None = None
) -> tuple[KVIndex, list[int]]:
    needed = -(-len(k) // layout.page_size)
    block_table = torch.randperm(needed, generator=torch.Generator().manual_seed(1)).tolist()
    index = allocate_index(layout, needed)
    k_pages = pages_of(layout, k, block_table, needed)
    v_pages = k_pages if v is None else pages_of(layout, v, block_table, needed)
    build_index(pool, layout, k_pages, v_pages, index, block_table)
    return index, block_table


@pytest.mark.parametrize("head_dim", [8, 26, 32, 64, 80, 128])
def test_the_index_holds_rounded_keys_and_the_same_bits_on_every_instruction_set(
    pool: AttentionPool, dtype: torch.dtype, head_dim: int
) -> None:
    layout = KVLayout(2, 2, head_dim, 32, dtype)
    k, _ = draw(64, layout)
    k[3] = 0
    k[4, ..., 0] = 1e30 if dtype != torch.float16 else torch.inf
    k[5, ..., 1] = torch.nan
    k[6] *= 1e-6
    index, block_table = index_of(pool, layout, k)
    codes, scales = reference.unpack_index(index.k[block_table], head_dim)
    expected_codes, expected_scales = reference.quantize_keys(k.unflatten(0, (2, 32)).movedim(1, 3))
    assert torch.equal(codes, expected_codes)
    assert torch.equal(scales.isnan(), expected_scales.isnan())
    assert torch.equal(scales.nan_to_num(), expected_scales.nan_to_num())
    assert scales[0, 0, 0, 4:6, 0].isnan().all()


def test_the_sum_of_values_adds_tokens_in_their_order(pool: AttentionPool, dtype: torch.dtype) -> None:
    layout = KVLayout(1, 2, 26, 48, dtype)
    v, _ = draw(96, layout)
    index, block_table = index_of(pool, layout, v)
    expected = torch.zeros(2, 1, 2, 26)
    for token in v.float().unflatten(0, (2, 48)).unbind(1):
        expected += token
    assert torch.equal(index.v_sum[block_table], expected)


@ISAS
@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
@pytest.mark.parametrize(
    ("group", "head_dim"), [(1, 64), (2, 26), (4, 64), (5, 80), (7, 128), (16, 32), (20, 96)]
)
def test_estimates_are_the_products_of_quantised_keys_and_queries(
    isa: str, group: int, head_dim: int, soft_cap: float
) -> None:
    layout = KVLayout(2, 2, head_dim, 16, torch.bfloat16)
    k, q = draw(75, layout)
    q = q.repeat(5, 1)[:group]
    with AttentionPool(1, isa=isa) as pool:
        index, block_table = index_of(pool, layout, k)
    options = {"layer": 1, "kv_head": 1, "block_table": block_table, "num_tokens": 75, "scale": SCALE}
    estimates = estimate(layout, index, q, **options, soft_cap=soft_cap, isa=isa)
    expected = reference.estimate(q, *reference.quantize_keys(k[:, 1, 1]), SCALE, soft_cap)
    # the soft cap's tanh is good to 1e-4
    torch.testing.assert_close(estimates.double(), expected, atol=1e-3 if soft_cap else 2e-5, rtol=0)


def test_estimates_are_within_a_percent_of_the_spread_of_gaussian_logits() -> None:
    k, q = draw(2000, LAYOUT, size=3.0)
    with AttentionPool(1) as pool:
        index, block_table = index_of(pool, LAYOUT, k)
    exact = q.double() @ k[:, 0, 0].double().T * SCALE
    estimates = estimate(
        LAYOUT, index, q, layer=0, kv_head=0, block_table=block_table, num_tokens=2000, scale=SCALE
    )
    assert (estimates - exact).std() < 0.01 * exact.std()


@ISAS
@pytest.mark.parametrize("mass", [0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 700, 2048, 2049, 5000])
def test_a_selection_holds_its_mass_and_little_more(isa: str, num_tokens: int, mass: float) -> None:
    k, q = draw(num_tokens, LAYOUT)
    with AttentionPool(1) as pool:
        index, block_table = index_of(pool, LAYOUT, k)
    options = {"layer": 0, "kv_head": 1, "block_table": block_table, "num_tokens": num_tokens, "scale": SCALE}
    estimates = estimate(LAYOUT, index, q, **options, isa=isa).double()
    chosen = select(LAYOUT, index, q, **options, mass=mass, isa=isa)
    probabilities = torch.softmax(estimates, dim=-1)
    left_out = probabilities.sum(-1) - probabilities[:, chosen.tokens].sum(-1)
    # A weight is 4 % too small at most, and its share of the sum another 2 % to 4 %.
    assert left_out.mean() <= (1 - mass) * 1.08
    assert len(chosen.tokens) <= len(reference.select(estimates, 1 - (1 - mass) / 1.16))
    assert chosen.tokens.tolist() == sorted(set(chosen.tokens.tolist()))
    torch.testing.assert_close(chosen.lse.double(), torch.logsumexp(estimates, -1), atol=0.05, rtol=0)
    torch.testing.assert_close(chosen.rest.double(), left_out, atol=1e-6, rtol=0.08)


@ISAS
def test_sinks_and_the_last_tokens_are_always_selected(isa: str) -> None:
    k, q = draw(3000, LAYOUT)
    k[500] = q.mean(0)  # one token that holds nearly everything
    q[:] = q.mean(0) * 5
    with AttentionPool(1) as pool:
        index, block_table = index_of(pool, LAYOUT, k)
    chosen = select(
        LAYOUT, index, q, layer=1, kv_head=0, block_table=block_table, num_tokens=3000, scale=SCALE, mass=0.99,
        num_sinks=4, always_begin=2990, isa=isa,
    )  # fmt: skip
    assert chosen.tokens.tolist() == [0, 1, 2, 3, 500, *range(2990, 3000)]


@ISAS
@pytest.mark.parametrize("where", ["key", "sink", "query"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_what_cannot_be_estimated_is_said_and_not_guessed(isa: str, where: str, value: float) -> None:
    k, q = draw(300, LAYOUT)
    if where == "query":
        q[2, 5] = value
    else:
        k[1 if where == "sink" else 200, :, :, 40] = value
    with AttentionPool(1) as pool:
        index, block_table = index_of(pool, LAYOUT, k)
    with pytest.raises(NotEstimable, match="layer 1, KV head 0"):
        select(
            LAYOUT, index, q, layer=1, kv_head=0, block_table=block_table, num_tokens=300, scale=SCALE, mass=0.99,
            num_sinks=4, isa=isa,
        )  # fmt: skip


@ISAS
@pytest.mark.parametrize("size", [1e-3, 30.0, 1e4])
def test_logits_of_any_size_are_estimated(isa: str, size: float) -> None:
    k, q = draw(2500, LAYOUT, size=size)
    with AttentionPool(1) as pool:
        index, block_table = index_of(pool, LAYOUT, k)
    options = {"layer": 0, "kv_head": 0, "block_table": block_table, "num_tokens": 2500, "scale": SCALE}
    estimates = estimate(LAYOUT, index, q, **options, isa=isa)
    torch.testing.assert_close(
        estimates.double(),
        reference.estimate(q, *reference.quantize_keys(k[:, 0, 0]), SCALE),
        atol=size * 1e-5,
        rtol=0,
    )
    if size == 1e4:
        # A key is further above the first ones than weights reach.
        with pytest.raises(NotEstimable):
            select(LAYOUT, index, q, **options, mass=0.99, isa=isa)
        return
    chosen = select(LAYOUT, index, q, **options, mass=0.99, isa=isa)
    assert torch.softmax(estimates.double(), -1)[:, chosen.tokens].sum(-1).mean() > 0.988


def test_what_lies_past_the_last_token_is_never_read() -> None:
    k, q = draw(333, LAYOUT)
    with AttentionPool(1) as pool:
        index, block_table = index_of(pool, LAYOUT, k)
    other = replace(index, k=index.k.clone())
    other.k[block_table[-1], :, :, 1] = (
        0x7F  # the second group of the last page holds no token; all scales NaN
    )
    options = {
        "layer": 0,
        "kv_head": 0,
        "block_table": block_table,
        "num_tokens": 333,
        "scale": SCALE,
        "mass": 0.9,
    }
    for isa in supported_isas():
        with_zeros, with_nan = (select(LAYOUT, i, q, **options, isa=isa) for i in (index, other))
        assert torch.equal(with_zeros.tokens, with_nan.tokens)
        assert torch.equal(with_zeros.rest, with_nan.rest)
