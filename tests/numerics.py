"""The numerics rule: no more than twice eager's error, against a float64 truth."""

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps


def relative_error(out: Tensor, truth: Tensor) -> float:
    """max |out - truth| / max |truth| in float64; the absolute error where truth is all 0."""
    truth = truth.detach().double()
    assert out.shape == truth.shape, f"shape {list(out.shape)}, truth {list(truth.shape)}"
    if truth.numel() == 0:
        return 0.0
    scale = truth.abs().max()
    error = (out.detach().double() - truth).abs().max()
    return float(error / scale if scale > 0 else error)


def relative_l2(out: Tensor, truth: Tensor) -> float:
    """||out - truth|| / ||truth|| in float64."""
    truth = truth.detach().double()
    return float((out.detach().double() - truth).norm() / truth.norm())


def assert_no_worse(
    out: Tensor, eager: Tensor, truth: Tensor, factor: float = 2, name: str = "result"
) -> None:
    """Assert that out's error is at most factor x eager's + 4 eps(float32).

    Args:
        out: what is tested.
        eager: the plain torch computation in the same dtype.
        truth: the same in float64.
    """
    ours, theirs = relative_error(out, truth), relative_error(eager, truth)
    bound = factor * theirs + 4 * EPS
    assert ours <= bound, (
        f"{name}: error {ours:.3e} against float64, eager's {theirs:.3e}, allowed {bound:.3e}"
    )
