"""The custom op behind `linear_policy_loss`: loss and gradients in one pass, autograd."""

import torch
from torch import Tensor

from r1kernels import chunked_head, head_inputs
from r1kernels.backend import isolated
from r1kernels.check import IGNORE
from r1kernels.chunked_head import unscaled_dtype
from r1kernels.forward_gradients import keep, upstream
from r1kernels.head_contract import Gradients
from r1kernels.head_inputs import split
from r1kernels.objective import PolicyObjective
from r1kernels.policy_inputs import PolicyInputs
from r1kernels.policy_terms import METRICS, policy_terms
from r1kernels.reference.token_logp import Logp
from r1kernels.rows import spread


@torch.library.custom_op(
    "r1kernels::linear_policy_loss_fwd",
    mutates_args=(),
    schema=f"({head_inputs.SCHEMA}, Tensor? live_T, Tensor advantages_T, Tensor? logp_old_T, "
    "Tensor? logp_ref_T, Tensor? logp_sampler_T, Tensor weights_T, Tensor? sequence_T, "
    "int num_sequences, str objective, bool entropy, float skip_mass, bool[] needs, "
    "int? workspace_mb) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@isolated
def linear_policy_loss_fwd(*args):
    """(loss, logp, metrics, dropped, dhidden, dweight, dbias, dA, dB).

    Those of the head are float32. Empty are gradients that `needs` does not ask for, and dropped
    without skip_mass.
    """
    call, rest = split(args)
    live_T, *streams, num_sequences, objective, entropy, skip_mass, needs, workspace_mb = rest
    chunk, head, rows, _, _ = call.start(workspace_mb, rest)
    if rows.place_T is not None:
        streams = tuple(None if x is None else x[rows.place_T] for x in streams)
    # Both are on the CPU, or there is no live_T.
    live = None if live_T is None else live_T[call.targets_T != IGNORE].nonzero().squeeze(1)
    terms_of = PolicyObjective.from_spec(objective)
    loss = call.hidden_TD.new_zeros((), dtype=torch.float64)
    metrics = call.hidden_TD.new_zeros(len(METRICS), dtype=torch.float64)

    def coefficients(part: slice, stats: Logp) -> tuple[Tensor, Tensor | None]:
        *tensors, weights_C, sequence_C = (None if x is None else x[part] for x in streams)
        inputs = PolicyInputs(*tensors, stats.entropy, weights_C, sequence_C, num_sequences)
        terms = policy_terms(terms_of, stats.logp, inputs)
        loss.add_(terms.loss)
        metrics.add_(terms.metrics)
        return terms.dlogp_T, terms.dentropy_T

    grads = Gradients.zeros(head, *needs)
    stats, dhidden_TD, dropped_T = chunked_head.fused(
        chunk,
        head,
        rows,
        entropy,
        terms_of.entropy_coef != 0,
        terms_of.scope != "token",
        coefficients,
        grads,
        workspace_mb,
        live,
        skip_mass,
    )
    none = call.hidden_TD.new_empty(0, dtype=torch.float32)
    return (
        loss.float(),
        spread(stats.logp.float(), rows.place_T, len(call.targets_T)),
        metrics,
        none.clone() if dropped_T is None else spread(dropped_T, rows.place_T, len(call.targets_T)),
        none if dhidden_TD is None else dhidden_TD,
        *(none.clone() if x is None else x for x in grads.of_head),
    )


@linear_policy_loss_fwd.register_fake
def _(*args):
    call, (*_, skip_mass, needs, _) = split(args)

    def wide(*shape: int) -> Tensor:
        return call.hidden_TD.new_empty(shape, dtype=torch.float32)

    hidden_TD = call.hidden_TD
    return (
        wide(),
        wide(*call.targets_T.shape),
        hidden_TD.new_empty(len(METRICS), dtype=torch.float64),
        wide(*call.targets_T.shape) if skip_mass else wide(0),
        hidden_TD.new_empty(hidden_TD.shape, dtype=unscaled_dtype(hidden_TD.dtype))
        if needs[0]
        else wide(0),
        *(
            wide(*x.shape) if need else wide(0)
            for x, need in zip(call.trained[1:], needs[1:], strict=True)
        ),
    )


def _setup(ctx, inputs, output):
    call, (*others, needs, _) = split(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.others = len(others) + 2
    keep(ctx, call, needs, output[4:])


def _grad(ctx, dloss, *_):
    found = upstream("linear_policy_loss", ctx, dloss)
    return *head_inputs.gradients(*found), *[None] * ctx.others


linear_policy_loss_fwd.register_autograd(_grad, setup_context=_setup)
