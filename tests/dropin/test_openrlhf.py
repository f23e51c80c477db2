import inspect

import pytest
import torch

import r1kernels
from r1kernels import dropin
from tests.dropin import stubs
from tests.numerics import assert_no_worse


def test_signature():
    theirs, ours = (inspect.signature(x.log_probs_from_logits) for x in (stubs, dropin))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_values_and_gradients(dtype, temperature):
    logits = (torch.randn(3, 11, 60) * 4).to(dtype)
    labels = torch.randint(0, 60, (3, 11))
    three = []
    for fn, x in (
        (dropin.log_probs_from_logits, logits),
        (stubs.log_probs_from_logits, logits),
        (stubs.log_probs_from_logits, logits.double()),
    ):
        x = x.clone().requires_grad_()
        out = fn(x, labels, temperature)
        three.append((out, *torch.autograd.grad((out * torch.arange(11)).sum(), x)))
    for name, *parts in zip(("logp", "dlogits"), *three, strict=True):
        assert_no_worse(*parts, name=name)


def test_patch(monkeypatch):
    (module,) = stubs.install(monkeypatch, "openrlhf").values()
    with r1kernels.patch("openrlhf"):
        assert module.log_probs_from_logits is dropin.log_probs_from_logits
    assert module.log_probs_from_logits is stubs.log_probs_from_logits
