import pytest
import torch

from r1kernels import token_logp
from r1kernels.check import IGNORE
from r1kernels.reference.token_logp import token_logp as token_logp_ref
from tests.numerics import assert_no_worse, relative_error
from tests.ops.head_cases import DTYPES, gradients, supported

# More than one segment of a row for native, more than one block for triton (interpreted and not).
SHAPES = {"reference": (7, 331), "native": (5, 9001), "triton": (7, 331)}
OPTIONS = {
    "plain": {},
    "entropy": {"entropy": True, "temperature": 0.8},
    "all": {"entropy": True, "softcap": 8.0, "logit_scale": 1.3, "temperature": "row"},
}


def make(shape, dtype, options="plain", scale=4.0):
    T, V = shape
    logits = (torch.randn(T, V) * scale).to(dtype)
    targets = torch.randint(0, V, (T,))
    targets[0], targets[1], targets[2] = V - 1, 0, IGNORE
    settings = dict(OPTIONS[options])
    if settings.get("temperature") == "row":
        settings["temperature"] = torch.rand(T) + 0.5
    return logits, targets, settings


def eager(logits, targets, **settings):
    return token_logp_ref(logits, targets, **settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_no_worse_than_eager(backend, dtype, options):
    if not supported(backend, DTYPES[dtype]):
        pytest.skip("the interpreter truncates where bfloat16 is rounded")
    logits, targets, settings = make(SHAPES[backend], DTYPES[dtype], options)
    given = [x.detach().clone().requires_grad_() for x in (logits, logits, logits.double())]
    outs = [
        f(x, targets, **settings) for f, x in zip((token_logp, eager, eager), given, strict=True)
    ]
    for name in ("logp", "entropy", "lse"):
        if getattr(outs[2], name) is not None:
            assert_no_worse(*(getattr(out, name) for out in outs), name=name)
    for only in ("logp", "entropy", "lse")[:: 1 if settings.get("entropy") else 2]:
        outs = [
            f(x, targets, **settings)
            for f, x in zip((token_logp, eager, eager), given, strict=True)
        ]
        grads = [gradients(out, (x,), only)[0] for out, x in zip(outs, given, strict=True)]
        assert grads[0].dtype == logits.dtype
        assert_no_worse(*grads, name=f"dlogits through {only}")


def test_log_probability_near_one_keeps_its_digits(backend):
    gap = torch.linspace(4.0, 30.0, 27)
    others = torch.tensor([0.25, -0.5, 0.125, -1.0])
    logits = torch.cat([gap[:, None], others.expand(27, 4)], 1)
    truth = -torch.log1p(torch.exp(others.double()[None] - gap.double()[:, None]).sum(1))
    out = token_logp(logits, torch.zeros(27, dtype=torch.int64)).logp.double()
    assert bool((out <= 0).all())
    if backend != "reference":  # the textbook form loses them, as eager does
        assert float(((out - truth) / truth).abs().max()) <= 1e-5


def test_inplace_backward_writes_over_the_logits(backend):
    logits, targets, settings = make(SHAPES[backend], torch.float32, "all")
    plain = logits.clone().requires_grad_()
    grad = gradients(token_logp(plain, targets, **settings), (plain,))[0]
    work = logits.clone()
    leaf = work.requires_grad_()
    inplace = gradients(token_logp(leaf, targets, inplace_backward=True, **settings), (leaf,))[0]
    assert torch.equal(inplace, grad)
    assert inplace.data_ptr() == work.data_ptr()


def test_rows_may_be_apart_and_columns_too(backend):
    logits, targets, _ = make(SHAPES[backend], torch.float32)
    T, V = logits.shape
    wide = torch.randn(T, V + 9)
    wide[:, :V] = logits
    across = logits.T.contiguous().T
    truth = token_logp(logits, targets).logp
    for view in (wide[:, :V], across):
        view = view.detach().requires_grad_()
        out = token_logp(view, targets).logp
        assert torch.equal(out, truth)
        (grad,) = torch.autograd.grad(out.sum(), view)
        assert (
            relative_error(
                grad,
                torch.autograd.grad(
                    token_logp(x := logits.clone().requires_grad_(), targets).logp.sum(), x
                )[0],
            )
            == 0
        )


def test_minus_infinity_is_probability_zero(backend):
    logits, targets, _ = make((4, 331), torch.float32)
    targets = targets.clamp(min=0)
    banned = torch.rand(4, 331) < 0.5
    banned[torch.arange(4), targets] = False
    masked = logits.masked_fill(banned, -torch.inf).requires_grad_()
    low = logits.masked_fill(banned, -1e4).double().requires_grad_()
    ours, truth = (
        token_logp(masked, targets, entropy=True),
        token_logp_ref(low, targets, entropy=True),
    )
    for name in ("logp", "entropy"):
        assert relative_error(getattr(ours, name), getattr(truth, name)) < 1e-6
    grad, expected = gradients(ours, (masked,))[0], gradients(truth, (low,))[0]
    assert relative_error(grad, expected) < 1e-5
    assert not grad[banned].any()


def test_impossible_target(backend):
    logits = torch.randn(2, 331)
    logits[0, 7] = -torch.inf
    out = token_logp(logits, torch.tensor([7, 8]))
    assert out.logp[0].item() == -torch.inf
    assert out.logp[1].isfinite()


@pytest.mark.parametrize("V", [331, 9001])
@pytest.mark.parametrize("upstream", [0.0, 1.0])
def test_impossible_target_has_a_finite_gradient(backend, V, upstream):
    """As with logits cut to the sampler's top k; the first segment of a row is all -inf too."""
    logits = torch.randn(2, V)
    logits[0, : V - 10] = -torch.inf
    logits.requires_grad_()
    out = token_logp(logits, torch.tensor([7, 8]), entropy=True)
    kept = logits.detach()[0, V - 10 :].double()
    assert out.logp[0].item() == -torch.inf
    assert abs(out.lse[0] - kept.logsumexp(0)) < 1e-5
    assert abs(out.entropy[0] - torch.distributions.Categorical(logits=kept).entropy()) < 1e-5
    d = torch.tensor([upstream, 1.0])
    (grad,) = torch.autograd.grad((out.logp, out.entropy), logits, (d, d))
    assert bool(grad.isfinite().all())
    assert grad[0, 7] == upstream and not grad[0, 8 : V - 10].any()


def test_rows_that_share_memory_have_a_gradient_each(backend):
    row, targets = torch.randn(1, 331), torch.tensor([1, 2, IGNORE])
    apart = row.expand(3, 331).clone().requires_grad_()
    shared = row.expand(3, 331).requires_grad_()
    (expected,) = torch.autograd.grad(token_logp(apart, targets).logp.sum(), apart)
    out = token_logp(shared, targets, inplace_backward=True)
    assert torch.equal(torch.autograd.grad(out.logp.sum(), shared)[0], expected)


def test_a_second_backward_after_one_in_place_is_an_error(backend):
    logits = torch.randn(3, 331, requires_grad=True)
    loss = token_logp(logits, torch.tensor([1, 2, 3]), inplace_backward=True).logp.sum()
    torch.autograd.grad(loss, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


def test_ignored_rows_hold_anything(backend):
    logits, targets, settings = make(SHAPES[backend], torch.float32, "all")
    dirty = logits.clone()
    dirty[2] = torch.nan
    for x in (logits, dirty):
        x.requires_grad_()
    a, b = token_logp(logits, targets, **settings), token_logp(dirty, targets, **settings)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert a.logp[2].item() == 0.0
    c, d = gradients(a, (logits,))[0], gradients(b, (dirty,))[0]
    assert torch.equal(c, d) and not d[2].any()


def test_shift_by_a_constant_changes_nothing(backend):
    # Multiples of 1/8, so that the shift is exact.
    logits = (torch.randn(5, 331) * 8).round() / 8
    targets = torch.randint(0, 331, (5,))
    a, b = token_logp(logits, targets, entropy=True), token_logp(logits + 64, targets, entropy=True)
    if backend == "reference":  # logit - logsumexp rounds at the size of the shift, as eager does
        assert relative_error(b.logp, a.logp) < 1e-5
    else:
        assert torch.equal(a.logp, b.logp) and torch.equal(a.entropy, b.entropy)


def test_entropy_lies_between_zero_and_log_v(backend):
    logits = torch.randn(6, 331) * torch.tensor([0.0, 0.01, 1.0, 10.0, 100.0, 1000.0])[:, None]
    h = token_logp(logits, logits.argmax(-1), entropy=True).entropy
    assert bool((h >= 0).all()) and bool((h <= torch.tensor(331.0).log() * (1 + 1e-6)).all())


def test_a_row_does_not_depend_on_its_neighbours(backend):
    logits, targets, settings = make(SHAPES[backend], torch.float32, "entropy")
    whole = token_logp(logits, targets, **settings)
    alone = token_logp(logits[4:5], targets[4:5], **settings)
    assert all(torch.equal(x[4:5], y) for x, y in zip(whole, alone, strict=True))


def test_empty(backend):
    logits = torch.zeros(0, 17, requires_grad=True)
    out = token_logp(logits, torch.zeros(0, dtype=torch.int64), entropy=True)
    assert out.logp.shape == out.entropy.shape == (0,)
    assert torch.autograd.grad(out.logp.sum(), logits)[0].shape == (0, 17)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    native = pytest.importorskip("r1kernels._C", reason="needs the C++ extension")
    if isa not in native.isas():
        pytest.skip(f"this machine does not run {isa}")
    before = native.isa()
    native.use_isa(isa)
    try:
        for dtype in DTYPES.values():
            logits, targets, settings = make((5, 9001), dtype, "all")
            given, truth_in = logits.clone().requires_grad_(), logits.double().requires_grad_()
            out, truth = (
                token_logp(given, targets, **settings),
                token_logp_ref(truth_in, targets, **settings),
            )
            assert relative_error(out.logp, truth.logp) < 1e-6
            assert relative_error(gradients(out, (given,))[0], gradients(truth, (truth_in,))[0]) < (
                4e-3 if dtype == torch.bfloat16 else 1e-3
            )
        # Conversions of the whole range, subnormal and infinite halves included
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
        finite = every[every.isfinite()].view(1, -1)
        shown = token_logp(finite, torch.zeros(1, dtype=torch.int64), entropy=True)
        assert relative_error(shown.lse, torch.logsumexp(finite.double(), -1)) < 1e-6
    finally:
        native.use_isa(before)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (
            {"logits": torch.zeros(3, 5, dtype=torch.float64)},
            TypeError,
            "logits must be torch.float32",
        ),
        ({"logits": torch.zeros(3, 0)}, ValueError, "vocabulary axis"),
        (
            {"targets": torch.zeros(2, dtype=torch.int64)},
            ValueError,
            r"targets must have shape \[3\]",
        ),
        ({"targets": torch.tensor([0, 5, 0])}, ValueError, r"targets\[1\] is 5"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number"),
    ],
)
def test_bad_input(change, error, match):
    given = {"logits": torch.zeros(3, 5), "targets": torch.zeros(3, dtype=torch.int64)} | change
    with pytest.raises(error, match=match):
        token_logp(given.pop("logits"), given.pop("targets"), **given)


def test_reference_gradcheck():
    logits = torch.randn(4, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 10, IGNORE, 3])
    assert torch.autograd.gradcheck(
        lambda x: tuple(token_logp_ref(x, targets, softcap=3.0, temperature=0.7, entropy=True)),
        (logits,),
    )


def test_gradient_far_from_zero_is_as_exact_as_log_softmaxs(backend):
    """A float32 log-sum-exp near 3000 has lost 1e-4 of what p needs."""
    logits = torch.randn(6, 50) + torch.linspace(2900.0, 3100.0, 6)[:, None]
    targets = torch.randint(0, 50, (6,))
    given = [x.clone().requires_grad_() for x in (logits, logits, logits.double())]
    logps = [token_logp(given[0], targets).logp]
    logps += [x.log_softmax(-1).gather(1, targets[:, None]) for x in given[1:]]
    grads = [torch.autograd.grad(x.sum(), y)[0] for x, y in zip(logps, given, strict=True)]
    assert_no_worse(*grads, name="dlogits")
