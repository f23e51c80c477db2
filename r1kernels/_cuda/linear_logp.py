"""The linear head on Hopper GPUs: the Triton backend with GEMM 1 by csrc/cuda/head_gemm.cu.

bfloat16 alone. GEMMs 2 and 3, the target column, the sums over tiles and the rows that are redone
are Triton's and the library's.
"""

import torch
from torch import Tensor

from r1kernels._cuda.common import address, device_refusal, extension, place, rows_refusal
from r1kernels._triton import linear_logp as triton_head
from r1kernels._triton.head_kernels import GRADIENT, STORE, SUMS, padded

BLOCK_V = 128
# Blocks that share a vocabulary tile, and pairs of row tiles that meet it one after the other.
CLUSTER, GROUP = 2, 8
MODES = {SUMS.value: 0, STORE.value: 1, GRADIENT.value: 2}


def gemm(
    hidden_CD: Tensor,
    targets_C: Tensor,
    inverse_temperature_C: Tensor,
    anchor_C: Tensor,
    row_terms: tuple[Tensor, Tensor, Tensor] | None,
    head,
    entropy: bool,
    store_CV: Tensor | None,
    mode: int,
) -> Tensor:
    """Partial sums [planes, tiles, C]; the contract is in `head_kernels._launch_head`."""
    (C, D), V = hidden_CD.shape, head.weight_VD.shape[0]
    planes = (mode != GRADIENT.value) * (1 + entropy) + (mode != SUMS.value)
    partial = hidden_CD.new_empty((planes, -(-V // BLOCK_V), C), dtype=torch.float32)
    # Held until the launch: the allocator may give away what nothing refers to.
    bias_V = None if head.bias_V is None else head.bias_V.float()
    terms = [x.contiguous() for x in (targets_C, anchor_C, inverse_temperature_C)]
    alpha_C, beta_C, centre_C = (
        (None, None, None) if row_terms is None else (x.contiguous() for x in row_terms)
    )
    extension.head_gemm(
        hidden=address(hidden_CD),
        hidden_stride=hidden_CD.stride(0),
        weight=address(head.weight_VD),
        weight_stride=head.weight_VD.stride(0),
        targets=address(terms[0]),
        anchor=address(terms[1]),
        per_tau=address(terms[2]),
        bias=address(bias_V),
        alpha=address(alpha_C),
        beta=address(beta_C),
        centre=address(centre_C),
        out=address(store_CV),
        columns=0 if store_CV is None else store_CV.shape[1],
        partial=address(partial),
        C=C,
        V=V,
        D=D,
        scale=head.logit_scale,
        softcap=head.softcap,
        mode=MODES[mode],
        entropy=entropy,
        cluster=CLUSTER,
        group=GROUP,
        **place(hidden_CD),
    )
    return partial


class HeadChunk(triton_head.HeadChunk):
    """See `r1kernels.head_contract.HeadChunk`."""

    gemm = staticmethod(gemm)

    @staticmethod
    def bytes_per_row(head) -> int:
        V, D = head.weight_VD.shape
        # the stored row, three planes of partial sums, a float32 row of dhidden
        return 2 * padded(V) + 12 * -(-V // BLOCK_V) + 4 * D


def refuses(
    hidden: Tensor | None = None,
    weight: Tensor | None = None,
    lora_VR: Tensor | None = None,
    *args: object,
) -> str | None:
    """Why these kernels cannot take a head's hidden states and weight, or None."""
    reason = device_refusal(hidden) or triton_head.refuses(hidden, weight, lora_VR, *args)
    if reason is not None or hidden is None:
        return reason
    if hidden.dtype != torch.bfloat16:
        return f"dtype is {hidden.dtype}; the tensor-core kernel takes bfloat16"
    if lora_VR is not None:
        return "no low-rank term"
    if hidden.shape[1] % 8:
        return f"hidden width {hidden.shape[1]} is no multiple of 8"
    return rows_refusal("hidden", hidden) or (
        None if weight is None else rows_refusal("weight", weight)
    )
