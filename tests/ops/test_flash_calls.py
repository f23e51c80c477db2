"""How the flash kernels are called: stand-ins that compute by the definition, on the CPU."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from ops.attention_cases import CASES, by_autograd, draw
from ops.test_attention_parts import run

from r1kernels import SharedPrefixes, attention_kernels
from r1kernels.attention_parts import Bounds
from r1kernels.prefix_attention import prefix_attention_bwd, prefix_attention_fwd
from r1kernels.reference.attention import attention
from r1kernels.varlen_attention import varlen_attention_bwd, varlen_attention_fwd

INF = float("inf")
# more keys than queries under a window, and a softcap, go elsewhere
NAMES = [name for name in CASES if "window," not in name and "cap" not in name]


def check_rows(query, key, value, cu_q, cu_k, max_q, max_k):
    """What the kernels ask of their inputs, and what they do not check."""
    for x in (query, key, value):
        assert x.stride(-1) == 1
    for cu, x, longest in ((cu_q, query, max_q), (cu_k, key, max_k)):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and cu[-1] == len(x)
        assert longest >= cu.diff().max()
    # they would take the queries for one of each sequence
    assert max_q > 1


def forward(query, key, value, cu_q, cu_k, max_q, max_k, scale, causal, left, right):
    """(out, lse [H, T]), +inf where a query sees no key, as the kernels write it."""
    check_rows(query, key, value, cu_q, cu_k, max_q, max_k)
    assert (right == 0) == causal and (left == -1 or causal)
    window = None if left < 0 else left + 1
    out, lse = attention(
        query, key, value, cu_q.tolist(), cu_k.tolist(), causal=causal, scale=scale, window=window
    )
    return out, lse.masked_fill(lse == -INF, INF).T.contiguous()


def backward(dout, query, key, value, out, lse, cu_q, cu_k, *args):
    """(dquery, dkey, dvalue) from the given out and lse [H, T]."""
    check_rows(query, key, value, cu_q, cu_k, *args[:2])
    scale, causal, left, _ = args[2:]
    assert lse.shape == query.shape[1::-1] and lse.is_contiguous() and not lse.isneginf().any()
    bounds = Bounds(cu_q.tolist(), cu_k.tolist())
    rule = attention_kernels.Rule(scale, None if left < 0 else left + 1, None)
    dkey, dvalue = torch.zeros_like(key), torch.zeros_like(value)
    dquery = attention_kernels.TILED.backward(
        dout, query, key, value, out, lse.T, bounds, causal, rule, dkey, dvalue
    )
    return dquery, dkey, dvalue


# parameters as in flash_attn 2.7 and 2.8
def _flash_attn_varlen_forward(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
    causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
    return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None,
):  # fmt: skip
    assert dropout_p == 0 and softcap == 0
    out, lse = forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
        window_size_left, window_size_right,
    )  # fmt: skip
    return out, lse, torch.empty(0), torch.empty(2)


def _flash_attn_varlen_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
    alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    assert dropout_p == 0 and softcap == 0 and alibi_slopes is None and deterministic is False
    made = backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale, causal, window_size_left, window_size_right,
    )  # fmt: skip
    for buffer, x in zip((dq, dk, dv), made, strict=True):
        buffer.copy_(x)


def aten_forward(*args, **options):
    bound = bind("_flash_attention_forward", args, options)
    assert bound["dropout_p"] == 0 and not bound["return_debug_mask"]
    names = "query key value cum_seq_q cum_seq_k max_q max_k scale is_causal window_size_left"
    out, lse = forward(*(bound[x] for x in names.split()), bound["window_size_right"])
    return out, lse, torch.empty(2), torch.empty(0), torch.empty(0)


def aten_backward(*args, **options):
    bound = bind("_flash_attention_backward", args, options)
    assert bound["dropout_p"] == 0
    names = "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k scale is_causal"
    return backward(
        *(bound[x] for x in names.split()), bound["window_size_left"], bound["window_size_right"]
    )


SCHEMAS = {
    name: getattr(torch.ops.aten, name).default._schema
    for name in ("_flash_attention_forward", "_flash_attention_backward")
}


def bind(name, args, options):
    """The arguments by name, as torch's own schema has them."""
    schema = inspect.Signature(
        [
            inspect.Parameter(
                x.name,
                inspect.Parameter.KEYWORD_ONLY
                if x.kwarg_only
                else inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=x.default_value if x.has_default_value() else inspect.Parameter.empty,
            )
            for x in SCHEMAS[name].arguments
        ]
    )
    return schema.bind(*args, **options).arguments


@pytest.fixture(params=["package", "torch"])
def flash(request, monkeypatch):
    package = SimpleNamespace(
        _flash_attn_varlen_forward=_flash_attn_varlen_forward,
        _flash_attn_varlen_backward=_flash_attn_varlen_backward,
    )
    found = package if request.param == "package" else None
    monkeypatch.setattr(attention_kernels, "_flash_attn", lambda: found)
    monkeypatch.setattr(attention_kernels, "choose", lambda *_: attention_kernels.FLASH)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", aten_forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", aten_backward)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_flash_kernels_get_what_they_expect(name, groups, flash):
    case = CASES[name]
    problem = draw(case)
    found = run(case, problem, head_groups=groups)
    for x, exact in zip(found, by_autograd(case, problem), strict=True):
        torch.testing.assert_close(x, exact, rtol=1e-11, atol=1e-12)


def test_gradients_are_laid_out_as_compiled_code_is_told(flash):
    """Queries that are heads first in memory: the kernels give their gradients the same layout."""
    layout = SharedPrefixes([(3, [2, 4]), (5, [1])])
    rows = [torch.randn(2, layout.num_tokens, 8).transpose(0, 1) for _ in range(4)]
    packed = (torch.tensor([0, 9, 15]), None, None, None, True, 0.3, None, None, None)
    assert not rows[0].is_contiguous() and layout.num_tokens == 15
    qkv, shared = rows[:3], (*layout.offsets, 0.3)
    found = varlen_attention_bwd(rows[3], None, *varlen_attention_fwd(*qkv, *packed), *qkv, *packed)
    assert all(x.is_contiguous() for x in found)
    found = prefix_attention_bwd(rows[3], *prefix_attention_fwd(*qkv, *shared), *qkv, *shared)
    assert all(x.is_contiguous() for x in found)
