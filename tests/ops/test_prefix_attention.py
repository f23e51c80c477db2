"""Shared prompts against the same sequences without sharing: attention, head, whole models."""

from functools import partial

import pytest
import torch
from numerics import assert_no_worse, relative_error

from r1kernels import (
    PolicyObjective,
    SharedPrefixes,
    linear_policy_loss,
    prefix_attention,
    register_attention,
    share_prefixes,
)
from r1kernels.attention_parts import Bounds, attend, attend_backward
from r1kernels.reference.attention import attention
from r1kernels.shared_prefixes import token_ratio

# groups of many and few completions, plain sequences among them, prompts and completions of 1
LENGTHS = [(5, [3, 1, 7]), (4, [6]), (1, [2, 2]), (40, [20, 9, 1, 33]), (1, [1])]


def token_groups(lengths, vocab=50):
    def ids(count):
        return torch.randint(1, vocab, (count,)).tolist()

    return [(ids(prompt), [ids(length) for length in rest]) for prompt, rest in lengths]


def sequences(groups):
    return [[*prompt, *completion] for prompt, rest in groups for completion in rest]


def heads(layout, dtype, H=4, N=2, E=8):
    """Queries, keys and values of the packed row; the products between them matter."""
    T = layout.num_tokens
    return [(2 * torch.randn(T, n, E)).to(dtype) for n in (H, N, N)]


def dense(query, key, value, bounds):
    """Causal attention of the packed sequences by its definition, scores and all."""
    scale = query.shape[-1] ** -0.5
    return attention(query, key, value, bounds, bounds, causal=True, scale=scale)[0]


def gradients(function, inputs, dout):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    out.backward(dout.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def test_in_float64_attention_and_its_gradients_are_those_without_sharing():
    layout = SharedPrefixes(LENGTHS)
    inputs = heads(layout, torch.float64)
    # the copies of a prompt's row get gradients of their own, which are to be summed
    dout = torch.randn(layout.num_unshared, 4, 8).double()
    bounds = layout.cu_seqlens.tolist()

    def shared(*x):
        return layout.unshared(prefix_attention(*x, layout))

    def plain(*x):
        return dense(*(layout.unshared(part) for part in x), bounds)

    pairs = zip(gradients(shared, inputs, dout), gradients(plain, inputs, dout), strict=True)
    assert all(relative_error(ours, truth) < 1e-13 for ours, truth in pairs)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_errors_are_at_most_twice_those_without_sharing(dtype, device):
    """The other side: packed attention in the same dtype, a prompt's gradients summed exactly."""
    layout = SharedPrefixes([(300, [200, 130, 1]), *LENGTHS])
    *inputs, dout = (x.to(device) for x in (*heads(layout, dtype), heads(layout, dtype)[0]))
    whole, options = Bounds(layout.cu_seqlens.tolist()), {"causal": True, "scale": 8**-0.5}
    parts = [layout.unshared(x) for x in inputs]
    out, lse = attend(*parts, whole, **options)
    sums = [torch.zeros_like(x, dtype=torch.float32) for x in parts[1:]]
    rows_U = layout.unshared(torch.arange(layout.num_tokens))
    first = layout.shared(torch.arange(layout.num_unshared))
    dout_U = torch.zeros_like(out).index_copy(0, first.to(device), dout)
    dquery = attend_backward(
        dout_U, *parts, out, lse, whole, dkey=sums[0], dvalue=sums[1], **options
    )
    plain = [layout.shared(out)]
    for x in (dquery, *sums):
        wide = torch.zeros(layout.num_tokens, *x.shape[1:], dtype=torch.float64)
        plain.append(wide.index_add_(0, rows_U, x.double().cpu()).to(dtype))

    def truth(*x):
        return layout.shared(dense(*(layout.unshared(part) for part in x), whole.query))

    ours = gradients(lambda *x: prefix_attention(*x, layout), inputs, dout)
    exact = gradients(truth, [x.double().cpu() for x in inputs], dout.cpu())
    ours, plain = ([x.cpu() for x in side] for side in (ours, plain))
    for name, *three in zip(("out", "dquery", "dkey", "dvalue"), ours, plain, exact, strict=True):
        assert_no_worse(*three, name=name)


def test_a_completion_sees_its_prompt_and_itself_alone():
    # the row: prompts of 3 and 2, then completions of 2, 4, 3 and 3
    layout = SharedPrefixes([(3, [2, 4]), (2, [3, 3])])
    query, key, value = (x.requires_grad_() for x in heads(layout, torch.float64))
    out = prefix_attention(query, key, value, layout)
    for row, seen in (
        (1, [0, 1]),
        (5, [0, 1, 2, 5]),
        (8, [0, 1, 2, 7, 8]),
        (13, [3, 4, 11, 12, 13]),
    ):
        for grad in torch.autograd.grad(out[row].sum(), (key, value), retain_graph=True):
            assert grad.abs().sum((1, 2)).nonzero().flatten().tolist() == seen


def test_the_row_and_its_maps():
    groups = [([1, 2], [[3], [4, 5]]), ([6], [[7, 8]]), ([9], [[10], [11], [12]])]
    tokens, layout = share_prefixes(groups)
    assert tokens.tolist() == [1, 2, 9, 3, 4, 5, 10, 11, 12, 6, 7, 8]
    assert layout.position_ids.tolist() == [0, 1, 0, 2, 2, 3, 1, 1, 1, 0, 1, 2]
    # a prompt's last row predicts the first token of each of its completions
    assert layout.rows.tolist() == [1, 1, 4, 9, 10, 2, 2, 2]
    assert layout.row_cu_seqlens.tolist() == [0, 1, 3, 5, 6, 7, 8]
    assert layout.cu_seqlens.tolist() == [0, 3, 7, 10, 12, 14, 16]
    assert (layout.num_tokens, layout.num_unshared, layout.num_sequences) == (12, 16, 6)
    assert layout.longest == 4 and layout.token_ratio == 16 / 12 and layout.worth_sharing
    assert layout.unshared(tokens).tolist() == [t for one in sequences(groups) for t in one]
    assert layout.shared(layout.unshared(tokens)).tolist() == tokens.tolist()


def test_the_ratio_says_when_sharing_pays():
    assert token_ratio([(1024, [256] * 8)]) == pytest.approx(3.333, abs=1e-3)
    assert not SharedPrefixes([(10, [60, 60])]).worth_sharing
    assert SharedPrefixes([(30, [60, 60])]).worth_sharing


def test_sequences_that_share_nothing_are_one_plain_call():
    layout = SharedPrefixes([(3, [4]), (1, [1]), (7, [2])])
    inputs = heads(layout, torch.float32)
    assert layout.offsets[1:] == (None, None) and layout.token_ratio == 1
    expected, _ = attend(*inputs, Bounds([0, 7, 9, 18]), causal=True, scale=0.3)
    assert torch.equal(prefix_attention(*inputs, layout, scale=0.3), expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_gradients_of_a_prompts_last_row_are_summed_in_float32(device):
    layout = SharedPrefixes([(2, [3] * 200), (4, [1, 2])], device)
    hidden = torch.randn(layout.num_tokens, 16, device=device).bfloat16().requires_grad_()
    rows = layout.head_rows(hidden)
    assert torch.equal(rows, hidden.detach()[layout.rows])
    drows = (1 + 0.1 * torch.randn(rows.shape)).bfloat16()
    rows.backward(drows.to(device))
    expected = torch.zeros(hidden.shape, dtype=torch.float64)
    expected.index_add_(0, layout.rows.cpu(), drows.double())
    assert relative_error(hidden.grad.cpu(), expected) <= 2**-8


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def family(request):
    """A builder of a small model with grouped heads: (attention, dtype) -> model."""
    import transformers as hf

    sizes = dict(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=request.param == "qwen2", initializer_range=0.3,
    )  # fmt: skip
    name = {"qwen2": "Qwen2", "llama": "Llama"}[request.param]
    config = getattr(hf, f"{name}Config")(**sizes)
    torch.manual_seed(0)
    state = getattr(hf, f"{name}ForCausalLM")(config).state_dict()

    def build(attention, dtype):
        config._attn_implementation = attention
        model = getattr(hf, f"{name}ForCausalLM")(config)
        model.load_state_dict(state)
        for module in model.modules():
            if dtype == torch.float64 and type(module).__name__.endswith("RMSNorm"):
                module.forward = partial(norm, module)
        return model.to(dtype).train()

    return build


def norm(module, x):
    """transformers' own takes float64 through float32."""
    variance = x.square().mean(-1, keepdim=True)
    return module.weight * x * (variance + module.variance_epsilon).rsqrt()


def fixed_groups():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return token_groups([(9, [6, 2, 4]), (3, [5]), (14, [7, 3])])


GROUPS = fixed_groups()


def predicting(groups):
    """Rows of the batch without sharing that predict a token of a completion."""
    rows, at = [], 0
    for prompt, rest in groups:
        for completion in rest:
            rows += range(at + len(prompt) - 1, at + len(prompt) + len(completion) - 1)
            at += len(prompt) + len(completion)
    return rows


def shared_hidden(model, layout, tokens):
    batch = {"input_ids": tokens[None], "position_ids": layout.position_ids[None]}
    hidden_TD = model.model(**batch, use_cache=False, layout=layout).last_hidden_state[0]
    return layout.unshared(hidden_TD), layout.head_rows(hidden_TD)


def plain_hidden(model, layout, tokens):
    """The batch without sharing, packed, under a mask."""
    sequence = torch.cat([torch.full((len(x),), i) for i, x in enumerate(sequences(GROUPS))])
    mask = (sequence[:, None] == sequence) & torch.ones(len(sequence), len(sequence)).tril().bool()
    batch = {
        "input_ids": layout.unshared(tokens)[None],
        "position_ids": layout.unshared(layout.position_ids)[None],
        "attention_mask": mask[None, None],
    }
    hidden_UD = model.model(**batch, use_cache=False).last_hidden_state[0]
    return hidden_UD, hidden_UD[predicting(GROUPS)]


def outcome(model, hidden, weights_R):
    """Hidden states, loss, and all gradients."""
    tokens, layout = share_prefixes(GROUPS)
    hidden_UD, rows_RD = hidden(model, layout, tokens)
    targets_R = torch.tensor([t for _, rest in GROUPS for completion in rest for t in completion])
    logp_RV = (rows_RD @ model.lm_head.weight.T).log_softmax(-1)
    loss = -(logp_RV.gather(1, targets_R[:, None])[:, 0] * weights_R).sum()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return hidden_UD.detach(), loss.detach(), grads


@pytest.fixture(scope="module")
def weights_R():
    return torch.randn(len(predicting(GROUPS)), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def truth(family, weights_R):
    return outcome(family("sdpa", torch.float64), plain_hidden, weights_R)


def joined(grads, truth):
    """All gradients in one vector, each in units of its truth's largest entry."""
    return torch.cat([(grads[name].double() / truth[name].abs().max()).flatten() for name in truth])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_model_gives_the_same_hidden_states_loss_and_gradients(family, truth, weights_R, dtype):
    ours = outcome(family(register_attention(), dtype), shared_hidden, weights_R)
    pairs = [(*x[:2], joined(x[2], truth[2])) for x in (ours, truth)]
    if dtype == torch.float64:
        for one, exact in zip(*pairs, strict=True):
            assert relative_error(one, exact) < 1e-12
        return
    plain = outcome(family("sdpa", dtype), plain_hidden, weights_R)
    # not the loss: one number, whose error may be 0 by luck
    assert_no_worse(ours[0], plain[0], truth[0], name="hidden")
    assert_no_worse(pairs[0][2], joined(plain[2], truth[2]), pairs[1][2], name="gradients")


def test_recomputed_layers_give_the_same_gradients(family, weights_R):
    found = []
    for recompute in (False, True):
        model = family(register_attention(), torch.float32)
        if recompute:
            model.gradient_checkpointing_enable()
        found.append(outcome(model, shared_hidden, weights_R)[2])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_fused_head_takes_the_rows(family):
    """linear_policy_loss on the rows against the same on the batch with its prompts masked."""
    torch.manual_seed(3)
    _, layout = share_prefixes(GROUPS)
    hidden_TD = torch.randn(layout.num_tokens, 32, requires_grad=True)
    weight_VD = torch.randn(50, 32, requires_grad=True)
    rows = torch.tensor(predicting(GROUPS))
    objective = PolicyObjective.gspo()
    targets_R = torch.tensor([t for _, rest in GROUPS for completion in rest for t in completion])
    old_R, advantages_R = -5 * torch.rand(len(rows)), torch.randn(len(rows))
    shared = linear_policy_loss(
        layout.head_rows(hidden_TD), weight_VD, targets_R, advantages_R, objective,
        logp_old=old_R, cu_seqlens=layout.row_cu_seqlens,
    )  # fmt: skip
    ours = torch.autograd.grad(shared.loss, (hidden_TD, weight_VD))

    def spread(x_R, fill=0):
        return torch.full((layout.num_unshared,), fill, dtype=x_R.dtype).index_copy(0, rows, x_R)

    plain = linear_policy_loss(
        layout.unshared(hidden_TD), weight_VD, spread(targets_R, -100), spread(advantages_R),
        objective, logp_old=spread(old_R), cu_seqlens=layout.cu_seqlens,
    )  # fmt: skip
    theirs = torch.autograd.grad(plain.loss, (hidden_TD, weight_VD))
    assert relative_error(shared.loss, plain.loss) < 1e-6
    assert relative_error(shared.logp, plain.logp[rows]) < 1e-6
    assert all(relative_error(a, b) < 2e-6 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SharedPrefixes([]), "groups: expected at least one"),
        (lambda: SharedPrefixes([(2, [1]), (0, [3, 4])]), r"groups\[1\]: its prompt has 0 tokens"),
        (lambda: SharedPrefixes([(2, [1, 0])]), r"groups\[0\].*got lengths \[1, 0\]"),
        (lambda: SharedPrefixes([(2, [])]), r"groups\[0\].*got lengths \[\]"),
    ],
)
def test_groups_that_cannot_be_laid_out_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_does_not_fit_the_layout_is_named(family):
    tokens, layout = share_prefixes([([1, 2], [[3], [4]])])
    query, key, value = heads(layout, torch.float32)
    with pytest.raises(ValueError, match=r"query must have the layout's 4 tokens.*another batch"):
        prefix_attention(query[:3], key[:3], value[:3], layout)
    with pytest.raises(ValueError, match="hidden must have the layout's 4 tokens"):
        layout.head_rows(torch.randn(5, 8))
    with pytest.raises(ValueError, match=r"hidden is on meta and the layout on cpu.*layout\.to"):
        layout.head_rows(torch.empty(4, 8, device="meta"))
    with pytest.raises(ValueError, match="the 6 rows of the batch without sharing"):
        layout.shared(torch.randn(4, 8))
    with pytest.raises(ValueError, match="key must have shape"):
        prefix_attention(query, key[:2], value, layout)
    with pytest.raises(ValueError, match="N a divisor of H"):
        prefix_attention(query[:, :3], key, value, layout)
    for nothing in (query[:, :0], key, value), (x[..., :0] for x in (query, key, value)):
        with pytest.raises(ValueError, match="none 0, got"):
            prefix_attention(*nothing, layout)
    for scale in (float("nan"), 0.0):
        with pytest.raises(ValueError, match=f"scale must be positive and finite, got {scale}"):
            prefix_attention(query, key, value, layout, scale=scale)
    with pytest.raises(TypeError, match=r"key must be torch\.float32"):
        prefix_attention(query, key.double(), value, layout)
    with pytest.raises(TypeError, match="layout must be a SharedPrefixes, got"):
        prefix_attention(query, key, value, layout.position_ids)
    model = family(register_attention(), torch.float32)
    batch = {"input_ids": tokens[None], "position_ids": layout.position_ids[None]}
    two = {name: x.expand(2, -1) for name, x in batch.items()}
    with pytest.raises(ValueError, match="shared prompts does not go with 2 rows"):
        model.model(**two, use_cache=False, layout=layout)
    wrong = [("attention_dropout", 0.1, r"dropout is not supported, got 0\.1")]
    if model.config.model_type == "qwen2":  # llama's layers know no window
        wrong.insert(0, ("sliding_window", 2, "does not go with a window of 2 tokens"))
    for name, value, said in wrong:
        for layer in model.model.layers:
            setattr(layer.self_attn, name, value)
        with pytest.raises(ValueError, match=said):
            model.model(**batch, use_cache=False, layout=layout)
