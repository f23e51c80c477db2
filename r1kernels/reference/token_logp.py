"""Log-probability and entropy of target tokens from logits, as written in a textbook."""

from typing import NamedTuple

import torch
from torch import Tensor

from r1kernels.backend import is_batch_invariant
from r1kernels.check import IGNORE


class Logp(NamedTuple):
    """Per-token results, in nats, shaped like the targets; 0 in rows that do not count."""

    logp: Tensor
    entropy: Tensor | None
    lse: Tensor | None


def token_logp(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
) -> Logp:
    """`log_softmax(l)[target]` with `l = softcap tanh(logit_scale logits / softcap) / temperature`.

    Differentiable by autograd, any device. In float64 for float64 logits, in float32 otherwise.

    Args:
        logits: [..., V] any floating dtype.
        targets: [...] int64 in [0, V), or IGNORE (-100): result 0, no gradient, whatever the row
            holds.
        temperature: float or [...] tensor.
    """
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    counted = targets != IGNORE
    # Selecting before any arithmetic keeps NaN and inf of ignored rows out of result and gradient.
    x = torch.where(counted[..., None], logits, 0).to(wide)
    tau = temperature[..., None].to(wide) if isinstance(temperature, Tensor) else temperature
    x = transformed(x, tau, softcap, logit_scale)
    lse = torch.logsumexp(x, dim=-1)
    picked = x.gather(-1, torch.where(counted, targets, 0)[..., None]).squeeze(-1)
    zero = torch.zeros((), dtype=wide, device=x.device)
    h = None
    if entropy:
        # A logit of -inf has probability 0 and adds nothing; 0 * -inf would be NaN.
        surprise = torch.where(x == -torch.inf, 0, lse[..., None] - x)
        h = (torch.softmax(x, dim=-1) * surprise).sum(-1)
    return Logp(
        torch.where(counted, picked - lse, zero),
        None if h is None else torch.where(counted, h, zero),
        torch.where(counted, lse, zero),
    )


def transformed(
    z: Tensor, temperature: float | Tensor, softcap: float | None, logit_scale: float
) -> Tensor:
    """`softcap tanh(logit_scale z / softcap) / temperature`."""
    x = z * logit_scale
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    return x / temperature


def refuses(*_args: object) -> str | None:
    """None: runs anywhere, but promises nothing about bits."""
    return "no promise under batch_invariant" if is_batch_invariant() else None


def fwd(
    logits_TV: Tensor,
    targets_T: Tensor,
    temperature_T: Tensor | None,
    softcap: float,
    logit_scale: float,
    entropy: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(logp, entropy or None, lse), each [T] float64."""
    with torch.no_grad():
        stats = _call(logits_TV, targets_T, temperature_T, softcap, logit_scale, entropy)
    return tuple(None if x is None else x.double() for x in stats)


def bwd(
    dlogp_T: Tensor,
    dentropy_T: Tensor | None,
    dlse_T: Tensor,
    logits_TV: Tensor,
    targets_T: Tensor,
    temperature_T: Tensor | None,
    softcap: float,
    logit_scale: float,
    logp_T: Tensor,
    entropy_T: Tensor | None,
    lse_T: Tensor,
    inplace: bool,
) -> Tensor:
    """dlogits [T, V] in the dtype of the logits; written over the logits when `inplace`."""
    dlogits_TV = logit_gradient(
        dlogp_T, dentropy_T, dlse_T, logits_TV, targets_T, temperature_T, softcap, logit_scale
    ).to(logits_TV.dtype)
    return logits_TV.copy_(dlogits_TV) if inplace else dlogits_TV


def logit_gradient(
    dlogp_T: Tensor,
    dentropy_T: Tensor | None,
    dlse_T: Tensor | None,
    logits_TV: Tensor,
    targets_T: Tensor,
    temperature_T: Tensor | None,
    softcap: float,
    logit_scale: float,
    whole: Logp | None = None,
) -> Tensor:
    """The gradient of `token_logp`, written out; [T, V] float32, 0 in ignored rows.

    dl/dlogits times dL/dl_j = dlogp [j = target] - p_j (dlogp - dlse + dentropy (l_j - m)), with
    m = sum_i p_i l_i; l may be log p, which differs from it by a constant of the row.

    whole: the statistics of the vocabulary that the logits are a slice of; a target elsewhere is
        then -1.
    """
    counted = (targets_T != IGNORE)[:, None]
    x = torch.where(counted, logits_TV, 0).float() * logit_scale
    slope = torch.full_like(x, logit_scale)
    if softcap:
        x = torch.tanh(x / softcap)
        slope = slope * (1 - x * x)
        x = x * softcap
    if temperature_T is not None:
        x, slope = x / temperature_T[:, None], slope / temperature_T[:, None]
    if whole is None:
        # The entropy's gradient takes differences of these: logits would cancel where p is near 1.
        x = torch.log_softmax(x, dim=-1)
        p = x.exp()
    else:
        # The target's logit as lse has it: another product's rounding would be all of 1 - p.
        at = (targets_T >= 0).nonzero().squeeze(1)
        x[at, targets_T[at]] = (whole.logp + whole.lse).float()[at]
        p = torch.exp(x - whole.lse[:, None]).float()
    coefficient = (dlogp_T if dlse_T is None else dlogp_T - dlse_T)[:, None]
    if dentropy_T is not None:
        x = torch.where(x == -torch.inf, 0, x)
        if whole is None:
            mean = (p * x).sum(-1, keepdim=True)
        else:
            mean = (whole.lse - whole.entropy).float()[:, None]
        coefficient = coefficient + dentropy_T[:, None] * (x - mean)
    dx = -p * coefficient
    here_T = torch.where(targets_T >= 0, dlogp_T, 0).float()
    dx.scatter_add_(-1, targets_T.clamp(min=0)[:, None], here_T[:, None])
    return torch.where(counted, dx * slope, 0)


def _call(
    logits_TV: Tensor,
    targets_T: Tensor,
    temperature_T: Tensor | None,
    softcap: float,
    logit_scale: float,
    entropy: bool,
) -> Logp:
    temperature = 1.0 if temperature_T is None else temperature_T
    return token_logp(
        logits_TV,
        targets_T,
        temperature=temperature,
        softcap=softcap or None,
        logit_scale=logit_scale,
        entropy=entropy,
    )
