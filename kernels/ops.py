"""Row-wise operations between the linear layers, each one pass over memory, on the CPU.

They run in the calling thread, or over `pool` when there are many rows. float32, bfloat16 and float16;
arithmetic is float32 and the result has the dtype of the input. `reference.py` has the same in plain PyTorch.
"""

from functools import cache

import torch
from torch import Tensor

from hybridgen.kernels import _cpu
from hybridgen.kernels.isa import select_isa
from hybridgen.kernels.layout import DTYPE_NAMES
from hybridgen.kernels.pool import AttentionPool


@cache
def _rows(isa: str, dtype: torch.dtype) -> _cpu.Rows:
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"no kernel for {dtype}; there are {', '.join(DTYPE_NAMES.values())}")
    return _cpu.Rows(isa, DTYPE_NAMES[dtype])


@cache
def _default_isa() -> str:
    return select_isa()


def _kernels(dtype: torch.dtype, pool: AttentionPool | None) -> tuple[_cpu.Rows, _cpu.Pool | None]:
    if pool is None:
        return _rows(_default_isa(), dtype), None
    return _rows(pool.isa, dtype), pool.handle


def _check(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    packed = x.numel() == 0 or x.stride(-1) == 1 or x.shape[-1] == 1
    if x.shape != shape or x.dtype != dtype or not packed or x.device.type != "cpu":
        raise ValueError(
            f"{name}: expected {dtype} {shape} with packed rows, got {x.dtype} {tuple(x.shape)} {x.stride()}"
        )


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, out: Tensor | None = None, pool: AttentionPool | None = None
) -> Tensor:
    """x / rms(x) * weight over the last dim, rounded as Hugging Face rounds it: before and after the weight.

    Args:
        x: [rows, n], or contiguous [.., n], or heads of a fused projection viewed as [tokens, heads, n].
        out: like x; may be x itself.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype)
    n = x.shape[-1]
    kernels, threads = _kernels(x.dtype, pool)
    _check("weight", weight, (n,), x.dtype)
    for rows, out_rows in _as_rows(x, out):
        kernels.rms_norm(
            threads,
            rows.shape[0],
            n,
            rows.data_ptr(),
            rows.stride(0),
            0,
            0,
            weight.data_ptr(),
            eps,
            out_rows.data_ptr(),
            out_rows.stride(0),
        )
    return out


def _as_rows(x: Tensor, out: Tensor) -> list[tuple[Tensor, Tensor]]:
    """x and out as pairs of [rows, n]: one pair where all rows are evenly spaced, else one for each head."""
    _check("x", x, tuple(x.shape), x.dtype)
    _check("out", out, tuple(x.shape), x.dtype)
    if x.dim() == 2:
        return [(x, out)]
    if x.is_contiguous() and out.is_contiguous():
        return [(x.view(-1, x.shape[-1]), out.view(-1, x.shape[-1]))]
    if x.dim() != 3:
        raise ValueError(f"x of shape {tuple(x.shape)} must be contiguous")
    return [(x[:, head], out[:, head]) for head in range(x.shape[1])]


def fused_add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    *,
    out: Tensor | None = None,
    pool: AttentionPool | None = None,
) -> Tensor:
    """residual += x in place, rounded; the norm of the sum is returned.

    Args:
        x, residual: [rows, n]
        out: [rows, n]; may be x itself.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype)
    rows, n = x.shape
    kernels, threads = _kernels(x.dtype, pool)
    _check("x", x, (rows, n), x.dtype)
    _check("residual", residual, (rows, n), x.dtype)
    _check("weight", weight, (n,), x.dtype)
    _check("out", out, (rows, n), x.dtype)
    kernels.rms_norm(
        threads,
        rows,
        n,
        x.data_ptr(),
        x.stride(0),
        residual.data_ptr(),
        residual.stride(0),
        weight.data_ptr(),
        eps,
        out.data_ptr(),
        out.stride(0),
    )
    return out


def rotary_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, pool: AttentionPool | None = None) -> None:
    """Rotate the halves of the first 2n dims of every head of q and k, in place.

    Args:
        q, k: [tokens, heads, head_dim]; rows may be apart (views of a fused projection), heads are packed.
        cos, sin: [tokens, n], float32, contiguous.
    """
    tokens, num_heads, head_dim = q.shape
    n = cos.shape[1]
    if 2 * n > head_dim:
        raise ValueError(f"cannot rotate {2 * n} of {head_dim} dims")
    kernels, threads = _kernels(q.dtype, pool)
    for name, heads in (("q", q), ("k", k)):
        _check(name, heads, (tokens, heads.shape[1], head_dim), q.dtype)
        if heads.shape[1] > 1 and heads.stride(1) != head_dim:
            raise ValueError(f"{name}: heads must be packed, got strides {heads.stride()}")
    for name, angles in (("cos", cos), ("sin", sin)):
        _check(name, angles, (tokens, n), torch.float32)
        if not angles.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    kernels.rotary(
        threads,
        tokens,
        n,
        q.data_ptr(),
        q.stride(0),
        num_heads,
        k.data_ptr(),
        k.stride(0),
        k.shape[1],
        head_dim,
        cos.data_ptr(),
        sin.data_ptr(),
    )


def silu_and_mul(gate_up: Tensor, *, out: Tensor | None = None, pool: AttentionPool | None = None) -> Tensor:
    """[rows, 2n] -> [rows, n]: silu of the first half, rounded, times the second half."""
    rows, double = gate_up.shape
    if double % 2:
        raise ValueError(f"gate_up has {double} columns, which are not two halves")
    if out is None:
        out = torch.empty((rows, double // 2), dtype=gate_up.dtype)
    kernels, threads = _kernels(gate_up.dtype, pool)
    _check("gate_up", gate_up, (rows, double), gate_up.dtype)
    _check("out", out, (rows, double // 2), gate_up.dtype)
    kernels.silu_and_mul(
        threads, rows, double // 2, gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), out.stride(0)
    )
    return out


def merge(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    *,
    out: Tensor,
    lse: Tensor | None = None,
    pool: AttentionPool | None = None,
) -> Tensor:
    """Combine two partial attentions over disjoint sets of keys into one, exactly, rounded once to out's dtype.

    Args:
        out_a, out_b: [tokens, heads, head_dim], float32, contiguous; each already divided by its own sum.
        lse_a, lse_b: [tokens, heads], float32, contiguous, natural log; -inf marks a half that saw no keys.
        out: [tokens, heads, head_dim], contiguous.
        lse: [tokens, heads], float32, contiguous, to be filled with that of the union.

    Returns:
        out. Both halves empty gives out = 0, lse = -inf, never NaN.
    """
    shape = tuple(out_a.shape)
    kernels, threads = _kernels(out.dtype, pool)
    for name, x, expected, dtype in (
        ("out_a", out_a, shape, torch.float32),
        ("out_b", out_b, shape, torch.float32),
        ("lse_a", lse_a, shape[:-1], torch.float32),
        ("lse_b", lse_b, shape[:-1], torch.float32),
        ("out", out, shape, out.dtype),
        ("lse", lse_a if lse is None else lse, shape[:-1], torch.float32),
    ):
        _check(name, x, expected, dtype)
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {x.stride()}")
    kernels.merge(
        threads,
        lse_a.numel(),
        shape[-1],
        out_a.data_ptr(),
        lse_a.data_ptr(),
        out_b.data_ptr(),
        lse_b.data_ptr(),
        out.data_ptr(),
        0 if lse is None else lse.data_ptr(),
    )
    return out
