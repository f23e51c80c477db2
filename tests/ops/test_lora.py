"""The low-rank term of the head, W + scale B A: as if the sum had been made, without making it."""

import pytest
import torch

from r1kernels import (
    PolicyObjective,
    linear_logp,
    linear_loss,
    linear_policy_loss,
)
from r1kernels.head_contract import Gradients
from tests.numerics import assert_no_worse, relative_error, relative_l2
from tests.ops.head_cases import DTYPES, eager, gradients, make, shape_for, supported

SCALE, RANK = 1.7, 3


# Which of (hidden, weight, A, B) train.
TRAINED = {
    "all": (True, True, True, True),
    "lora": (True, False, True, True),
    "none": (True, False, False, False),
    "lora alone": (False, False, True, True),
}


def draw(backend, size, options, dtype):
    case = make(shape_for(backend, size), dtype, options)
    (V, D), scale = case.weight.shape, 0.3 * RANK**-0.5
    down, up = torch.randn(RANK, D) * D**-0.5, torch.randn(V, RANK) * scale
    return case, down.to(dtype), up.to(dtype)


def leaves(case, down, up, trained, dtype=None):
    dtype = dtype or case.hidden.dtype
    return [
        x.to(dtype).detach().clone().requires_grad_(need)
        for x, need in zip((case.hidden, case.weight, down, up), trained, strict=True)
    ]


def merged(hidden, weight, down, up, case, **more):
    """PEFT's merge: the term added to the weight in its dtype."""
    bias = None if case.bias is None else case.bias.to(hidden.dtype)
    options = case.options | more
    return eager(hidden, weight + SCALE * (up @ down), case.targets, bias=bias, **options)


def apart(hidden, weight, down, up, case, **more):
    return linear_logp(
        hidden, weight, case.targets, bias=case.bias, lora=(down, up, SCALE), **case.options, **more
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("trained", "options"),
    [
        ("all", "all"),
        ("lora", "plain"),
        ("none", "plain"),
        ("none", "all"),
        ("lora alone", "plain"),
    ],
)
def test_no_worse_than_the_merged_weight(backend, options, dtype, trained):
    if not supported(backend, DTYPES[dtype]):
        pytest.skip("the interpreter's bfloat16 dot product is wrong")
    # Through logp alone where all but hidden is frozen: lse would pass the Jacobian by.
    only = "logp" if trained == "none" else None
    names = [
        name
        for name, need in zip(("hidden", "weight", "A", "B"), TRAINED[trained], strict=True)
        if need
    ]
    found = {}
    for _ in range(4):
        case, down, up = draw(backend, 1, options, DTYPES[dtype])
        three = []
        for fn, wide in ((apart, None), (merged, None), (merged, torch.float64)):
            given = leaves(case, down, up, TRAINED[trained], wide)
            out = fn(*given, case)
            three.append([out.logp, out.lse, *gradients(out, tuple(given), only)])
        for name, *x in zip(["logp", "lse", *names], *three, strict=True):
            top = x[2].abs().max().double()
            found.setdefault(name, []).append([(y.detach().double() / top).flatten() for y in x])
    for name, draws in found.items():
        assert_no_worse(*(torch.cat(x) for x in zip(*draws, strict=True)), name=name)


@pytest.mark.parametrize("size", [0, 2])
def test_chunks_and_shapes(backend, size):
    case, down, up = draw(backend, size, "all", torch.float32)
    ours = leaves(case, down, up, TRAINED["all"])
    truth = leaves(case, down, up, TRAINED["all"], torch.float64)
    ours_out, truth_out = apart(*ours, case, workspace_mb=1), merged(*truth, case)
    for a, b in zip(
        [*ours_out, *gradients(ours_out, tuple(ours))],
        [*truth_out, *gradients(truth_out, tuple(truth))],
        strict=True,
    ):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("trained", ["all", "lora"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("workspace", [None, 1])
def test_policy_loss(backend, trained, entropy_coef, workspace):
    case, down, up = draw(backend, 2, "plain", torch.float32)
    # Sequences share a coefficient, so that a small workspace takes the second pass.
    objective = PolicyObjective(entropy_coef=entropy_coef, ratio_level="sequence")
    advantages, T = torch.tensor([1.0, 0.0, -0.5]), len(case.targets)
    cu_seqlens = torch.tensor([0, T // 3, T // 2, T])
    ours, again = (leaves(case, down, up, TRAINED[trained]) for _ in range(2))
    found = linear_policy_loss(
        ours[0],
        ours[1],
        case.targets,
        advantages,
        objective,
        lora=(ours[2], ours[3], SCALE),
        cu_seqlens=cu_seqlens,
        workspace_mb=workspace,
        **case.options,
    )
    expected = linear_policy_loss(
        again[0],
        again[1] + SCALE * (again[3] @ again[2]),
        case.targets,
        advantages,
        objective,
        cu_seqlens=cu_seqlens,
        **case.options,
    )
    assert relative_error(found.logp, expected.logp) < 2e-6
    needed = [[x for x in given if x.requires_grad] for given in (ours, again)]
    for a, b in zip(
        torch.autograd.grad(found.loss, needed[0]),
        torch.autograd.grad(expected.loss, needed[1]),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-5


def test_callers_loss(backend):
    case, down, up = draw(backend, 1, "all", torch.float32)
    ours = leaves(case, down, up, TRAINED["all"])
    truth = leaves(case, down, up, TRAINED["all"], torch.float64)
    loss = linear_loss(
        *ours[:2],
        case.targets,
        lambda logp, entropy, rows: logp - 0.3 * entropy,
        bias=case.bias,
        lora=(*ours[2:], SCALE),
        **case.options,
    )
    out = merged(*truth, case)
    expected = out.logp.sum() - 0.3 * out.entropy.sum()
    for a, b in zip(
        torch.autograd.grad(loss, ours), torch.autograd.grad(expected, truth), strict=True
    ):
        assert relative_error(a, b) < 1e-5


def test_float32_adapters_beside_sixteen_bit_weights(backend):
    if not supported(backend, torch.bfloat16):
        pytest.skip("the interpreter's bfloat16 dot product is wrong")
    case, down, up = draw(backend, 1, "plain", torch.bfloat16)
    hidden, weight, down, up = leaves(case, down, up, TRAINED["lora"])
    wide = [x.detach().float().requires_grad_() for x in (down, up)]
    out = apart(hidden, weight, down, up, case)
    mixed = apart(hidden, weight, *wide, case)
    assert torch.equal(out.logp, mixed.logp)
    narrow = torch.autograd.grad(out.logp.sum(), (down, up))
    for a, b in zip(narrow, torch.autograd.grad(mixed.logp.sum(), wide), strict=True):
        assert b.dtype == torch.float32 and torch.equal(b.to(torch.bfloat16), a)


def test_frozen_weight_has_no_gradient_buffer(backend, monkeypatch):
    buffers = []
    zeros = Gradients.zeros
    monkeypatch.setattr(
        Gradients,
        "zeros",
        lambda *given, **more: buffers.append(zeros(*given, **more)) or buffers[-1],
    )
    case, down, up = draw(backend, 1, "plain", torch.float32)
    given = leaves(case, down, up, TRAINED["lora"])
    out = apart(*given, case)
    gradients(out, tuple(given))
    linear_policy_loss(
        *given[:2],
        case.targets,
        torch.ones(len(case.targets)),
        PolicyObjective(aggregation="token_mean"),
        lora=(*given[2:], SCALE),
    ).loss.backward()
    assert len(buffers) == 2
    for grads in buffers:
        assert grads.weight_VD is None and grads.lora_RD.any() and grads.lora_VR.any()


def test_ignored_rows_hold_anything(backend):
    case, down, up = draw(backend, 1, "plain", torch.float32)
    clean, dirty = (leaves(case, down, up, TRAINED["all"]) for _ in range(2))
    dirty[0].data[2] = torch.nan
    for a, b in zip(
        *(gradients(apart(*given, case), tuple(given)) for given in (clean, dirty)), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("device", "rank", "shape"),
    [
        ("cpu", 16, (64, 64, 600)),
        pytest.param("cuda", 16, (512, 1024, 32000), marks=pytest.mark.gpu),
        pytest.param("cuda", 5, (512, 1000, 32003), marks=pytest.mark.gpu),
        pytest.param("cuda", 128, (512, 1024, 32000), marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_bfloat16_on_every_device(device, rank, shape, entropy_coef):
    T, D, V = shape
    sizes = {"hidden": (T, D), "weight": (V, D), "A": (rank, D), "B": (V, rank)}
    scales = {"hidden": 1.0, "weight": D**-0.5, "A": D**-0.5, "B": rank**-0.5}
    drawn = [(torch.randn(sizes[x]) * scales[x]).to(device, torch.bfloat16) for x in sizes]
    targets, advantages = torch.randint(0, V, (T,)).to(device), torch.randn(T).to(device)
    ours = [x.clone().requires_grad_() for x in drawn]
    truth = [x.double().requires_grad_() for x in drawn]
    out = linear_policy_loss(
        *ours[:2],
        targets,
        advantages,
        PolicyObjective(entropy_coef=entropy_coef),
        lora=(*ours[2:], SCALE),
    )
    logits = truth[0] @ (truth[1] + SCALE * truth[3] @ truth[2]).T
    logps = logits.log_softmax(-1)
    logp = logps.gather(1, targets[:, None]).squeeze(1)
    entropy = -(logps.exp() * logps).sum(-1)
    loss = -((logp - logp.detach()).exp() * advantages + entropy_coef * entropy).mean()
    # What rounding low to bfloat16 does to a logit.
    assert float((out.logp - logp.detach()).abs().max()) < 0.05
    names = zip(
        sizes, torch.autograd.grad(out.loss, ours), torch.autograd.grad(loss, truth), strict=True
    )
    for name, found, expected in names:
        assert relative_l2(found, expected) <= 6e-3, f"{name}: {relative_l2(found, expected):.2e}"
    frozen = linear_logp(
        drawn[0].clone().requires_grad_(), drawn[1], targets, lora=(*drawn[2:], SCALE)
    )
    assert torch.equal(frozen.logp, out.logp)


A, B = torch.zeros(2, 8), torch.zeros(17, 2)


@pytest.mark.parametrize(
    ("lora", "error", "match"),
    [
        ((A, B), TypeError, r"lora must be \(A"),
        ((A[:, 1:], B, 1.0), ValueError, r"lora's A must have shape \[2, 8\]"),
        ((A, B[1:], 1.0), ValueError, r"lora's B must have shape \[17, 2\]"),
        ((A[:0], B[:, :0], 1.0), ValueError, r"lora's A must be \[R, 8\]"),
        ((A.half(), B, 1.0), TypeError, "lora's A must be torch.float32"),
        ((A, None, 1.0), TypeError, "lora's B must be a tensor"),
        ((A, B, torch.nan), TypeError, "lora's scale"),
    ],
)
def test_bad_input(lora, error, match):
    with pytest.raises(error, match=match):
        linear_logp(
            torch.zeros(3, 8), torch.zeros(17, 8), torch.zeros(3, dtype=torch.int64), lora=lora
        )
