"""What a decoder layer does around attention, for few rows: each half is one call into the extension.

A decode step of one sequence reads its weights in milliseconds, in which the ten calls that Python would make a layer
are felt. The halves do what the operations of `ops.py` and `linear.py` do, in the same order and to the same bits.
"""

import torch
from torch import Tensor

from hybridgen.kernels import _cpu
from hybridgen.kernels.linear import Linear
from hybridgen.kernels.pool import AttentionPool


class Layer:
    """A layer with RMS norms before its blocks and an MLP gated by SiLU, all of it bfloat16 that the pool streams.

    Args:
        attention_norm, mlp_norm: [hidden]
        qkv: [(num_heads + 2 * num_kv_heads) * head_dim, hidden]
        q_norm, k_norm: [head_dim]; both or neither.
        out: [hidden, num_heads * head_dim]
        up: [2 * intermediate, hidden], gate first
        down: [hidden, intermediate]

    Raises:
        ValueError: the matrices do not go together, or the pool cannot stream them.
    """

    def __init__(
        self,
        *,
        attention_norm: Tensor,
        qkv: Linear,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        out: Linear,
        mlp_norm: Tensor,
        up: Linear,
        down: Linear,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
    ) -> None:
        hidden = qkv.shape[1]
        norms = [(attention_norm, hidden), (mlp_norm, hidden), (q_norm, head_dim), (k_norm, head_dim)]
        for norm, size in norms:
            if norm is not None and (
                norm.shape != (size,) or norm.dtype != torch.bfloat16 or not norm.is_contiguous()
            ):
                raise ValueError(
                    f"expected the {size} weights of a norm in bfloat16, got {tuple(norm.shape)}"
                )
        matrices = [linear.streamed for linear in (qkv, out, up, down) if linear.streamed is not None]
        if len(matrices) < 4:
            raise ValueError(
                f"of a layer's weights only {len(matrices)} can be streamed: see kernels/linear.py"
            )
        self._kept = (
            attention_norm,
            qkv,
            q_norm,
            k_norm,
            out,
            mlp_norm,
            up,
            down,
        )  # what the handle points to
        self._num_heads = num_heads
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        self._hidden = hidden
        self._handle = _cpu.Layer(
            attention_norm.data_ptr(),
            matrices[0],
            0 if q_norm is None else q_norm.data_ptr(),
            0 if k_norm is None else k_norm.data_ptr(),
            matrices[1],
            mlp_norm.data_ptr(),
            matrices[2],
            matrices[3],
            num_heads,
            num_kv_heads,
            head_dim,
            eps,
        )

    def enter(
        self, x: Tensor | None, residual: Tensor, rotation: tuple[Tensor, Tensor] | None, pool: AttentionPool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """residual += x, if there is one, in place; q, k, v of its norm, q and k rotated.

        Args:
            x, residual: [rows, hidden], contiguous, bfloat16.
            rotation: cos and sin, [rows, n], float32, contiguous: as `rotary_` takes them.

        Returns:
            [rows, num_heads, head_dim], then twice [rows, num_kv_heads, head_dim]: views of one tensor.
        """
        rows = len(residual)
        self._check(residual, self._hidden)
        if x is not None:
            self._check(x, self._hidden)
        cos = sin = half = 0
        if rotation is not None:
            half = rotation[0].shape[1]
            for angles in rotation:
                if (
                    angles.shape != (rows, half)
                    or angles.dtype != torch.float32
                    or not angles.is_contiguous()
                    or 2 * half > self._head_dim
                ):
                    raise ValueError(
                        f"cannot rotate {rows} rows by angles {angles.dtype} {tuple(angles.shape)}"
                    )
            cos, sin = rotation[0].data_ptr(), rotation[1].data_ptr()
        num_heads, num_kv_heads = self._num_heads, self._num_kv_heads
        heads = torch.empty((rows, num_heads + 2 * num_kv_heads, self._head_dim), dtype=torch.bfloat16)
        self._handle.enter(
            pool.handle,
            rows,
            0 if x is None else x.data_ptr(),
            residual.data_ptr(),
            cos,
            sin,
            half,
            heads.data_ptr(),
        )
        kv_begin, v_begin = num_heads, num_heads + num_kv_heads
        return heads[:, :kv_begin], heads[:, kv_begin:v_begin], heads[:, v_begin:]

    def leave(self, attended: Tensor, residual: Tensor, pool: AttentionPool) -> Tensor:
        """residual += the projection of what was attended, in place; the MLP of its norm.

        Args:
            attended: [rows, num_heads, head_dim], contiguous, bfloat16.
            residual: [rows, hidden], contiguous, bfloat16.

        Returns:
            [rows, hidden]
        """
        rows = len(residual)
        self._check(residual, self._hidden)
        self._check(attended, self._num_heads, self._head_dim)
        if len(attended) != rows:
            raise ValueError(f"{len(attended)} rows were attended, the residual has {rows}")
        x = torch.empty((rows, self._hidden), dtype=torch.bfloat16)
        self._handle.leave(pool.handle, rows, attended.data_ptr(), residual.data_ptr(), x.data_ptr())
        return x

    @staticmethod
    def _check(x: Tensor, *sizes: int) -> None:
        if x.shape[1:] != sizes or x.dtype != torch.bfloat16 or not x.is_contiguous():
            raise ValueError(f"expected contiguous bfloat16 rows of {sizes}, got {x.dtype} {tuple(x.shape)}")
