from collections import defaultdict

import pytest
import torch

from r1kernels import PolicyObjective, linear_logp, linear_policy_loss, use_backend
from r1kernels.check import IGNORE
from r1kernels.reference.linear_logp import linear_logp as linear_logp_ref
from tests.numerics import assert_no_worse, relative_error, relative_l2
from tests.ops.head_cases import (
    DTYPES,
    OPTIONS,
    Case,
    eager,
    gradients,
    leaves,
    make,
    shape_for,
    supported,
)


def call(fn, case: Case, inputs, **more):
    hidden, weight, bias = inputs
    return fn(hidden, weight, case.targets, bias=bias, **case.options, **more)


def compare(cases: list[Case], head: bool, only: str | None = None, **more):
    """Outputs and gradients against eager's and the truth's.

    Several draws together, since one draw's largest error is luck.
    """
    found = defaultdict(list)
    for case in cases:
        truth_in, eager_in, ours_in = (
            leaves(case.to(torch.float64), head),
            leaves(case, head),
            leaves(case, head),
        )
        truth, plain, ours = (
            call(eager, case, truth_in),
            call(eager, case, eager_in),
            call(linear_logp, case, ours_in, **more),
        )
        for name in ("logp", "entropy", "lse"):
            if getattr(truth, name) is not None:
                found[name].append([getattr(x, name) for x in (ours, plain, truth)])
        three = zip(
            *(
                gradients(out, given, only)
                for out, given in ((ours, ours_in), (plain, eager_in), (truth, truth_in))
            ),
            strict=True,
        )
        for name, x in zip(("dhidden", "dweight", "dbias"), three, strict=False):
            found[name].append(x)
    for name, draws in found.items():
        scaled = [
            [(x.detach().double() / t.abs().max().clamp(min=1e-30)).flatten() for x in (o, e, t)]
            for o, e, t in draws
        ]
        assert_no_worse(*(torch.cat(x) for x in zip(*scaled, strict=True)), name=name)


# Options meet the middle shape, the plain call all shapes: options change row work, shapes tiling.
CASES = [(1, name) for name in OPTIONS] + [(0, "plain"), (2, "plain"), (2, "all")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "options"), CASES)
@pytest.mark.parametrize("head", ["trainable", "frozen"])
def test_no_worse_than_eager(backend, size, options, dtype, head):
    if not supported(backend, DTYPES[dtype]):
        with pytest.raises(RuntimeError, match="bfloat16"):
            linear_logp(
                torch.zeros(1, 8, dtype=torch.bfloat16),
                torch.zeros(17, 8, dtype=torch.bfloat16),
                torch.zeros(1, dtype=torch.int64),
            )
        return
    # Through logp alone where the head is frozen: a gradient through lse passes the Jacobian by.
    cases = [make(shape_for(backend, size), DTYPES[dtype], options) for _ in range(8)]
    compare(cases, head == "trainable", only="logp" if head == "frozen" else None)


@pytest.mark.parametrize("only", ["logp", "entropy", "lse"])
@pytest.mark.parametrize("head", ["trainable", "frozen"])
def test_each_output_has_its_gradient(backend, head, only):
    compare(
        [make(shape_for(backend, 1), torch.float32, "all") for _ in range(4)],
        head == "trainable",
        only,
    )


@pytest.mark.parametrize("prior", ["near", "off", "nan", "none"])
def test_any_prior_is_safe(backend, prior):
    case = make(shape_for(backend, 1), torch.float32, "entropy", peaked=True)
    truth = call(eager, case, leaves(case.to(torch.float64))).logp.float()
    priors = {
        "near": truth + 0.3 * torch.randn_like(truth),
        "off": torch.randn_like(truth) * 200,
        "nan": torch.where(torch.arange(len(truth)) % 2 == 0, torch.nan, -torch.inf),
        "none": None,
    }
    given = priors[prior]
    compare([case], True, prior=None if given is None else given.detach())
    compare([case], False, "logp", prior=None if given is None else given.detach())


def test_rows_that_top_the_target_by_many_nats(backend):
    case = make(shape_for(backend, 1), torch.float32, "entropy")
    case.weight[5] = 60 * case.hidden[0] / case.hidden[0].square().sum()
    compare([case], True)
    compare([case], False, "logp")
    case.weight[5] *= 5
    for head in (True, False):
        inputs = leaves(case, head)
        out = call(linear_logp, case, inputs)
        assert -400 < out.logp[0].item() < -300
        assert all(bool(d.isfinite().all()) for d in gradients(out, inputs))


def test_log_probability_near_one_keeps_its_digits(backend):
    # 1 - p from 1e-2 down to 1e-13; exact inputs, so that the truth is not that of their rounding.
    gap = torch.linspace(4.0, 30.0, 27)
    hidden = torch.stack([gap, torch.ones_like(gap)], 1)
    others = torch.tensor([0.25, -0.5, 0.125, -1.0])
    weight = torch.cat([torch.tensor([[1.0, 0.0]]), torch.stack([torch.zeros(4), others], 1)])
    truth = -torch.log1p(torch.exp(others.double()[None] - gap.double()[:, None]).sum(1))
    out = linear_logp(
        hidden, weight, torch.zeros(len(gap), dtype=torch.int64), prior=truth.float() * 0.5
    ).logp.double()
    assert bool((out <= 0).all())
    if backend != "reference":  # the textbook form loses them, as eager does
        assert float(((out - truth) / truth).abs().max()) <= 1e-5


@pytest.mark.parametrize("peaked", [False, True], ids=["diffuse", "peaked"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradient_of_sixteen_bit_inputs(backend, dtype, peaked):
    if not supported(backend, DTYPES[dtype]):
        pytest.skip("the interpreter's bfloat16 dot product is wrong")
    case = make(
        (33, 64, 4400) if backend == "native" else (33, 64, 600), DTYPES[dtype], "plain", peaked
    )
    truth_in, ours_in, eager_in = leaves(case.to(torch.float64)), leaves(case), leaves(case)
    truth = gradients(call(eager, case, truth_in), truth_in, "logp")
    ours = gradients(call(linear_logp, case, ours_in), ours_in, "logp")
    plain = gradients(call(eager, case, eager_in), eager_in, "logp")
    for d, d_eager, d_truth in zip(ours, plain, truth, strict=True):
        assert relative_l2(d, d_truth) <= 4e-3, (
            f"{relative_l2(d, d_truth):.2e}, eager {relative_l2(d_eager, d_truth):.2e}"
        )


def test_paths_agree_bitwise(backend):
    case = make(shape_for(backend, 2), torch.float32, "plain")
    prior = torch.randn(len(case.targets)) - 2
    with torch.no_grad():
        forward = call(linear_logp, case, leaves(case), prior=prior).logp
    assert torch.equal(forward, call(linear_logp, case, leaves(case), prior=prior).logp)
    assert torch.equal(forward, call(linear_logp, case, leaves(case, head=False), prior=prior).logp)
    case.options["entropy"] = True
    assert torch.equal(forward, call(linear_logp, case, leaves(case), prior=prior).logp)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa):
    native = pytest.importorskip("r1kernels._C", reason="needs the C++ extension")
    if isa not in native.isas():
        pytest.skip(f"this machine does not run {isa}")
    before = native.isa()
    native.use_isa(isa)
    try:
        with use_backend("native"):
            for options in ("plain", "all"):
                case = make((33, 24, 4400), torch.float32, options)
                # Tops its target in the second tile: the first is rescaled.
                case.weight[3000] = 30 * case.hidden[0] / case.hidden[0].square().sum()
                compare([case], True)
                compare([case], False, "logp")
    finally:
        native.use_isa(before)


def test_runs_repeat_bitwise(backend):
    case = make(shape_for(backend, 2), torch.float32, "all")

    def run():
        inputs = leaves(case)
        out = call(linear_logp, case, inputs)
        return [*out, *gradients(out, inputs)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_chunks_do_not_change_the_result(backend):
    case = make(shape_for(backend, 2), torch.float32, "all")
    whole_in, cut_in = leaves(case), leaves(case)
    whole, cut = call(linear_logp, case, whole_in), call(linear_logp, case, cut_in, workspace_mb=1)
    for a, b in zip(
        [*whole, *gradients(whole, whole_in)], [*cut, *gradients(cut, cut_in)], strict=True
    ):
        assert relative_error(b, a) < 2e-6


def test_ignored_rows_hold_anything(backend):
    case = make(shape_for(backend, 1), torch.float32, "all")
    clean_in, dirty_in = leaves(case), leaves(case)
    dirty_in[0].data[2] = torch.tensor([torch.nan, torch.inf]).repeat(case.hidden.shape[1] // 2)
    for head in (True, False):
        clean_in, dirty_in = leaves(case, head), leaves(case, head)
        dirty_in[0].data[2] = torch.nan
        clean, dirty = call(linear_logp, case, clean_in), call(linear_logp, case, dirty_in)
        for a, b in zip(
            [*clean, *gradients(clean, clean_in)],
            [*dirty, *gradients(dirty, dirty_in)],
            strict=True,
        ):
            assert torch.equal(a, b)
        assert float(dirty.logp[2]) == float(dirty.lse[2]) == float(dirty.entropy[2]) == 0.0


def test_nan_in_a_counted_row_shows_and_stays_there(backend):
    case = make(shape_for(backend, 1), torch.float32, "entropy")
    case.hidden[4] = torch.nan
    out = call(linear_logp, case, leaves(case))
    assert bool(out.logp[4].isnan()) and bool(out.entropy[4].isnan())
    others = torch.arange(len(case.targets)) != 4
    assert bool(out.logp[others].isfinite().all())


@pytest.mark.parametrize("head", ["trainable", "frozen"])
def test_impossible_target_has_a_finite_gradient(backend, head):
    # The first tile of the vocabulary is all -inf.
    V = 331 if backend == "triton" else 2500
    hidden = torch.randn(2, 8, requires_grad=True)
    weight = torch.randn(V, 8, requires_grad=head == "trainable")
    bias = torch.zeros(V)
    bias[: V - 10] = -torch.inf
    out = linear_logp(hidden, weight, torch.tensor([7, V - 1]), bias=bias, entropy=True)
    kept = hidden[0].detach() @ weight[V - 10 :].detach().T
    assert out.logp[0].item() == -torch.inf and out.logp[1].isfinite()
    assert abs(out.lse[0] - kept.logsumexp(0)) < 1e-5
    assert abs(out.entropy[0] - torch.distributions.Categorical(logits=kept).entropy()) < 1e-5
    leaves = [x for x in (hidden, weight) if x.requires_grad]
    d = torch.tensor([0.0, 1.0])
    for grad in torch.autograd.grad((out.logp, out.entropy), leaves, (d, d)):
        assert bool(grad.isfinite().all()) and grad.any()


def test_autocast_changes_nothing(backend):
    case = make(shape_for(backend, 1), torch.float32, "all")

    def run():
        inputs = leaves(case)
        out = call(linear_logp, case, inputs)
        return [*out, *gradients(out, inputs)]

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(plain, run(), strict=True))


@pytest.mark.parametrize("head", ["trainable", "frozen"])
def test_second_derivatives_are_refused(head):
    hidden, weight = torch.randn(3, 8, requires_grad=True), torch.randn(17, 8)
    weight.requires_grad_(head == "trainable")
    out = linear_logp(hidden, weight, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="linear_logp has no second derivative"):
        torch.autograd.grad(out.logp.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_float32_master_weight_keeps_its_gradient(backend, dtype):
    if not supported(backend, DTYPES[dtype]):
        pytest.skip("the interpreter's bfloat16 dot product is wrong")
    case = make(shape_for(backend, 1), torch.float32, "plain")
    hidden, weight, _ = leaves(case)
    hidden = hidden.detach().to(DTYPES[dtype])
    narrow = weight.detach().to(DTYPES[dtype]).requires_grad_()
    out, plain = (linear_logp(hidden, w, case.targets) for w in (weight, narrow))
    assert torch.equal(out.logp, plain.logp)
    (wide,), (rounded,) = (
        torch.autograd.grad(x.logp.sum(), w) for x, w in ((out, weight), (plain, narrow))
    )
    assert wide.dtype == torch.float32 and torch.equal(wide.to(rounded.dtype), rounded)
    assert not torch.equal(wide, rounded.float())
    objective = PolicyObjective(aggregation="token_mean")
    loss = linear_policy_loss(
        hidden, weight, case.targets, torch.ones(len(hidden)), objective, normalizer=1
    ).loss
    (fused,) = torch.autograd.grad(-loss, weight)
    assert fused.dtype == torch.float32 and relative_error(fused, wide) < 2e-3


def test_distributed_weight_is_refused_with_the_way_out():
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.tensor import DTensor, Shard, init_device_mesh

        mesh = init_device_mesh("cpu", (1,))
        weight = DTensor.from_local(torch.randn(17, 8), mesh, [Shard(0)])
        given = torch.randn(3, 8), torch.zeros(3, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"weight\.full_tensor\(grad_placements=\[Partial"):
            linear_logp(given[0], weight, given[1])
        with pytest.raises(ValueError, match="hidden is a DTensor"):
            linear_logp(weight, torch.randn(17, 8), torch.zeros(17, dtype=torch.int64))
    finally:
        dist.destroy_process_group()


def test_empty_and_all_ignored(backend):
    weight = torch.randn(17, 8, requires_grad=True)
    for targets in (torch.zeros(0, dtype=torch.int64), torch.full((3,), IGNORE)):
        hidden = torch.full((len(targets), 8), torch.nan, requires_grad=True)
        out = linear_logp(hidden, weight, targets, entropy=True)
        assert out.logp.shape == targets.shape and not out.logp.any() and not out.entropy.any()
        dhidden, dweight = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), (hidden, weight))
        assert not dhidden.any() and not dweight.any()


def test_padded_input_has_the_shape_of_its_targets(backend):
    hidden, weight = torch.randn(2, 3, 8), torch.randn(17, 8)
    targets = torch.randint(0, 17, (2, 3))
    temperature = torch.rand(2, 3) + 0.5
    padded = linear_logp(hidden, weight, targets, temperature=temperature)
    flat = linear_logp(hidden.view(6, 8), weight, targets.view(6), temperature=temperature.view(6))
    assert torch.equal(padded.logp, flat.logp.view(2, 3))


def test_strided_inputs(backend):
    case = make((7, 40, 331), torch.float32, "plain")
    hidden = torch.randn(7, 80)[:, ::2]
    weight = torch.randn(40, 331).T
    strided = linear_logp(hidden, weight, case.targets).logp
    assert (
        relative_error(
            strided, linear_logp(hidden.contiguous(), weight.contiguous(), case.targets).logp
        )
        < 1e-6
    )


def test_rows_of_the_logit_gradient_sum_to_zero(backend):
    # With weight rows all ones, dhidden is the sum of dlogits over the vocabulary.
    hidden = torch.randn(9, 8, requires_grad=True)
    bias = torch.randn(331)
    out = linear_logp(hidden, torch.ones(331, 8), torch.randint(0, 331, (9,)), bias=bias)
    (dhidden,) = torch.autograd.grad(out.logp.sum(), hidden)
    assert float(dhidden.abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"hidden": torch.zeros(3, 7)}, ValueError, "width 8"),
        (
            {"hidden": torch.zeros(3, 8, dtype=torch.float64)},
            TypeError,
            "hidden must be torch.float32",
        ),
        (
            {"weight": torch.zeros(17, 8, dtype=torch.float16)},
            TypeError,
            "weight must be torch.float32",
        ),
        ({"weight": torch.zeros(17)}, ValueError, r"weight must be \[V, D\]"),
        (
            {"targets": torch.zeros(4, dtype=torch.int64)},
            ValueError,
            r"targets must have shape \[3\]",
        ),
        ({"targets": torch.zeros(3)}, TypeError, "targets must be torch.int64"),
        ({"targets": torch.tensor([0, 17, 1])}, ValueError, r"targets\[1\] is 17"),
        ({"targets": torch.tensor([0, -1, 1])}, ValueError, r"targets\[1\] is -1"),
        ({"bias": torch.zeros(16)}, ValueError, r"bias must have shape \[17\]"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, ValueError, r"temperature\[1\] is 0.0"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature must have shape \[3\]"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale must be positive"),
        ({"prior": torch.zeros(5)}, ValueError, r"prior must have shape \[3\]"),
        ({"workspace_mb": 0}, ValueError, "workspace_mb must be positive"),
        ({"workspace_mb": 1.5}, TypeError, "workspace_mb must be an int"),
        ({"hidden": [1.0]}, TypeError, "hidden must be a tensor"),
    ],
)
def test_bad_input(change, error, match):
    given = {
        "hidden": torch.zeros(3, 8),
        "weight": torch.zeros(17, 8),
        "targets": torch.zeros(3, dtype=torch.int64),
    } | change
    hidden, weight, targets = (given.pop(name) for name in ("hidden", "weight", "targets"))
    with pytest.raises(error, match=match):
        linear_logp(hidden, weight, targets, **given)


@pytest.mark.parametrize("options", ["plain", "all"])
def test_reference_gradcheck(options):
    case = make((4, 6, 11), torch.float64, options)
    case.options["temperature"] = 0.8
    inputs = [x for x in leaves(case) if x is not None]

    def outputs(*given):
        out = linear_logp_ref(
            given[0],
            given[1],
            case.targets,
            bias=given[2] if len(given) > 2 else None,
            **case.options,
        )
        return tuple(x for x in out if x is not None)

    assert torch.autograd.gradcheck(outputs, inputs)


def test_backend_by_name_or_an_error():
    with (
        use_backend("cuda"),
        pytest.raises(RuntimeError, match=r"cuda: (no CUDA|tensor is on cpu)"),
    ):
        linear_logp(torch.zeros(1, 8), torch.zeros(17, 8), torch.zeros(1, dtype=torch.int64))
