"""Log-probabilities of a transformers causal LM, whose logits are never stored."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from r1kernels.check import IGNORE
from r1kernels.linear_logp import linear_logp
from r1kernels.reference.token_logp import Logp


class LMHead(NamedTuple):
    """A model's output layer, `linear_logp`'s arguments."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    lora: tuple[Tensor, Tensor, float] | None = None


def logprobs_forward(
    model: torch.nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    **kwargs: object,
) -> Logp:
    """Log-probabilities of labels under a causal LM: its backbone, then `linear_logp`.

    Reads weight, bias, softcap, scale and LoRA of the head, tied or not. Under FSDP or DDP use
    `patch("transformers")` and `model(..., return_logp=True)`, which runs inside the model's own
    forward, so that its hooks gather the weights.

    Args:
        model: a transformers causal LM, or a PEFT model around one.
        input_ids, attention_mask, position_ids, kwargs: as the model's forward.
        labels: [B, S] int64, shifted here as transformers does: logp[:, t] is that of
            labels[:, t + 1]. -100 is skipped. Default: input_ids where attention_mask is 1 and
            position_ids, if given, is not 0 (the first token of a packed sequence).
        shift_labels: [B, S] int64 in place of labels: logp[:, t] is that of shift_labels[:, t].
        temperature: a number, or one per log-probability; > 0.
        entropy: also return the entropy.

    Returns:
        Logp(logp, entropy | None, lse): float32, [B, S - 1], or [B, S] with shift_labels.

    Raises: ValueError on a head that is neither a linear layer nor one with a single plain LoRA
        (no DoRA, no dropout in training), and on both kinds of labels.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    if labels is not None and shift_labels is not None:
        raise ValueError("give labels or shift_labels, not both")
    if labels is None and shift_labels is None:
        labels = input_ids
        if attention_mask is not None:
            labels = labels.masked_fill(attention_mask == 0, IGNORE)
        if position_ids is not None:
            labels = labels.masked_fill(position_ids == 0, IGNORE)
    out = backbone(model)(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=False,
        **kwargs,
    )
    hidden = out.last_hidden_state
    if shift_labels is None:
        hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
    head = head_of(model)
    return head_logp(hidden, head, shift_labels, temperature, entropy)


def forward_with_logp(original: Callable) -> Callable:
    """A causal LM's `forward` that takes `return_logp=True` and then is `logprobs_forward`."""

    @functools.wraps(original)
    def forward(self, *args, return_logp=False, temperature=None, entropy=False, **kwargs):
        if not return_logp:
            if temperature is not None or entropy:
                raise ValueError("temperature and entropy belong to return_logp=True")
            return original(self, *args, **kwargs)
        temperature = 1.0 if temperature is None else temperature
        return logprobs_forward(self, *args, temperature=temperature, entropy=entropy, **kwargs)

    return forward


def backbone(model: torch.nn.Module) -> torch.nn.Module:
    """The model without its head."""
    base = getattr(model, getattr(model, "base_model_prefix", "") or "model", None)
    if not isinstance(base, torch.nn.Module) or base is model:
        raise ValueError(f"{type(model).__name__} has no backbone that can be called by itself")
    return base


def head_of(model: torch.nn.Module) -> LMHead:
    """A causal LM's head, looked up at each call: PEFT and FSDP replace its parts.

    Raises: ValueError unless the logits are those of a plain linear layer, scaled and capped.
    """
    layer, lora = model.get_output_embeddings(), None
    if hasattr(layer, "base_layer"):
        layer, lora = layer.base_layer, _lora(layer)
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.numel() == 0:
        raise ValueError("the head's weight is empty here: it is sharded and was not gathered")
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"the head must be a linear layer with a float weight, got {type(layer).__name__}"
        )
    config = model.config.get_text_config()
    scale = next(
        (
            value
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if (value := getattr(config, name, None)) is not None
        ),
        1.0,
    )
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        # HyperCLOVA X multiplies by what Granite divides by.
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    weight, bias = (
        x.full_tensor() if hasattr(x, "full_tensor") else x for x in (layer.weight, layer.bias)
    )
    softcap = getattr(config, "final_logit_softcapping", None)
    return LMHead(weight, bias, softcap, float(scale), lora)


def _lora(layer: torch.nn.Module) -> tuple[Tensor, Tensor, float] | None:
    """The low-rank term of a PEFT layer; None where it is merged or switched off."""
    if getattr(layer, "disable_adapters", False) or getattr(layer, "merged", False):
        return None
    names = [name for name in layer.active_adapters if name in getattr(layer, "lora_A", ())]
    if len(names) != 1 or len(layer.active_adapters) != 1:
        raise ValueError(f"the head must have one LoRA adapter, got {layer.active_adapters}")
    (name,) = names
    dropout = layer.lora_dropout[name]
    if layer.training and getattr(dropout, "p", 0.0):
        raise ValueError(f"lora_dropout of the head must be 0 in training, got {dropout.p}")
    if name in getattr(layer, "lora_variant", {}) or layer.lora_B[name].bias is not None:
        raise ValueError("the LoRA of the head must be plain: no DoRA or other variant, no bias")
    return layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])


def head_logp(
    hidden: Tensor, head: LMHead, labels: Tensor, temperature: float | Tensor, entropy: bool
) -> Logp:
    """`linear_logp` of a head, in autocast's dtype where autocast is on."""
    hidden = hidden.to(head.weight.device, compute_dtype(hidden))

    def fit(x: Tensor) -> Tensor:
        # Float32 meets 16-bit hidden states as it is, and gets its gradient in float32.
        return x if x.dtype == torch.float32 else x.to(hidden.dtype)

    return linear_logp(
        hidden,
        fit(head.weight),
        labels.to(hidden.device),
        bias=None if head.bias is None else fit(head.bias),
        lora=None if head.lora is None else (*map(fit, head.lora[:2]), head.lora[2]),
        temperature=temperature,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
        entropy=entropy,
    )


def compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
