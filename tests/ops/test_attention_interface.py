"""Transformers' models on packed rows against their own attention, one sequence at a time."""

from itertools import accumulate, pairwise

import pytest
import torch
from numerics import assert_no_worse
from torch.utils._python_dispatch import TorchDispatchMode

from r1kernels import register_attention

LENGTHS = (5, 1, 9, 3)
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
    "initializer_range": 0.3, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
MORE = {
    "Qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "Qwen3": {"head_dim": 16},
    "Llama": {},
    "Mistral": {"sliding_window": 4},
}
ACCEPTED = {"attn_implementation": register_attention()}


def build(family, implementation, dtype=torch.float64, **more):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | MORE[family] | more)
    config._attn_implementation = implementation
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, module in list(model.named_modules()):
        # theirs round to float32, whatever they are given
        if type(module).__name__.endswith("RMSNorm"):
            norm = torch.nn.RMSNorm(module.weight.shape, module.variance_epsilon)
            model.set_submodule(name, norm)
    return model.to(dtype)


def tokens(*shape):
    return torch.randint(2, 64, shape, generator=torch.Generator().manual_seed(1))


def restarting(lengths=LENGTHS):
    return torch.cat([torch.arange(n) for n in lengths])[None]


def offsets(lengths=LENGTHS):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def outcome(model, calls):
    """Hidden states of all calls end to end, and the gradient of a function of them."""
    hidden = torch.cat([model.model(**call).last_hidden_state.flatten(0, 1) for call in calls])
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    found = torch.autograd.grad((hidden * weights).sum(), list(model.model.parameters()))
    return hidden.detach(), torch.cat([x.flatten() for x in found])


def one_by_one(ids, lengths=LENGTHS):
    return [{"input_ids": ids[:, a:b]} for a, b in pairwise([0, *accumulate(lengths)])]


@pytest.fixture(scope="module", params=MORE)
def family(request):
    """(name, its truth: every sequence alone under its own attention in float64)."""
    ids = tokens(1, sum(LENGTHS))
    return request.param, ids, outcome(build(request.param, "sdpa"), one_by_one(ids))


@pytest.mark.parametrize("said", ["positions", "offsets"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_packed_sequences_are_those_alone(family, dtype, said):
    name, ids, truth = family
    call = {"input_ids": ids, "position_ids": restarting()}
    if said == "offsets":
        call |= {"cu_seq_lens_q": offsets(), "cu_seq_lens_k": offsets()}
        call |= {"max_length_q": max(LENGTHS), "max_length_k": max(LENGTHS)}
    found = outcome(build(name, "r1kernels", dtype), [call])
    if dtype == torch.float64:
        for x, exact in zip(found, truth, strict=True):
            torch.testing.assert_close(x, exact, rtol=1e-9, atol=1e-9 * float(exact.abs().max()))
        return
    packed = {"input_ids": ids, "position_ids": restarting(), "use_cache": False}
    eager = outcome(build(name, "sdpa", dtype), [packed])
    for what, x, theirs, exact in zip(("hidden", "gradient"), found, eager, truth, strict=True):
        assert_no_worse(x, theirs, exact, name=what)


def test_rows_of_a_batch_and_sequences_within_them(family):
    name, ids, truth = family
    both = ids.repeat(2, 1)
    found = outcome(
        build(name, "r1kernels"), [{"input_ids": both, "position_ids": restarting().repeat(2, 1)}]
    )
    hidden = found[0].chunk(2)
    torch.testing.assert_close(hidden[0], truth[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(hidden[1], truth[0], rtol=1e-9, atol=1e-9)


def test_keys_from_a_cache_stand_before_the_queries(family):
    name, *_ = family
    model, ids = build(name, "r1kernels"), tokens(2, 9)
    with torch.no_grad():
        whole = build(name, "sdpa")(ids, attention_mask=torch.ones_like(ids)).logits
        first = model(ids[:, :5], use_cache=True)
        middle = model(ids[:, 5:8], past_key_values=first.past_key_values)
        last = model(ids[:, 8:], past_key_values=middle.past_key_values)
    found = torch.cat([first.logits, middle.logits, last.logits], 1)
    torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-9)


def test_checkpointed_layers_give_the_same(family):
    name, ids, truth = family
    model = build(name, "r1kernels").train()
    model.gradient_checkpointing_enable()
    found = outcome(model, [{"input_ids": ids, "position_ids": restarting(), "use_cache": False}])
    for x, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(x, exact, rtol=1e-9, atol=1e-9 * float(exact.abs().max()))


def test_no_mask_is_made():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            for x in out if isinstance(out, (tuple, list)) else (out,):
                self.size = max(self.size, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    lengths = (400, 600)
    with Largest() as largest:
        outcome(
            build("Llama", "r1kernels", torch.float32),
            [{"input_ids": tokens(1, 1000), "position_ids": restarting(lengths)}],
        )
    assert 1000 * 48 <= largest.size < 1000 * 1000 / 4


def test_changed_positions_are_read_again():
    model, ids = build("Llama", "r1kernels"), tokens(1, 6)
    positions = torch.arange(6)[None]
    with torch.no_grad():
        before = model(ids, position_ids=positions).logits
        positions[0, 3:] -= 3
        after = model(ids, position_ids=positions).logits
        alone = model(ids[:, 3:]).logits
    assert not torch.equal(before, after)
    torch.testing.assert_close(after[:, 3:], alone)


def test_positions_without_a_version_are_read_as_well():
    model, ids = build("Llama", "r1kernels"), tokens(1, sum(LENGTHS))
    with torch.no_grad():
        expected = model(ids, position_ids=restarting()).logits
    with torch.inference_mode():
        positions = restarting()
        assert positions.is_inference()
        assert torch.equal(model(ids, position_ids=positions).logits, expected)
        positions.copy_(torch.arange(ids.numel()))
        assert not torch.equal(model(ids, position_ids=positions).logits, expected)


def test_autocast_leaves_float64_and_devices_without_it_alone():
    model, ids = build("Llama", "r1kernels"), tokens(1, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(ids).logits.dtype == torch.float64
        assert model.float()(ids).logits.dtype == torch.bfloat16
    call = {"cu_seq_lens_q": torch.tensor([0, 6]), "position_ids": torch.arange(6)[None]}
    call = {name: x.to("meta") for name, x in call.items()}
    assert model.to("meta")(ids.to("meta"), **call).logits.shape == (1, 6, 64)


def test_compiled_with_offsets():
    model = build("Llama", "r1kernels", num_hidden_layers=1)
    ids = tokens(1, sum(LENGTHS))
    call = {"position_ids": restarting(), "cu_seq_lens_q": offsets(), "use_cache": False}
    with torch.no_grad():
        expected = model.model(ids, **call).last_hidden_state
        compiled = torch.compile(model.model, backend="aot_eager")(ids, **call).last_hidden_state
    torch.testing.assert_close(compiled, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"attention_mask": torch.tensor([[0, 1, 1, 1]])}, "attention_mask .* has padding"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, r"LlamaAttention \(layer 0\): attention_mask"),
        ({"output_attentions": True}, "output_attentions is not supported"),
        ({"s_aux": torch.zeros(4)}, r"LlamaAttention \(layer 0\): attention sinks"),
        ({"position_bias": torch.zeros(4)}, "position_bias is not supported"),
        ({"is_causal": False}, "masks by bidirectional_mask_function are not supported"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 2, 4])}, "cu_seqlens must not decrease"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 4]), "cu_seq_lens_k": torch.tensor([0, 1, 4])},
            "cu_seq_lens_k differs from cu_seq_lens_q",
        ),
        ({"position_ids": torch.zeros(1, 1).long()}, r"position_ids must have shape \[1, 4\]"),
    ],
)
def test_what_is_refused(changed, said):
    model = build("Llama", "r1kernels")
    with pytest.raises(ValueError, match=said):
        model(tokens(1, 4), **changed)


def test_dropout_static_caches_and_unknown_masks_are_refused():
    from transformers import StaticCache
    from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask

    model = build("Llama", "r1kernels", attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"LlamaAttention \(layer 0\): dropout .* got 0.1"):
        model.train()(tokens(1, 4))
    model.eval()(tokens(1, 4))
    model = build("Llama", "r1kernels")
    with pytest.raises(ValueError, match="StaticCache"):
        model(tokens(1, 4), past_key_values=StaticCache(model.config, max_cache_len=16))
    given = {"config": model.config, "inputs_embeds": torch.zeros(1, 4, 32)}
    given |= {"attention_mask": None, "past_key_values": None}
    with pytest.raises(ValueError, match="masks by or_masks are not supported"):
        create_causal_mask(**given, or_mask_function=lambda b, h, q, k: q == k)
    model.config.attention_chunk_size = 2
    with pytest.raises(ValueError, match="masks by chunked_overlay are not supported"):
        create_chunked_causal_mask(**given)
