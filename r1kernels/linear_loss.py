"""Linear head and the caller's own loss; the logits are made once and never stored whole."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from r1kernels import chunked_head
from r1kernels.backend import isolated
from r1kernels.check import IGNORE, describe
from r1kernels.forward_gradients import keep, upstream
from r1kernels.head_contract import Gradients
from r1kernels.head_inputs import HeadInputs, check_skip_mass, gradients, head_inputs, split
from r1kernels.kept_logp import kept_logp
from r1kernels.reference.token_logp import Logp
from r1kernels.shards import refusals_told

# fn(logp, entropy | None, rows) -> per-token loss
TokenLoss = Callable[[Tensor, Tensor | None, Tensor], Tensor]


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    fn: TokenLoss,
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
    skip_mass: float = 0.0,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Sum over tokens of `fn(logp, entropy, rows)`, at the cost of three GEMMs.

    `fn` is called once per chunk with vectors of that chunk's rows, and autograd differentiates it
    on those vectors alone; it must treat each token by itself. Divide by a count of your own inside
    it.

    Args:
        fn: (logp [n] float32, entropy [n] float32 or None, rows [n] int64) -> [n] losses, with rows
            the indices into the flattened leading shape. Tensors that it closes over would get no
            gradient, so (except with `kept`) none may require one.
        The rest as `linear_logp`, weight_grad and skip_mass as `linear_policy_loss`; skip_mass not
            together with entropy. Rows with target IGNORE (-100) are never seen by `fn`.

    Returns:
        The sum, 0-d float32. Gradients flow to hidden, weight, bias, A and B, once.

    Raises: ValueError when fn returns another shape, or closes over a tensor that requires a
        gradient; otherwise as `linear_logp`.
    """
    with refusals_told(group):
        call = head_inputs(
            hidden, weight, targets, bias, lora, temperature, softcap, logit_scale, prior,
            workspace_mb, weight_grad, group,
        )  # fmt: skip
        skip_mass = check_skip_mass(skip_mass, entropy, kept, group)
    if kept is not None:
        found = kept_logp(call, kept, entropy)
        rows = (call.targets_T != IGNORE).nonzero().squeeze(1).to(hidden.device)
        losses = fn(found.logp[rows], found.entropy[rows] if entropy else None, rows)
        return _per_token(losses, rows).sum(dtype=torch.float64).float()
    # Asked here: inside, gradients are off, and ctx.needs_input_grad knows nothing of no_grad.
    return _LinearLoss.apply(*call, fn, entropy, skip_mass, call.wants(), workspace_mb)


def _per_token(losses: object, like: Tensor) -> Tensor:
    if not isinstance(losses, Tensor) or losses.shape != like.shape:
        raise ValueError(
            f"fn must return one loss per token, shape {list(like.shape)}, got {describe(losses)}"
        )
    return losses


def _closes_over_none(total: Tensor, given: list[Tensor]) -> None:
    """Raises: ValueError when a leaf of total's graph is none of `given`."""
    todo, seen = [total.grad_fn], {None}
    while todo:
        node = todo.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and not any(leaf is x for x in given):
            raise ValueError(
                f"fn closes over a tensor that requires a gradient, {describe(leaf)}, and "
                "linear_loss gives it none: detach it, or make the loss of linear_logp's result"
            )
        seen.add(node)
        todo += [x for x, _ in getattr(node, "next_functions", ()) if x not in seen]


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    @isolated
    def forward(ctx, *args):
        call, (fn, entropy, skip_mass, needs, workspace_mb) = split(args)
        call = HeadInputs(*(x.detach() if isinstance(x, Tensor) else x for x in call))
        chunk, head, rows, counted_T, _ = call.start(workspace_mb, (entropy, needs))
        index = rows.place_T
        if index is None:
            index = torch.arange(len(counted_T), device=counted_T.device)
        loss = call.hidden_TD.new_zeros((), dtype=torch.float64)

        def coefficients(part: slice, stats: Logp) -> tuple[Tensor, Tensor | None]:
            with torch.enable_grad():
                given = [
                    x.requires_grad_()
                    for x in (
                        stats.logp.clone(),
                        None if stats.entropy is None else stats.entropy.clone(),
                    )
                    if x is not None
                ]
                losses = fn(given[0], given[1] if entropy else None, index[part])
                total = _per_token(losses, given[0]).sum(dtype=torch.float64)
                _closes_over_none(total, given)
                # A loss that ignores both, or a constant one, has no gradient and is no error.
                found = (
                    torch.autograd.grad(total, given, allow_unused=True)
                    if total.requires_grad
                    else [None] * len(given)
                )
            loss.add_(total.detach())
            dlogp, *dentropy = (
                torch.zeros_like(x) if dx is None else dx
                for x, dx in zip(given, found, strict=True)
            )
            return dlogp, dentropy[0] if dentropy else None

        grads = Gradients.zeros(head, *needs)
        _, dhidden_TD, _ = chunked_head.fused(
            chunk, head, rows, entropy, entropy, False, coefficients, grads, workspace_mb, None,
            skip_mass,
        )  # fmt: skip
        keep(ctx, call, needs, (dhidden_TD, *grads.of_head))
        return loss.float()

    @staticmethod
    def backward(ctx, dloss):
        return *gradients(*upstream("linear_loss", ctx, dloss)), *[None] * 5
