"""The logits-input op on the CPU, in the dtype of the logits: one read forward, one read and one
write backward."""

import torch
from torch import Tensor

from r1kernels.reference.token_logp import Logp

try:
    from r1kernels import _C
except ImportError as error:
    raise ImportError(
        f"the C++ extension is not built ({error}); `pip install .` with a C++ compiler builds it"
    ) from error

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def refuses(logits: Tensor | None = None, *_args: object) -> str | None:
    """Why these logits cannot be taken, or None."""
    if logits is None:
        return None
    if logits.device.type != "cpu":
        return f"tensor is on {logits.device.type}"
    return None if logits.dtype in CODES else f"dtype {logits.dtype}"


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
    _C.token_forward(
        logits=logits_TV.data_ptr(),
        dtype=CODES[logits_TV.dtype],
        rows=count,
        vocab=logits_TV.shape[1],
        ld=logits_TV.stride(0),
        targets=targets_T.data_ptr(),
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=_address(temperature_T),
        entropy=entropy,
        logp=logp_T.data_ptr(),
        entropy_out=_address(entropy_T),
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
    _C.token_backward(
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
        temperature=_address(temperature_T),
        **{name: _address(x) for name, x in terms.items()},
        threads=torch.get_num_threads(),
    )
    return dlogits_TV


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


def _rows(logits_TV: Tensor) -> Tensor:
    """Rows may be any distance apart; the elements of a row must be neighbours."""
    return logits_TV if logits_TV.stride(1) == 1 else logits_TV.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
