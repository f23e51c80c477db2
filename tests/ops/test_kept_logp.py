"""`linear_logp(kept=...)`: the softmax over ids kept per token."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1kernels import PolicyObjective, linear_logp, linear_loss, linear_policy_loss, policy_loss
from r1kernels.backend import refusal, use_backend
from r1kernels.check import IGNORE
from r1kernels.reference.kept_logp import kept_logp as kept_logp_ref
from r1kernels.sampling import kept_from_logits
from tests.numerics import assert_no_worse, relative_error
from tests.ops.head_cases import DTYPES, OPTIONS, gradients, leaves, make, supported

ROOT = Path(__file__).parent.parent.parent
SHAPE = (33, 40, 331)
# More than one block of D, of ids and of a set; few distinct ids, each a program.
SHAPES = {"reference": SHAPE, "native": SHAPE, "triton": (9, 40, 67)}

# The interpreter computes with numpy, which warns where a kernel's unused branch overflows.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def sets(targets, vocab, most=60, repeats=False):
    """Random sets in random order, each with its target; row 3's is the target alone."""
    rows = []
    for t, target in enumerate(targets.tolist()):
        count = 0 if t == 3 else int(torch.randint(0, min(most, vocab), ()))
        ids = torch.randperm(vocab)[:count]
        ids = torch.cat([ids[ids != target], torch.tensor([target] if target >= 0 else [])])
        ids = ids[torch.randperm(len(ids))].long()
        rows.append(torch.cat([ids, ids[: len(ids) // 2]]) if repeats else ids)
    lengths = torch.tensor([0] + [len(ids) for ids in rows])
    return torch.cat(rows), lengths.cumsum(0)


def whole(count, vocab, dtype=torch.int32):
    return torch.arange(vocab, dtype=dtype).repeat(count), torch.arange(count + 1) * vocab


def eager(hidden, weight, targets, kept, *, bias=None, **options):
    """As a trainer would write it: logits in the inputs' dtype, all but the kept ones masked."""
    logits = hidden @ weight.T
    logits = logits if bias is None else logits + bias
    x = (logits if logits.dtype == torch.float64 else logits.float()) * options["logit_scale"]
    if options["softcap"]:
        x = options["softcap"] * torch.tanh(x / options["softcap"])
    tau = options["temperature"]
    x = x / (tau[:, None] if isinstance(tau, torch.Tensor) else tau)
    keep = torch.zeros_like(x, dtype=torch.bool)
    keep[torch.repeat_interleave(kept[1].diff()), kept[0].long()] = True
    counted = targets != IGNORE
    keep[~counted] = True
    x = x.masked_fill(~keep, -torch.inf)
    logps = x.log_softmax(-1)
    logp = logps.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    h = -(logps.exp() * logps.masked_fill(~keep, 0)).sum(-1) if options["entropy"] else None
    return type(linear_logp(*EMPTY))(
        *(None if y is None else torch.where(counted, y, 0) for y in (logp, h, x.logsumexp(-1)))
    )


EMPTY = torch.zeros(0, 2), torch.zeros(3, 2), torch.zeros(0, dtype=torch.int64)


def call(fn, case, inputs, kept):
    options = {"softcap": None, "logit_scale": 1.0, "entropy": False} | case.options
    hidden, weight, bias = inputs
    if fn is linear_logp:
        return fn(hidden, weight, case.targets, bias=bias, kept=kept, **options)
    return fn(hidden, weight, case.targets, kept, bias=bias, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("head", ["trainable", "frozen"])
def test_no_worse_than_eager(backend, options, dtype, head):
    if not supported(backend, DTYPES[dtype]):
        pytest.skip("the interpreter truncates where bfloat16 is rounded")
    found = {}
    for _ in range(2 if backend == "triton" else 4):
        case = make(SHAPES[backend], DTYPES[dtype], options)
        kept = sets(case.targets, SHAPES[backend][2])
        given = [leaves(c, head == "trainable") for c in (case, case, case.to(torch.float64))]
        outs = [
            call(fn, case, x, kept)
            for fn, x in zip((linear_logp, eager, eager), given, strict=True)
        ]
        three = list(zip(*(gradients(o, x) for o, x in zip(outs, given, strict=True)), strict=True))
        for name, x in zip(("dhidden", "dweight", "dbias"), three, strict=False):
            assert x[0].dtype == DTYPES[dtype]
            found.setdefault(name, []).append(x)
        for name in ("logp", "entropy", "lse"):
            if getattr(outs[2], name) is not None:
                found.setdefault(name, []).append([getattr(o, name) for o in outs])
    for name, draws in found.items():
        scaled = [[x.detach().double() / t.abs().max() for x in (o, e, t)] for o, e, t in draws]
        assert_no_worse(*(torch.cat(x) for x in zip(*scaled, strict=True)), name=name)


@pytest.mark.parametrize("only", ["logp", "entropy", "lse"])
def test_each_output_has_its_gradient(backend, only):
    case = make(SHAPES[backend], torch.float32, "all")
    kept = sets(case.targets, SHAPES[backend][2])
    given = [leaves(c) for c in (case, case, case.to(torch.float64))]
    outs = [
        call(fn, case, x, kept) for fn, x in zip((linear_logp, eager, eager), given, strict=True)
    ]
    grads = [gradients(o, x, only) for o, x in zip(outs, given, strict=True)]
    for name, *three in zip(("dhidden", "dweight", "dbias"), *grads, strict=True):
        assert_no_worse(*three, name=name)


def test_a_set_of_the_target_alone_is_certain(backend):
    case = make(SHAPES[backend], torch.float32, "all")
    counted = case.targets[case.targets >= 0]
    kept = counted, (case.targets >= 0).cumsum(0)
    inputs = leaves(case)
    out = call(linear_logp, case, inputs, (kept[0], torch.nn.functional.pad(kept[1], (1, 0))))
    assert not out.logp.any() and not out.entropy.any() and out.lse.any()
    for grad in torch.autograd.grad(out.logp.sum() + out.entropy.sum(), inputs):
        assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_whole_vocabulary_is_the_plain_op(backend, dtype):
    case = make(SHAPES[backend], torch.float32, "all")
    inputs, plain_in = leaves(case), leaves(case)
    out = call(linear_logp, case, inputs, whole(SHAPES[backend][0], SHAPES[backend][2], dtype))
    plain = linear_logp(*plain_in[:2], case.targets, bias=plain_in[2], **case.options)
    for a, b in zip(
        [*out, *gradients(out, inputs)], [*plain, *gradients(plain, plain_in)], strict=True
    ):
        assert relative_error(a, b) < 2e-6


def test_order_and_repeats_do_not_matter(backend):
    case = make(SHAPES[backend], torch.float32, "all")
    ids, offsets = sets(case.targets, SHAPES[backend][2], repeats=True)
    rising = [row.unique() for row in ids.split(offsets.diff().tolist())]
    lengths = torch.tensor([0] + [len(row) for row in rising])
    found = []
    for kept in ((ids, offsets), (torch.cat(rising), lengths.cumsum(0))):
        inputs = leaves(case)
        out = call(linear_logp, case, inputs, kept)
        found.append([*out, *gradients(out, inputs)])
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b) < 1e-6


def test_huge_logits(backend):
    case = make(SHAPES[backend], torch.float32, "entropy")
    kept = sets(case.targets, SHAPES[backend][2])
    case.hidden.mul_(300)
    given = [leaves(c) for c in (case, case, case.to(torch.float64))]
    outs = [
        call(fn, case, x, kept) for fn, x in zip((linear_logp, eager, eager), given, strict=True)
    ]
    assert outs[2].logp.min() < -500
    for name, *three in zip(("logp", "entropy", "lse"), *outs, strict=True):
        # The textbook's entropy, sum p (lse - l), loses the digits that logits near 1000 leave.
        if (name, backend) != ("entropy", "reference"):
            assert_no_worse(*three, name=name)
    grads = [gradients(o, x, "logp") for o, x in zip(outs, given, strict=True)]
    for name, *three in zip(("dhidden", "dweight"), *grads, strict=True):
        assert_no_worse(*three, name=name)


def test_log_probability_near_one_keeps_its_digits(backend):
    gap = torch.linspace(4.0, 30.0, 27)
    hidden = torch.stack([gap, torch.ones_like(gap)], 1)
    others = torch.tensor([0.25, -0.5, 0.125, 9.0])
    weight = torch.cat([torch.tensor([[1.0, 0.0]]), torch.stack([torch.zeros(4), others], 1)])
    kept = torch.tensor([2, 0, 3, 1]).repeat(27), torch.arange(28) * 4
    truth = -torch.log1p(torch.exp(others[:3].double()[None] - gap.double()[:, None]).sum(1))
    out = linear_logp(hidden, weight, torch.zeros(27, dtype=torch.int64), kept=kept).logp.double()
    assert bool((out <= 0).all())
    if backend != "reference":  # the textbook form loses them, as eager does
        assert float(((out - truth) / truth).abs().max()) <= 1e-5


def test_rows_that_do_not_count_hold_anything(backend):
    case = make(SHAPES[backend], torch.float32, "all")
    ids, offsets = sets(case.targets, SHAPES[backend][2])
    assert case.targets[2] == IGNORE
    # The ignored row is given other ids, one no id at all, and hidden states of NaN.
    extra = torch.tensor([5, SHAPES[backend][2] + 9, 5])
    filled = torch.cat([ids[: offsets[2]], extra, ids[offsets[3] :]]), offsets.clone()
    filled[1][3:] += 3 - offsets[3] + offsets[2]
    clean_in, dirty_in = leaves(case), leaves(case)
    dirty_in[0].data[2] = torch.nan
    clean = call(linear_logp, case, clean_in, (ids, offsets))
    dirty = call(linear_logp, case, dirty_in, filled)
    assert dirty.logp[2] == dirty.entropy[2] == dirty.lse[2] == 0
    for a, b in zip(
        [*clean, *gradients(clean, clean_in)], [*dirty, *gradients(dirty, dirty_in)], strict=True
    ):
        assert torch.equal(a, b)


def test_runs_repeat_bitwise(backend):
    case = make(SHAPES[backend], torch.float32, "all")
    kept = sets(case.targets, SHAPES[backend][2])

    def run():
        inputs = leaves(case)
        out = call(linear_logp, case, inputs, kept)
        return [*out, *gradients(out, inputs)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_a_row_does_not_depend_on_its_neighbours(backend):
    case = make(SHAPES[backend], torch.float32, "entropy")
    ids, offsets = sets(case.targets, SHAPES[backend][2])
    whole_batch = call(linear_logp, case, leaves(case), (ids, offsets))
    own = ids[offsets[4] : offsets[5]], torch.tensor([0, offsets[5] - offsets[4]])
    alone = case._replace(hidden=case.hidden[4:5], targets=case.targets[4:5])
    for x, y in zip(whole_batch, call(linear_logp, alone, leaves(alone), own), strict=True):
        assert backend == "reference" or torch.equal(x[4:5], y)


def test_empty_and_all_ignored(backend):
    weight = torch.randn(17, 8, requires_grad=True)
    for targets in (torch.zeros(0, dtype=torch.int64), torch.full((3,), IGNORE)):
        hidden = torch.full((len(targets), 8), torch.nan, requires_grad=True)
        none = torch.zeros(0, dtype=torch.int32), torch.zeros(len(targets) + 1, dtype=torch.int64)
        out = linear_logp(hidden, weight, targets, kept=none, entropy=True)
        assert out.logp.shape == targets.shape and not out.logp.any() and not out.entropy.any()
        grads = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), (hidden, weight))
        assert not grads[0].any() and not grads[1].any()


def test_strides_and_padded_shape(backend):
    case = make((6, 40, 331), torch.float32, "plain")
    kept = sets(case.targets, 331)
    flat = linear_logp(case.hidden, case.weight, case.targets, kept=kept)
    wide = torch.randn(6, 80)
    wide[:, ::2] = case.hidden
    across = case.weight.T.contiguous().T
    padded = linear_logp(wide[:, ::2].view(2, 3, 40), across, case.targets.view(2, 3), kept=kept)
    assert torch.equal(padded.logp, flat.logp.view(2, 3))


MEMORY = """
import resource, torch
from r1kernels import linear_logp
torch.set_num_threads(1)
T, D, V, count = 2000, 512, 8192, 250
hidden, weight = torch.randn(T, D), torch.randn(V, D)
ids = torch.randint(0, V, (T, count), dtype=torch.int32)
targets = ids[:, 3].long()

def step(rows):
    leaves = hidden[:rows].clone().requires_grad_(), weight.clone().requires_grad_()
    kept = ids[:rows].reshape(-1), torch.arange(rows + 1) * count
    linear_logp(*leaves, targets[:rows], kept=kept, entropy=True).logp.sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = step(2)
print((step(T) - before) * 1024)
"""


def test_memory_holds_neither_logits_nor_gathered_rows():
    pytest.importorskip("r1kernels._C", reason="needs the C++ extension")
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, cwd=ROOT
    )
    T, D, V, N = 2000, 512, 8192, 2000 * 250
    grown = int(done.stdout)
    # hidden's clone and gradient, and some numbers per id; not [T, V], far from [N, D].
    assert grown < 8 * T * D + 96 * N < 4 * T * V, f"{grown} bytes"


OBJECTIVES = {
    "token": PolicyObjective(kl_coef=0.1, entropy_coef=0.01),
    "sequence": PolicyObjective(ratio_level="sequence"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_policy_loss_composes(backend, name):
    case = make(SHAPES[backend], torch.float32, "plain")
    kept = sets(case.targets, SHAPES[backend][2])
    T = len(case.targets)
    rest = {
        "logp_old": -torch.rand(T),
        "logp_ref": -torch.rand(T),
        "cu_seqlens": torch.tensor([0, 5, T]),
        "mask": torch.rand(T) < 0.8,
    }
    pair, fused = leaves(case), leaves(case)
    out = linear_logp(*pair[:2], case.targets, kept=kept, entropy=True)
    two = policy_loss(
        out.logp, torch.tensor([1.0, -1.0]), OBJECTIVES[name], entropy=out.entropy,
        **(rest | {"mask": rest["mask"] & (case.targets != IGNORE)}),
    )  # fmt: skip
    one = linear_policy_loss(
        *fused[:2], case.targets, torch.tensor([1.0, -1.0]), OBJECTIVES[name], kept=kept,
        entropy=True, **rest,
    )  # fmt: skip
    assert torch.equal(one.loss, two.loss) and torch.equal(one.logp, two.logp)
    assert all(torch.equal(one.metrics[key], x) for key, x in two.metrics.items())
    for a, b in zip(
        torch.autograd.grad(one.loss, fused[:2]),
        torch.autograd.grad(two.loss, pair[:2]),
        strict=True,
    ):
        assert a.any() and relative_error(a, b) < 1e-6


def test_linear_loss_composes(backend):
    case = make(SHAPES[backend], torch.float32, "plain")
    kept = sets(case.targets, SHAPES[backend][2])
    scale = torch.randn(len(case.targets))
    inputs, plain_in = leaves(case), leaves(case)
    loss = linear_loss(
        *inputs[:2],
        case.targets,
        lambda logp, entropy, rows: scale[rows] * (logp + 0.1 * entropy),
        entropy=True,
        kept=kept,
    )
    out = linear_logp(*plain_in[:2], case.targets, kept=kept, entropy=True)
    expected = (scale * (out.logp + 0.1 * out.entropy)).sum()
    assert relative_error(loss, expected) < 1e-5
    for a, b in zip(
        torch.autograd.grad(loss, inputs[:2]),
        torch.autograd.grad(expected, plain_in[:2]),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-6


def good():
    return {
        "hidden": torch.zeros(3, 8),
        "weight": torch.zeros(17, 8),
        "targets": torch.tensor([1, 2, IGNORE]),
        "kept": (torch.tensor([1, 4, 2]), torch.tensor([0, 2, 3, 3])),
    }


@pytest.mark.parametrize(
    ("kept", "error", "match"),
    [
        (
            (torch.tensor([1, 4, 3]), [0, 2, 3, 3]),
            ValueError,
            "lacks the target of row 1: 2 is not",
        ),
        ((torch.tensor([1, 17, 2]), [0, 2, 3, 3]), ValueError, r"kept ids\[1\] is 17"),
        ((torch.tensor([1, -1, 2]), [0, 2, 3, 3]), ValueError, r"kept ids\[1\] is -1"),
        ((torch.tensor([1, 4, 2]), [0, 2, 3]), ValueError, r"offsets \[T \+ 1\] with T = 3"),
        ((torch.tensor([1, 4, 2]), [0, 2, 1, 3]), ValueError, "offsets must rise from 0"),
        ((torch.tensor([1, 4, 2]), [0, 2, 3, 4]), ValueError, "they go from 0 to 4"),
        ((torch.tensor([[1, 4, 2]]), [0, 2, 3, 3]), ValueError, r"must be ids \[N\]"),
        ((torch.tensor([1.0, 4.0, 2.0]), [0, 2, 3, 3]), TypeError, "kept ids must be torch.int32"),
        ((torch.tensor([1, 4, 2]), None), TypeError, "kept offsets must be a tensor"),
        ((torch.tensor([1, 4, 2]),), TypeError, r"kept must be a pair \(ids, offsets\)"),
    ],
)
def test_bad_sets(kept, error, match):
    given = good()
    linear_logp(given["hidden"], given["weight"], given["targets"], kept=given["kept"])
    kept = tuple(torch.tensor(x) if isinstance(x, list) else x for x in kept)
    with pytest.raises(error, match=match):
        linear_logp(given["hidden"], given["weight"], given["targets"], kept=kept)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_sets_are_made_safe_where_no_value_is_read(backend, monkeypatch):
    """As on a GPU: targets are added, ids out of range left out, bad rows are NaN."""
    if backend == "triton" and refusal("kept_logp", "triton", torch.zeros(1, 8)) is not None:
        pytest.skip("no Triton here")
    monkeypatch.setattr("r1kernels.kept_logp.values_readable", lambda x: False)
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(17, 8, requires_grad=True)
    targets = torch.tensor([1, 2, IGNORE, 17, 4])
    ids = torch.tensor([9, 3, 9, 40, 2, -7, 6, 16, 4, 16])
    offsets = torch.tensor([0, 3, 6, 7, 8, 10])
    temperature = torch.tensor([1.0, 0.5, 0.0, 1.0, -1.0])
    with use_backend(backend):
        out = linear_logp(
            hidden, weight, targets, kept=(ids, offsets), temperature=temperature, entropy=True
        )
        grads = torch.autograd.grad(sum(x[:3].sum() for x in out), (hidden, weight))
    monkeypatch.undo()
    leaves = hidden[:3].detach().requires_grad_(), weight.detach().requires_grad_()
    clean = torch.tensor([1, 3, 9, 2]), torch.tensor([0, 3, 4, 4])
    truth = linear_logp(*leaves, targets[:3], kept=clean, temperature=temperature[:3], entropy=True)
    for x, z in zip(out, truth, strict=True):
        assert x[3:].isnan().all() and relative_error(x[:3], z) < 1e-6
    dhidden, dweight = torch.autograd.grad(sum(x.sum() for x in truth), leaves)
    assert relative_error(grads[0][:3], dhidden) < 1e-6
    # Of ids that only good rows keep; the reference's product with whole rows spreads NaN.
    if backend == "triton":
        assert relative_error(grads[1][1:4], dweight[1:4]) < 1e-6


def test_what_does_not_go_with_kept():
    given = good()
    weight = given["weight"].requires_grad_()
    lora = torch.zeros(2, 8), torch.zeros(17, 2), 1.0
    for name, x in (("lora", lora), ("weight_grad", torch.zeros(17, 8))):
        with pytest.raises(ValueError, match=f"kept does not go with {name}"):
            linear_logp(given["hidden"], weight, given["targets"], kept=given["kept"], **{name: x})


def test_float32_master_weight(backend):
    case = make(SHAPES[backend], torch.float16, "plain")
    kept = sets(case.targets, SHAPES[backend][2])
    inputs, half = leaves(case), leaves(case)
    master = half[1].detach().float().requires_grad_()
    plain = call(linear_logp, case, inputs, kept)
    out = call(linear_logp, case, (half[0], master, None), kept)
    assert torch.equal(out.logp, plain.logp)
    for a, b in zip(
        torch.autograd.grad(out.logp.sum(), (half[0], master)),
        torch.autograd.grad(plain.logp.sum(), inputs[:2]),
        strict=True,
    ):
        assert torch.equal(a.half(), b)
    assert (master.dtype, half[0].dtype) == (torch.float32, torch.float16)


def test_second_derivatives_are_refused():
    given = good()
    hidden = given["hidden"].requires_grad_()
    out = linear_logp(hidden, given["weight"], given["targets"], kept=given["kept"])
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.logp.sum(), hidden, create_graph=True)


@pytest.mark.parametrize("options", ["plain", "all"])
def test_reference_gradcheck(options):
    case = make((4, 6, 11), torch.float64, options)
    case.options["temperature"] = 0.8
    kept = sets(case.targets, 11, most=8)
    inputs = [x for x in leaves(case) if x is not None]

    def outputs(*given):
        out = call(kept_logp_ref, case, (*given[:2], given[2] if len(given) > 2 else None), kept)
        return tuple(x for x in out if x is not None)

    assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize(
    "rules",
    [{"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.1}, {"top_k": 50, "top_p": 0.9, "min_p": 0.05}, {}],
    ids=str,
)
def test_sets_are_those_of_a_sampler(rules):
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = 3 * torch.randn(50, 331)
    logits[0] = 0.0
    logits[0, 5] = 30.0
    x = processors.TemperatureLogitsWarper(0.7)(None, logits)
    warpers = {
        "top_k": "TopKLogitsWarper",
        "top_p": "TopPLogitsWarper",
        "min_p": "MinPLogitsWarper",
    }
    for rule, value in rules.items():
        x = getattr(processors, warpers[rule])(value)(None, x)
    ids, offsets = kept_from_logits(logits, temperature=0.7, **rules)
    assert ids.dtype == torch.int32 and offsets[0] == 0 and len(offsets) == 51
    theirs = x > -torch.inf
    assert torch.equal(offsets.diff(), theirs.sum(1))
    assert torch.equal(ids.long(), theirs.nonzero()[:, 1])
    if rules:
        # Row 0 holds ties, all of which top_k keeps.
        assert offsets.diff().min() >= 1 and offsets.diff()[1:].max() < 331


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, "logits must be .T, V., got torch.float32 .2, 3, 4."),
        ({"logits": torch.zeros(2, 4).log()}, "logits.0. keeps no id"),
        ({"logits": torch.full((2, 4), torch.nan), "min_p": 0.5}, "logits.0. keeps no id"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_k": 0}, "top_k must be an int of at least 1, or None"),
        ({"top_p": 1.5}, "top_p must lie in"),
        ({"min_p": 2.0}, "min_p must lie in"),
    ],
    ids=str,
)
def test_rules_that_keep_nothing_are_refused(given, error):
    with pytest.raises(ValueError, match=error):
        kept_from_logits(**{"logits": torch.randn(2, 4)} | given)
