import inspect

import pytest
import torch

import r1kernels
from r1kernels import dropin
from tests.dropin import stubs
from tests.dropin.heads import assert_each_no_worse, evaluate, make


def test_signatures():
    for member in ("__init__", "forward"):
        theirs, ours = (
            inspect.signature(getattr(x.FusedOutputLinear, member)) for x in (stubs, dropin)
        )
        assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
            (p.name, p.kind, p.default) for p in theirs.parameters.values()
        ]


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


def test_patch(monkeypatch):
    (module,) = stubs.install(monkeypatch, "prime_rl").values()
    with r1kernels.patch("prime_rl"):
        assert module.FusedOutputLinear is dropin.FusedOutputLinear
    assert module.FusedOutputLinear is stubs.FusedOutputLinear
