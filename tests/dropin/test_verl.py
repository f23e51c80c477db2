import importlib
import inspect
from types import SimpleNamespace

import pytest
import torch

import r1kernels
from r1kernels import dropin
from tests.dropin import stubs
from tests.dropin.heads import assert_each_no_worse, evaluate, make
from tests.numerics import assert_no_worse

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODULES = {
    "linear_cross_entropy": "verl.utils.kernel.linear_cross_entropy",
    "FusedLinearForPPO": "verl.utils.experimental.torch_functional",
    "logprobs_from_logits": "verl.utils.torch_functional",
}


def parameters(x):
    return [(p.name, p.kind, p.default) for p in inspect.signature(x).parameters.values()]


def test_signatures():
    ours = dropin.linear_cross_entropy
    assert parameters(ours) == parameters(stubs.linear_cross_entropy)
    assert parameters(ours) == parameters(stubs.LinearCrossEntropy.forward)[1:]
    assert parameters(dropin.logprobs_from_logits) == parameters(stubs.logprobs_from_logits)
    ours, older, released = (
        [parameters(cls), parameters(cls.forward)]
        for cls in (
            dropin.FusedLinearForPPO,
            stubs.FusedLinearForPPO,
            stubs.ReleasedFusedLinearForPPO,
        )
    )
    assert ours == released
    assert [ours[0][:-1], ours[1]] == older


def heads(fn, temperature, **options):
    def run(hidden, weight, targets, bias):
        heat = temperature
        if isinstance(heat, torch.Tensor) and hidden.dtype == torch.float64:
            heat = heat.double()
        logp, entropy = fn(hidden, weight, targets, heat, **options)
        return {"logp": logp, "entropy": entropy}

    return run


@pytest.mark.parametrize("temperature", ["number", "scalar", "rows"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_cross_entropy(dtype, temperature):
    inputs = make((3, 11), 24, 501, DTYPES[dtype])
    heat = {"number": 0.7, "scalar": torch.tensor(0.7), "rows": torch.rand(33) + 0.5}[temperature]
    plain = float(heat) if temperature == "scalar" else heat
    theirs = heads(stubs.linear_cross_entropy, plain)
    found = evaluate(heads(dropin.linear_cross_entropy, heat), inputs)
    assert found["entropy"].shape == (33,)
    assert_each_no_worse(found, evaluate(theirs, inputs), evaluate(theirs, inputs, torch.float64))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reductions(reduction):
    hidden, weight, targets, _ = make((3, 11), 24, 501, torch.float32)
    hidden.requires_grad_()
    whole, _ = dropin.linear_cross_entropy(hidden, weight, targets, 0.7)
    reduced, entropy = dropin.linear_cross_entropy(hidden, weight, targets, 0.7, reduction)
    expected = getattr(whole, reduction)()
    assert torch.equal(reduced, expected) and entropy.shape == (33,)
    ours, by_hand = (torch.autograd.grad(x, hidden)[0] for x in (reduced, expected))
    assert torch.equal(ours, by_hand)


def test_flat_labels_and_none_mean_the_defaults():
    hidden, weight, targets, _ = make((3, 11), 24, 501, torch.float32)
    found = dropin.linear_cross_entropy(hidden, weight, targets.flatten(), None, None)
    plain = dropin.linear_cross_entropy(hidden, weight, targets)
    assert all(map(torch.equal, found, plain))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_linear_for_ppo(dtype):
    inputs = make((3, 11), 24, 501, DTYPES[dtype])
    theirs = heads(stubs.FusedLinearForPPO(7), 0.7)
    found = evaluate(heads(dropin.FusedLinearForPPO(7), 0.7), inputs)
    assert found["logp"].shape == (3, 11) and found["logp"].dtype == torch.float32
    assert found["entropy"].dtype == DTYPES[dtype]
    assert_each_no_worse(found, evaluate(theirs, inputs), evaluate(theirs, inputs, torch.float64))


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logprobs_from_logits(dtype, inplace):
    logits = (torch.randn(3, 11, 60) * 4).to(DTYPES[dtype])
    labels = torch.randint(0, 60, (3, 11))

    def run(fn, x):
        leaf = x.clone().requires_grad_()
        x = leaf * 1.0
        out = fn(x, labels, inplace_backward=inplace)
        (grad,) = torch.autograd.grad((out * torch.arange(33).view(3, 11)).sum(), leaf)
        return x, out, grad

    used, *ours = run(dropin.logprobs_from_logits, logits)
    _, *theirs = run(stubs.logprobs_from_logits, logits)
    _, *truth = run(stubs.logprobs_from_logits, logits.double())
    assert torch.equal(used, logits) != inplace
    for name, *three in zip(("logp", "dlogits"), ours, theirs, truth, strict=True):
        assert_no_worse(*three, name=name)


def test_what_has_no_counterpart_is_refused():
    hidden, weight, targets, _ = make((5,), 8, 17, torch.float32)
    with pytest.raises(ValueError, match="reduction"):
        dropin.linear_cross_entropy(hidden, weight, targets, 1.0, "batchmean")
    with pytest.raises(ValueError, match="impl_backend"):
        dropin.FusedLinearForPPO(impl_backend="cute")
    with pytest.raises(ValueError, match=r"temperature must be one number .* 5 labels, got \[2\]"):
        dropin.FusedLinearForPPO()(hidden, weight, targets, torch.ones(2))
    alone, several = (SimpleNamespace(size=lambda n=n: n) for n in (1, 2))
    dropin.linear_cross_entropy(hidden, weight, targets, 1.0, "none", alone)
    with pytest.raises(ValueError, match="dist_process_group"):
        dropin.linear_cross_entropy(hidden, weight, targets, 1.0, "none", several)


@pytest.mark.parametrize("members", [stubs.MEMBERS, stubs.RELEASED], ids=["main", "released"])
def test_patch(monkeypatch, members):
    modules = stubs.install(monkeypatch, "verl")
    for title, module in modules.items():
        setattr(module, stubs.MEMBERS[title].__name__, members[title])
        module.borrowed = members[title]
    with r1kernels.patch("verl") as places:
        for title, module in modules.items():
            name = stubs.MEMBERS[title].__name__
            assert {f"{title}.{name}", f"{title}.borrowed"} <= set(places)
            assert getattr(module, name) is module.borrowed is getattr(dropin, name)
    for title, module in modules.items():
        assert getattr(module, stubs.MEMBERS[title].__name__) is module.borrowed is members[title]


def test_real_verl():
    pytest.importorskip("verl")
    torch_functional = importlib.import_module(MODULES["FusedLinearForPPO"])
    importlib.import_module(MODULES["linear_cross_entropy"])
    inputs = make((3, 11), 24, 501, torch.float32)
    truth = heads(stubs.FusedLinearForPPO(), 0.7)
    theirs = evaluate(heads(torch_functional.FusedLinearForPPO(7), 0.7), inputs)
    with r1kernels.patch("verl") as places:
        assert {f"{title}.{name}" for name, title in MODULES.items()} <= set(places)
        ours = evaluate(heads(torch_functional.FusedLinearForPPO(7), 0.7), inputs)
    assert_each_no_worse(ours, theirs, evaluate(truth, inputs, torch.float64))
