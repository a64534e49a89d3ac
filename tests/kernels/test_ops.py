"""Row-wise operations against their reference.

Equal up to a unit in the last place for each rounding: a float32 intermediate may differ in its last bits and
so round to the neighbour.
"""

import math

import pytest
import torch
from torch import Tensor

from hybridgen.kernels import ops, reference
from hybridgen.kernels.pool import AttentionPool

WIDTHS = (1, 8, 15, 16, 64, 80, 129, 768)


def assert_within_ulps(actual: Tensor, expected: Tensor, ulps: int) -> None:
    assert actual.dtype == expected.dtype
    rtol = ulps * torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=rtol * 1e-2)


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_rms_norm(pool: AttentionPool, dtype: torch.dtype, rows: int, n: int) -> None:
    x, weight = (3 * torch.randn(rows, n)).to(dtype), torch.randn(n).to(dtype)
    assert_within_ulps(ops.rms_norm(x, weight, 1e-5, pool=pool), reference.rms_norm(x, weight, 1e-5), 4)


def test_rms_norm_of_the_heads_of_a_fused_projection_in_place(
    pool: AttentionPool, dtype: torch.dtype
) -> None:
    qkv, weight = torch.randn(5, 8 * 64).to(dtype), torch.randn(64).to(dtype)
    heads = qkv.view(5, 8, 64)[:, 2:6]
    expected = reference.rms_norm(heads, weight, 1e-6)
    others = qkv.view(5, 8, 64)[:, 6:].clone()
    assert ops.rms_norm(heads, weight, 1e-6, out=heads, pool=pool) is heads
    assert_within_ulps(heads, expected, 4)
    assert torch.equal(qkv.view(5, 8, 64)[:, 6:], others)


@pytest.mark.parametrize("n", WIDTHS)
def test_fused_add_rms_norm_updates_the_residual(pool: AttentionPool, dtype: torch.dtype, n: int) -> None:
    x, residual, weight = (torch.randn(shape).to(dtype) for shape in ((3, n), (3, n), (n,)))
    expected_residual = residual.clone()
    expected = reference.fused_add_rms_norm(x, expected_residual, weight, 1e-5)
    actual = ops.fused_add_rms_norm(x, residual, weight, 1e-5, pool=pool)
    assert torch.equal(residual, expected_residual)
    assert_within_ulps(actual, expected, 4)


@pytest.mark.parametrize(("head_dim", "rotated"), [(8, 8), (64, 64), (80, 80), (80, 20), (128, 128)])
def test_rotary_on_views_of_a_fused_projection(
    pool: AttentionPool, dtype: torch.dtype, head_dim: int, rotated: int
) -> None:
    tokens, num_heads, num_kv_heads = 7, 4, 2
    angles = torch.rand(tokens, rotated // 2) * 100
    cos, sin = angles.cos(), angles.sin()
    qkv = torch.randn(tokens, (num_heads + 2 * num_kv_heads) * head_dim).to(dtype)
    expected = qkv.clone()

    def split(fused: Tensor) -> tuple[Tensor, Tensor]:
        heads = fused.view(tokens, -1, head_dim)
        return heads[:, :num_heads], heads[:, num_heads : num_heads + num_kv_heads]

    reference.rotary_(*split(expected), cos, sin)
    ops.rotary_(*split(qkv), cos, sin, pool=pool)
    # A sum of two products near zero has the absolute error of the products.
    torch.testing.assert_close(qkv, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("n", WIDTHS)
def test_silu_and_mul(pool: AttentionPool, dtype: torch.dtype, n: int) -> None:
    gate_up = (5 * torch.randn(3, 2 * n)).to(dtype)
    assert_within_ulps(ops.silu_and_mul(gate_up, pool=pool), reference.silu_and_mul(gate_up), 4)


def test_silu_saturates_instead_of_overflowing(pool: AttentionPool, dtype: torch.dtype) -> None:
    gate = torch.tensor([[-6e4, -200.0, -100.0, 0.0, 100.0, 200.0, 6e4]]).to(dtype)
    out = ops.silu_and_mul(torch.cat([gate, torch.ones_like(gate)], dim=1), pool=pool)
    torch.testing.assert_close(out, gate.clamp(min=0), atol=1e-30, rtol=0)


def test_many_rows_are_shared_out_without_changing_a_bit(pool: AttentionPool, dtype: torch.dtype) -> None:
    x, weight = torch.randn(1001, 512).to(dtype), torch.randn(512).to(dtype)
    with AttentionPool(1, isa=pool.isa) as single:
        assert torch.equal(
            ops.rms_norm(x, weight, 1e-5, pool=pool), ops.rms_norm(x, weight, 1e-5, pool=single)
        )
        assert torch.equal(ops.silu_and_mul(x, pool=pool), ops.silu_and_mul(x, pool=single))


def test_operands_that_do_not_fit_are_refused() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8)
    with pytest.raises(ValueError, match="weight"):
        ops.rms_norm(x, weight[:7], 1e-5)
    with pytest.raises(ValueError, match="weight"):
        ops.rms_norm(x.bfloat16(), weight, 1e-5)
    with pytest.raises(ValueError, match="residual"):
        ops.fused_add_rms_norm(x, x[:2], weight, 1e-5)
    with pytest.raises(ValueError, match="no kernel"):
        ops.rms_norm(x.double(), weight.double(), 1e-5)
    with pytest.raises(ValueError, match="two halves"):
        ops.silu_and_mul(x[:, :7])
    with pytest.raises(ValueError, match="cannot rotate"):
        ops.rotary_(x.view(3, 1, 8), x.view(3, 1, 8), torch.ones(3, 5), torch.ones(3, 5))
    with pytest.raises(ValueError, match="sin"):
        ops.rotary_(x.view(3, 1, 8), x.view(3, 1, 8), torch.ones(3, 4), torch.ones(2, 4))


@pytest.mark.parametrize(
    "lse", [(0.0, 0.0), (3.0, -5.0), (-1e4, 1e4), (-math.inf, 2.0), (-math.inf, -math.inf)]
)
def test_merge_matches_the_reference(
    pool: AttentionPool, dtype: torch.dtype, lse: tuple[float, float]
) -> None:
    parts = [torch.randn(5, 3, 24) * (size > -math.inf) for size in lse]
    sizes = [torch.randn(5, 3) + size for size in lse]
    out, total = torch.empty(5, 3, 24, dtype=dtype), torch.empty(5, 3)
    ops.merge(parts[0], sizes[0], parts[1], sizes[1], out=out, lse=total, pool=pool)
    expected, expected_lse = reference.merge(parts[0], sizes[0], parts[1], sizes[1])
    torch.testing.assert_close(out, expected.to(dtype))
    torch.testing.assert_close(total, expected_lse)
