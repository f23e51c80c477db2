"""Gradients that a forward has made: kept until the backward, scaled in their own memory."""

from torch import Tensor

from r1kernels.check import no_second_derivative, values_readable
from r1kernels.head_inputs import HeadInputs


def upstream(op: str, ctx, dloss: Tensor) -> list[Tensor | None]:
    """The gradients of `trained` that a forward kept on ctx, times dloss, in their own memory.

    That of the weight is added to weight_grad where the call has one.
    Raises: RuntimeError on a second backward, which would scale what is scaled.
    """
    no_second_derivative(op)
    if ctx.spent:
        raise RuntimeError(
            f"{op} makes its gradients in the forward, and one backward scales them in place: "
            "call it again for a second backward"
        )
    ctx.spent = True
    # Looked at only where that stops nobody: on the CPU, and not while torch.compile traces.
    unscaled = values_readable(dloss) and dloss.item() == 1.0
    found = []
    for at, (grad, dtype, need) in enumerate(
        zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)
    ):
        if not need:
            found.append(None)
        elif at == 1 and ctx.weight_grad_VD is not None:
            ctx.weight_grad_VD.addcmul_(grad, dloss)
            found.append(None)
        else:
            # What traces has a memory of its own to plan.
            scale = grad.mul_ if type(grad) is Tensor else grad.mul
            found.append((grad if unscaled else scale(dloss).to(grad.dtype)).to(dtype))
    return found


def keep(ctx, call: HeadInputs, needs: list[bool], grads: tuple[Tensor | None, ...]) -> None:
    """Keeps for `upstream` the gradients of `trained` that a forward made."""
    ctx.spent, ctx.needs, ctx.weight_grad_VD = False, needs, call.weight_grad_VD
    ctx.dtypes = [None if x is None else x.dtype for x in call.trained]
    # Or autograd would make zeros in the shape of every output, those of the head too.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*grads)
