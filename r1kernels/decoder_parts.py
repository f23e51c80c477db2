"""RMS norm and rotary embedding of a chunk of rows, and their gradients, which are not rounded.

Forwards round where transformers' modules round, or less. Gradients are float32, float64 where the
rows are, and so are the sums of the norms' weight gradients over chunks.
"""

import torch
from torch import Tensor

from r1kernels.decoder import Norm
from r1kernels.weight_grads import WeightGrads, sum_dtype


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps), [..., D] in x's dtype."""
    return norm.weight * _normal(x, norm)[0].to(x.dtype)


def rms_norm_backward(dy: Tensor, x: Tensor, norm: Norm, grads: WeightGrads, key: str) -> Tensor:
    """Gradient of x, the norm's input, float32. Adds that of the weight."""
    normal, inverse = _normal(x, norm)
    dy = dy.to(normal.dtype)
    if f"{key}.weight" in grads:
        grads.add_sum(f"{key}.weight", (dy * normal).flatten(0, -2))
    dnormal = dy * norm.weight
    return inverse * (dnormal - normal * (dnormal * normal).mean(-1, keepdim=True))


def _normal(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    x = x.to(sum_dtype(x.dtype))
    inverse = (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    return x * inverse, inverse


def rotate(x_CNE: Tensor, cos_CE: Tensor, sin_CE: Tensor) -> Tensor:
    """Rotary embedding of heads, halves paired, float32."""
    x_CNE = x_CNE.to(sum_dtype(x_CNE.dtype))
    low, high = x_CNE.chunk(2, dim=-1)
    return x_CNE * cos_CE.unsqueeze(1) + torch.cat([-high, low], -1) * sin_CE.unsqueeze(1)


def rotate_backward(dy_CNE: Tensor, cos_CE: Tensor, sin_CE: Tensor) -> Tensor:
    """Gradient of what was rotated, float32."""
    dy_CNE = dy_CNE.to(sum_dtype(dy_CNE.dtype))
    low, high = (dy_CNE * sin_CE.unsqueeze(1)).chunk(2, dim=-1)
    return dy_CNE * cos_CE.unsqueeze(1) + torch.cat([high, -low], -1)
