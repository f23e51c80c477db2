import pytest
import torch
from conftest import available_backends

from r1kernels.check import IGNORE
from r1kernels.reference.linear_logp import linear_logp as linear_logp_ref
from r1kernels.reference.policy_loss import policy_loss as policy_loss_ref
from tests.numerics import assert_no_worse
from tests.ops import shard_ranks
from tests.ops.head_cases import eager
from tests.ops.rank_program import run_ranks
from tests.ops.shard_ranks import ADVANTAGES, CASES, LENGTHS, OBJECTIVES, equal, make

# Of the vocabulary: a rank has its slice of it.
REFUSED = "RuntimeError: group: ranks [{last}] refused their arguments"
SLICED = ("dweight", "dbias", "dlora_b")


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def ranks(request, tmp_path_factory):
    """What every rank found, in rank order."""
    folder = tmp_path_factory.mktemp("ranks")
    return run_ranks(shard_ranks, folder, request.param, str(request.param))


def by_hand(given, case):
    """`shard_ranks.call` with the whole vocabulary and torch alone."""
    weight = given.weight
    if given.lora:
        weight = weight + given.lora[2] * given.lora[1] @ given.lora[0]
    options = {k: v for k, v in given.options.items() if k != "prior"}
    counted = given.targets != IGNORE
    hidden = torch.where(counted[:, None], given.hidden, 0)
    if case.op not in ("logp", "loss"):
        options["entropy"] = True
    # Eager's own entropy of a logit of -inf is NaN.
    head = linear_logp_ref if case.rows == "impossible" else eager
    out = head(hidden, weight, given.targets, bias=given.bias, **options)
    if case.op == "logp":
        found = {name: x for name, x in out._asdict().items() if x is not None}
        loss = shard_ranks.through(out, case.only)
    elif case.op == "loss":
        rows = counted.nonzero().squeeze(1)
        entropy = None if out.entropy is None else out.entropy[rows]
        loss = shard_ranks.token_loss(out.logp[rows], entropy, rows).sum()
        found = {"loss": loss}
    else:
        streams = {"entropy": out.entropy, "mask": counted, "cu_seqlens": LENGTHS, **given.streams}
        loss = policy_loss_ref(
            out.logp if out.logp.dtype == torch.float64 else out.logp.float(),
            ADVANTAGES.to(given.streams["logp_old"].dtype),
            OBJECTIVES[case.op],
            **streams,
        ).loss
        found = {"logp": out.logp}
    trained = given.trained()
    grads = torch.autograd.grad(3 * loss, list(trained.values()))
    return {
        k: v.detach() for k, v in (found | dict(zip(trained, grads, strict=True))).items()
    }, loss


def finite(x):
    return torch.where(x.isfinite(), x, 0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend_name", available_backends())
def test_shards_are_no_worse_than_eager_and_agree_bitwise(ranks, name, backend_name):
    case = CASES[name]
    if backend_name not in case.backends:
        assert f"{name} {backend_name}" not in ranks[0]
        return
    found = [rank[f"{name} {backend_name}"] for rank in ranks]
    assert all(same for _, same in found), "a second run differs"
    first, *others = (x for x, _ in found)
    ours = {}
    for key, x in first.items():
        if key in SLICED:
            ours[key] = torch.cat([x, *(other[key] for other in others)])
        else:
            ours[key] = x
            assert all(equal(x, other[key]) for other in others), f"{key} differs between ranks"
    whole = make(case, len(ranks))
    plain, _ = by_hand(whole.leaves(case.head), case)
    truth, loss = by_hand(whole.leaves(case.head, dtype=torch.float64), case)
    for key, value in truth.items():
        assert torch.equal(ours[key].isfinite(), value.isfinite()), key
        assert_no_worse(finite(ours[key]), finite(plain[key]), finite(value), name=key)
    if "loss" in ours:
        assert abs(ours["loss"].item() - loss.item()) < 1e-6 * max(1.0, abs(loss.item()))


@pytest.mark.parametrize("backend_name", available_backends())
def test_every_path_gives_the_same_logp(ranks, backend_name):
    for rank in ranks:
        first, *others = rank[f"paths {backend_name}"]
        assert all(equal(first, x) for x in others)
        assert equal(first, ranks[0][f"paths {backend_name}"][0])


@pytest.mark.parametrize("backend_name", available_backends())
def test_without_rows_everything_is_zero(ranks, backend_name):
    for rank in ranks:
        assert not any(bool(x.any()) for x in rank[f"empty {backend_name}"])


def test_split_by_dtensor(ranks):
    case = CASES["all"]
    truth, _ = by_hand(make(case, len(ranks)).leaves(True, dtype=torch.float64), case)
    plain, _ = by_hand(make(case, len(ranks)).leaves(True), case)
    for rank in ranks:
        for key, value in truth.items():
            assert_no_worse(rank["dtensor"][key], plain[key], value, name=key)
        assert "ValueError: weight must be a DTensor with Shard(0)" in rank["dtensor"]["replicated"]


@pytest.mark.parametrize(
    ("name", "culprit", "others"),
    [
        ("width", "ValueError: hidden must end in weight's width 7", REFUSED),
        ("mask", "ValueError: mask must have shape [4]", REFUSED),
        ("rows", "ValueError: group: the number of rows must be the same on every rank", None),
        ("option", "ValueError: group: dtype, options or backend must be the same", None),
        ("gradients", "ValueError: group: dtype, options or backend must be the same", None),
        ("targets", "ValueError: group: per-token tensors must be the same", None),
        ("range", "a target lies in [0, {vocab})", None),
        ("backend", "RuntimeError: no backend runs linear_logp", REFUSED),
        ("type", "TypeError: group must be a torch.distributed.ProcessGroup", None),
    ],
)
def test_one_rank_s_mistake_is_an_error_on_all(ranks, name, culprit, others):
    last = len(ranks) - 1
    for at, rank in enumerate(ranks):
        wanted = culprit if at == last or others is None else others
        assert wanted.format(last=last, vocab=5 * len(ranks)) in rank["errors"][name]
        assert rank["errors"]["after"] == "True"


def test_compiles_without_a_graph_break(ranks):
    assert all(rank["compiled"] for rank in ranks)


def test_what_rounding_takes_from_a_row_goes_back_on_the_target_s_rank(ranks):
    # Weight rows are all ones: dhidden is the sum of a row's logit gradients, which is 0.
    for rank in ranks:
        assert float(rank["rounding"].abs().max()) < 1e-5


def test_a_group_of_one_is_no_group(ranks):
    assert all(rank["alone"] for rank in ranks)


def test_batch_invariance_holds_over_shards(ranks):
    assert all(rank["invariant"] for rank in ranks)
