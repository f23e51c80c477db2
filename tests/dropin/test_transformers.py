import copy

import pytest
import torch

pytest.importorskip("transformers")

import transformers

import r1kernels
from r1kernels import dropin
from r1kernels.check import IGNORE
from tests.numerics import assert_no_worse

SIZES = {
    "vocab_size": 211,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "attn_implementation": "sdpa",
}
MODELS = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {}),
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "mistral": ("Mistral", {}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 12}),
    "granite": ("Granite", {"logits_scaling": 4.0}),
    "cohere": ("Cohere", {"logit_scale": 0.25}),
}


def tiny(kind):
    title, options = MODELS[kind]
    sizes = {name: value for name, value in SIZES.items() if kind != "cohere" or name != "head_dim"}
    config = getattr(transformers, f"{title}Config")(**sizes, **options)
    torch.manual_seed(3)
    model = getattr(transformers, f"{title}ForCausalLM")(config)
    # Logits of some size, so that softcap and temperature matter.
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    return model


def batch(side="left"):
    torch.manual_seed(4)
    ids = torch.randint(0, SIZES["vocab_size"], (3, 9))
    length = torch.tensor([9, 5, 7])[:, None]
    column = torch.arange(9)
    return ids, (column >= 9 - length if side == "left" else column < length).long()


def by_hand(model, ids, mask, temperature=1.0, **_):
    x = model(ids, attention_mask=mask).logits[:, :-1]
    logps = ((x if x.dtype == torch.float64 else x.float()) / temperature).log_softmax(-1)
    counted = mask[:, 1:].bool()
    logp = logps.gather(-1, ids[:, 1:, None]).squeeze(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    return torch.where(counted, logp, 0), torch.where(counted, entropy, 0)


def outcome(model, fn, side, temperature):
    ids, mask = batch(side)
    logp, entropy = fn(model, ids, mask, temperature=temperature, entropy=True)[:2]
    (logp.sum() + 0.3 * entropy.sum()).backward()
    return logp, entropy, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("side, temperature", [("left", 1.0), ("right", 0.7)])
@pytest.mark.parametrize("kind", MODELS)
def test_values_and_gradients(kind, side, temperature):
    model = tiny(kind)
    truth = outcome(copy.deepcopy(model).double(), by_hand, side, temperature)
    eager = outcome(copy.deepcopy(model), by_hand, side, temperature)
    ours = outcome(model, dropin.logprobs_forward, side, temperature)
    for name, *three in zip(("logp", "entropy", "gradients"), ours, eager, truth, strict=True):
        assert_no_worse(*three, name=name)


def test_the_head_is_never_called(monkeypatch):
    model = tiny("qwen2")
    monkeypatch.setattr(model.lm_head, "forward", None)
    ids, mask = batch()
    out = dropin.logprobs_forward(model, ids, mask)
    assert out.logp.shape == (3, 8) and out.entropy is None
    with pytest.raises(TypeError):
        model(ids)


def test_labels():
    model, (ids, mask) = tiny("qwen3"), batch("right")
    with torch.no_grad():
        default = dropin.logprobs_forward(model, ids, mask)
        given = dropin.logprobs_forward(model, ids, mask, labels=ids.masked_fill(mask == 0, IGNORE))
        rolled = torch.where(mask.roll(-1, 1).bool(), ids.roll(-1, 1), IGNORE)
        rolled[:, -1] = IGNORE
        shifted = dropin.logprobs_forward(model, ids, mask, shift_labels=rolled)
    assert torch.equal(default.logp, given.logp) and shifted.logp.shape == ids.shape
    assert torch.equal(shifted.logp[:, :-1], default.logp)
    assert (default.logp == 0).equal(mask[:, 1:] == 0)
    with pytest.raises(ValueError, match="not both"):
        dropin.logprobs_forward(model, ids, mask, labels=ids, shift_labels=ids)


def test_packed_sequences():
    model = tiny("qwen2").eval()
    ids = torch.randint(0, 211, (1, 11))
    position_ids = torch.tensor([[*range(4), *range(7)]])
    with torch.no_grad():
        packed = dropin.logprobs_forward(model, ids, position_ids=position_ids).logp[0]
        apart = [
            dropin.logprobs_forward(model, ids[:, part]).logp[0]
            for part in (slice(4), slice(4, 11))
        ]
    assert packed[3] == 0
    torch.testing.assert_close(packed, torch.cat([apart[0], torch.zeros(1), apart[1]]))


def test_temperature_of_each_token():
    model, (ids, mask) = tiny("llama"), batch()
    temperature = torch.rand(3, 8) + 0.5
    with torch.no_grad():
        rows = dropin.logprobs_forward(model, ids, mask, temperature=temperature).logp
        one = dropin.logprobs_forward(model, ids, mask, temperature=float(temperature[1, 6])).logp
    assert rows[1, 6] == one[1, 6] != 0


def test_autocast():
    model, (ids, mask) = tiny("qwen2"), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dropin.logprobs_forward(model, ids, mask)
    out.logp.sum().backward()
    assert out.logp.dtype == torch.float32
    assert model.get_output_embeddings().weight.grad.dtype == torch.float32


def test_patch():
    model, (ids, mask) = tiny("qwen2").eval(), batch()
    plain = model(ids, attention_mask=mask).logits
    expected = dropin.logprobs_forward(model, ids, mask, temperature=0.7, entropy=True)
    original = type(model).forward
    with r1kernels.patch("transformers") as places:
        name = "transformers.models.qwen2.modeling_qwen2.Qwen2ForCausalLM.forward"
        assert name in places
        found = model(ids, attention_mask=mask, return_logp=True, temperature=0.7, entropy=True)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(model(ids, attention_mask=mask).logits, plain)
        generated = model.generate(ids[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert generated.shape == (3, 7)
        with pytest.raises(ValueError, match="return_logp"):
            model(ids, temperature=0.7)
    assert type(model).forward is original


class Adapter(torch.nn.Module):
    """What PEFT puts around a linear layer, as far as it is read."""

    def __init__(self, base, rank=3, dropout=0.0):
        super().__init__()
        features = base.weight.shape[::-1]
        self.base_layer, self.active_adapters, self.scaling = base, ["mine"], {"mine": 0.5}
        self.lora_A = torch.nn.ModuleDict({"mine": torch.nn.Linear(features[0], rank, bias=False)})
        self.lora_B = torch.nn.ModuleDict({"mine": torch.nn.Linear(rank, features[1], bias=False)})
        self.lora_dropout = torch.nn.ModuleDict({"mine": torch.nn.Dropout(dropout)})
        self.lora_variant, self.merged, self.disable_adapters = {}, False, False

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        if self.disable_adapters or self.merged:
            return self.base_layer(x)
        low = self.lora_A["mine"](self.lora_dropout["mine"](x))
        return self.base_layer(x) + 0.5 * self.lora_B["mine"](low)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("off", [None, "disable_adapters", "merged"])
def test_lora_on_the_head(off, frozen):
    model = tiny("llama")
    model.lm_head = Adapter(model.lm_head)
    model.lm_head.base_layer.weight.requires_grad_(not frozen)
    if off:
        setattr(model.lm_head, off, True)
    ids, mask = batch()

    def run(fn, lm):
        logp, entropy = fn(lm, ids, mask, entropy=True)[:2]
        (logp.sum() + 0.3 * entropy.sum()).backward()
        grads = [p.grad for p in lm.lm_head.parameters() if p.grad is not None]
        return logp, entropy, *grads

    truth = run(by_hand, copy.deepcopy(model).double())
    eager = run(by_hand, copy.deepcopy(model))
    ours = run(dropin.logprobs_forward, model)
    assert len(ours) == 2 + (not frozen) + 2 * (off is None)
    for at, three in enumerate(zip(ours, eager, truth, strict=True)):
        assert_no_worse(*three, name=f"result {at}")


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda head: setattr(head.lora_dropout["mine"], "p", 0.1), "lora_dropout"),
        (lambda head: head.lora_variant.update(mine="dora"), "variant"),
        (lambda head: setattr(head, "active_adapters", ["mine", "other"]), "one LoRA"),
        (lambda head: setattr(head, "active_adapters", ["prompt"]), "one LoRA"),
        (
            lambda head: setattr(head.lora_B["mine"], "bias", torch.nn.Parameter(torch.ones(1))),
            "bias",
        ),
    ],
)
def test_adapters_that_are_refused(change, text):
    model = tiny("llama").train()
    model.lm_head = Adapter(model.lm_head)
    change(model.lm_head)
    with pytest.raises(ValueError, match=text):
        dropin.logprobs_forward(model, batch()[0])


def test_heads_that_are_refused():
    ids, _ = batch()
    model = tiny("llama")
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(0))
    with pytest.raises(ValueError, match="not gathered"):
        dropin.logprobs_forward(model, ids)
    model.lm_head.weight = torch.nn.Parameter(torch.ones(4, 1).to(torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="float weight"):
        dropin.logprobs_forward(model, ids)
    model.lm_head = torch.nn.Identity()
    with pytest.raises(ValueError, match="Identity"):
        dropin.logprobs_forward(model, ids)
    with pytest.raises(ValueError, match="backbone"):
        dropin.logprobs_forward(torch.nn.Linear(3, 4), ids)


def test_real_peft():
    peft = pytest.importorskip("peft")
    model, (ids, mask) = tiny("llama"), batch()
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config, init_lora_weights=False))
    logp, _ = by_hand(wrapped, ids, mask)
    ours = dropin.logprobs_forward(wrapped, ids, mask).logp
    torch.testing.assert_close(ours, logp)
    with wrapped.disable_adapter():
        torch.testing.assert_close(
            dropin.logprobs_forward(wrapped, ids, mask).logp, by_hand(wrapped, ids, mask)[0]
        )
    with r1kernels.patch("transformers"):
        assert torch.equal(wrapped(ids, attention_mask=mask, return_logp=True).logp, ours)
    wrapped.merge_adapter()
    torch.testing.assert_close(dropin.logprobs_forward(wrapped, ids, mask).logp, logp)


def test_a_model_inside_peft():
    model, (ids, mask) = tiny("qwen2"), batch()

    class Peft(torch.nn.Module):
        def get_base_model(self):
            return model

    with torch.no_grad():
        inside, outside = (dropin.logprobs_forward(m, ids, mask).logp for m in (Peft(), model))
    assert torch.equal(inside, outside)
