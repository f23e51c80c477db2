"""The head over kept ids on the CPU: gathered dot products in C++, one number per id stored."""

import torch
from torch import Tensor

from r1kernels._native.common import CODES, address, extension
from r1kernels._native.linear_logp import refuses
from r1kernels.reference.token_logp import Logp
from r1kernels.rows import gradient_terms, ragged_rows

__all__ = ["bwd", "fwd", "refuses"]


def fwd(head, rows, kept: tuple[Tensor, Tensor], entropy: bool) -> tuple[Tensor, Tensor]:
    """See `r1kernels.reference.kept_logp.fwd`."""
    given, tensors = _where(head, rows, kept)
    count = len(rows.targets_T)
    exact_3T = torch.zeros(3, count, dtype=torch.float64)
    logp_T, entropy_T, lse_T = exact_3T
    logits_M = torch.empty(len(kept[0]) + count)
    bias_V = None if head.bias_V is None else head.bias_V.float().contiguous()
    extension.kept_forward(
        **given,
        bias=address(bias_V),
        entropy=entropy,
        logits=logits_M.data_ptr(),
        logp=logp_T.data_ptr(),
        entropy_out=entropy_T.data_ptr(),
        lse=lse_T.data_ptr(),
    )
    del tensors
    return exact_3T, logits_M


def bwd(
    upstream,
    head,
    rows,
    kept: tuple[Tensor, Tensor],
    exact_3T: Tensor,
    logits_M: Tensor,
    dtypes: list[torch.dtype | None],
) -> list[Tensor | None]:
    """See `r1kernels.reference.kept_logp.bwd`."""
    given, tensors = _where(head, rows, kept)
    hidden_TD, weight_VD, ids_N, _, targets_T, _ = tensors
    terms = gradient_terms(Logp(*exact_3T), *upstream)
    dlogits_M = torch.empty_like(logits_M)
    to_hidden, to_weight, to_bias = dtypes
    dhidden_TD = None if to_hidden is None else torch.empty(hidden_TD.shape, dtype=to_hidden)
    extension.kept_backward(
        **given,
        logits=logits_M.data_ptr(),
        **{name: address(x) for name, x in terms.items()},
        dlogits=dlogits_M.data_ptr(),
        dhidden=address(dhidden_TD),
    )
    dweight_VD = None if to_weight is None else torch.zeros(weight_VD.shape, dtype=to_weight)
    dbias_V = None if to_bias is None else torch.zeros(len(weight_VD))
    if dweight_VD is not None or dbias_V is not None:
        places = torch.arange(len(targets_T))
        rows_M = torch.cat([ragged_rows(kept[1], len(ids_N)), places])
        sorted_M, order_M = torch.cat([ids_N, targets_T.int()]).sort(stable=True)
        found, counts = sorted_M.unique_consecutive(return_counts=True)
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        none = int((found < 0).sum())
        extension.kept_weight(
            hidden=given["hidden"],
            dtype=given["dtype"],
            segments=len(found) - none,
            width=given["width"],
            hidden_ld=given["hidden_ld"],
            starts=starts[none:].data_ptr(),
            order=order_M.data_ptr(),
            rows=rows_M.data_ptr(),
            ids=found[none:].data_ptr(),
            dlogits=dlogits_M.data_ptr(),
            dweight=address(dweight_VD),
            weight_dtype=CODES[torch.float32 if to_weight is None else to_weight],
            dbias=address(dbias_V),
            threads=given["threads"],
        )
    return [dhidden_TD, dweight_VD, None if dbias_V is None else dbias_V.to(to_bias)]


def _where(head, rows, kept: tuple[Tensor, Tensor]) -> tuple[dict, tuple]:
    """What both kernels are told, and the tensors whose addresses it holds."""
    hidden_TD, weight_VD = (
        x if x.stride(1) == 1 else x.contiguous() for x in (rows.hidden_TD, head.weight_VD)
    )
    ids_N, offsets, targets_T = (x.contiguous() for x in (*kept, rows.targets_T))
    temperature_T = rows.temperature_T
    given = {
        "hidden": hidden_TD.data_ptr(),
        "weight": weight_VD.data_ptr(),
        "dtype": CODES[hidden_TD.dtype],
        "rows": len(targets_T),
        "width": hidden_TD.shape[1],
        "hidden_ld": hidden_TD.stride(0),
        "weight_ld": weight_VD.stride(0),
        "ids": ids_N.data_ptr(),
        "offsets": offsets.data_ptr(),
        "targets": targets_T.data_ptr(),
        "logit_scale": head.logit_scale,
        "softcap": head.softcap,
        "temperature": address(temperature_T),
        "threads": torch.get_num_threads(),
    }
    return given, (hidden_TD, weight_VD, ids_N, offsets, targets_T, temperature_T)
