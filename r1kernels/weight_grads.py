"""Weight gradients of chunks of rows, summed in float32 and delivered once.

Summed in bfloat16 over 512 chunks, a gradient that all chunks agree on loses a quarter of its size:
beside the sum, a chunk's share falls below half an ulp. Here every product is made in float32 and
added in float32, and rounded once, at the end.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def accumulate(out_MN: Tensor, left_MC: Tensor, right_CN: Tensor) -> None:
    """out += left @ right in the dtype of out, float32 for operands of 16 bits.

    A GPU's library adds to out in place without widening the operands; elsewhere they are widened.
    """
    if left_MC.dtype == out_MN.dtype:
        out_MN.addmm_(left_MC, right_CN)
    elif out_MN.is_cuda:
        torch.addmm(out_MN, left_MC, right_CN, out_dtype=out_MN.dtype, out=out_MN)
    else:
        out_MN.addmm_(left_MC.to(out_MN.dtype), right_CN.to(out_MN.dtype))


class WeightGrads:
    """Sums over chunks of the gradients of the parameters that want one.

    A parameter is known by a key. What is added under a key that was not given costs nothing, so
    frozen parameters need no case of their own.

    Args:
        parameters: the parameters that want gradients; a sum is float32, float64 for float64.
    """

    def __init__(self, parameters: Mapping[str, Tensor]):
        self._dtypes = {key: x.dtype for key, x in parameters.items()}
        self._sums = {
            key: torch.zeros(x.shape, dtype=sum_dtype(x.dtype), device=x.device)
            for key, x in parameters.items()
        }

    def __contains__(self, key: str) -> bool:
        return key in self._sums

    def add(self, key: str, dy_CM: Tensor, x_CN: Tensor) -> None:
        """Adds dy^T x, [M, N], of a chunk of rows of `y = x W^T`."""
        if key in self._sums:
            accumulate(self._sums[key], dy_CM.T, x_CN)

    def add_sum(self, key: str, dy_CM: Tensor) -> None:
        """Adds the sum of the rows, [M]: a bias, or a norm's weight."""
        if key in self._sums:
            self._sums[key] += dy_CM.sum(0, dtype=self._sums[key].dtype)

    def deliver(self, key: str, dtype: torch.dtype | None = None) -> Tensor | None:
        """The gradient of a parameter, rounded once, to the parameter's dtype unless another is
        asked for; None where none was wanted. Gives its sum away: called twice, a KeyError."""
        if key not in self._dtypes:
            return None
        return self._sums.pop(key).to(dtype or self._dtypes[key])


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of the sums of a parameter's gradients."""
    return torch.float64 if dtype == torch.float64 else torch.float32
