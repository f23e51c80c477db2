"""What the logp ops share: checks of targets, temperature, softcap and scale; rows that count."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from r1kernels.check import IGNORE, describe, device, dtype_in, shape, tensor
from r1kernels.reference.token_logp import Logp

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Vocabulary columns that `skip_mass` keeps or leaves out together.
SKIP_TILE = 2048


class Scaling(NamedTuple):
    """Checked options of `l = softcap tanh(logit_scale z / softcap) / temperature`."""

    temperature_T: Tensor | None  # [T] float32; None: 1
    softcap: float  # 0: none
    logit_scale: float


def check_targets(targets: object, leading: torch.Size, like: Tensor, host: bool = False) -> None:
    """Raises: TypeError unless int64, ValueError on another shape or device (`host`: the CPU is
    fine)."""
    dtype_in("targets", targets, (torch.int64,))
    shape("targets", targets, leading, "the leading shape of the rows")
    if not (host and targets.device.type == "cpu"):
        device("targets", targets, like.device)


def scaling(
    temperature: object, softcap: object, logit_scale: object, leading: torch.Size, like: Tensor
) -> Scaling:
    """The options of a call, a temperature other than 1 as [T]; `counted_rows` looks at its values.

    Raises: TypeError on what is no number; ValueError on numbers that are not positive and finite,
        on a temperature tensor of another shape or device.
    """
    softcap = 0.0 if softcap is None else positive("softcap", softcap)
    logit_scale = positive("logit_scale", logit_scale)
    if not isinstance(temperature, Tensor):
        value = positive("temperature", temperature)
        count = math.prod(leading)
        rows = (
            None
            if value == 1.0
            else torch.full((count,), value, dtype=torch.float32, device=like.device)
        )
        return Scaling(rows, softcap, logit_scale)
    shape("temperature", temperature, leading, "one per token, or a float")
    temperature = beside(temperature, like)
    device("temperature", temperature, like.device)
    return Scaling(temperature.detach().reshape(-1).float().contiguous(), softcap, logit_scale)


def positive(name: str, value: object) -> float:
    """Raises: TypeError unless a number, ValueError unless positive and finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    if not (0.0 < value < math.inf):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")
    return float(value)


def beside(x: object, like: Tensor) -> object:
    """A CPU tensor's copy on like's device, for which the host does not wait; x, if it is none."""
    if not isinstance(x, Tensor) or x.device == like.device or x.device.type != "cpu":
        return x
    if like.is_cuda and torch.cuda.is_available():
        x = x.pin_memory()
    return like.new_empty(x.shape, dtype=x.dtype).copy_(x, non_blocking=True)


def per_row(name: str, x: object, leading: torch.Size, like: Tensor) -> Tensor | None:
    """A tensor of one number per row, flattened, on like's device; or None."""
    if x is None:
        return None
    tensor(name, x)
    shape(name, x, leading, "one per token")
    x = beside(x, like)
    device(name, x, like.device)
    return x.detach().reshape(-1)


def counted_rows(
    targets_T: Tensor, vocab: int, temperature_T: Tensor | None
) -> tuple[Tensor, int, Tensor | None]:
    """Which rows to compute (bool, with the targets), how many, and the temperatures.

    The one read from the device of a call, and none where the targets are on the CPU. A temperature
    elsewhere than they are is not looked at; a bad one becomes NaN.

    Raises: ValueError on a target outside [0, vocab) that is not IGNORE, on a temperature that is
        not positive and finite.
    """
    keep_T = targets_T != IGNORE
    bad_T = keep_T & ((targets_T < 0) | (targets_T >= vocab))
    counts = [keep_T.sum(), bad_T.sum()]
    if temperature_T is not None:
        fine_T = (temperature_T > 0) & (temperature_T < torch.inf)
        if temperature_T.device == targets_T.device:
            cold_T = keep_T & ~fine_T
            counts.append(cold_T.sum())
        else:
            temperature_T = torch.where(fine_T, temperature_T, torch.nan)
    kept, bad, *cold = torch.stack(counts).tolist()
    if bad:
        at = int(bad_T.nonzero()[0])
        raise ValueError(
            f"targets[{at}] is {int(targets_T[at])}: a target lies in [0, {vocab}) "
            f"or is IGNORE ({IGNORE}); {bad} are not"
        )
    if cold and cold[0]:
        at = int(cold_T.nonzero()[0])
        raise ValueError(
            f"temperature[{at}] is {float(temperature_T[at])}: a temperature is positive and finite"
        )
    return keep_T, kept, temperature_T


def ragged_rows(offsets: Tensor, total: int) -> Tensor:
    """The row, int64 [total], that each entry of a ragged list belongs to. Never waits."""
    at_N = torch.arange(total, device=offsets.device)
    rows_N = torch.searchsorted(offsets[1:].contiguous(), at_N, right=True)
    return rows_N.clamp(max=len(offsets) - 2)


def spread(x_A: Tensor, rows: Tensor | None, total: int) -> Tensor:
    """Results of the computed rows at their places among `total`, 0 elsewhere."""
    if rows is None:
        return x_A
    return x_A.new_zeros((total, *x_A.shape[1:])).index_copy_(0, rows, x_A)


def gradient_terms(
    stats: Logp, dlogp_T: Tensor, dentropy_T: Tensor | None, dlse_T: Tensor | None
) -> dict[str, Tensor | None]:
    """The row terms of a gradient (`GradTile` in csrc/cpu/kernels.hpp) from float64 statistics.

    log p_j = (l_j - anchor) + shift with anchor the float32 nearest to lse: the difference is exact
    where p is not small, and the shift carries the digits that a float32 lse has lost.
    """
    anchor_T = stats.lse.float()
    shift_T = anchor_T - stats.lse
    p_T = stats.logp.exp()
    # dL/dl of the target. 1 - p comes from logp, which keeps its digits near p = 1.
    target_T = -dlogp_T * torch.expm1(stats.logp)
    coefficient_T, centre_T = dlogp_T, None
    if dlse_T is not None:
        target_T = target_T + dlse_T * p_T
        coefficient_T = dlogp_T - dlse_T
    if dentropy_T is not None:
        # A target of probability 0 adds nothing; 0 * -inf would be NaN.
        target_T = target_T - dentropy_T * p_T * (stats.logp.clamp(min=-1e4) + stats.entropy)
        centre_T = shift_T + stats.entropy
    terms = {
        "anchor": anchor_T,
        "shift": shift_T,
        "logp_grad": coefficient_T,
        "ent_grad": dentropy_T,
        "centre": centre_T,
        "target_grad": target_T,
    }
    return {name: None if x is None else x.float().contiguous() for name, x in terms.items()}


def left_out(mass_CS: Tensor, targets_C: Tensor, skip_mass: float) -> tuple[Tensor, Tensor]:
    """Which tiles of SKIP_TILE columns a row's gradient leaves out, given the mass of each without
    the target: those below the bound, never the target's. And their mass, [C] float32."""
    skip_CS = (mass_CS < skip_mass).scatter(1, targets_C[:, None] // SKIP_TILE, False)
    return skip_CS, torch.where(skip_CS, mass_CS, 0.0).sum(1).float()
