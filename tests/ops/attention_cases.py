"""Packed attention problems and their truth by autograd in float64."""

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from r1kernels.reference.attention import attention


def offsets(lengths) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))


class Case(NamedTuple):
    queries: tuple[int, ...]
    keys: tuple[int, ...] | None
    causal: bool = True
    heads: tuple[int, int, int] = (4, 2, 16)
    window: int | None = None
    softcap: float | None = None

    @property
    def offsets(self):
        return offsets(self.queries), offsets(self.queries if self.keys is None else self.keys)

    @property
    def scale(self):
        return self.heads[-1] ** -0.5

    @property
    def options(self):
        return {
            "causal": self.causal,
            "scale": self.scale,
            "window": self.window,
            "softcap": self.softcap,
        }


CASES = {
    "short": Case((5, 9, 1, 7), None),
    "uneven": Case((3, 0, 40, 1, 2, 17), None, heads=(6, 2, 24)),
    "long and short": Case((300, 4, 4, 270), None, heads=(3, 1, 16)),
    "one head for all": Case((4, 6), (9, 6), heads=(4, 1, 64)),
    "more keys than queries": Case((3, 0, 5, 2), (8, 4, 5, 7), heads=(4, 4, 32)),
    "all keys": Case((4, 2, 0, 3), (7, 0, 5, 1), causal=False, heads=(4, 1, 16)),
    "one query each": Case((1, 1, 1), (5, 1, 9)),
    "window": Case((9, 2, 12), None, window=4),
    "window, more keys": Case((3, 12), (9, 14), window=4, softcap=2.0),
    "window wider than all": Case((9, 2), None, window=40),
    "softcap": Case((9, 2, 12), None, softcap=1.5, heads=(4, 1, 8)),
}


class Problem(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    dout: Tensor

    def to(self, dtype) -> "Problem":
        return Problem(*(x.to(dtype) for x in self))


def draw(case: Case, dtype=torch.float64, device="cpu", seed=0) -> Problem:
    (T, S), (H, N, E) = (x[-1] for x in case.offsets), case.heads
    generator = torch.Generator().manual_seed(seed)
    sizes = ((T, H, E), (S, N, E), (S, N, E), (T, H, E))
    made = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    # a few scores stand out, as in trained models
    made[0][::3] *= 3
    return Problem(*(x.to(device, dtype) for x in made))


def by_autograd(case: Case, problem: Problem) -> tuple[Tensor, ...]:
    """(out, lse, dquery, dkey, dvalue) by the definition, in the problem's dtype."""
    inputs = [x.detach().requires_grad_() for x in problem[:3]]
    out, lse = attention(*inputs, *case.offsets, **case.options)
    return out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, problem.dout)


def by_torch(case: Case, problem: Problem) -> tuple[Tensor, ...]:
    """The same by torch's own attention on each sequence, with lse by the definition."""
    if case.softcap is not None:
        return by_autograd(case, problem)
    inputs = [x.detach().requires_grad_() for x in problem[:3]]
    outs = []
    for (q0, q1), (k0, k1) in zip(*map(pairwise, case.offsets), strict=True):
        query, key, value = (
            x[a:b].transpose(0, 1).unsqueeze(0)
            for x, (a, b) in zip(inputs, ((q0, q1), (k0, k1), (k0, k1)), strict=True)
        )
        # the key beside a query, and those before it
        before = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
        before = before.to(query.device)
        seen = (before >= 0) & (before < (case.window or k1)) | (not case.causal)
        out = query.new_zeros(query.shape)
        if k0 < k1:
            out = scaled_dot_product_attention(
                query, key, value, attn_mask=seen, scale=case.scale, enable_gqa=True
            )
        outs.append(out[0].transpose(0, 1))
    out, lse = torch.cat(outs), by_autograd(case, problem)[1]
    return out.detach(), lse, *torch.autograd.grad(out, inputs, problem.dout)


NAMES = ("out", "lse", "dquery", "dkey", "dvalue")
