"""The packed matrix product against float64."""

import pytest
import torch

from hybridgen.kernels.linear import Linear, can_pack


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


def test_no_rows_give_no_rows() -> None:
    assert Linear(torch.zeros(6, 4, dtype=torch.bfloat16))(torch.zeros(0, 4, dtype=torch.bfloat16)).shape == (
        0,
        6,
    )


def test_float32_and_float16_are_not_packed() -> None:
    assert not can_pack(torch.zeros(4, 4))
    assert not can_pack(torch.zeros(4, 4, dtype=torch.float16))
