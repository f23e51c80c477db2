"""Kernels of other libraries inside a model: which of them run, and why the others do not."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

import torch

from r1kernels import attention_kernels

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# architectures with the norm, rotation and MLP that Liger's functions compute
LIGER_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# modelling file -> what of it is replaced now
_originals: dict[str, dict[str, Any]] = {}


def select_attention(wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """Let `varlen_attention` take the flash_attn package, or not ("none"), in this process; what it
    takes on this device, for the log."""
    attention_kernels.allow_flash_attn(wanted == "auto")
    if device.type != "cuda":
        return "torch's fused kernel for CPUs"
    if dtype == torch.float32:
        return "tiles of scores: flash kernels have no float32"
    return attention_kernels.flash_kernels()


def apply_liger(module: PreTrainedModel, wanted: str, device: torch.device) -> str:
    """Put Liger's RMSNorm, RoPE and SwiGLU into `module` where they can run.

    Norms and MLPs are bound to the modules of this model. RoPE is a function of transformers'
    modelling file: it is replaced for the process, and the next call puts it back first.

    Args:
        module: a loaded model.
        wanted: "auto", or "none" to leave the model as it is.
        device: where the model runs.

    Returns: what runs, or "none: " and the reason, for the log.
    """
    modeling = vars(sys.modules[type(module).__module__])
    modeling.update(_originals.pop(modeling["__name__"], {}))
    kind = module.config.model_type
    if wanted == "none":
        return 'none: model.kernels is "none"'
    if device.type != "cuda":
        return f"none: they need a GPU, the model is on the {device.type}"
    if kind not in LIGER_TYPES:
        return f"none: they are for {', '.join(LIGER_TYPES)}, the model is {kind}"
    try:
        liger = importlib.import_module("liger_kernel.transformers")
    except ImportError as error:
        return f"none: {error}"
    # Liger's MLP has SiLU whatever the model has
    swiglu = module.config.hidden_act in ("silu", "swish")
    before = dict(modeling)
    getattr(liger, f"apply_liger_kernel_to_{kind}")(
        rope=True, rms_norm=True, swiglu=swiglu, cross_entropy=False,
        fused_linear_cross_entropy=False, model=module,
    )  # fmt: skip
    replaced = {name: value for name, value in before.items() if modeling[name] is not value}
    # this model has them bound; the next one is built from transformers' own classes
    modeling.update({name: value for name, value in replaced.items() if isinstance(value, type)})
    _originals[modeling["__name__"]] = replaced
    return "RMSNorm, RoPE" + (", SwiGLU" if swiglu else "")


def told(found: dict[str, str]) -> str:
    """A line for the log."""
    return "kernels: " + "; ".join(f"{name}: {text}" for name, text in found.items())
