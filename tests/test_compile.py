"""Every op passes opcheck and compiles without a graph break."""

import pytest
import torch

import r1kernels
from r1kernels import PolicyObjective
from r1kernels.kept_logp import kept_logp_fwd
from r1kernels.linear_logp_ops import linear_logp_fwd
from r1kernels.linear_policy_loss_ops import linear_policy_loss_fwd
from r1kernels.prefix_attention import prefix_attention_fwd
from r1kernels.tiled_mlp import tiled_mlp_fwd
from r1kernels.token_logp import token_logp_fwd
from r1kernels.varlen_attention import varlen_attention_fwd

TARGETS = torch.tensor([3, -100, 16, 0, 7])
OBJECTIVE = PolicyObjective.r1()
STREAMS = {"logp_old": -torch.rand(5), "logp_ref": -torch.rand(5)}
LENGTHS = torch.tensor([0, 2, 5])
KEPT = torch.tensor([3, 9, 4, 16, 2, 0, 8, 7]), torch.tensor([0, 2, 3, 5, 7, 8])
ADVANTAGES = torch.tensor([1.0, -1.0])


def logits():
    return torch.randn(5, 17, requires_grad=True)


def head():
    return torch.randn(5, 8, requires_grad=True), torch.randn(17, 8, requires_grad=True)


def heads():
    sizes = (5, 4, 8), (9, 2, 8), (9, 2, 8)
    return tuple(torch.randn(*size, requires_grad=True) for size in sizes)


def lora(trained=False):
    return tuple(torch.randn(*size, requires_grad=trained) for size in ((2, 8), (17, 2)))


def run_token_logp(x):
    return sum(v.sum() for v in r1kernels.token_logp(x, TARGETS, entropy=True, temperature=0.7))


def run_linear_logp(hidden, weight):
    out = r1kernels.linear_logp(hidden, weight, TARGETS, entropy=True, softcap=5.0)
    return out.logp.sum() + out.entropy.sum() + out.lse.sum()


def run_kept_logp(hidden, weight):
    out = r1kernels.linear_logp(hidden, weight, TARGETS, entropy=True, softcap=5.0, kept=KEPT)
    return out.logp.sum() + out.entropy.sum() + out.lse.sum()


def run_frozen(hidden, weight):
    return (
        r1kernels.linear_logp(hidden, weight.detach(), TARGETS, entropy=True).logp.sum()
        + 0 * weight.sum()
    )


def run_linear_policy_loss(hidden, weight):
    out = r1kernels.linear_policy_loss(
        hidden, weight, TARGETS, ADVANTAGES, OBJECTIVE, cu_seqlens=LENGTHS, **STREAMS
    )
    return out.loss + 0 * out.metrics["kl"]


def run_policy_loss(logp):
    return r1kernels.policy_loss(
        logp[:, 0], ADVANTAGES, OBJECTIVE, cu_seqlens=LENGTHS, **STREAMS
    ).loss


def run_group_advantages(rewards):
    return (
        r1kernels.group_advantages(rewards[:, 0].detach(), torch.tensor([0, 0, 1, 1, 1]))
        * rewards[:, 0]
    ).sum()


def run_lora(hidden, weight, down, up):
    more = {"lora": (down, up, 2.0), "workspace_mb": 1}
    loss = r1kernels.linear_policy_loss(
        hidden, weight, TARGETS, ADVANTAGES, OBJECTIVE, cu_seqlens=LENGTHS, **STREAMS, **more
    ).loss
    return loss + r1kernels.linear_logp(hidden, weight, TARGETS, **more).lse.sum()


def run_weight_grad(hidden, weight):
    """The buffer is read after the backward, which the caller runs: `backward` does."""
    return r1kernels.linear_logp(hidden, weight, TARGETS, weight_grad=BUFFER).logp.sum()


def run_varlen_attention(query, key, value):
    more = {"cu_seqlens_key": torch.tensor([0, 3, 9]), "window": 4, "return_lse": True}
    out, lse = r1kernels.varlen_attention(query, key, value, LENGTHS, **more)
    return out.sum() + lse.square().sum()


LAYOUT = r1kernels.SharedPrefixes([(2, [1, 2])])


def run_prefix_attention(query, key, value):
    out = r1kernels.prefix_attention(query, key, value, LAYOUT)
    return LAYOUT.head_rows(out.flatten(1)).square().sum()


def run_tiled_mlp(x, gate, up, down, bias, *lora):
    more = {"up_lora": (*lora, 2.0), "down_bias": bias, "tile_rows": 2}
    return r1kernels.tiled_mlp(x, gate, up, down, **more).square().sum()


def mlp():
    sizes = ((5, 8), (12, 8), (12, 8), (8, 12), (8,), (2, 8), (12, 2))
    return tuple(torch.randn(*size, requires_grad=True) for size in sizes)


BUFFER = torch.zeros(17, 8)
CALLS = {
    "token_logp": (run_token_logp, lambda: (logits(),)),
    "linear_logp": (run_linear_logp, head),
    "linear_logp frozen": (run_frozen, head),
    "kept_logp": (run_kept_logp, head),
    "linear_policy_loss": (run_linear_policy_loss, head),
    "low-rank term": (run_lora, lambda: (*head(), *lora(True))),
    "policy_loss": (run_policy_loss, lambda: (logits(),)),
    "group_advantages": (run_group_advantages, lambda: (logits(),)),
    "varlen_attention": (run_varlen_attention, heads),
    "prefix_attention": (run_prefix_attention, lambda: tuple(x[:5] for x in heads())),
    "tiled_mlp": (run_tiled_mlp, mlp),
}


@pytest.mark.parametrize("name", CALLS)
def test_fullgraph(name):
    fn, inputs = CALLS[name]
    given = inputs()
    expected = fn(*given)
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")(*given)
    assert torch.equal(compiled, expected)
    for a, b in zip(
        torch.autograd.grad(compiled, given), torch.autograd.grad(expected, given), strict=True
    ):
        assert torch.equal(a, b)


def test_weight_gradient_of_a_compiled_call_goes_into_the_buffer():
    hidden, weight = head()
    found = []
    for fn in (
        run_weight_grad,
        torch.compile(run_weight_grad, fullgraph=True, backend="aot_eager"),
    ):
        BUFFER.zero_()
        fn(hidden, weight).backward()
        found.append(BUFFER.clone())
    assert weight.grad is None and found[0].any() and torch.equal(*found)


def op_arguments():
    hidden, weight = head()
    x, gate, up, down, bias, *low = mlp()
    temperature = torch.rand(5) + 0.5
    return {
        "token_logp": (token_logp_fwd, (logits(), TARGETS, temperature, 5.0, 1.0, True, False)),
        "linear_logp": (
            linear_logp_fwd,
            (
                hidden, weight, TARGETS, torch.randn(17, requires_grad=True), None, None,
                temperature, None, None, 0.0, 1.0, 1.0, "", True, False, None,
            ),
        ),
        "linear_logp frozen": (
            linear_logp_fwd,
            (
                hidden, weight.detach(), TARGETS, None, *lora(), None, -torch.rand(5), None, 5.0,
                1.0, 2.0, "", True, True, None,
            ),
        ),
        "kept_logp": (
            kept_logp_fwd,
            (
                hidden, weight, TARGETS, torch.randn(17, requires_grad=True), None, None,
                temperature, None, None, 5.0, 1.0, 1.0, "", *KEPT, True,
            ),
        ),
        "varlen_attention": (
            varlen_attention_fwd,
            (*heads(), LENGTHS, torch.tensor([0, 3, 9]), None, None, True, 0.3, None, None, 2),
        ),
        "prefix_attention": (
            prefix_attention_fwd,
            (*(x.detach()[:5].requires_grad_() for x in heads()), *LAYOUT.offsets, 0.3),
        ),
        "linear_policy_loss": (
            linear_policy_loss_fwd,
            (
                hidden, weight, TARGETS, None, *lora(True), None, None, None, 0.0, 1.0, 0.5, "",
                None, torch.randn(5), -torch.rand(5), None, None, torch.rand(5), None, 1,
                PolicyObjective.dapo().spec, False, 0.0, [True, True, False, True, True], None,
            ),
        ),
        "tiled_mlp": (
            tiled_mlp_fwd,
            (
                x, gate, None, None, None, up.detach(), None, *low, down, bias, None, None,
                1.0, 2.0, 1.0, "gelu", 2,
            ),
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(op_arguments()))
def test_opcheck(name):
    op, args = op_arguments()[name]
    torch.library.opcheck(op, args)
