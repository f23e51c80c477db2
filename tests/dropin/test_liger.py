import inspect

import pytest
import torch

pytest.importorskip("liger_kernel")

from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOFunction

import r1kernels
from r1kernels import dropin
from tests.numerics import assert_no_worse

B, S, D, V = 4, 6, 16, 67
LENGTHS = torch.tensor([6, 3, 1, 5])
CLIP = {"epsilon_low": 0.1, "epsilon_high": 0.2}
LOSSES = {
    "grpo": CLIP,
    "bnpo": CLIP,
    "dapo": CLIP,
    "dr_grpo": {**CLIP, "max_completion_length": 11},
    "cispo": {"epsilon_high": 1.3},
    "sapo": {"sapo_temperature_pos": 1.2, "sapo_temperature_neg": 1.7},
    "vespo": {"vespo_k_pos": 1.5, "vespo_lambda_neg": 1.2},
}
OPTIONS = {
    "plain": {},
    "kl": {"beta": 0.3, "use_ref_model": True},
    "kl_of_input": {"beta": 0.3, "use_ref_model": True, "call": ("ref_input",)},
    "kl_without_reference": {"beta": 0.3},
    "kl_corrected": {"beta": 0.3, "use_ref_model": True, "use_bias_correction_kl": True},
    "on_policy": {"call": ("no_old",)},
    "sequence_ratios": {"call": ("ratio_B",)},
    "sequence_ratios_column": {"call": ("ratio_B1",)},
    "token_ratios": {"call": ("ratio_BS",)},
    "items": {"call": ("items",)},
    "bias_and_temperature": {"temperature": 0.7, "call": ("bias",)},
}
CLIPPED = {
    "delta": {"delta": 1.5},
    "delta_below_the_clip": {"delta": 1.05},
    "sequence": {"importance_sampling_level": "sequence"},
    "sequence_kl_corrected": {
        "importance_sampling_level": "sequence",
        "beta": 0.3,
        "use_ref_model": True,
        "use_bias_correction_kl": True,
    },
}
CASES = [
    (loss, option)
    for loss in LOSSES
    for option in (OPTIONS | CLIPPED if LOSSES[loss].get("epsilon_low") else OPTIONS)
]
CASES += [("luspo", "sequence"), ("luspo", "sequence_and_ratios")]


def settings(loss, option):
    given = {
        **OPTIONS,
        **CLIPPED,
        "sequence_and_ratios": {"importance_sampling_level": "sequence", "call": ("ratio_B",)},
    }[option]
    options = {"beta": 0.0, "use_ref_model": False, "loss_type": loss, **LOSSES.get(loss, CLIP)}
    options |= {name: value for name, value in given.items() if name != "call"}
    return options, given.get("call", ())


def arguments(call, dtype, uses_reference):
    """What a loss is called with; off-policy by enough to reach every bound."""
    mask = torch.arange(S) < LENGTHS[:, None]
    hidden, weight = torch.randn(B, S, D), torch.randn(V, D) * (2 / D**0.5)
    targets = torch.randint(0, V, (B, S))
    logp = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    named = {"bias": torch.randn(V).to(dtype) if "bias" in call else None}
    if "no_old" not in call:
        named["old_per_token_logps"] = logp + 0.3 * torch.randn(B, S)
    if "ref_input" in call:
        named["ref_input"] = (hidden + 0.1 * torch.randn(B, S, D)).to(dtype)
        named["ref_weight"] = (weight + 0.02 * torch.randn(V, D)).to(dtype)
    elif uses_reference:
        named["ref_per_token_logps"] = logp + 0.3 * torch.randn(B, S)
    for name, shape in (("ratio_B", (B,)), ("ratio_B1", (B, 1)), ("ratio_BS", (B, S))):
        if name in call:
            # VESPO's sum runs over padding, where a trainer has ones.
            ratio = torch.rand(shape) * 1.5
            named["vllm_is_ratio"] = torch.where(mask, ratio, 1.0) if shape == (B, S) else ratio
    if "items" in call:
        named["num_items_in_batch"] = torch.tensor(37.0)
    head = (hidden.to(dtype), weight.to(dtype), targets, mask.long(), torch.randn(B))
    return head, named


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def run(loss, head, named):
    hidden, weight, *rest = head
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    value, metrics = loss(*leaves, *rest, **named)
    return value, metrics, torch.autograd.grad(value * 3.0, leaves)


class Float64(torch.nn.Module):
    """Liger's loss with its log-probabilities in float64, which it makes in float32 alone."""

    def __init__(self, **options):
        super().__init__()
        self.loss = LigerFusedLinearGRPOLoss(compiled=False, **options)

    def forward(self, hidden, weight, targets, mask, advantages, bias=None, **named):
        def logp(h, w, b):
            z = h @ w.T if b is None else h @ w.T + b
            z = (z / self.loss.temperature).log_softmax(-1)
            return z.gather(-1, targets[..., None]).squeeze(-1)

        if "ref_input" in named:
            with torch.no_grad():
                named["ref_per_token_logps"] = logp(
                    named.pop("ref_input"), named.pop("ref_weight"), None
                )
        options = {
            name: getattr(self.loss, name)
            for name in inspect.signature(LigerFusedLinearGRPOLoss).parameters
            if name not in ("compiled", "chunk_size", "use_ref_model", "temperature")
        }
        ratio = named.pop("vllm_is_ratio", None)
        if ratio is not None and ratio.ndim == 1:
            ratio = ratio[:, None]
        return LigerFusedLinearGRPOFunction.ppo_loss_fn(
            logp(hidden, weight, bias),
            mask,
            advantages,
            mask,
            vllm_is_ratio=ratio,
            **named,
            **options,
        )


def test_signatures():
    for member in ("__init__", "forward"):
        theirs, ours = (
            inspect.signature(getattr(cls, member)).parameters.values()
            for cls in (LigerFusedLinearGRPOLoss, dropin.LigerFusedLinearGRPOLoss)
        )
        assert [(p.name, p.kind, p.default) for p in ours] == [
            (p.name, p.kind, p.default) for p in theirs
        ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("loss, option", CASES, ids=["-".join(case) for case in CASES])
def test_loss(loss, option, dtype):
    options, call = settings(loss, option)
    ours_fn = dropin.LigerFusedLinearGRPOLoss(**options)
    theirs_fn = LigerFusedLinearGRPOLoss(compiled=False, **options)
    draws = []
    # Several together: the error of one draw's loss, a sum of both signs, is luck.
    for _ in range(4):
        head, named = arguments(call, dtype, options["use_ref_model"])
        exact = [double(x) for x in head], {name: double(x) for name, x in named.items()}
        found = (
            run(ours_fn, head, named),
            run(theirs_fn, head, named),
            run(Float64(**options), *exact),
        )
        assert len({len(metrics) for _, metrics, _ in found}) == 1
        draws.append([[value, *metrics, *grads] for value, metrics, grads in found])
    count = len(draws[0][0]) - 3
    names = ["loss", *(f"metric {at}" for at in range(count)), "dhidden", "dweight"]
    for at, name in enumerate(names):
        three = (torch.stack([draw[side][at].detach() for draw in draws]) for side in range(3))
        assert_no_worse(*three, name=name)
    assert all(draw[0][-1].any() for draw in draws)
    if LOSSES.get(loss) is CLIP and option in ("delta", "token_ratios", "sequence"):
        assert any(draw[0][count] > 0 for draw in draws), "nothing was clipped"


@pytest.mark.parametrize(
    "options, text",
    [
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "sequence"),
        ({"loss_type": "ppo"}, "loss_type"),
        ({"loss_type": "luspo"}, "luspo"),
        ({"loss_type": "luspo", "importance_sampling_level": "sequence"}, "beta=0"),
        ({"loss_type": "cispo"}, "epsilon_high"),
        ({"loss_type": "sapo", "importance_sampling_level": "sequence"}, "sequence"),
        ({"loss_type": "dr_grpo"}, "max_completion_length"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level"),
        ({"delta": 0.9}, "delta"),
        ({"sapo_temperature_pos": 0.0, "loss_type": "sapo"}, "sapo_temperature"),
    ],
)
def test_what_has_no_counterpart_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        dropin.LigerFusedLinearGRPOLoss(**options)


def test_calls_that_are_refused():
    head, named = arguments((), torch.float32, False)
    with pytest.raises(ValueError, match="ref_per_token_logps or ref_input"):
        dropin.LigerFusedLinearGRPOLoss()(*head, **named)
    named["vllm_is_ratio"] = torch.ones(B, S + 1)
    with pytest.raises(ValueError, match="vllm_is_ratio"):
        dropin.LigerFusedLinearGRPOLoss(use_ref_model=False)(*head, **named)


def test_what_stands_in_padding_is_not_read():
    head, named = arguments((), torch.float32, True)
    hidden, weight, targets, mask, advantages = head
    loss = dropin.LigerFusedLinearGRPOLoss(beta=0.1)
    clean = loss(*head, **named)[0]
    void = mask == 0
    named = {n: None if x is None else x.masked_fill(void, float("nan")) for n, x in named.items()}
    dirty = (hidden.masked_fill(void[..., None], float("nan")), weight)
    dirty = loss(*dirty, targets.masked_fill(void, -1), mask, advantages, **named)
    assert torch.equal(dirty[0], clean) and all(x.isfinite() for x in dirty[1])


def test_patch():
    import liger_kernel.chunked_loss as package

    with r1kernels.patch("liger") as places:
        assert "liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss" in places
        assert package.LigerFusedLinearGRPOLoss is dropin.LigerFusedLinearGRPOLoss
    assert package.LigerFusedLinearGRPOLoss is LigerFusedLinearGRPOLoss
    assert LigerFusedLinearGRPOLoss.__module__.startswith("liger_kernel")
