"""Rows that the host knows: dropped before the GEMMs, without a read from the device.

The device is played by "meta", which has no values to read, and every op that would wait for a
device (a CPU tensor as an index, say) is an error there.
"""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r1kernels import (
    PolicyObjective,
    chunked_head,
    linear_loss,
    linear_policy_loss,
    rows,
    use_backend,
)
from r1kernels.backend import load
from r1kernels.head_contract import Rows
from r1kernels.head_inputs import head_inputs
from r1kernels.linear_logp_ops import linear_logp_bwd, linear_logp_fwd
from r1kernels.linear_policy_loss_ops import linear_policy_loss_fwd
from r1kernels.policy_inputs import live_rows

TARGETS = torch.tensor([3, -100, 16, 0, 7, 2])
LENGTHS = torch.tensor([0, 2, 5, 6])
ADVANTAGES = torch.tensor([1.0, 0.0, -1.0])
PLAIN = PolicyObjective(aggregation="token_mean")


class NoWaiting(TorchDispatchMode):
    """Raises on an op that takes values of both devices, other than a copy from the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.ndim}
        copies = (torch.ops.aten.copy_.default,)
        assert len(devices) < 2 or func in copies, f"{func} mixes {devices}"
        return func(*args, **(kwargs or {}))


def body(op):
    """What an op does on its tensors, past the dispatcher, which has a fake for meta tensors."""
    return op._init_fn.__wrapped__


def on_device(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def options(**more):
    names = "bias", "lora", "softcap", "prior", "workspace_mb", "weight_grad", "group"
    given = dict.fromkeys(names)
    return given | {"temperature": 1.0, "logit_scale": 1.0} | more


def test_a_read_would_be_noticed():
    hidden, weight, targets = on_device(6, 8), on_device(17, 8), on_device(6, dtype=torch.int64)
    with NoWaiting(), pytest.raises(RuntimeError, match="meta"):
        body(linear_logp_fwd)(
            *head_inputs(hidden, weight, targets, **options()), False, False, None
        )
    with NoWaiting(), pytest.raises(AssertionError, match="mixes"):
        hidden[TARGETS != -100]


@pytest.mark.parametrize("temperature", [0.7, torch.full((6,), 0.7)], ids=["float", "tensor"])
@pytest.mark.parametrize("frozen", [False, True])
def test_linear_logp_does_not_wait(frozen, temperature):
    hidden, weight = on_device(6, 8), on_device(17, 8)
    with NoWaiting():
        call = head_inputs(
            hidden,
            weight,
            TARGETS,
            **options(temperature=temperature, prior=-torch.rand(6)),
        )
        out = body(linear_logp_fwd)(*call, True, frozen, None)
        upstream = [on_device(6) for _ in range(3)]
        needs = [True, True, False, False, False]
        grads = body(linear_logp_bwd)(*call, *upstream, *out[3:6], needs, None)
    assert out[0].device.type == "meta" and out[0].shape == (6,) and int(out[5]) == 5
    assert grads[0].shape == hidden.shape and grads[1].shape == weight.shape


def test_backward_reads_nothing_wherever_the_targets_are():
    targets = on_device(6, dtype=torch.int64)
    call = head_inputs(on_device(6, 8), on_device(17, 8), targets, **options())
    exact_3T, counted_T = on_device(3, 6, dtype=torch.float64), on_device(6, dtype=torch.bool)
    with NoWaiting():
        body(linear_logp_bwd)(
            *call, *[on_device(6) for _ in range(3)], exact_3T, counted_T, torch.tensor([4]),
            [True, True, False, False, False], None,
        )  # fmt: skip


def test_one_read_in_a_forward_and_none_in_a_backward(monkeypatch):
    """Reads of CPU tensors that stand for a device's; `count` is on the CPU wherever hidden is."""
    hidden, weight = torch.randn(6, 8), torch.randn(17, 8)
    temperature = torch.rand(6) + 0.5
    call = head_inputs(hidden, weight, TARGETS, **options(temperature=temperature))
    read = []
    for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
        before = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda self, *args, before=before: read.append(self) or before(self, *args),
        )
    with use_backend("reference"):
        out = body(linear_logp_fwd)(*call, True, False, None)
        assert len(read) == 1
        read.clear()
        needs = [True, True, False, False, False]
        body(linear_logp_bwd)(*call, *torch.randn(3, 6), *out[3:6], needs, None)
    assert [x is out[5] for x in read] == [True]


@pytest.mark.parametrize("objective", ["plain", "gspo", "r1", "entropy"])
@pytest.mark.parametrize("padded", [False, True])
def test_linear_policy_loss_does_not_wait(monkeypatch, objective, padded):
    objectives = {
        "plain": PLAIN,
        "gspo": PolicyObjective.gspo(),
        "r1": PolicyObjective.r1(),
        "entropy": PolicyObjective(entropy_coef=0.1),
    }
    module = importlib.import_module("r1kernels.linear_policy_loss")
    monkeypatch.setattr(module, "linear_policy_loss_fwd", body(linear_policy_loss_fwd))
    # Called without its autograd, it would be given nothing to differentiate.
    needs = [True, True, False, False, False]
    monkeypatch.setattr("r1kernels.head_inputs.HeadInputs.wants", lambda call: needs)
    met = []
    chunk = load("linear_logp", "reference").HeadChunk
    before = chunk.gradients

    def spy(self, active, *args, **more):
        met.append(None if active is None else len(active))
        return before(self, active, *args, **more)

    monkeypatch.setattr(chunk, "gradients", spy)
    leading = (3, 2) if padded else (6,)
    streams = {name: -torch.rand(leading) for name in ("logp_old", "logp_ref", "logp_sampler")}
    with NoWaiting(), torch.no_grad():
        out = linear_policy_loss(
            on_device(*leading, 8),
            on_device(17, 8),
            TARGETS.view(leading),
            ADVANTAGES,
            objectives[objective],
            cu_seqlens=None if padded else LENGTHS,
            mask=torch.ones(leading),
            weights=torch.rand(leading) + 0.5,
            temperature=torch.rand(leading) + 0.5,
            **streams,
        )
    assert out.logp.shape == leading and out.logp.device.type == "meta"
    # Five rows count; the group in the middle has no advantage.
    known = 3 if padded else 2
    assert met == [known if objective in ("plain", "gspo") else None]


def test_linear_loss_does_not_wait():
    hidden, weight = on_device(6, 8).requires_grad_(), on_device(17, 8).requires_grad_()
    with NoWaiting():
        loss = linear_loss(hidden, weight, TARGETS, lambda logp, entropy, rows: logp * rows)
        loss.backward()
    assert hidden.grad.shape == hidden.shape and weight.grad.shape == weight.shape


@pytest.mark.parametrize("workspace", [None, 1])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_idle_rows_enter_no_gradient_product(backend, monkeypatch, level, workspace):
    T, vocab = 60, 300 if backend == "triton" else 9000
    hidden, weight = torch.randn(T, 24), torch.randn(vocab, 24) / 5
    targets, cu_seqlens = torch.randint(0, vocab, (T,)), torch.tensor([0, 20, 40, 60])
    targets[[0, 25, 59]] = -100
    objective = PolicyObjective(ratio_level=level)

    def run():
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_policy_loss(
            *leaves, targets, ADVANTAGES, objective, cu_seqlens=cu_seqlens, workspace_mb=workspace
        )
        return out, torch.autograd.grad(out.loss, leaves)

    by_value, expected = run()
    # As on a GPU, where coefficients are not looked at.
    monkeypatch.setattr(chunked_head, "looks_free", lambda device: False)
    met = []
    chunk = load("linear_logp", backend).HeadChunk
    for name in ("gradients", "backward"):
        before = getattr(chunk, name)

        def spy(self, first, second, *args, before=before, **more):
            met.append(len(first.targets_T if isinstance(first, Rows) else second))
            return before(self, first, second, *args, **more)

        monkeypatch.setattr(chunk, name, spy)
    known, found = run()
    assert torch.equal(known.logp, by_value.logp)
    assert bool(known.logp[26:40].all())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # A chunk of nearly no idle rows takes them along.
    assert 38 <= sum(met) <= 41


def test_what_the_host_knows_of_coefficients():
    packed, padded = torch.Size([6]), torch.Size([3, 2])
    per_token = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, torch.nan])
    sequence = PolicyObjective.gspo()
    expected = [True, True, False, False, False, True]
    assert live_rows(PLAIN, packed, ADVANTAGES, LENGTHS).tolist() == expected
    assert live_rows(PLAIN, packed, per_token, None).tolist() == [False, True] + 3 * [False] + [
        True
    ]
    # One token with an advantage moves the ratio of its whole sequence.
    assert live_rows(sequence, packed, per_token, LENGTHS).tolist() == expected
    assert live_rows(PLAIN, padded, ADVANTAGES, None).tolist() == [
        True,
        True,
        False,
        False,
        True,
        True,
    ]
    for objective in (
        PolicyObjective.r1(),
        PolicyObjective.kimi(0.1),
        PolicyObjective(entropy_coef=1),
    ):
        assert live_rows(objective, packed, per_token, LENGTHS) is None
    assert live_rows(PLAIN, packed, per_token.to("meta"), None) is None
    assert live_rows(PLAIN, packed, ADVANTAGES, LENGTHS.to("meta")) is None


def test_temperature_that_nobody_looked_at_shows():
    temperature = torch.tensor([1.0, 0.0, -1.0])
    *_, checked = rows.counted_rows(torch.zeros(3, dtype=torch.int64), 5, temperature.to("meta"))
    assert checked.device.type == "meta"
    with pytest.raises(ValueError, match=r"temperature\[1\] is 0.0"):
        rows.counted_rows(torch.zeros(3, dtype=torch.int64), 5, temperature)
