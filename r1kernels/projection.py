"""A linear layer on chunks of rows, forward and backward, with a low-rank term that stays apart."""

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from r1kernels.check import describe, device, dtype_in, local, low_rank, shape
from r1kernels.weight_grads import WeightGrads


class Projection(NamedTuple):
    """`y = x W^T + bias + scale (x A^T) B^T`; the sum W + scale B A is never made."""

    weight_NK: Tensor
    bias_N: Tensor | None = None
    lora_RK: Tensor | None = None  # A
    lora_NR: Tensor | None = None  # B
    scale: float = 1.0

    def to(self, dtype: torch.dtype) -> "Projection":
        """Its tensors in the dtype of the rows: a float32 master weight meets 16 bits as a copy."""
        return Projection(*(x.to(dtype) if isinstance(x, Tensor) else x for x in self))

    def apply(self, x_CK: Tensor, out_CN: Tensor | None = None) -> Tensor:
        """y of a chunk, written to `out` where that is given."""
        if self.bias_N is None:
            out_CN = torch.mm(x_CK, self.weight_NK.T, out=out_CN)
        else:
            out_CN = torch.addmm(self.bias_N, x_CK, self.weight_NK.T, out=out_CN)
        if self.lora_RK is not None:
            out_CN.addmm_(x_CK @ self.lora_RK.T, self.lora_NR.T, alpha=self.scale)
        return out_CN

    def input_grad(self, dy_CN: Tensor, out_CK: Tensor | None = None, add: bool = False) -> Tensor:
        """dx of a chunk, written to `out` or, with `add`, added to it."""
        if add:
            out_CK.addmm_(dy_CN, self.weight_NK)
        else:
            out_CK = torch.mm(dy_CN, self.weight_NK, out=out_CK)
        if self.lora_RK is not None:
            out_CK.addmm_(dy_CN @ self.lora_NR, self.lora_RK, alpha=self.scale)
        return out_CK

    def weight_grads(self, key: str, dy_CN: Tensor, x_CK: Tensor, grads: WeightGrads) -> None:
        """Adds the gradients of a chunk under `key.weight`, `key.bias`, `key.lora_a` and
        `key.lora_b`, of which only those that `grads` wants are made."""
        grads.add(f"{key}.weight", dy_CN, x_CK)
        grads.add_sum(f"{key}.bias", dy_CN)
        if f"{key}.lora_a" in grads:
            grads.add(f"{key}.lora_a", dy_CN @ (self.scale * self.lora_NR), x_CK)
        if f"{key}.lora_b" in grads:
            grads.add(f"{key}.lora_b", dy_CN, x_CK @ (self.scale * self.lora_RK).T)


# Of the first four fields, which may get a gradient: their keys in WeightGrads, after the
# projection's own.
KEYS = ("weight", "bias", "lora_a", "lora_b")


def projection(
    name: str,
    like: Tensor,
    weight: object,
    bias: object,
    lora: object,
    inputs: int,
    outputs: int | None = None,
) -> Projection:
    """The arguments of a projection of rows [C, inputs] with like's dtype and device, checked.

    Raises: ValueError on shapes and devices; TypeError on dtypes. They name `name`_weight and so
        on, and show what came.
    """
    title = f"{name}_weight"
    local(title, weight)
    dtype_in(title, weight, (like.dtype, torch.float32))
    if weight.ndim != 2 or len(weight) == 0:
        raise ValueError(f"{title} must be [outputs, {inputs}], got {describe(weight)}")
    outputs = outputs or len(weight)
    shape(title, weight, (outputs, inputs), "[outputs, inputs]")
    device(title, weight, like.device)
    if bias is not None:
        title = f"{name}_bias"
        local(title, bias)
        dtype_in(title, bias, (like.dtype, torch.float32))
        shape(title, bias, (outputs,), "one per output")
        device(title, bias, like.device)
    if lora is None:
        return Projection(weight, bias)
    return Projection(weight, bias, *low_rank(f"{name}_lora", lora, like, outputs, inputs))


def linear_parts(name: str, module: nn.Module) -> tuple[Tensor, Tensor | None, tuple | None]:
    """(weight, bias, lora) of a linear layer: torch's own, or PEFT's LoRA around one.

    To be called in every forward: adapters are switched on and off, weights move.

    Raises: ValueError, with the module's name, on any other module.
    """
    lora = None
    if _is_adapter(module):
        lora = _adapter(name, module)
        module, name = module.base_layer, f"{name}.base_layer"
    if type(module) is not nn.Linear:
        raise ValueError(
            f"{name} is a {type(module).__module__}.{type(module).__name__}: only torch.nn.Linear, "
            "by itself or inside PEFT's LoRA, is taken apart"
        )
    return module.weight, module.bias, lora


def refuse_hooks(name: str, module: nn.Module) -> None:
    """Raises: ValueError, with its name, where a module in here does more than its class does."""
    for part, each in module.named_modules(prefix=name):
        if "forward" in vars(each):
            raise ValueError(
                f"{part} has a forward of its own, put there by this or another library: "
                "it would not be called; take it off first"
            )
        if has_hooks(each):
            raise ValueError(f"{part} has hooks that would not be called: take them off first")


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to be called with this module.

    transformers leaves hooks behind after a call with output_hidden_states or output_attentions.
    They do nothing in a call without, and nobody has a handle to take them off.
    """
    hooks = (
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
    )
    idle = "transformers.utils.output_capturing"
    return any(getattr(hook, "__module__", None) != idle for hook in hooks)


def _is_adapter(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.tuners.lora") and hasattr(module, "base_layer")


def _adapter(name: str, module: nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """The low-rank term in force, or None."""

    def refuse(what: str) -> NoReturn:
        raise ValueError(f"{name} has {what}, which no projection here computes")

    if module.disable_adapters or module.merged:
        # A merged term is in the weight; a disabled one is not wanted, but may still be in it.
        if module.merged and module.disable_adapters:
            refuse("adapters both merged and disabled")
        return None
    active = [key for key in module.active_adapters if key in module.lora_A]
    if not active:
        return None
    if len(active) > 1:
        refuse(f"{len(active)} active adapters ({', '.join(active)})")
    (key,) = active
    if key in getattr(module, "lora_variant", {}):
        refuse(f"an adapter {key!r} of the variant {type(module.lora_variant[key]).__name__}")
    if getattr(module, "use_dora", {}).get(key):  # before PEFT had variants
        refuse(f"an adapter {key!r} with DoRA")
    if module.lora_B[key].bias is not None:
        refuse(f"an adapter {key!r} with a bias")
    dropout = module.lora_dropout[key]
    if module.training and getattr(dropout, "p", 0.0) > 0:
        refuse(f"an adapter {key!r} with dropout {dropout.p}")
    return module.lora_A[key].weight, module.lora_B[key].weight, float(module.scaling[key])
