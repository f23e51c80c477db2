"""The custom ops behind `linear_logp`: forward, backward by recomputation, autograd."""

import torch
from torch import Tensor

from r1kernels import chunked_head, head_inputs
from r1kernels.backend import isolated
from r1kernels.check import no_second_derivative
from r1kernels.head_contract import Gradients
from r1kernels.head_inputs import HeadInputs, split
from r1kernels.reference.token_logp import Logp
from r1kernels.rows import spread

MUTATING_SCHEMA = head_inputs.SCHEMA.replace("Tensor? weight_grad", "Tensor(a!)? weight_grad")


@torch.library.custom_op(
    "r1kernels::linear_logp_fwd",
    mutates_args=(),
    schema=f"({head_inputs.SCHEMA}, bool entropy, bool frozen, int? workspace_mb) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@isolated
def linear_logp_fwd(*args):
    """(logp, entropy, lse, float64 [3, T] of the same, which rows count, how many (on the CPU),
    d logp / d hidden, d entropy / d hidden). What was not asked for is empty.
    """
    call, (entropy, frozen, workspace_mb) = split(args)
    chunk, head, rows, counted_T, count = call.start(workspace_mb, (entropy, frozen))
    jac_TD = jac_entropy_TD = None
    if frozen:
        stats, jac_TD, jac_entropy_TD = chunked_head.jacobian(
            chunk, head, rows, entropy, workspace_mb
        )
    else:
        stats = chunked_head.forward(chunk, head, rows, entropy, workspace_mb)
    none = call.hidden_TD.new_empty(0, dtype=torch.float32)
    exact_3T = torch.stack([stats.lse if x is None else x for x in stats])
    if rows.place_T is not None:
        exact_3T = spread(exact_3T.T, rows.place_T, rows.total).T.contiguous()
    logp_T, entropy_T, lse_T = exact_3T.float()
    return (
        logp_T.clone(),
        entropy_T.clone() if entropy else none,
        lse_T.clone(),
        exact_3T,
        # Of its own: an op's result may not share memory with an argument.
        counted_T.clone(),
        torch.tensor([count]),
        *(none.clone() if x is None else x for x in (jac_TD, jac_entropy_TD)),
    )


@linear_logp_fwd.register_fake
def _(*args):
    call, (entropy, frozen, _) = split(args)

    def wide(like: Tensor, wanted: bool) -> Tensor:
        return call.hidden_TD.new_empty(like.shape if wanted else 0, dtype=torch.float32)

    exact_3T = call.hidden_TD.new_empty((3, *call.targets_T.shape), dtype=torch.float64)
    return (
        *(wide(call.targets_T, wanted) for wanted in (True, entropy, True)),
        exact_3T,
        exact_3T.new_empty(call.targets_T.shape, dtype=torch.bool),
        torch.empty(1, dtype=torch.int64),
        wide(call.hidden_TD, frozen),
        wide(call.hidden_TD, frozen and entropy),
    )


@torch.library.custom_op(
    "r1kernels::linear_logp_bwd",
    mutates_args=("weight_grad_VD",),
    schema=f"({MUTATING_SCHEMA}, Tensor dlogp_T, Tensor? dentropy_T, Tensor? dlse_T, "
    "Tensor exact_3T, Tensor counted_T, Tensor count, bool[] needs, int? workspace_mb) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@isolated
def linear_logp_bwd(*args):
    """(dhidden, dweight, dbias, dA, dB) by recomputation; empty what `needs` does not ask for.

    weight_grad_VD is the buffer that dweight accumulates in, where there is one.
    """
    call, (*upstream, exact_3T, counted_T, count, needs, workspace_mb) = split(args)
    chunk, head, rows, _, _ = call.start(workspace_mb, (needs,), counted_T, count.item())
    dentropy_T, at = upstream[1], rows.place_T
    logp_T, entropy_T, lse_T = exact_3T
    stats = Logp(logp_T, None if dentropy_T is None else entropy_T, lse_T)
    if at is not None:
        stats = Logp(*(None if x is None else x[at] for x in stats))
        upstream = (None if x is None else x[at] for x in upstream)
    grads = Gradients.zeros(head, *needs, weight_grad_VD=call.weight_grad_VD)
    dhidden_TD = chunked_head.backward(chunk, head, rows, stats, *upstream, grads, workspace_mb)
    none = call.hidden_TD.new_empty(0)
    return (
        none if dhidden_TD is None else dhidden_TD,
        *(
            none.clone() if grad is None or grad is call.weight_grad_VD else grad.to(x.dtype)
            for x, grad in zip(call.trained[1:], grads.of_head, strict=True)
        ),
    )


@linear_logp_bwd.register_fake
def _(*args):
    call, (*_, needs, _) = split(args)
    return tuple(
        x.new_empty(x.shape) if need else call.hidden_TD.new_empty(0)
        for x, need in zip(call.trained, _returned(call, needs), strict=True)
    )


def _returned(call: HeadInputs, needs: list[bool]) -> list[bool]:
    """Which gradients of `trained` the backward returns, of those it makes."""
    return [need and (at != 1 or call.weight_grad_VD is None) for at, need in enumerate(needs)]


def _setup(ctx, inputs, output):
    call, (ctx.entropy, ctx.frozen, ctx.workspace_mb) = split(inputs)
    ctx.mark_non_differentiable(*output[3:])
    # None, not zeros, for an output that the loss does not use: without dlse the Jacobian will do.
    ctx.set_materialize_grads(False)
    ctx.plain = call[head_inputs.TENSORS :]
    # Not saved: other micro-batches may add to it before this one's backward.
    ctx.weight_grad_VD = call.weight_grad_VD
    tensors = call._replace(prior_T=None, weight_grad_VD=None)[: head_inputs.TENSORS]
    ctx.save_for_backward(*tensors, *output[3:])


def _grad(ctx, dlogp_T, dentropy_T, dlse_T, *_):
    no_second_derivative("linear_logp")
    *tensors, exact_3T, counted_T, count, jac_TD, jac_entropy_TD = ctx.saved_tensors
    call = HeadInputs(*tensors, *ctx.plain)._replace(weight_grad_VD=ctx.weight_grad_VD)
    dentropy_T = dentropy_T if ctx.entropy else None
    if ctx.frozen and dlse_T is None:
        # Rows that do not count have a Jacobian of 0, and upstream gradients that may be anything.
        dhidden_TD = (
            torch.where(counted_T, 0.0 if dlogp_T is None else dlogp_T, 0.0)[:, None] * jac_TD
        )
        if dentropy_T is not None:
            dhidden_TD = (
                dhidden_TD + torch.where(counted_T, dentropy_T, 0.0)[:, None] * jac_entropy_TD
            )
        found = dhidden_TD.to(call.hidden_TD.dtype), *[None] * 4
    else:
        if dlogp_T is None:
            dlogp_T = torch.zeros_like(counted_T, dtype=torch.float32)
        needs = list(HeadInputs(*ctx.needs_input_grad[: head_inputs.COUNT]).trained)
        found = linear_logp_bwd(
            *call,
            dlogp_T,
            dentropy_T,
            dlse_T,
            exact_3T,
            counted_T,
            count,
            needs,
            ctx.workspace_mb,
        )
        returned = _returned(call, needs)
        found = (x if need else None for x, need in zip(found, returned, strict=True))
    return *head_inputs.gradients(*found), None, None, None


linear_logp_fwd.register_autograd(_grad, setup_context=_setup)
