"""Log-probability and entropy under a softmax over ids kept per token: dense and masked."""

import torch
from torch import Tensor

from r1kernels.backend import is_batch_invariant
from r1kernels.check import IGNORE
from r1kernels.reference.token_logp import Logp, logit_gradient, token_logp


def kept_logp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    kept: tuple[Tensor, Tensor],
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
) -> Logp:
    """`token_logp` of the logits [T, V] that hold -inf outside row t's kept ids and its target.

    In float64 for float64 inputs, in float32 otherwise. Differentiable by autograd, any device.
    Args as `r1kernels.linear_logp`, for flat rows [T, D]; an id of -1 is none.
    """
    x = _logits(hidden, weight, targets, bias, temperature, softcap, logit_scale)
    return token_logp(x.masked_fill(~_mask(kept, targets, x), -torch.inf), targets, entropy=entropy)


def _logits(hidden, weight, targets, bias, temperature, softcap, logit_scale) -> Tensor:
    """Transformed logits [T, V] in float32 or float64; of rows that do not count, any."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    x = torch.where((targets != IGNORE)[:, None], hidden, 0).to(wide) @ weight.to(wide).T
    x = (x if bias is None else x + bias.to(wide)) * logit_scale
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    return x / (temperature[:, None].to(wide) if isinstance(temperature, Tensor) else temperature)


def _mask(kept: tuple[Tensor, Tensor], targets: Tensor, x: Tensor) -> Tensor:
    """Where [T, V] a row keeps a logit: at its ids and its target."""
    ids_N, offsets = kept
    real_N, counted = ids_N >= 0, (targets != IGNORE).nonzero().squeeze(1)
    keep = torch.zeros_like(x, dtype=torch.bool)
    keep[torch.repeat_interleave(offsets.diff())[real_N], ids_N[real_N]] = True
    keep[counted, targets[counted]] = True
    return keep


def refuses(*_args: object) -> str | None:
    """None: runs anywhere, but promises nothing about bits."""
    return "no promise under batch_invariant" if is_batch_invariant() else None


def fwd(head, rows, kept: tuple[Tensor, Tensor], entropy: bool) -> tuple[Tensor, Tensor]:
    """(float64 [3, T] of logp, entropy and lse; transformed logits of ids and targets [N + T]).

    kept: (ids [N], offsets [T + 1]); an id of -1 is none and has a logit of -inf, and the target is
    not among the ids: its logit comes after theirs.
    """
    x = _call(head, rows)
    masked = x.masked_fill(~_mask(kept, rows.targets_T, x), -torch.inf)
    stats = token_logp(masked, rows.targets_T, entropy=entropy)
    exact = [torch.zeros_like(stats.logp) if s is None else s for s in stats]
    ids_N, offsets = kept
    of_ids = x[torch.repeat_interleave(offsets.diff()), ids_N.clamp(min=0)]
    of_targets = x.gather(1, rows.targets_T.clamp(min=0)[:, None]).squeeze(1)
    logits_M = torch.cat([of_ids.masked_fill(ids_N < 0, -torch.inf), of_targets])
    return torch.stack(exact).double(), logits_M


def bwd(
    upstream: tuple[Tensor, Tensor | None, Tensor],
    head,
    rows,
    kept: tuple[Tensor, Tensor],
    exact_3T: Tensor,
    logits_M: Tensor,
    dtypes: list[torch.dtype | None],
) -> list[Tensor | None]:
    """Gradients of hidden, weight and bias in the given dtypes; None where that is None.

    upstream: gradients of logp, entropy (None: of no interest) and lse.
    """
    x = _call(head, rows)
    masked = x.masked_fill(~_mask(kept, rows.targets_T, x), -torch.inf)
    slope = torch.full_like(x, head.logit_scale)
    if rows.temperature_T is not None:
        slope, x = slope / rows.temperature_T[:, None], x * rows.temperature_T[:, None]
    if head.softcap:
        slope = slope * (1 - (x / head.softcap) ** 2)
    dx = logit_gradient(*upstream, masked, rows.targets_T, None, 0.0, 1.0) * slope
    # A row that does not count may hold anything, its temperature too.
    counted = (rows.targets_T != IGNORE)[:, None]
    dx = torch.where(counted, dx, 0)
    counted_TD = torch.where(counted, rows.hidden_TD, 0).float()
    found = (lambda: dx @ head.weight_VD.float(), lambda: dx.T @ counted_TD, lambda: dx.sum(0))
    return [None if to is None else f().to(to) for f, to in zip(found, dtypes, strict=True)]


def _call(head, rows) -> Tensor:
    temperature = 1.0 if rows.temperature_T is None else rows.temperature_T
    options = (head.bias_V, temperature, head.softcap, head.logit_scale)
    return _logits(rows.hidden_TD, head.weight_VD, rows.targets_T, *options)
