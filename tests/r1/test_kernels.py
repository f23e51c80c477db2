"""Which of Liger's kernels are put into a model; the kernels themselves need a GPU."""

import sys
from types import ModuleType

import pytest
import torch

from r1 import kernels
from r1.config import Model
from r1.model import load
from r1kernels import attention_kernels

CUDA = torch.device("cuda")


@pytest.fixture
def liger(monkeypatch):
    """A liger_kernel that replaces what the real one does, and keeps how it was called."""
    from transformers.models.qwen2 import modeling_qwen2

    calls = []

    class Norm(torch.nn.Module):
        pass

    def rotary(query, key, cos, sin):
        raise AssertionError("never run here")

    def apply_liger_kernel_to_qwen2(**options):
        calls.append(options)
        modeling_qwen2.apply_rotary_pos_emb = rotary
        modeling_qwen2.Qwen2RMSNorm = Norm

    package, module = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    module.apply_liger_kernel_to_qwen2 = apply_liger_kernel_to_qwen2
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    yield calls
    kernels.apply_liger(tiny(), "none", CUDA)


def tiny(**changes):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, **changes))


def test_what_liger_replaces_is_put_back_for_the_next_model(liger):
    from transformers.models.qwen2 import modeling_qwen2

    theirs = modeling_qwen2.apply_rotary_pos_emb, modeling_qwen2.Qwen2RMSNorm
    model = tiny()
    assert kernels.apply_liger(model, "auto", CUDA) == "RMSNorm, RoPE, SwiGLU"
    (options,) = liger
    assert options.pop("model") is model
    off = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert options == {"rope": True, "rms_norm": True, "swiglu": True, **off}
    # a model that is built afterwards has transformers' own norm
    assert modeling_qwen2.Qwen2RMSNorm is theirs[1]
    assert modeling_qwen2.apply_rotary_pos_emb is not theirs[0]
    assert kernels.apply_liger(tiny(), "none", CUDA) == 'none: model.kernels is "none"'
    assert (modeling_qwen2.apply_rotary_pos_emb, modeling_qwen2.Qwen2RMSNorm) == theirs


def test_liger_s_mlp_is_for_silu_alone(liger):
    assert kernels.apply_liger(tiny(hidden_act="gelu"), "auto", CUDA) == "RMSNorm, RoPE"
    assert liger[0]["swiglu"] is False


def test_reasons_for_none(liger, monkeypatch):
    model = tiny()
    said = kernels.apply_liger(model, "auto", torch.device("cpu"))
    assert said == "none: they need a GPU, the model is on the cpu"
    monkeypatch.setattr(model.config, "model_type", "gemma2")
    assert kernels.apply_liger(model, "auto", CUDA).endswith("qwen2, qwen3, the model is gemma2")
    monkeypatch.setattr(model.config, "model_type", "qwen2")
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.delitem(sys.modules, "liger_kernel.transformers")
    assert "liger_kernel" in kernels.apply_liger(model, "auto", CUDA)
    assert not liger


def test_flash_attn_is_taken_where_it_is_installed(monkeypatch):
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.__version__, package.flash_attn_interface = "2.8.3", interface
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    monkeypatch.setattr(attention_kernels, "_package_allowed", True)
    attention_kernels._installed_flash_attn.cache_clear()
    try:
        said = [
            kernels.select_attention(wanted, torch.device(device), dtype)
            for wanted, device, dtype in (
                ("auto", "cuda", torch.bfloat16),
                ("none", "cuda", torch.bfloat16),
                ("auto", "cuda", torch.float32),
                ("auto", "cpu", torch.bfloat16),
            )
        ]
    finally:
        attention_kernels._installed_flash_attn.cache_clear()
    assert said[:2] == ["flash_attn 2.8.3", "the flash kernels of torch"]
    assert said[2].startswith("tiles of scores") and "CPUs" in said[3]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_and_gradients_are_as_exact_with_liger_as_without(dtype):
    pytest.importorskip("liger_kernel", reason="compares with Liger's kernels")
    tokens = torch.randint(3, 90, (200,))
    bounds = torch.tensor([0, 150, 151, 200])
    truth = load(Model(path="toy", dtype="float32"))

    def outcome(lm, weights):
        lm.module.load_state_dict(weights)
        device = lm.device
        logits = lm.head.logits(lm.hidden(tokens.to(device), bounds.to(device)))
        loss = torch.nn.functional.cross_entropy(logits, tokens.roll(-1).to(device))
        loss.backward()
        gradient = torch.cat([p.grad.flatten().double().cpu() for p in lm.module.parameters()])
        return loss.detach().double().cpu().reshape(1), gradient

    found = {}
    for wanted in ("none", "auto"):
        lm = load(Model(path="toy", dtype=dtype, kernels=wanted), device="cuda")
        assert lm.kernels["Liger"].startswith("none") == (wanted == "none")
        weights = {name: one.float() for name, one in truth.module.state_dict().items()}
        found[wanted] = outcome(lm, weights)
        weights = {name: one.double().cpu() for name, one in lm.module.state_dict().items()}
    truth.module.double()
    for one, two, three in zip(outcome(truth, weights), found["none"], found["auto"], strict=True):
        without, with_liger = ((x - one).norm() / one.norm() for x in (two, three))
        bound = 2 * without + 4 * torch.finfo(torch.float32).eps
        assert with_liger <= bound, f"Liger {with_liger:.1e}, without {without:.1e}"
