"""The gated activation by itself: every backend and instruction set against autograd in float64."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from conftest import DEVICE
from numerics import assert_no_worse

from r1kernels.backend import implementation, load, use_backend
from r1kernels.reference import glu as reference
from tests.ops.head_cases import supported

# The interpreter computes with numpy, which warns where exp(-x) overflows to the right result.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(dtype, count=2600):
    """Gates over all that matters, both zeros and far tails included, in no multiple of a block."""
    gate = torch.cat(
        [torch.linspace(-13, 13, count), torch.tensor([0.0, -0.0, 60, -60, 110, -110])]
    )
    up, dh = torch.randn(2, len(gate))
    return [x.to(DEVICE, dtype).view(2, -1) for x in (dh, gate, up)]


def eager(dh, gate, up, activation):
    """h, dgate, dup by torch, in the dtype given."""
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    h = reference.glu(gate, up, activation)
    return h.detach(), *torch.autograd.grad(h, (gate, up), dh)


def ours(run, dh, gate, up, activation):
    h, dh, dgate, dup = gate.clone(), dh.clone(), gate.clone(), up.clone()
    run.forward_(h, up, activation)
    run.backward_(dh, dgate, dup, activation)
    return h, dh, dgate, dup


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_eager(backend, dtype, activation):
    given = draw(dtype)
    if not supported(backend, dtype):
        with pytest.raises(RuntimeError, match="glu: triton: the interpreter truncates"):
            implementation("glu", DEVICE, *given)
        return
    found = ours(implementation("glu", DEVICE, *given), *given, activation)
    truth = eager(*(x.double() for x in given), activation)
    names = ("h", "h again", "dgate", "dup")
    for name, x, y, z in zip(
        names,
        found,
        [eager(*given, activation)[i] for i in (0, 0, 1, 2)],
        [truth[i] for i in (0, 0, 1, 2)],
        strict=True,
    ):
        assert_no_worse(x, y, z, name=f"{activation} {name}")


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_reference_in_float64_is_exact(activation):
    given = draw(torch.float64)
    h, *rest = ours(reference, *given, activation)
    truth = eager(*given, activation)
    for x, y in zip((h, *rest), (truth[0], *truth), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_every_instruction_set(activation):
    native = load("glu", "native")
    if isinstance(native, str):
        pytest.skip(native)
    from r1kernels import _C

    given, before = [x.cpu() for x in draw(torch.float32)], _C.isa()
    truth = eager(*(x.double() for x in given), activation)
    expected = eager(*given, activation)
    try:
        for isa in _C.isas():
            _C.use_isa(isa)
            h, _, *grads = ours(native, *given, activation)
            for x, y, z in zip((h, *grads), expected, truth, strict=True):
                assert_no_worse(x, y, z, name=f"{isa} {activation}")
    finally:
        _C.use_isa(before)


def test_an_extension_of_older_sources_is_refused(monkeypatch):
    if isinstance(native := load("glu", "native"), str):
        pytest.skip(native)
    common = importlib.import_module("r1kernels._native.common")
    monkeypatch.setattr(common, "extension", SimpleNamespace(token_forward=None))
    gate = torch.ones(1, 4)
    assert implementation("glu", "cpu", gate) is reference
    with use_backend("native"), pytest.raises(RuntimeError, match=r"without glu_forward .*pip"):
        implementation("glu", "cpu", gate)
    assert native.refuses() is not None


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_nan_stays_nan(backend, activation):
    x = torch.tensor([[float("nan"), 1.0]], device=DEVICE)
    one = torch.ones_like(x)
    h, dh, dgate, dup = ours(implementation("glu", DEVICE, x), one, x, one, activation)
    for out in (h, dh, dgate, dup):
        assert out[0, 0].isnan() and not out[0, 1].isnan()


@pytest.mark.gpu
def test_more_elements_than_an_int32_counts():
    count = 2**31 + 2**12
    gate, up = (torch.full((1, count), x, dtype=torch.bfloat16, device="cuda") for x in (1, 2))
    h = 2 * torch.nn.functional.silu(torch.ones(())).bfloat16()
    implementation("glu", "cuda", gate, up).forward_(gate, up, "silu")
    assert (gate[:, :4096] == h).all() and (gate[:, -8192:] == h).all()
