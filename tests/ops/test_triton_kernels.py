"""The Triton kernels by themselves, in the interpreter where there is no GPU (without bfloat16)."""

import sys

import pytest
import torch
from numerics import EPS, assert_no_worse, relative_error, relative_l2

pytest.importorskip("triton", reason="needs Triton")
from r1kernels import linear_logp, token_logp
from r1kernels import rows as head_rows
from r1kernels._triton import counted_kernels, head_configs, head_kernels, target_kernels
from r1kernels._triton import linear_logp as triton_head
from r1kernels._triton import token_logp as triton_token
from r1kernels._triton.common import INTERPRETED, RowList, architecture
from r1kernels.backend import batch_invariant, use_backend
from r1kernels.head_contract import Gradients, Head, Rows
from r1kernels.reference.linear_logp import linear_logp as reference_linear
from r1kernels.reference.token_logp import token_logp as reference_token

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])

pytestmark = [
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU"),
    # The interpreter computes with numpy, which warns where a kernel overflows on purpose.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def problem(T, V, D, dtype, bias=False):
    hidden = torch.randn(T, D, device=DEVICE).to(dtype)
    weight = (0.7 * torch.randn(V, D, device=DEVICE)).to(dtype)
    targets = torch.randint(0, V, (T,), device=DEVICE)
    targets[0] = 0
    targets[-1] = V - 1
    bias = torch.randn(V, device=DEVICE).to(dtype) if bias else None
    return hidden, weight, targets, bias


def exact(x):
    """x in sixteenths: float32 sums of products are then exact, whatever order a CPU takes them in.

    The interpreter multiplies with numpy, whose bits depend on the machine.
    """
    return (x * 16).round() / 16


def outputs(function, hidden, weight, bias, targets, upstream, **options):
    """logp, entropy, lse and the gradients of their weighted sum."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in (hidden, weight, bias)]
    out = function(leaves[0], leaves[1], targets, bias=leaves[2], **options)
    used = [x for x in (out.logp, out.entropy, out.lse) if x is not None]
    total = sum((x * w.to(x.dtype)).sum() for x, w in zip(used, upstream, strict=False))
    return used, torch.autograd.grad(total, [x for x in leaves if x is not None])


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("T", "V", "D", "softcap", "bias", "entropy"),
    [
        (1, 17, 8, None, False, False),
        (7, 67, 64, 15.0, False, True),
        (33, 331, 40, None, True, True),
        (33, 130, 40, 15.0, True, False),
    ],
    ids=["one-row", "softcap-entropy", "bias-entropy", "softcap-bias"],
)
def test_linear_logp_is_no_worse_than_eager(
    T, V, D, softcap, bias, entropy, dtype, compare=assert_no_worse
):
    hidden, weight, targets, bias = problem(T, V, D, dtype, bias)
    temperature = torch.rand(T, device=DEVICE) + 0.5
    upstream = torch.randn(3, T, device=DEVICE)
    options = dict(softcap=softcap, logit_scale=0.9, entropy=entropy)
    inputs = (hidden, weight, bias, targets, upstream)
    with use_backend("triton"):
        ours = outputs(linear_logp, *inputs, temperature=temperature, **options)
    eager = outputs(reference_linear, *inputs, temperature=temperature, **options)
    truth = outputs(
        reference_linear, *map(double, inputs), temperature=temperature.double(), **options
    )
    for ours_part, eager_part, truth_part in zip(ours, eager, truth, strict=True):
        for x, y, z in zip(ours_part, eager_part, truth_part, strict=True):
            compare(x, y, z)


def no_worse_in_l2(out, eager, truth):
    """The rule of assert_no_worse on norms: one entry's luck with its last bit decides nothing."""
    ours, theirs = relative_l2(out, truth), relative_l2(eager, truth)
    bound = 2 * theirs + 4 * EPS
    assert ours <= bound, f"error {ours:.3e}, eager's {theirs:.3e}, allowed {bound:.3e}"


def chunk_of(hidden, weight, targets, prior=None, entropy=True, softcap=0.0):
    head = Head(weight, None, softcap, 1.0)
    rows = Rows(hidden, targets, None, prior)
    return triton_head.HeadChunk(head, len(targets), entropy, entropy), rows, head


ARCH = architecture(torch.device(DEVICE))
VARIANTS = [name for name, archs in head_configs.VARIANTS.items() if ARCH in archs]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", [x for x in VARIANTS if x != head_configs.CHOICE.get(ARCH)])
def test_variants_are_no_worse_than_eager(variant, dtype, monkeypatch):
    monkeypatch.setitem(head_configs.CHOICE, ARCH, variant)
    # Three blocks of rows and three of columns, the last ones partial; two programs or four. The
    # interpreter's products are numpy's, whose last bits depend on the machine.
    test_linear_logp_is_no_worse_than_eager(
        33, 131, 64, 15.0, True, True, dtype, compare=no_worse_in_l2
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_modes_of_a_variant_agree_bitwise(variant, monkeypatch):
    monkeypatch.setitem(head_configs.CHOICE, ARCH, variant)
    hidden, weight, targets, _ = problem(33, 131, 64, DTYPES[-1])
    hidden, weight = exact(hidden), exact(weight)
    weight[targets[1]] = -hidden[1] * 4
    chunk, rows, _ = chunk_of(hidden, weight, targets)
    plain = chunk.forward(rows, keep=False)
    for found, kept in zip(plain, chunk.forward(rows, keep=True), strict=True):
        assert torch.equal(found, kept)
    alone, row, _ = chunk_of(hidden[20:21], weight, targets[20:21])
    for found, single in zip(plain, alone.forward(row, keep=True), strict=True):
        assert torch.equal(found[20:21], single)
    out = torch.empty(33, 144, dtype=hidden.dtype, device=DEVICE)
    head_kernels.product(hidden, weight, out, variant)
    assert_no_worse(out[:, :131], hidden @ weight.T, hidden.double() @ weight.double().T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_out_of_range_are_redone(dtype):
    hidden, weight, targets, _ = problem(7, 67, 64, dtype)
    hidden, weight = exact(hidden), exact(weight)
    # The target 200 nats and more below the top: around it, every exponential overflows.
    weight[targets[1]] = -hidden[1] * 4
    weight[targets[2]] = -hidden[2] * 4
    truth = reference_linear(hidden.double(), weight.double(), targets, entropy=True)
    eager = reference_linear(hidden, weight, targets, entropy=True)
    assert truth.logp.min() < -100
    chunk, rows, _ = chunk_of(hidden, weight, targets)
    out = chunk.forward(rows, keep=True)
    assert_no_worse(out.logp, eager.logp, truth.logp, name="logp")
    assert_no_worse(out.lse, eager.lse, truth.lse, name="lse")
    # log S - mean cancels over |log S| <= 32 in the rows that are not redone.
    assert (out.entropy - truth.entropy).abs().max() < 32 * 2**-24
    logits = hidden.double() @ weight.double().T
    off_target = torch.ones_like(logits).scatter_(1, targets[:, None], 0.0)
    kept = chunk.buffer[:, :67].double() / chunk.total_C[:, None]
    rounding = torch.finfo(chunk.buffer.dtype).eps
    assert relative_error(kept, logits.softmax(-1) * off_target) < rounding + 1e-5
    assert (chunk.buffer[:, 67:] == 0).all()


def test_any_prior_gives_the_same_result():
    hidden, weight, targets, _ = problem(7, 67, 64, torch.float32)
    truth = reference_linear(hidden.double(), weight.double(), targets, entropy=True)
    wild = torch.tensor([0.0, -3.0, -200.0, 50.0, float("nan"), float("-inf"), float("inf")])
    for prior in (truth.logp.float(), wild.to(DEVICE)):
        chunk, rows, _ = chunk_of(hidden, weight, targets, prior)
        out = chunk.forward(rows, keep=False)
        for x, z in zip(out, truth, strict=True):
            # Half an ulp of a logit near 20 is 1e-6 nats.
            assert (x - z).abs().max() < 4e-6


def test_logp_near_one_keeps_its_digits():
    hidden, weight, targets, _ = problem(7, 67, 64, torch.float32)
    weight[targets] = hidden * 0.4
    truth = reference_linear(hidden.double(), weight.double(), targets, entropy=True)
    near = truth.logp > -1e-3
    assert near.any()
    chunk, rows, _ = chunk_of(hidden, weight, targets, truth.logp.float())
    out = chunk.forward(rows, keep=False)
    assert ((out.logp - truth.logp) / truth.logp)[near].abs().max() < 1e-5
    assert (out.logp <= 0).all()


def test_paths_and_chunks_agree_bitwise():
    hidden, weight, targets, _ = problem(33, 67, 40, torch.float32)
    hidden, weight = exact(hidden), exact(weight)
    whole, rows, head = chunk_of(hidden, weight, targets)
    plain = whole.forward(rows, keep=False)
    kept = whole.forward(rows, keep=True)
    alone = triton_head.HeadChunk(head, 9, False, False).forward(
        rows.take(slice(20, 29)), keep=True
    )
    assert torch.equal(plain.logp, kept.logp)
    assert torch.equal(plain.lse, kept.lse)
    assert torch.equal(plain.entropy, kept.entropy)
    assert torch.equal(plain.logp[20:29], alone.logp)


def test_a_row_alone_takes_the_tiles_of_all(monkeypatch):
    monkeypatch.setitem(head_configs.CHOICE, ARCH, "tma" if "tma" in VARIANTS else "pointers")
    wide, weight, targets, _ = problem(33, 1031, 65, DTYPES[-1])
    # Rows 65 apart start nowhere in particular, but one of them counts as contiguous.
    hidden, weight = exact(wide)[:, :64], exact(weight)[:, :64].contiguous()
    with batch_invariant():
        whole, rows, _ = chunk_of(hidden, weight, targets)
        truth = whole.forward(rows, keep=False)
        for at in (slice(row, row + 1) for row in (0, 16, 32)):
            chunk, rows, _ = chunk_of(hidden[at], weight, targets[at])
            for x, z in zip(chunk.forward(rows, keep=False), truth, strict=True):
                assert torch.equal(x, z[at])


@pytest.mark.parametrize("softcap", [0.0, 15.0], ids=["plain", "softcap"])
def test_kept_and_recomputed_gradients_agree(softcap):
    hidden, weight, targets, _ = problem(7, 67, 40, torch.float32)
    chunk, rows, head = chunk_of(hidden, weight, targets, softcap=softcap)
    stats = chunk.forward(rows, keep=True)
    dlogp = torch.randn(7, device=DEVICE)
    found = []
    for last in (False, True):
        grads = Gradients.zeros(head, True, True, False)
        found.append((chunk.gradients(None, dlogp, None, grads, last), grads.weight_VD))
    grads = Gradients.zeros(head, True, True, False)
    found.append((chunk.backward(rows, stats, dlogp, None, None, grads), grads.weight_VD))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    for kept, again in zip(found[0], found[2], strict=True):
        assert relative_error(kept, again) < 3e-6
    active = torch.tensor([1, 4], device=DEVICE)
    grads = Gradients.zeros(head, True, True, False)
    part = chunk.gradients(active, dlogp[active], None, grads, True)
    assert relative_error(part, found[0][0][active]) < 3e-6


def listed_problem(dtype):
    """Operands of the GEMMs over listed rows, with NaN in the rows that are not listed."""
    C, V, D = 57, 83, 40
    mask = torch.rand(C, device=DEVICE) < 0.4
    mask[0], mask[C - 1] = False, True
    left = torch.randn(C, 96, device=DEVICE).to(dtype)
    left[~mask] = float("nan")
    right, weight = (torch.randn(n, D, device=DEVICE).to(dtype) for n in (C, V))
    factor = torch.randn(C, device=DEVICE)
    dhidden, dweight = torch.randn(C, D, device=DEVICE), torch.randn(V, D, device=DEVICE)
    return mask, left, weight, right, factor, dhidden, dweight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tiles", [False, True], ids=["all-tiles", "kept-tiles"])
def test_products_over_listed_rows(tiles, dtype):
    mask, left, weight, right, factor, dhidden, dweight = listed_problem(dtype)
    listed = RowList.of(mask)
    rows, block = mask.nonzero().squeeze(1), counted_kernels.BLOCK
    part = left[rows, : len(weight)].double()
    kept = None
    if tiles:
        keep = torch.rand(-(-len(mask) // block), -(-len(weight) // block), device=DEVICE) < 0.5
        keep[0], keep[:, 0] = False, True
        kept = counted_kernels.KeptTiles.of(keep)
        wide = keep.repeat_interleave(block, 0).repeat_interleave(block, 1)
        part *= wide[: len(rows), : len(weight)]
    hidden_truth, weight_truth = dhidden.double(), dweight.double()
    hidden_truth[rows] += factor[rows, None].double() * (part @ weight.double())
    weight_truth += part.T @ right[rows].double()
    again = dweight.clone()
    counted_kernels.add_hidden_rows(dhidden, left, weight, factor, listed, kept)
    counted_kernels.add_weight_rows(dweight, left, right, listed, kept)
    counted_kernels.add_weight_rows(again, left, right, listed, kept)
    assert relative_error(dhidden, hidden_truth) < 1e-6
    assert relative_error(dweight, weight_truth) < 1e-6
    assert torch.equal(dweight, again)


def test_an_empty_list_writes_nothing():
    mask, left, weight, right, factor, dhidden, dweight = listed_problem(torch.float32)
    listed = RowList.of(torch.zeros_like(mask))
    before = dhidden.clone(), dweight.clone()
    counted_kernels.add_hidden_rows(dhidden, left, weight, factor, listed)
    counted_kernels.add_weight_rows(dweight, left, right, listed)
    assert torch.equal(dhidden, before[0])
    assert torch.equal(dweight, before[1])


@pytest.mark.parametrize("entropy", [False, True], ids=["kept", "recomputed"])
def test_gradients_of_listed_rows_are_those_of_all(entropy, monkeypatch):
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    hidden, weight, targets, _ = problem(33, 67, 64, dtype)
    dlogp = torch.randn(33, device=DEVICE) * (torch.rand(33, device=DEVICE) < 0.3)
    dentropy = torch.where(dlogp == 0, 0.0, 0.5) if entropy else None
    found = []
    for counted in (False, True):
        monkeypatch.setitem(head_configs.COUNTED, ARCH, counted)
        chunk, rows, head = chunk_of(hidden, weight, targets)
        chunk.forward(rows, keep=True)
        grads = Gradients.zeros(head, True, True, False)
        assert (chunk._listed(grads, dlogp) is not None) == counted
        found.append((chunk.gradients(None, dlogp, dentropy, grads, True), grads.weight_VD))
    for listed, dense in zip(found[1], found[0], strict=True):
        assert relative_error(listed, dense) < 3e-6
    assert (found[1][0][dlogp == 0] == 0).all()


def test_tiles_without_mass_are_skipped_where_no_listed_row_keeps_them(monkeypatch):
    width = 2 * counted_kernels.BLOCK
    for module in (head_rows, triton_head):
        monkeypatch.setattr(module, "SKIP_TILE", width)
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    hidden, weight, targets, _ = problem(33, 5 * width + 3, 64, dtype)
    # Every row has the tiles of its target and hardly another; the third tile belongs to none.
    targets[:] = torch.arange(33, device=DEVICE) % width
    weight[targets] = hidden
    dlogp = torch.randn(33, device=DEVICE) * (torch.arange(33, device=DEVICE) % 3 == 0)
    found = []
    for counted in (False, True):
        monkeypatch.setitem(head_configs.COUNTED, ARCH, counted)
        chunk, rows, head = chunk_of(hidden, weight, targets)
        chunk.skip_mass = 0.01
        chunk.forward(rows, keep=True)
        grads = Gradients.zeros(head, True, True, False)
        found.append((chunk.gradients(None, dlogp, None, grads, True), grads.weight_VD))
    listed = RowList.of(dlogp != 0)
    kept = counted_kernels.KeptTiles.of_rows(~chunk.skip_CS, width, listed, len(weight))
    steps = width // counted_kernels.STEP
    assert 0 < kept.num_columns[0] < kept.columns.shape[1] - steps
    assert (kept.num_columns[-1:] == 0).all()
    for listed, dense in zip(found[1], found[0], strict=True):
        assert relative_error(listed, dense) < 3e-6


def far(x, stride):
    """x with its rows `stride` elements apart, past 2^31; the memory between is never touched."""
    rows, columns = x.shape
    assert (rows - 1) * stride >= 2**31
    memory = torch.empty((rows - 1) * stride + columns, dtype=x.dtype, device=DEVICE)
    return memory.as_strided(x.shape, (stride, 1)).copy_(x)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has no memory that is not there")
@pytest.mark.parametrize("variant", ["pointers", "tma", "specialized"])
def test_offsets_beyond_31_bits(variant, monkeypatch):
    monkeypatch.setitem(head_configs.CHOICE, ARCH, variant)
    hidden, weight, targets, _ = problem(3, 18, 64, torch.float16)
    # A row out of range, which is listed and redone.
    weight[targets[1]] = -hidden[1] * 4
    temperature = torch.ones(3)
    anchor = target_kernels.target_logits(hidden, targets, None, Head(weight, None, 0.0, 1.0))

    def run(hidden, weight, columns=32):
        head, store = Head(weight, None, 0.0, 1.0), torch.empty(3, columns, dtype=torch.float16)
        here = target_kernels.target_logits(hidden, targets, None, head)
        assert torch.equal(here, anchor)
        sums = head_kernels.forward_chunk(hidden, targets, temperature, here, head, False, store)
        return sums.s_C, sums.rounded_C, store[:, :18]

    near = run(hidden, weight)
    assert (near[2][1] <= 1).all()
    for found in (
        run(far(hidden, 2**30), weight),
        run(hidden, far(weight, 2**27)),
        # No tile lies beyond V, so most of these columns are never touched.
        run(hidden, weight, columns=2**30),
    ):
        for x, z in zip(found, near, strict=True):
            assert torch.equal(x, z)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has no memory that is not there")
def test_offsets_of_listed_products_beyond_31_bits():
    _, _, weight, right, factor, _, _ = listed_problem(torch.float16)
    left, right, weight = torch.randn(3, 32).half(), right[:3], weight[:18]
    listed = RowList.of(torch.tensor([False, True, True]))

    def run(left, right, weight, dhidden, dweight):
        counted_kernels.add_hidden_rows(dhidden, left, weight, factor, listed)
        counted_kernels.add_weight_rows(dweight, left, right, listed)
        return dhidden, dweight

    dhidden, dweight = torch.zeros(3, 40), torch.zeros(18, 40)
    near = run(left, right, weight, dhidden.clone(), dweight.clone())
    assert near[0][1:].all() and near[1].any()
    for found in (
        run(far(left, 2**30), right, weight, dhidden.clone(), dweight.clone()),
        run(left, far(right, 2**30), weight, dhidden.clone(), dweight.clone()),
        run(left, right, far(weight, 2**27), dhidden.clone(), dweight.clone()),
        run(left, right, weight, far(dhidden, 2**30), dweight.clone()),
        run(left, right, weight, dhidden.clone(), far(dweight, 2**27)),
    ):
        for x, z in zip(found, near, strict=True):
            assert torch.equal(x, z)


def test_columns_of_minus_infinity_count_for_nothing():
    hidden, weight, targets, bias = problem(7, 67, 40, torch.float32, bias=True)
    shut = torch.arange(20, 30, device=DEVICE)
    bias[shut] = -float("inf")
    targets[:] = 3
    upstream = torch.randn(3, 7, device=DEVICE)
    with use_backend("triton"):
        ours = outputs(linear_logp, hidden, weight, bias, targets, upstream, entropy=True)
    keep = torch.tensor([v for v in range(67) if not 20 <= v < 30], device=DEVICE)
    inputs = map(double, (hidden, weight[keep], bias[keep], targets, upstream))
    truth = outputs(reference_linear, *inputs, entropy=True)
    for x, z in zip(ours[0], truth[0], strict=True):
        assert (x - z).abs().max() < 4e-6
    assert relative_error(ours[1][0], truth[1][0]) < 1e-5
    assert relative_error(ours[1][1][keep], truth[1][1]) < 1e-5
    assert (ours[1][1][shut] == 0).all()


def test_target_terms():
    T, V, D = 33, 50, 40
    hidden, weight = torch.randn(T, D, device=DEVICE), torch.randn(V, D, device=DEVICE)
    targets = torch.randint(0, 4, (T,), device=DEVICE)
    targets[5] = V - 1
    coefficient = torch.randn(T, device=DEVICE)
    dweight = torch.randn(V, D, device=DEVICE)
    truth = dweight.double().index_add(0, targets, (coefficient[:, None] * hidden).double())
    again = dweight.clone()
    target_kernels.add_target_weight(dweight, hidden, targets, coefficient)
    target_kernels.add_target_weight(again, hidden, targets, coefficient)
    assert relative_error(dweight, truth) < 1e-6
    assert torch.equal(dweight, again)
    dhidden = torch.randn(T, D, device=DEVICE)
    truth = dhidden.double() + coefficient[:, None].double() * weight[targets].double()
    target_kernels.add_target_hidden(dhidden, weight, targets, coefficient)
    assert relative_error(dhidden, truth) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 15.0], ids=["plain", "softcap"])
def test_token_logp_is_no_worse_than_eager(softcap, dtype):
    T, V = 7, 331
    # Columns of a wider buffer: rows start at an odd stride.
    logits = (4 * torch.randn(T, V + 6, device=DEVICE)).to(dtype)[:, 3:-3]
    targets = torch.randint(0, V, (T,), device=DEVICE)
    targets[0], targets[1] = 0, V - 1
    temperature = torch.rand(T, device=DEVICE) + 0.5
    upstream = torch.randn(3, T, device=DEVICE)

    def run(function, logits, temperature):
        leaf = logits.detach().requires_grad_()
        out = function(
            leaf, targets, temperature=temperature, softcap=softcap, logit_scale=0.9, entropy=True
        )
        total = sum((x * w).sum() for x, w in zip(out, upstream.to(out[0].dtype), strict=True))
        return [*out, *torch.autograd.grad(total, leaf)]

    with use_backend("triton"):
        ours = run(token_logp, logits, temperature)
    eager = run(reference_token, logits, temperature)
    truth = run(reference_token, logits.double(), temperature.double())
    for x, y, z in zip(ours, eager, truth, strict=True):
        assert_no_worse(x, y, z)


def test_token_logp_edges():
    V = 300
    logits = 3 * torch.randn(5, V, device=DEVICE)
    targets = torch.randint(10, V, (5,), device=DEVICE)
    logits[:, :5] = -float("inf")
    logits[1] = float("nan")
    targets[1] = -100
    logits[2, targets[2]] = 60.0
    logits[3, targets[3]] = -90.0
    arguments = (logits, targets, None, 0.0, 1.0)
    logp, entropy, lse = triton_token.fwd(*arguments, True)
    counted = torch.tensor([0, 2, 3, 4], device=DEVICE)
    wide = logits[counted].double()
    truth = reference_token(wide, targets[counted], entropy=True)
    for x, z in zip((logp, entropy, lse), truth, strict=True):
        assert x[1] == 0
        assert relative_error(x[counted], z) < 1e-6
    rest = (wide[1] - wide[1, targets[2]]).exp()
    rest[targets[2]] = 0
    assert abs(logp[2] / -torch.log1p(rest.sum()) - 1) < 1e-5
    upstream = torch.randn(3, 5, device=DEVICE)
    expected = triton_token.bwd(*upstream, *arguments, logp, entropy, lse, False)
    assert expected.isfinite().all()
    assert (expected[1] == 0).all()
    assert (expected[:, :5] == 0).all()
    inplace = triton_token.bwd(*upstream, *arguments, logp, entropy, lse, True)
    assert inplace.data_ptr() == logits.data_ptr()
    assert torch.equal(inplace, expected)


def test_refusals_name_the_reason():
    assert "float64" in triton_token.refuses(torch.zeros(2, 2, dtype=torch.float64, device=DEVICE))
    hidden = torch.zeros(2, 16, device=DEVICE)
    assert triton_head.refuses(hidden, hidden) is None
    assert "weight is torch.float16" in triton_head.refuses(hidden, hidden.half())
    if INTERPRETED:
        assert "bfloat16" in triton_head.refuses(hidden.bfloat16(), hidden.bfloat16())


def test_one_tile_per_mode_and_a_stored_row_that_fits():
    for arch in (80, 90, 100):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            config = head_configs.launch_config(arch, dtype)
            # is_aligned promises D % 64 == 0 to the loop that loads without a mask.
            assert 64 % config.BLOCK_D == 0
    assert head_kernels.store_dtype(torch.float16) == torch.float32
    assert [head_kernels.padded(V) for V in (1, 16, 17)] == [16, 16, 32]


@pytest.mark.parametrize("V", [1, 5, 331, 512, 513, 1031])
@pytest.mark.parametrize("shift", [0, 3])
def test_token_logp_cuts_rows_anywhere(V, shift):
    # Rows at every distance from a 16-byte boundary; targets at both ends and in each block.
    logits = (3 * torch.randn(9, V + shift, device=DEVICE)).half()[:, :V]
    targets = torch.tensor([0, V - 1, V // 2, 7, 8, 511, 512, 1023, 1030], device=DEVICE) % V
    upstream = torch.randn(3, 9, device=DEVICE)
    found = []
    for function, x in ((token_logp, logits), (reference_token, logits.double())):
        leaf = x.detach().requires_grad_()
        with use_backend("triton"):
            out = function(leaf, targets, entropy=True)
        total = sum((y * w).sum() for y, w in zip(out, upstream, strict=True))
        found.append([*out, *torch.autograd.grad(total, leaf)])
    for x, z in zip(*found, strict=True):
        assert (x - z).abs().max() <= 2e-6 * z.abs().max() + (x.dtype == torch.half) * 2e-3


@pytest.mark.parametrize("V", [1031, 1032])
def test_token_logp_sums_a_row_alike_wherever_it_lies(V):
    wide = (3 * torch.randn(9, V + 8, device=DEVICE)).half()
    targets = torch.randint(0, V, (9,), device=DEVICE)
    with batch_invariant():
        shifted = torch.cat([wide.flatten()[:3], wide[:, :V].flatten()])[3:].view(9, V)
        whole = triton_token.fwd(wide[:, :V].contiguous(), targets, None, 0.0, 1.0, True)
        for rows in (wide[:, :V], wide[4:, :V], wide[3:, :V].contiguous(), shifted[8:]):
            at = slice(9 - len(rows), 9)
            found = triton_token.fwd(rows, targets[at], None, 0.0, 1.0, True)
            for x, z in zip(found, whole, strict=True):
                assert torch.equal(x, z[at])


def test_token_logp_rows_beyond_the_range_of_int32():
    # Two rows 2^31 elements apart: memory that is never touched is never there.
    V, apart = 331, 2**31
    logits = torch.empty(apart + V, dtype=torch.half, device=DEVICE).as_strided((2, V), (apart, 1))
    logits.copy_(torch.randn(2, V))
    targets = torch.tensor([3, 330], device=DEVICE)
    near = logits.contiguous().requires_grad_()
    with use_backend("triton"):
        expected = token_logp(near, targets, entropy=True)
        far = logits.detach().requires_grad_()
        out = token_logp(far, targets, entropy=True, inplace_backward=True)
        for x, z in zip(out, expected, strict=True):
            assert torch.equal(x, z)
        (grad,) = torch.autograd.grad(out.logp.sum(), far)
        assert grad.data_ptr() == logits.data_ptr()
        assert torch.equal(grad, torch.autograd.grad(expected.logp.sum(), near)[0])


def test_token_logp_bad_rows_are_nan_and_alone(monkeypatch):
    # As on a GPU, where no value is looked at before the kernel runs.
    monkeypatch.setattr(sys.modules["r1kernels.token_logp"], "values_readable", lambda x: False)
    logits = torch.randn(6, 40, device=DEVICE, requires_grad=True)
    targets = torch.tensor([3, 40, -1, -100, 5, 6], device=DEVICE)
    temperature = torch.tensor([1.0, 1.0, 1.0, -1.0, 0.0, 0.5], device=DEVICE)
    with use_backend("triton"):
        out = token_logp(logits, targets, temperature=temperature, entropy=True)
        (grad,) = torch.autograd.grad(sum(x.sum() for x in out), logits)
    bad = torch.tensor([False, True, True, False, True, False], device=DEVICE)
    for x in (*out, grad):
        assert x[bad].isnan().all() and x[~bad].isfinite().all()
    assert not out.logp[3] and not grad[3].any()


def test_token_logp_entropy_of_a_peaked_row_keeps_its_digits():
    logits = torch.zeros(27, 331, device=DEVICE)
    logits[:, 7] = torch.linspace(4.0, 30.0, 27, device=DEVICE)
    targets = torch.full((27,), 7, device=DEVICE)
    truth = torch.special.entr(logits.double().softmax(-1)).sum(-1)
    with use_backend("triton"):
        ours = token_logp(logits, targets, entropy=True).entropy
        other = token_logp(logits, targets - 1, entropy=True).entropy
    assert ((ours - truth) / truth).abs().max() < 1e-5
    # Where the peak is not the target, what lies beside it in its lane rounds against 1.
    assert (other - truth).abs().max() < 2e-6
