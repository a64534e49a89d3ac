"""x @ weight.T + bias, for few rows at the rate at which the weight can be read.

On a CPU in bfloat16, oneDNN's matrix product wants the weight in blocks; `torch.nn.functional.linear` reorders it at
every call, which a prompt does not notice and a decode step does. Where the pool has a product of its own (AVX512_BF16)
the weight stays as it is: few rows go to the pool, which reads it in one stream, many to torch. Elsewhere the reordered
weight takes the place of the plain one; the operators are those that torch's own compiler uses when it freezes a model.
"""

from typing import TypeGuard

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own habit)
from torch import Tensor

from hybridgen.kernels import _cpu
from hybridgen.kernels.isa import select_isa
from hybridgen.kernels.pool import AttentionPool

FEW_ROWS = 64  # from here on the reordering is lost in the product


class Linear:
    """One matrix and its optional bias.

    Args:
        weight: [out, in]; may be freed once the layer is made, where it is packed.
        bias: [out]
    """

    __slots__ = ("_is_packed", "bias", "shape", "streamed", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        self.bias = bias
        # What the pool's product reads; None where it reads nothing of this weight.
        self.streamed: _cpu.LinearWeights | None = None
        if can_stream(weight):
            bias_address = 0 if bias is None else bias.data_ptr()
            self.streamed = _cpu.LinearWeights(
                weight.data_ptr(), bias_address, weight.shape[1], weight.shape[0]
            )
        self._is_packed = self.streamed is None and can_pack(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self._is_packed else weight

    def first(self, outputs: int) -> "Linear":
        """The product with the first `outputs` rows of the weight alone. Packed weights are packed once more."""
        weight = self.weight.to_dense() if self._is_packed else self.weight
        return Linear(weight[:outputs], None if self.bias is None else self.bias[:outputs])

    def __call__(self, x: Tensor, *, pool: AttentionPool | None = None) -> Tensor:
        """[rows, in] -> [rows, out], in the dtype of x, which is the weight's. Few rows are shared out over `pool`."""
        if self.streamed is not None and streams(pool, len(x)):
            return self._stream(x, pool, self.streamed)
        if not self._is_packed:
            return F.linear(x, self.weight, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out

    def _stream(self, x: Tensor, pool: AttentionPool, weights: _cpu.LinearWeights) -> Tensor:
        outputs, inputs = self.shape
        if x.shape[1] != inputs or x.dtype != self.weight.dtype:
            raise ValueError(f"x {tuple(x.shape)} in {x.dtype} does not go with a weight {self.shape}")
        if x.stride(1) != 1 and inputs > 1:
            x = x.contiguous()
        out = torch.empty((len(x), outputs), dtype=x.dtype)
        _cpu.linear(pool.handle, weights, x.data_ptr(), x.stride(0), out.data_ptr(), outputs, len(x))
        return out


def streams(pool: AttentionPool | None, num_rows: int) -> TypeGuard[AttentionPool]:
    """Whether this pool computes products of so many rows, of weights that can be streamed."""
    return pool is not None and num_rows < FEW_ROWS and _cpu.has_linear(pool.isa)


def can_stream(weight: Tensor) -> bool:
    """Whether the pool's own product can read this weight as it is, on this machine's chosen path."""
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and weight.numel() > 0
        and _cpu.has_linear(select_isa())
    )


def can_pack(weight: Tensor) -> bool:
    """Whether this weight's dtype and device, this machine and this torch have the packed product.

    Only bfloat16: in float32 the packed product is no faster, and in float16 most CPUs have none.
    """
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.numel() > 0
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
