"""x @ weight.T + bias, with the weight laid out once for the processor that reads it.

On a CPU in bfloat16, oneDNN's matrix product wants the weight in blocks; `torch.nn.functional.linear` reorders it at
every call, which costs a decode step a third of its time. The reordered weight takes the place of the plain one.
The operators are those that torch's own compiler uses when it freezes a model.
"""

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own habit)
from torch import Tensor


class Linear:
    """One matrix and its optional bias.

    Args:
        weight: [out, in]; may be freed once the layer is made, where it is packed.
        bias: [out]
    """

    __slots__ = ("_is_packed", "bias", "shape", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.shape = (weight.shape[0], weight.shape[1])
        self.bias = bias
        self._is_packed = can_pack(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self._is_packed else weight

    def first(self, outputs: int) -> "Linear":
        """The product with the first `outputs` rows of the weight alone. Packed weights are packed once more."""
        weight = self.weight.to_dense() if self._is_packed else self.weight
        return Linear(weight[:outputs], None if self.bias is None else self.bias[:outputs])

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out], in the dtype of x, which is the weight's."""
        if not self._is_packed:
            return F.linear(x, self.weight, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out


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
