"""`tile_mlps` on transformers models: nothing changes but memory, and everything can be undone."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the models are those of transformers")

import transformers

from r1kernels import tile_mlps
from tests.numerics import assert_no_worse

SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
}
IDS = torch.arange(22).view(2, 11)
NAMES = [f"model.layers.{layer}.mlp" for layer in range(2)]


def tiny(title, **options):
    torch.manual_seed(3)
    config = getattr(transformers, f"{title}Config")(**SIZES, **options)
    return getattr(transformers, f"{title}ForCausalLM")(config)


def run(model):
    """Logits and the gradients of their mean square, by name."""
    model.zero_grad()
    logits = model(IDS).logits
    logits.square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **found}


def assert_same(found, model):
    """found, of float32 models, against a float64 copy of the untiled model."""
    expected, truth = run(model), run(copy.deepcopy(model).double())
    assert found.keys() == truth.keys()
    for name, x in truth.items():
        assert_no_worse(found[name], expected[name], x, name=name)


@pytest.mark.parametrize(
    ("title", "options"),
    [
        ("Qwen2", {"hidden_act": "gelu_pytorch_tanh"}),
        ("Qwen3", {}),
        ("Llama", {"mlp_bias": True, "hidden_act": "gelu"}),
        ("Mistral", {}),
    ],
    ids=["qwen2", "qwen3", "llama", "mistral"],
)
def test_a_model_computes_what_it_did(title, options):
    model = tiny(title, **options)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    with tile_mlps(model, tile_rows=4) as tiled:
        assert list(tiled) == NAMES
        found = run(model)
        twin = copy.deepcopy(model)
        assert model.state_dict().keys() == state.keys()
        with pytest.raises(ValueError, match=r"layers\.0\.mlp has a forward of its own, tiled"):
            tile_mlps(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert_same(found, model)
    # A copy is tiled with its own weights.
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    assert_same(run(twin), tile_free(twin))


def tile_free(model):
    plain = copy.deepcopy(model)
    for module in plain.modules():
        vars(module).pop("forward", None)
    return plain


def test_under_gradient_checkpointing_and_compile():
    model = tiny("Qwen2")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with tile_mlps(model, tile_rows=4):
        found = run(model)
        mlp = model.model.layers[0].mlp
        x = torch.randn(2, 11, 24)
        assert torch.equal(torch.compile(mlp, fullgraph=True, backend="aot_eager")(x), mlp(x))
    assert_same(found, model)


def test_undo_leaves_what_others_have_replaced():
    model = tiny("Qwen2")
    tiled = tile_mlps(model)
    mine = lambda x: x  # noqa: E731
    model.model.layers[0].mlp.forward = mine
    with pytest.warns(UserWarning, match=r"layers\.0\.mlp\.forward was replaced by someone else"):
        assert tiled.undo() == NAMES[1:]
    assert model.model.layers[0].mlp.forward is mine and tiled.undo() == []


def adapters(dropout=0.0, bias=False, variant=None, dora=False, active=("default",)):
    """As PEFT's lora.Linear lies around a linear layer; the rank is 2, the scale 1.5."""

    class Linear(nn.Module):
        def __init__(self, base_layer):
            super().__init__()
            inputs, outputs = base_layer.in_features, base_layer.out_features
            self.base_layer, self.active_adapters = base_layer.requires_grad_(False), list(active)
            self.merged = self.disable_adapters = False
            self.scaling = dict.fromkeys(active, 1.5)
            self.lora_variant = {} if variant is None else {"default": variant}
            self.use_dora = dict.fromkeys(active, dora)
            self.lora_dropout = nn.ModuleDict({key: nn.Dropout(dropout) for key in active})
            self.lora_A = nn.ModuleDict({key: nn.Linear(inputs, 2, bias=False) for key in active})
            self.lora_B = nn.ModuleDict({key: nn.Linear(2, outputs, bias=bias) for key in active})

        def forward(self, x):
            y = self.base_layer(x)
            for key in [] if self.merged or self.disable_adapters else self.active_adapters:
                y = y + self.lora_B[key](self.lora_A[key](x)) * self.scaling[key]
            return y

    Linear.__module__ = "peft.tuners.lora.layer"
    return Linear


def test_low_rank_adapters_by_their_layout():
    model, wrap = tiny("Qwen2"), adapters()
    for layer in model.model.layers:
        layer.mlp.gate_proj = wrap(layer.mlp.gate_proj)
        layer.mlp.down_proj = wrap(layer.mlp.down_proj)
    tiled = tile_mlps(model, tile_rows=4)
    found = run(model)
    assert not any(".base_layer." in name for name in found)
    model.model.layers[0].mlp.gate_proj.disable_adapters = True
    model.model.layers[1].mlp.gate_proj.merged = True
    off = run(model)
    model.model.layers[0].mlp.gate_proj.merged = True
    with pytest.raises(ValueError, match="gate_proj has adapters both merged and disabled"):
        model(IDS)
    model.model.layers[0].mlp.gate_proj.merged = False
    tiled.undo()
    assert_same(off, model)
    model.model.layers[0].mlp.gate_proj.disable_adapters = False
    model.model.layers[1].mlp.gate_proj.merged = False
    assert_same(found, model)


def test_low_rank_adapters_of_peft():
    peft = pytest.importorskip("peft", reason="the adapters are those of PEFT")
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["gate_proj", "down_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(tiny("Qwen2"), config)
    with tile_mlps(model, tile_rows=4) as tiled:
        found = run(model)
    assert len(tiled) == 2 and any("lora_A" in name for name in found)
    assert_same(found, model)


def broken(change):
    model = tiny("Qwen2")
    change(model.model.layers[1].mlp)
    return model


def wrapped(**options):
    def change(mlp):
        mlp.up_proj = adapters(**options)(mlp.up_proj)

    return change


class Quantised(nn.Linear):
    pass


CHANGES = {
    "activation": (lambda mlp: setattr(mlp, "act_fn", nn.ReLU()), r"act_fn is a ReLU"),
    "linear": (
        lambda mlp: setattr(mlp, "up_proj", Quantised(24, 32)),
        r"up_proj is a \S+Quantised: only torch.nn.Linear",
    ),
    "hook": (
        lambda mlp: mlp.down_proj.register_forward_hook(lambda *_: None),
        r"down_proj has hooks",
    ),
    "backward hook": (
        lambda mlp: mlp.up_proj.register_full_backward_pre_hook(lambda *_: None),
        r"up_proj has hooks",
    ),
    "forward": (lambda mlp: setattr(mlp, "forward", print), "has a forward of its own"),
    "dropout": (wrapped(dropout=0.1), r"up_proj has an adapter 'default' with dropout 0\.1"),
    "bias": (wrapped(bias=True), "up_proj has an adapter 'default' with a bias"),
    "variant": (wrapped(variant=nn.Identity()), "up_proj has an adapter 'default' of the variant"),
    "dora": (wrapped(dora=True), "up_proj has an adapter 'default' with DoRA"),
    "two": (wrapped(active=("a", "b")), r"up_proj has 2 active adapters \(a, b\)"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_cannot_be_tiled_is_named_and_nothing_changes(name):
    change, match = CHANGES[name]
    model = broken(change)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp.*" + match):
        tile_mlps(model)
    assert "forward" not in vars(model.model.layers[0].mlp)


def test_unknown_models_are_refused():
    mixture = tiny("Mixtral", num_local_experts=2)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.\w+ is a transformers.*Mixtral"):
        tile_mlps(mixture)
    with pytest.raises(ValueError, match="Linear has no MLP"):
        tile_mlps(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        tile_mlps("qwen")
    model = tiny("Qwen2")
    with pytest.raises(ValueError, match="tile_rows must be at least 1, got 0"):
        tile_mlps(model, tile_rows=0)
    assert "forward" not in vars(model.model.layers[0].mlp)
