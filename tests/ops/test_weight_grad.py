"""Gradients of the head in the caller's buffer, and gradients scaled where they lie."""

import pytest
import torch

from r1kernels import PolicyObjective, linear_logp, linear_loss, linear_policy_loss
from tests.numerics import relative_error

T, D = 5, 64
OBJECTIVE = PolicyObjective(aggregation="token_mean")
LOSSES = {
    "linear_logp": lambda hidden, weight, targets, **more: linear_logp(
        hidden, weight, targets, entropy=True, **more
    ).entropy.sum(),
    "linear_policy_loss": lambda hidden, weight, targets, **more: (
        linear_policy_loss(hidden, weight, targets, torch.arange(T) - 1.5, OBJECTIVE, **more).loss
    ),
    "linear_loss": lambda hidden, weight, targets, **more: linear_loss(
        hidden, weight, targets, lambda logp, entropy, rows: logp * (rows + 1), **more
    ),
}


def inputs(backend, dtype=torch.float32):
    vocab = 290 if backend == "triton" else 4400
    targets = torch.randint(0, vocab, (T,))
    targets[1] = -100
    return (
        torch.randn(T, D).to(dtype).requires_grad_(),
        (torch.randn(vocab, D) / 8).to(dtype).requires_grad_(),
        targets,
    )


@pytest.mark.parametrize("op", LOSSES)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_is_autograds_gradient_and_adds_up(backend, op, scale):
    hidden, weight, targets = inputs(backend)
    dhidden, dweight = torch.autograd.grad(
        scale * LOSSES[op](hidden, weight, targets), (hidden, weight)
    )
    buffer = torch.zeros(weight.shape)
    # Two micro-batches: both forwards before the first backward.
    losses = [scale * LOSSES[op](hidden, weight, targets, weight_grad=buffer) for _ in range(2)]
    losses[0].backward()
    assert torch.equal(buffer, dweight) and torch.equal(hidden.grad, dhidden)
    losses[1].backward()
    assert relative_error(buffer, 2 * dweight) < 1e-6
    assert weight.grad is None


@pytest.mark.parametrize("op", LOSSES)
def test_sixteen_bit_weight_has_a_float32_gradient(op):
    hidden, weight, targets = inputs("native", torch.bfloat16)
    (rounded,) = torch.autograd.grad(LOSSES[op](hidden, weight, targets), weight)
    buffer = torch.zeros(weight.shape)
    LOSSES[op](hidden, weight, targets, weight_grad=buffer).backward()
    assert torch.equal(buffer.to(torch.bfloat16), rounded)
    assert not torch.equal(buffer, rounded.float())


def largest_allocation(body) -> int:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        body()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("op", LOSSES)
@pytest.mark.parametrize("buffer", [False, True])
def test_backward_makes_no_second_gradient(backend, op, buffer):
    hidden, weight, targets = inputs(backend)
    more = {"weight_grad": torch.zeros(weight.shape)} if buffer else {}
    loss = 3 * LOSSES[op](hidden, weight, targets, **more)
    made = largest_allocation(loss.backward)
    # Without the buffer, linear_logp makes its one gradient here; the others scale what they have.
    expected = op == "linear_logp" and not buffer
    assert (made >= 4 * weight.numel()) == expected, f"{made} bytes, weight {4 * weight.numel()}"


@pytest.mark.parametrize("op", ["linear_policy_loss", "linear_loss"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_second_backward_is_refused(op, scale):
    hidden, weight, targets = inputs("native")
    loss = scale * LOSSES[op](hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=f"{op} makes its gradients in the forward"):
        loss.backward()


def test_linear_logp_has_a_second_backward(backend):
    hidden, weight, targets = inputs(backend)
    loss = LOSSES["linear_logp"](hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(
    ("buffer", "frozen", "error", "match"),
    [
        (torch.zeros(16, D), False, ValueError, r"weight_grad must have shape \[17, 64\]"),
        (torch.zeros(17, D).half(), False, TypeError, "weight_grad must be torch.float32"),
        (torch.zeros(D, 17).T, False, ValueError, "weight_grad must be contiguous"),
        (torch.zeros(17, D), True, ValueError, "weight must require one"),
        (1.0, False, TypeError, "weight_grad must be a tensor"),
    ],
)
def test_bad_input(buffer, frozen, error, match):
    weight = torch.randn(17, D, requires_grad=not frozen)
    with pytest.raises(error, match=match):
        linear_logp(
            torch.randn(3, D), weight, torch.zeros(3, dtype=torch.int64), weight_grad=buffer
        )
