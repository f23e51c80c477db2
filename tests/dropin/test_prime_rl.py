import inspect

import pytest
import torch

import r1kernels
from r1kernels import dropin
from tests.dropin import stubs
from tests.dropin.heads import assert_each_no_worse, evaluate, make


def test_signatures():
    for member in ("__init__", "forward"):
        newer, ours = (
            inspect.signature(getattr(cls, member))
            for cls in (stubs.MaskedOutputLinear, dropin.FusedOutputLinear)
        )
        assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
            (p.name, p.kind, p.default) for p in newer.parameters.values()
        ]
    older = list(inspect.signature(stubs.FusedOutputLinear.forward).parameters)
    assert older == list(ours.parameters)[:-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sampling_mask(dtype):
    inputs = make((3, 11), 24, 501, dtype)
    temperature = torch.rand(3, 11) + 0.5
    mask = torch.rand(3, 11, 501).argsort(-1)[..., :7].int()
    mask[..., 0] = inputs.targets
    mask[:, :, 4:] = torch.where(torch.rand(3, 11, 3) > 0.5, mask[:, :, 4:], -1)
    mask[0, :3] = -1
    mask[1, 1, 0] = (inputs.targets[1, 1] + 1) % 501
    mask[1, 1, 1:] = -1

    def run(cls):
        layer = cls(24, 501, chunk_size=64)

        def fn(hidden, weight, targets, bias):
            given = {"labels": targets, "sampling_mask": mask}
            given["temperature"] = (
                temperature.double() if weight.dtype == torch.float64 else temperature
            )
            return torch.func.functional_call(layer, {"weight": weight}, (hidden,), given)

        return fn

    theirs = run(stubs.MaskedOutputLinear)
    ours = evaluate(run(dropin.FusedOutputLinear), inputs)
    whole = dropin.FusedOutputLinear(24, 501, 64).to(dtype)
    whole.weight.data = inputs.weight
    full = whole(inputs.hidden, inputs.targets, temperature)["logprobs"]
    same = ours["logprobs"] == full
    assert same[0, :3].all() and same[1, 1] and not same[2].any()
    assert_each_no_worse(ours, evaluate(theirs, inputs), evaluate(theirs, inputs, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_values_and_gradients(dtype):
    inputs = make((3, 11), 24, 501, dtype)
    temperature = torch.rand(3, 11) + 0.5

    def run(cls):
        layer = cls(24, 501, chunk_size=64)

        def fn(hidden, weight, targets, bias):
            given = {"labels": targets, "temperature": temperature.to(hidden.dtype)}
            return torch.func.functional_call(layer, {"weight": weight}, (hidden,), given)

        return fn

    theirs = run(stubs.FusedOutputLinear)
    ours = evaluate(run(dropin.FusedOutputLinear), inputs)
    assert_each_no_worse(ours, evaluate(theirs, inputs), evaluate(theirs, inputs, torch.float64))


def test_without_labels_it_is_a_linear_layer():
    layer, hidden = dropin.FusedOutputLinear(8, 17, 4), torch.randn(2, 3, 8)
    assert torch.equal(layer(hidden)["logits"], hidden @ layer.weight.T)
    with pytest.raises(ValueError, match="temperature"):
        layer(hidden, torch.zeros(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("cls", [stubs.FusedOutputLinear, stubs.MaskedOutputLinear])
def test_patch(monkeypatch, cls):
    (module,) = stubs.install(monkeypatch, "prime_rl").values()
    module.FusedOutputLinear = cls
    with r1kernels.patch("prime_rl"):
        assert module.FusedOutputLinear is dropin.FusedOutputLinear
    assert module.FusedOutputLinear is cls
