"""The logits-input op on the CPU, in the dtype of the logits: one read forward, one read and one
write backward."""

import torch
from torch import Tensor

from r1kernels._native.common import CODES, address, extension, refusal
from r1kernels.reference.token_logp import Logp
from r1kernels.rows import gradient_terms


def refuses(logits: Tensor | None = None, *_args: object) -> str | None:
    """Why these logits cannot be taken, or None."""
    return refusal(logits)


def fwd(
    logits_TV: Tensor,
    targets_T: Tensor,
    temperature_T: Tensor | None,
    softcap: float,
    logit_scale: float,
    entropy: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(logp, entropy or None, lse), each [T] float64."""
    logits_TV = _rows(logits_TV)
    count = len(targets_T)
    logp_T, lse_T = torch.empty(count, dtype=torch.float64), torch.empty(count, dtype=torch.float64)
    entropy_T = torch.empty(count, dtype=torch.float64) if entropy else None
    extension.token_forward(
        logits=logits_TV.data_ptr(),
        dtype=CODES[logits_TV.dtype],
        rows=count,
        vocab=logits_TV.shape[1],
        ld=logits_TV.stride(0),
        targets=targets_T.data_ptr(),
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=address(temperature_T),
        entropy=entropy,
        logp=logp_T.data_ptr(),
        entropy_out=address(entropy_T),
        lse=lse_T.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return logp_T, entropy_T, lse_T


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
    source_TV = _rows(logits_TV)
    inplace = inplace and source_TV is logits_TV
    dlogits_TV = source_TV if inplace else torch.empty(source_TV.shape, dtype=source_TV.dtype)
    terms = gradient_terms(Logp(logp_T, entropy_T, lse_T), dlogp_T, dentropy_T, dlse_T)
    extension.token_backward(
        logits=source_TV.data_ptr(),
        grad=dlogits_TV.data_ptr(),
        dtype=CODES[source_TV.dtype],
        rows=len(targets_T),
        vocab=source_TV.shape[1],
        ld=source_TV.stride(0),
        grad_ld=dlogits_TV.stride(0),
        targets=targets_T.data_ptr(),
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=address(temperature_T),
        **{name: address(x) for name, x in terms.items()},
        threads=torch.get_num_threads(),
    )
    return dlogits_TV


def _rows(logits_TV: Tensor) -> Tensor:
    """Rows may be any distance apart; the elements of a row must be neighbours."""
    return logits_TV if logits_TV.stride(1) == 1 else logits_TV.contiguous()
