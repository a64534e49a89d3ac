"""The packed matrix product against float64."""

import pytest
import torch

from hybridgen.kernels import _cpu
from hybridgen.kernels.linear import Linear, can_pack, can_stream
from hybridgen.kernels.pool import AttentionPool


@pytest.mark.parametrize("rows", [1, 2, 7, 32, 33])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 3), (48, 64), (130, 96)])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_matches_the_exact_product(
    rows: int, outputs: int, inputs: int, bias: bool, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    shift = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    x = torch.randn(rows, inputs, generator=generator).to(dtype)
    exact = x.double() @ weight.double().T + (0 if shift is None else shift.double())
    got = Linear(weight, shift)(x)
    assert got.dtype == dtype
    assert got.shape == (rows, outputs)
    # One rounding of the result; sums are float32. Products cancel, so the bound is of the summands' size.
    scale = x.double().abs() @ weight.double().abs().T + 4
    assert ((got.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * scale).all()


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 63])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 3), (48, 64), (130, 96), (700, 513)])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_few_rows_over_the_pool_match_the_exact_product(
    pool: AttentionPool, rows: int, outputs: int, inputs: int, bias: bool
) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(outputs, inputs, generator=generator).bfloat16()
    shift = torch.randn(outputs, generator=generator).bfloat16() if bias else None
    x = torch.randn(rows, inputs + 7, generator=generator).bfloat16()[:, :inputs]
    exact = x.double() @ weight.double().T + (0 if shift is None else shift.double())
    got = Linear(weight, shift)(x, pool=pool)
    scale = x.double().abs() @ weight.double().abs().T + 4
    assert ((got.double() - exact).abs() <= 2 * torch.finfo(torch.bfloat16).eps * scale).all()


def test_a_row_does_not_depend_on_the_rows_beside_it(pool: AttentionPool) -> None:
    linear, x = Linear(torch.randn(130, 96).bfloat16()), torch.randn(20, 96).bfloat16()
    if not can_stream(linear.weight) or not _cpu.has_linear(pool.isa):
        pytest.skip("this path's product is torch's")
    together = linear(x, pool=pool)
    for row in range(20):
        assert torch.equal(linear(x[row : row + 1], pool=pool)[0], together[row])


def test_no_rows_give_no_rows() -> None:
    assert Linear(torch.zeros(6, 4, dtype=torch.bfloat16))(torch.zeros(0, 4, dtype=torch.bfloat16)).shape == (
        0,
        6,
    )


def test_float32_and_float16_are_not_packed() -> None:
    assert not can_pack(torch.zeros(4, 4))
    assert not can_pack(torch.zeros(4, 4, dtype=torch.float16))
