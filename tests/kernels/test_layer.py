"""The two halves of a layer against the operations that they are made of."""

import pytest
import torch
from torch import Tensor

from hybridgen.kernels.layer import Layer
from hybridgen.kernels.linear import Linear, streams
from hybridgen.kernels.ops import fused_add_rms_norm, rms_norm, rotary_, silu_and_mul
from hybridgen.kernels.pool import AttentionPool

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, DIM, EPS = 96, 160, 6, 2, 16, 1e-5


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


class Weights:
    def __init__(self, *, bias: bool, head_norms: bool) -> None:
        def linear(outputs: int, inputs: int, seed: int) -> Linear:
            return Linear(
                random(outputs, inputs, seed=seed) / 8, random(outputs, seed=seed + 1) if bias else None
            )

        self.attention_norm, self.mlp_norm = random(HIDDEN, seed=1), random(HIDDEN, seed=2)
        self.q_norm = random(DIM, seed=3) if head_norms else None
        self.k_norm = random(DIM, seed=4) if head_norms else None
        self.qkv = linear((HEADS + 2 * KV_HEADS) * DIM, HIDDEN, 5)
        self.out = linear(HIDDEN, HEADS * DIM, 7)
        self.up = linear(2 * INTERMEDIATE, HIDDEN, 9)
        self.down = linear(HIDDEN, INTERMEDIATE, 11)

    def layer(self) -> Layer:
        return Layer(**vars(self), num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, eps=EPS)


@pytest.fixture(autouse=True)
def _streaming(pool: AttentionPool) -> None:
    if not streams(pool, 1) or Weights(bias=False, head_norms=False).qkv.streamed is None:
        pytest.skip("this path's products are torch's")


@pytest.mark.parametrize("rows", [1, 2, 7, 63])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("head_norms", [False, True], ids=["no-head-norms", "head-norms"])
@pytest.mark.parametrize("half", [None, 4, 8], ids=lambda half: f"rotated={half and 2 * half}")
@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
def test_entering_a_layer_is_its_operations_one_by_one(
    pool: AttentionPool, rows: int, bias: bool, head_norms: bool, half: int | None, first: bool
) -> None:
    weights = Weights(bias=bias, head_norms=head_norms)
    x, residual = random(rows, HIDDEN, seed=20), random(rows, HIDDEN, seed=21)
    angles = torch.rand(rows, half or 0)
    rotation = None if half is None else (angles.cos(), angles.sin())
    expected_residual = residual.clone()
    if first:
        normed = rms_norm(expected_residual, weights.attention_norm, EPS)
    else:
        normed = fused_add_rms_norm(x, expected_residual, weights.attention_norm, EPS)
    heads = weights.qkv(normed, pool=pool).view(rows, -1, DIM)
    q, k, v = heads[:, :HEADS], heads[:, HEADS : HEADS + KV_HEADS], heads[:, HEADS + KV_HEADS :]
    if weights.q_norm is not None and weights.k_norm is not None:
        q, k = rms_norm(q, weights.q_norm, EPS), rms_norm(k, weights.k_norm, EPS)
    if rotation is not None:
        rotary_(q, k, *rotation)

    got = weights.layer().enter(None if first else x, residual, rotation, pool)
    assert torch.equal(residual, expected_residual)
    for part, expected in zip(got, (q, k, v), strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize("rows", [1, 2, 7, 63])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_leaving_a_layer_is_its_operations_one_by_one(pool: AttentionPool, rows: int, bias: bool) -> None:
    weights = Weights(bias=bias, head_norms=False)
    attended, residual = random(rows, HEADS, DIM, seed=20), random(rows, HIDDEN, seed=21)
    expected_residual = residual.clone()
    x = weights.out(attended.view(rows, -1), pool=pool)
    x = fused_add_rms_norm(x, expected_residual, weights.mlp_norm, EPS)
    expected = weights.down(silu_and_mul(weights.up(x, pool=pool)), pool=pool)

    got = weights.layer().leave(attended, residual, pool)
    assert torch.equal(residual, expected_residual)
    assert torch.equal(got, expected)


def test_matrices_that_do_not_go_together_are_refused() -> None:
    weights = Weights(bias=False, head_norms=False)
    weights.down = weights.out
    with pytest.raises(ValueError, match="do not go together"):
        weights.layer()


def test_rows_of_another_shape_are_refused(pool: AttentionPool) -> None:
    layer = Weights(bias=False, head_norms=False).layer()
    residual = random(3, HIDDEN, seed=1)
    with pytest.raises(ValueError, match="expected contiguous bfloat16 rows"):
        layer.enter(None, residual[:, :-1], None, pool)
    with pytest.raises(ValueError, match="cannot rotate"):
        layer.enter(None, residual, (torch.zeros(3, DIM), torch.zeros(3, DIM)), pool)
    with pytest.raises(ValueError, match="2 rows were attended, the residual has 3"):
        layer.leave(random(2, HEADS, DIM, seed=2), residual, pool)
