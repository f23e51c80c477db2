"""Linear head and policy loss in one op: gradients are made while the logits are there."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1kernels import check
from r1kernels.check import IGNORE
from r1kernels.head_inputs import check_skip_mass, head_inputs
from r1kernels.kept_logp import kept_logp
from r1kernels.linear_policy_loss_ops import linear_policy_loss_fwd
from r1kernels.objective import PolicyObjective
from r1kernels.policy_inputs import live_rows, prepare
from r1kernels.policy_loss import from_inputs
from r1kernels.policy_terms import METRICS
from r1kernels.reference.policy_loss import PolicyLoss
from r1kernels.rows import beside
from r1kernels.shards import refusals_told


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    objective: PolicyObjective,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    prior: Tensor | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
    logp_old: Tensor | None = None,
    logp_ref: Tensor | None = None,
    logp_sampler: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    workspace_mb: int | None = None,
    weight_grad: Tensor | None = None,
    skip_mass: float = 0.0,
    group: ProcessGroup | None = None,
) -> PolicyLoss:
    """`policy_loss` of `linear_logp`'s log-probabilities, with the logits made once.

    Three GEMMs where a row's coefficient needs only the row. Objectives over sequences or the batch
    take a second pass, over the rows with a coefficient, unless all rows fit one chunk. Rows that
    do not count enter no GEMM; on the CPU, rows without a coefficient only the first.

    On a GPU that takes tensors on the CPU. With targets, mask and weights there, the host waits for
    nothing; with advantages (and cu_seqlens) there too, rows of advantage 0 enter only GEMM 1,
    unless the objective has a KL or entropy term or is mirror descent: their logp is returned and
    they count in the metrics as ever. The other streams may lie on either side.

    Args:
        hidden: packed [T, D] or padded [B, S, D], float32, bfloat16 or float16.
        weight, targets, bias, lora, temperature, softcap, logit_scale, kept, workspace_mb, group:
            as `linear_logp`; of a group every rank passes the same advantages and other streams.
        weight_grad: as `linear_logp`, in one scaled addition of the gradient made in the forward.
        advantages, objective, logp_old, logp_ref, logp_sampler, mask, weights, cu_seqlens,
            normalizer: as `policy_loss`.
        entropy: fill metrics["entropy"] even where the objective does not need it.
        prior: as `linear_logp`. Give both calls the same prior (or none), the same workspace_mb
            and the same rows that count: then the ratio of an unchanged policy is exactly 1.
        skip_mass: above 0, a row's gradient leaves out blocks of 2048 vocabulary columns that hold
            less than this of its probability, never the target's block. An approximation: the
            gradient of a row's logits loses at most |dloss/dlogp| x logit_scale / temperature x
            dropped in 1-norm, and dropped is below skip_mass x the number of blocks. Loss, logp and
            the target's entry stay exact. Backends differ where a mass is next to the bound. Only
            the CPU does less work.

    Returns:
        PolicyLoss(loss, logp, metrics, dropped): loss 0-d float32; logp like targets, detached;
            metrics as `policy_loss`; dropped like targets, float32, 0 for rows without a gradient;
            None without skip_mass.

    Gradients: hidden, weight, bias, A and B, once: they are made in the forward and scaled in place
    by the backward, so a second backward raises RuntimeError.
    Numerics: as `linear_logp` and `policy_loss`. Deterministic.
    Raises: ValueError and TypeError as both; ValueError on a skip_mass outside [0, 1), or together
        with an entropy coefficient (whose gradient it does not bound) or `batch_invariant`.
    Source: docs/ops/linear_logp.md.
    """
    with refusals_told(group):
        call = head_inputs(
            hidden, weight, targets, bias, lora, temperature, softcap, logit_scale, prior,
            workspace_mb, weight_grad, group,
        )  # fmt: skip
        leading = targets.shape
        if mask is not None:
            check.shape("mask", mask, leading, "that of the targets")
        if weights is not None:
            check.shape("weights", weights, leading, "that of the targets")
        # What the host knows of the rows is used before anything reaches the device.
        on_host = all(x is None or x.device.type == "cpu" for x in (targets, mask, weights))
        live_T = live_rows(objective, leading, advantages, cu_seqlens) if on_host else None
        if not on_host:
            targets, mask = beside(targets, hidden), beside(mask, hidden)
        counted = targets != IGNORE
        if mask is not None:
            check.device("mask", mask, counted.device)
            counted = counted & mask.bool()
        inputs = prepare(
            objective,
            leading,
            beside(advantages, hidden),
            device=hidden.device,
            logp_old=beside(logp_old, hidden),
            logp_ref=beside(logp_ref, hidden),
            logp_sampler=beside(logp_sampler, hidden),
            mask=beside(counted, hidden),
            weights=beside(weights, hidden),
            cu_seqlens=beside(cu_seqlens, hidden),
            normalizer=normalizer,
            has_entropy=True,
        )
        skip_mass = check_skip_mass(skip_mass, objective.entropy_coef != 0, kept, group)
    # A token that weighs nothing is one that does not count.
    if not on_host:
        counted = inputs.weights_T != 0
    elif weights is not None:
        counted = counted & (weights != 0)
    call = call._replace(targets_T=torch.where(counted, targets, IGNORE).reshape(-1))
    wants_entropy = entropy or objective.entropy_coef != 0 or objective.top_entropy_quantile < 1
    if kept is not None:
        found = kept_logp(call, kept, wants_entropy)
        inputs = inputs._replace(entropy_T=found.entropy)
        return from_inputs(objective, found.logp.view(leading), inputs)
    loss, logp_T, metrics, dropped_T, *_ = linear_policy_loss_fwd(
        *call,
        live_T,
        inputs.advantages_T,
        inputs.logp_old_T,
        inputs.logp_ref_T,
        inputs.logp_sampler_T,
        inputs.weights_T,
        inputs.sequence_T,
        inputs.num_sequences,
        objective.spec,
        wants_entropy,
        skip_mass,
        call.wants(),
        workspace_mb,
    )
    return PolicyLoss(
        loss,
        logp_T.detach().view(leading),
        dict(zip(METRICS, metrics.unbind(), strict=True)),
        dropped_T.detach().view(leading) if skip_mass else None,
    )
