"""The linear head on a GPU: GEMM 1 and the softmax in one kernel, GEMMs 2 and 3 by the library.

`forward` writes E = exp(l - anchor) [C, V] from the GEMM's epilogue (bfloat16 for bfloat16 inputs)
and the row sums; `gradients` multiplies it, row factors outside: dH = v (E W), dW += E^T (v h).
The entropy's gradient and `backward` write dL/dz itself from a second run of the same GEMM.
GEMM operands have the inputs' dtype; accumulation is float32 within and across chunks. The target
column goes through float32 kernels of its own.
"""

import functools
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from r1kernels._triton.common import (
    INTERPRETED,
    RowList,
    architecture,
    device_refusal,
    dtype_refusal,
    inverse_temperature,
)
from r1kernels._triton.counted_kernels import KeptTiles, add_hidden_rows, add_weight_rows
from r1kernels._triton.head_configs import ALIGNMENT, COUNTED, is_aligned, launch_config
from r1kernels._triton.head_kernels import (
    RANK_BLOCK,
    forward_chunk,
    gradient_chunk,
    padded,
    store_dtype,
    target_slope,
)
from r1kernels._triton.product_kernels import add_product
from r1kernels._triton.target_kernels import add_target_hidden, add_target_weight, target_logits
from r1kernels.backend import is_batch_invariant
from r1kernels.reference.token_logp import Logp
from r1kernels.rows import SKIP_TILE, left_out
from r1kernels.weight_grads import accumulate

# Vocabulary columns widened or converted at a time where the stored matrix is no GEMM operand.
SLICE_V = 8192


class HeadChunk:
    """See `r1kernels.head_contract.HeadChunk`."""

    every_row = False
    skip_mass = 0.0
    gemm = None  # in place of GEMM 1's kernel; `_launch_head` has the contract

    def __init__(self, head, rows: int, entropy: bool, entropy_grad: bool):
        weight_VD = head.weight_VD
        bias_V = None if head.bias_V is None else head.bias_V.contiguous()
        if weight_VD.stride(1) != 1:
            weight_VD = weight_VD.contiguous()
        lora_VR = None if head.lora_VR is None else _pad(head.lora_VR)
        self.head = replace(head, weight_VD=weight_VD, bias_V=bias_V, lora_VR=lora_VR)
        self.capacity = rows
        self.entropy = entropy
        self.buffer: Tensor | None = None
        self.kept = False

    @staticmethod
    def bytes_per_row(head) -> int:
        V, D = head.weight_VD.shape
        dtype = head.weight_VD.dtype
        tiles = launch_config(architecture(head.weight_VD.device), dtype, False).tiles(V)
        # the stored row, three planes of partial sums, a float32 row of dhidden
        return padded(V) * store_dtype(dtype).itemsize + 12 * tiles + 4 * D

    @staticmethod
    def block_rows() -> int:
        return 1

    def target_logits(self, rows) -> Tensor:
        self._take(rows)
        return target_logits(
            self.hidden_CD, self.targets_C, self.temperature_C, self.head, self.low_CR
        )

    def forward(self, rows, keep: bool) -> Logp:
        target_C = rows.target_logit_T
        if target_C is None:
            target_C = self.target_logits(rows)
        else:
            self._take(rows)
        anchor_C = target_C.clone()
        if rows.prior_T is not None:
            anchor_C -= rows.prior_T.float().nan_to_num(0.0).clamp(-8.0, 0.0)
        store_CV = self._store() if keep else None
        sums = forward_chunk(
            self.hidden_CD, self.targets_C, self.temperature_C, anchor_C, self.head, self.entropy,
            store_CV, self.low_CR, self.gemm,
        )  # fmt: skip
        s_C, u_C = sums.s_C, sums.u_C
        lost_C = s_C - sums.rounded_C if keep else None
        self.kept, self.unit_C = keep, None
        if self.head.shard is not None:
            own_C = anchor_C
            anchor_C, s_C, u_C, lost_C = self.head.shard.combine(own_C, s_C, u_C, lost_C)
            # What E, around this rank's anchor, is in units of the common one; at most 1.
            self.unit_C = (own_C.double() - anchor_C).exp()
        self.s_C, self.lost_C = s_C, lost_C
        # float64 on [C] numbers: log S must not cancel against the mean where the entropy is small.
        q_C = target_C.double() - anchor_C
        e_C = q_C.exp()
        self.total_C = s_C + e_C
        log_C = self.total_C.log()
        # log1p keeps the digits of a logp near 0; far from it exp(q) may leave the range.
        logp_C = torch.where(q_C > -100.0, -torch.log1p(s_C / e_C), q_C - log_C)
        entropy_C = None
        if self.entropy:
            mean_C = (u_C + torch.where(e_C > 0, e_C * q_C, 0.0)) / self.total_C
            entropy_C = (log_C - mean_C).clamp(min=0.0)
        self.stats = Logp(logp_C, entropy_C, anchor_C + log_C)
        if keep and self.skip_mass:
            # With a softcap what is stored, and so what is measured, is the mass times its slope.
            tiles = store_CV[:, : self.head.weight_VD.shape[0]].split(SKIP_TILE, dim=1)
            mass_CS = torch.stack([x_CS.sum(1, dtype=torch.float32) for x_CS in tiles], dim=1)
            mass_CS = mass_CS / self.total_C[:, None]
            self.skip_CS, self.dropped_C = left_out(mass_CS, self.targets_C, self.skip_mass)
        return self.stats

    def gradients(
        self, active: Tensor | None, dlogp_C: Tensor, dentropy_C: Tensor | None, grads, last: bool
    ) -> Tensor | None:
        at = slice(None) if active is None else active
        hidden_CD, targets_C = self.hidden_CD[at], self.targets_C[at]
        low_CR = None if self.low_CR is None else self.low_CR[at]
        temperature_C = None if self.temperature_C is None else self.temperature_C[at]
        if dentropy_C is not None or not self.kept:
            stats = Logp(*(None if x is None else x[at] for x in self.stats))
            return self._recompute(
                hidden_CD, low_CR, targets_C, temperature_C, stats, dlogp_C, dentropy_C, None,
                grads,
            )  # fmt: skip
        listed = self._listed(grads, dlogp_C)
        store_CV = self.buffer[: len(self.targets_C)][at]
        kept = None
        if self.skip_mass:
            skip_CS = self.skip_CS[at]
            for tile, store_CS in enumerate(store_CV.split(SKIP_TILE, dim=1)):
                if tile < skip_CS.shape[1]:
                    store_CS.masked_fill_(skip_CS[:, tile, None], 0.0)
            if listed is not None:
                V = len(self.head.weight_VD)
                kept = KeptTiles.of_rows(~skip_CS, SKIP_TILE, listed, V)
        per_tau_C = inverse_temperature(temperature_C, hidden_CD)
        factor_C = dlogp_C * self.head.logit_scale * per_tau_C / self.total_C[at]
        own_C = (factor_C if self.unit_C is None else factor_C * self.unit_C[at]).float()
        factor_C = factor_C.float()
        # What rounding took from the stored row is taken from the target too: the row sums to zero.
        slope_C = 1.0
        if self.head.softcap:
            slope_C = target_slope(
                (self.stats.logp + self.stats.lse)[at], per_tau_C, self.head.softcap
            )
        target_grad_C = (factor_C * (slope_C * self.s_C[at] - self.lost_C[at])).float()
        return self._products(
            hidden_CD, low_CR, targets_C, store_CV, -own_C, target_grad_C, grads, listed, kept
        )

    def backward(
        self,
        rows,
        stats: Logp,
        dlogp_C: Tensor,
        dentropy_C: Tensor | None,
        dlse_C: Tensor | None,
        grads,
    ) -> Tensor | None:
        self._take(rows)
        return self._recompute(
            self.hidden_CD, self.low_CR, self.targets_C, self.temperature_C, stats, dlogp_C,
            dentropy_C, dlse_C, grads,
        )  # fmt: skip

    def _take(self, rows) -> None:
        hidden_CD = rows.hidden_TD
        # Where rows start decides whether the aligned tiles may run. A row alone is contiguous
        # whatever its stride says; an expanded one has a stride that no descriptor takes.
        width, start = hidden_CD.shape[1], hidden_CD.data_ptr() % ALIGNMENT
        as_is = hidden_CD.stride(1) == 1 and hidden_CD.stride(0) >= width
        if is_batch_invariant():
            as_is = hidden_CD.stride() == (width, 1) and not start
        if not as_is:
            hidden_CD = hidden_CD.clone(memory_format=torch.contiguous_format)
        self.hidden_CD = hidden_CD
        low_CR = self.head.low(self.hidden_CD)
        self.low_CR = None if low_CR is None else _pad(low_CR.to(hidden_CD.dtype))
        self.targets_C = rows.targets_T.contiguous()
        self.temperature_C = rows.temperature_T

    def _store(self) -> Tensor:
        """The buffer's first rows, as many as the chunk has."""
        if self.buffer is None:
            dtype = store_dtype(self.hidden_CD.dtype)
            columns = padded(self.head.weight_VD.shape[0])
            self.buffer = self.hidden_CD.new_empty((self.capacity, columns), dtype=dtype)
        return self.buffer[: len(self.targets_C)]

    def _recompute(
        self, hidden_CD, low_CR, targets_C, temperature_C, stats, dlogp_C, dentropy_C, dlse_C,
        grads,
    ) -> Tensor | None:  # fmt: skip
        """Gradients through dL/dz, written over whatever the buffer holds."""
        self.kept = False
        store_CV = self._store()[: len(targets_C)]
        listed = self._listed(grads, dlogp_C, dentropy_C, dlse_C)
        target_grad_C = gradient_chunk(
            hidden_CD, targets_C, temperature_C, stats, dlogp_C, dentropy_C, dlse_C,
            self.head, store_CV, low_CR, listed, self.gemm,
        )  # fmt: skip
        return self._products(
            hidden_CD, low_CR, targets_C, store_CV, None, target_grad_C, grads, listed
        )

    def _listed(self, grads, *upstream: Tensor | None) -> RowList | None:
        """The rows with a coefficient, for GEMMs that read their number; None for those over all.

        The gradient of a bias reads every stored row.
        """
        given = [x_C != 0 for x_C in upstream if x_C is not None]
        counted = COUNTED.get(architecture(given[0].device), False) and not self.every_row
        if not counted or grads.bias_V is not None or is_batch_invariant():
            return None
        # What is compiled for GPUs; the interpreter has no products of bfloat16.
        fits = is_aligned(self.hidden_CD, self.head.weight_VD)
        if not fits or self.hidden_CD.dtype != (torch.float32 if INTERPRETED else torch.bfloat16):
            return None
        return RowList.of(functools.reduce(torch.logical_or, given))

    def _products(
        self, hidden_CD, low_CR, targets_C, store_CV, factor_C, target_grad_C, grads, listed,
        kept=None,
    ) -> Tensor | None:  # fmt: skip
        """GEMMs 2 and 3 with dL/dz = factor_C * store_CV, and the target column."""
        V = len(self.head.weight_VD)
        store_CV = store_CV[:, :V]
        pairs = [_Pair.of(hidden_CD, self.head.weight_VD, grads.hidden, grads.weight_VD)]
        if low_CR is not None:
            rank = len(self.head.lora_RD)
            lora_VR = self.head.lora_VR[:, :rank]
            pairs.append(_Pair.of(low_CR[:, :rank], lora_VR, grads.low, grads.lora_VR))
        if store_CV.dtype != hidden_CD.dtype:
            self._half_products(pairs, store_CV, factor_C)
        else:
            for pair in pairs:
                if pair.dleft_CX is not None and listed is not None:
                    ones_C = torch.ones_like(target_grad_C)
                    factors_C = ones_C if factor_C is None else factor_C
                    add_hidden_rows(pair.dleft_CX, store_CV, pair.right_VX, factors_C, listed, kept)
                elif pair.dleft_CX is not None:
                    _add_hidden_product(pair.dleft_CX, store_CV, pair.right_VX)
                    if factor_C is not None:
                        pair.dleft_CX.mul_(factor_C[:, None])
                if pair.dright_VX is not None:
                    left_CX = pair.left_CX
                    if factor_C is not None:
                        left_CX = (left_CX * factor_C[:, None]).to(left_CX.dtype)
                    if listed is not None:
                        add_weight_rows(pair.dright_VX, store_CV, left_CX, listed, kept)
                    else:
                        accumulate(pair.dright_VX, store_CV.T, left_CX)
        for pair in pairs:
            if pair.dleft_CX is not None:
                add_target_hidden(pair.dleft_CX, pair.right_VX, targets_C, target_grad_C)
            if pair.dright_VX is not None:
                add_target_weight(pair.dright_VX, pair.left_CX, targets_C, target_grad_C)
        if grads.bias_V is not None:
            ones_C = torch.ones_like(target_grad_C) if factor_C is None else factor_C
            for at in range(0, V, SLICE_V):
                grads.bias_V[at : at + SLICE_V] += ones_C @ store_CV[:, at : at + SLICE_V].float()
            one_C1 = torch.ones_like(target_grad_C)[:, None]
            add_target_weight(grads.bias_V[:, None], one_C1, targets_C, target_grad_C)
        dhidden_CD = pairs[0].dleft_CX
        if low_CR is not None:
            self.head.add_low(pairs[1].dleft_CX, hidden_CD, dhidden_CD, grads)
        return dhidden_CD

    def _half_products(self, pairs, store_CV, factor_C) -> None:
        """The GEMMs of float16 inputs, whose stored matrix is float32: slices of it become float16
        after a power of two per row that brings the row's largest entry near the top of the range.
        """
        top_C = torch.linalg.vector_norm(store_CV, torch.inf, dim=1)
        raise_C = _raise(top_C)
        lower_C = 1.0 / raise_C if factor_C is None else factor_C / raise_C
        left = []
        for pair in pairs:
            left_CX = pair.left_CX.float() * lower_C[:, None]
            raise_left = _raise(torch.linalg.vector_norm(left_CX, torch.inf))
            left.append(((left_CX * raise_left).half(), raise_left))
        for at in range(0, store_CV.shape[1], SLICE_V):
            columns = slice(at, at + SLICE_V)
            slice_CS = (store_CV[:, columns] * raise_C[:, None]).half()
            for pair, (left_CX, raise_left) in zip(pairs, left, strict=True):
                if pair.dleft_CX is not None:
                    _add_hidden_product(pair.dleft_CX, slice_CS, pair.right_VX[columns])
                if pair.dright_VX is not None:
                    product_SX = torch.zeros_like(pair.dright_VX[columns])
                    accumulate(product_SX, slice_CS.T, left_CX)
                    pair.dright_VX[columns].addcdiv_(product_SX, raise_left)
        for pair in pairs:
            if pair.dleft_CX is not None:
                pair.dleft_CX.mul_(lower_C[:, None])


class _Pair(NamedTuple):
    """Operands of GEMM 1, left right^T, and their gradients in float32; None: not wanted."""

    left_CX: Tensor
    right_VX: Tensor
    dleft_CX: Tensor | None
    dright_VX: Tensor | None

    @classmethod
    def of(cls, left_CX: Tensor, right_VX: Tensor, wanted: bool, dright_VX: Tensor | None):
        dleft_CX = left_CX.new_zeros(left_CX.shape, dtype=torch.float32) if wanted else None
        return cls(left_CX, right_VX, dleft_CX, dright_VX)


def _pad(x_XR: Tensor) -> Tensor:
    """With columns of 0 up to a rank that the GEMM kernel takes without a mask."""
    return F.pad(x_XR, (0, -x_XR.shape[1] % RANK_BLOCK))


def _raise(top: Tensor) -> Tensor:
    """The power of two that brings top into [2^13, 2^14); at most 2^100."""
    exponent = (14 - torch.frexp(top).exponent).clamp(max=100)
    return torch.ldexp(torch.ones_like(top), exponent)


def _add_hidden_product(out_CD: Tensor, left_CV: Tensor, weight_VD: Tensor) -> None:
    """`accumulate`, where a row's result must not depend on the others under batch_invariant."""
    (add_product if is_batch_invariant() else accumulate)(out_CD, left_CV, weight_VD)


def refuses(
    hidden: Tensor | None = None,
    weight: Tensor | None = None,
    lora_VR: Tensor | None = None,
    *_args: object,
) -> str | None:
    """Why these kernels cannot take a head's hidden states and weight, or None."""
    if hidden is None:
        return device_refusal(None)
    reason = device_refusal(hidden) or dtype_refusal(hidden)
    if reason is None and INTERPRETED and hidden.dtype == torch.bfloat16:
        return "the interpreter's bfloat16 dot product is wrong"
    if reason is None and weight is not None and weight.dtype != hidden.dtype:
        return f"weight is {weight.dtype}, hidden {hidden.dtype}"
    if lora_VR is not None and is_batch_invariant():
        return "no low-rank term under batch_invariant"
    return reason
