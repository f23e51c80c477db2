"""Log-probability and entropy of target tokens from hidden states; logits never stored whole."""

from torch import Tensor
from torch.distributed import ProcessGroup

from r1kernels.head_inputs import head_inputs
from r1kernels.kept_logp import kept_logp
from r1kernels.linear_logp_ops import linear_logp_fwd
from r1kernels.reference.token_logp import Logp
from r1kernels.shards import refusals_told


def linear_logp(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    entropy: bool = False,
    prior: Tensor | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
    workspace_mb: int | None = None,
    weight_grad: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Logp:
    """`logp = l[target] - logsumexp(l)` of the logits of a linear head.

    `l = softcap tanh(logit_scale (hidden (W + scale B A)^T + bias) / softcap) / temperature`; the
    sum W + scale B A is never made. With a head that needs no gradient the forward also makes
    d logp / d hidden, and any loss on the result costs two GEMMs in all. With a trainable head the
    backward makes the logits again. For a policy loss `linear_policy_loss` is cheaper than either.

    Args:
        hidden: [..., D] float32, bfloat16 or float16.
        weight: [V, D] on hidden's device, of its dtype; or float32, a master weight that meets
            16-bit hidden states as a copy in their dtype and gets its gradient in float32.
        targets: [...] int64 in [0, V), or IGNORE (-100): results 0, no gradient, the row enters no
            product. Beside hidden; or on the CPU: then the host waits for nothing (else it reads
            once, in the forward, how many rows count). Temperature and prior may be there too; a
            temperature beside hidden is then not looked at, and a bad one makes its row NaN.
        bias: [V], of hidden's dtype or float32, or None.
        lora: (A [R, D], B [V, R], scale), a low-rank term of the weight, of hidden's dtype or
            float32; or None. PEFT's lora_A.weight, lora_B.weight and scaling.
        temperature: float, or [...] float32 for one per token; > 0. Gets no gradient.
        softcap: > 0, or None.
        logit_scale: > 0.
        entropy: also return the entropy.
        prior: [...] an earlier log-probability of the targets (the sampler's, the old policy's).
            Any value is safe; a close one spares a GPU the redo of its row.
        kept: (ids [N] int32 or int64, offsets [T + 1] int64): what a sampler's top-k, top-p or
            min-p left of each token's distribution. Row t of the T flattened rows is normalised
            over ids[offsets[t] : offsets[t + 1]], its target among them, in any order; repeats
            count once. Costs one dot product per id in place of the GEMMs; prior and workspace_mb
            do nothing then. See docs/ops/kept_logp.md; `r1kernels.sampling` makes such sets.
        workspace_mb: MiB for the logits of a chunk; default 256 on the CPU, 1280 on a GPU.
        weight_grad: [V, D] float32, contiguous, such as a float32 `weight.grad` or Megatron's
            `main_grad`: the backward adds the weight's gradient to it, unrounded and without a
            buffer of its own, and autograd gives weight none: its hooks do not run, those of
            DistributedDataParallel among them.
        group: the ranks that hold the vocabulary in slices, in rank order, each of one row or more.
            weight, bias and B are then this rank's slices (weight and bias may be DTensors with
            Shard(0) over the group), and every rank calls with the same hidden, targets (of the
            whole vocabulary) and options. Results are the same bits on every rank; the gradients of
            hidden and A are whole on every rank, the others are the slice's. An argument that one
            rank refuses, or ranks that differ, are errors on all of them; the backward has to run
            on all or none, as any collective.

    Returns:
        Logp(logp, entropy | None, lse): [...] float32, in nats. Gradients flow to hidden, weight,
        bias, A and B through all three.

    Numerics: float32 logits and exponentials, float64 statistics up to the backward; weight
        gradients accumulate in float32; logp is never above 0. Deterministic.
    Raises: ValueError on shapes, devices, temperatures or targets out of range, on the CPU on a
        kept set without its target (a GPU adds it); TypeError on dtypes.
    Source: docs/ops/linear_logp.md.
    """
    with refusals_told(group):
        call = head_inputs(
            hidden, weight, targets, bias, lora, temperature, softcap, logit_scale, prior,
            workspace_mb, weight_grad, group,
        )  # fmt: skip
    shape = targets.shape
    if kept is not None:
        return Logp(*(None if x is None else x.view(shape) for x in kept_logp(call, kept, entropy)))
    needs_hidden, *needs_head = call.wants()
    frozen = needs_hidden and not any(needs_head)
    logp_T, entropy_T, lse_T, *_ = linear_logp_fwd(*call, entropy, frozen, workspace_mb)
    return Logp(logp_T.view(shape), entropy_T.view(shape) if entropy else None, lse_T.view(shape))
