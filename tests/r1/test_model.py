"""Packed models against transformers' own attention, one sequence at a time."""

import itertools

import pytest
import torch

from r1 import checkpoint, toy
from r1.config import Model, Toy
from r1.model import CausalLM, Head, load, load_tokenizer
from r1kernels import attention_kernels, share_prefixes

LENGTHS = [5, 1, 9, 3]
TOY = Model(path="toy", dtype="float32")


def cu_seqlens(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)])


def gemma2():
    """Grouped heads, capped attention scores, a sliding window and a capped head."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=4, attn_logit_softcapping=1.0,
        final_logit_softcapping=2.0, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
        initializer_range=0.5,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


def cohere():
    from transformers import CohereConfig, CohereForCausalLM

    config = CohereConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, logit_scale=0.25,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=2, eos_token_id=1, initializer_range=0.5,
    )  # fmt: skip
    return CohereForCausalLM(config)


def qwen2_grouped():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
        eos_token_id=1, initializer_range=0.5, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


FAMILIES = {"gemma2": gemma2, "cohere": cohere, "qwen2_grouped": qwen2_grouped}


@pytest.fixture(params=FAMILIES)
def pair(request, tmp_path):
    """A random model under transformers' eager attention, and the same loaded as we load it."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    FAMILIES[request.param]().save_pretrained(tmp_path)
    toy.build_tokenizer().save_pretrained(tmp_path)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    return eager.eval(), load(Model(path=str(tmp_path), dtype="float32"))


# one padded group, several groups, and sequences longer than the sliding window
@pytest.mark.parametrize("lengths", [LENGTHS, [1, 20, 2, 9, 1]], ids=["one_group", "groups"])
def test_packed_logits_match_transformers_one_by_one(pair, lengths):
    eager, lm = pair
    tokens = torch.randint(3, 64, (sum(lengths),))
    bounds = cu_seqlens(lengths)
    with torch.no_grad():
        ours = lm.head.logits(lm.hidden(tokens, bounds))
        theirs = [
            eager(tokens[a:b][None]).logits[0] for a, b in itertools.pairwise(bounds.tolist())
        ]
    torch.testing.assert_close(ours, torch.cat(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [LENGTHS, [1, 40, 2, 9, 1]], ids=["one_group", "groups"])
def test_sequences_do_not_see_each_other(lengths):
    lm = load(TOY)
    tokens = torch.randint(3, 90, (sum(lengths),))
    bounds = cu_seqlens(lengths)
    start, stop = bounds[2], bounds[3]
    changed = tokens.clone()
    changed[start:stop] = (changed[start:stop] + 1) % 90
    with torch.no_grad():
        before, after = lm.hidden(tokens, bounds), lm.hidden(changed, bounds)
        alone = torch.cat([lm.hidden(t, cu_seqlens([len(t)])) for t in tokens.split(lengths)])
    outside = torch.ones(len(tokens), dtype=torch.bool)
    outside[start:stop] = False
    assert torch.equal(before[outside], after[outside])
    assert not torch.equal(before[~outside], after[~outside])
    assert (before - alone).abs().max() <= 1e-6 * alone.abs().max()


def test_gradients_of_packed_sequences_are_the_sum_of_theirs():
    lm = load(TOY)
    tokens = torch.randint(3, 90, (sum(LENGTHS),))

    def gradient(pieces):
        lm.module.zero_grad()
        for piece, lengths in pieces:
            lm.hidden(piece, cu_seqlens(lengths)).square().sum().backward()
        return torch.cat([p.grad.flatten() for p in lm.module.parameters() if p.grad is not None])

    packed = gradient([(tokens, LENGTHS)])
    alone = gradient([(t, [len(t)]) for t in tokens.split(LENGTHS)])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


def test_a_layer_that_does_not_see_all_of_the_past_refuses_shared_prompts(pair):
    _, lm = pair
    # gemma2 has windows and capped scores
    limited = lm.text_config.model_type == "gemma2"
    assert lm.shares_prefixes is not limited
    tokens, layout = share_prefixes([([5, 6, 7], [[8, 9], [10, 11, 12]])])
    with torch.no_grad():
        if limited:
            with pytest.raises(ValueError, match=r"scores capped at 1\.0.*rl\.share_prefix"):
                lm.shared_hidden(tokens, layout)
            return
        rows = lm.shared_hidden(tokens, layout)
        plain = lm.hidden(layout.unshared(tokens), layout.cu_seqlens)
    torch.testing.assert_close(rows, plain[[2, 3, 7, 8, 9]], rtol=1e-5, atol=1e-5)


def test_a_shared_sequence_over_the_models_length_is_named():
    tokens, layout = share_prefixes([(range(3, 90), [range(3, 90), range(3, 90), range(3, 90)])])
    lm = load(Model(path="toy", dtype="float32", toy=Toy(max_positions=100)))
    with pytest.raises(ValueError, match="1 to 100 tokens, got one of 174"):
        lm.shared_hidden(tokens, layout)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [LENGTHS, [1, 200, 7]], ids=["short", "long"])
def test_cuda_kernel_is_as_exact_as_tiles_of_scores(lengths, monkeypatch):
    half = load(Model(path="toy", dtype="bfloat16"), device="cuda")
    truth = load(TOY)
    truth.module.load_state_dict({n: t.float().cpu() for n, t in half.module.state_dict().items()})
    tokens, bounds = torch.randint(3, 90, (sum(lengths),)), cu_seqlens(lengths)

    def error():
        out = half.hidden(tokens.cuda(), bounds.cuda()).float().cpu()
        return float((out - expected).norm() / expected.norm())

    with torch.no_grad():
        expected = truth.hidden(tokens, bounds)
        kernel = error()
        monkeypatch.setattr(attention_kernels, "choose", lambda *_: attention_kernels.TILED)
        assert kernel <= 2 * error() + 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("bounds", "message"),
    [([0, 4], "0 to T"), ([1, 6], "0 to T"), ([0, 3, 3, 6], "1 to 256 tokens")],
)
def test_bad_cu_seqlens_are_named(bounds, message):
    with pytest.raises(ValueError, match=message):
        load(TOY).hidden(torch.zeros(6, dtype=torch.int64), torch.tensor(bounds))


def test_sequence_longer_than_the_model_is_named():
    with pytest.raises(ValueError, match=r"1 to 256 tokens.*300"):
        load(TOY).hidden(torch.zeros(300, dtype=torch.int64), torch.tensor([0, 300]))


def test_saved_folder_loads_as_the_same_model_and_tokenizer(tmp_path):
    lm = load(TOY, seed=3, template="Solve it.\n{question}\n")
    lm.save(tmp_path)
    again = load(Model(path=str(tmp_path), dtype="float32"))
    text = "Solve it.\n" + toy.question("3 + 4 - 5") + "\n<think>3+4=7;7-5=2</think>"
    assert again.tokenizer.encode(text) == lm.tokenizer.encode(text)
    assert again.tokenizer.decode(again.tokenizer.encode(text)) == text
    ours, theirs = lm.sync_state(), again.sync_state()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    generation = again.module.generation_config
    assert generation.eos_token_id == lm.tokenizer.eos_token_id
    assert generation.pad_token_id == lm.tokenizer.pad_token_id


def test_sync_state_names_the_tied_head():
    lm = load(TOY)
    state = lm.sync_state()
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert "lm_head.weight" not in dict(lm.module.named_parameters())


def test_toy_weights_follow_the_seed_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    first, same, other = (load(TOY, seed=s).head.weight for s in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_directory_stands_for_its_newest_checkpoint(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path / "checkpoints", step, load(TOY, seed=step).save, keep=2)
    found = load(Model(path=str(tmp_path), dtype="float32")).head.weight
    assert torch.equal(found, load(TOY, seed=2).head.weight)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(Model(path=str(tmp_path / "nowhere"), dtype="float32"))


def test_tokenizer_without_eos_is_refused(tmp_path):
    lm = load(TOY)
    lm.tokenizer.eos_token = None
    lm.save(tmp_path)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        load(Model(path=str(tmp_path), dtype="float32"))


def test_attention_dropout_is_refused(tmp_path):
    lm = load(TOY)
    lm.module.config.attention_dropout = 0.1
    lm.save(tmp_path)
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1"):
        load(Model(path=str(tmp_path), dtype="float32"))


def test_unsupported_head_is_refused(pair, tmp_path, monkeypatch):
    _, lm = pair
    lm.save(tmp_path)
    monkeypatch.setattr(
        CausalLM, "head", property(lambda self: Head(self.head_module.weight, None, None, 3.0))
    )
    with pytest.raises(ValueError, match="its head has a form that is not supported"):
        load(Model(path=str(tmp_path), dtype="float32"))


def test_layers_that_mix_packed_sequences_are_refused(tmp_path):
    """A convolution over tokens sees the end of the sequence before it."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, layer_types=["conv", "full_attention"],
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
        max_position_embeddings=64, bos_token_id=2, eos_token_id=1, initializer_range=0.5,
    )  # fmt: skip
    Lfm2ForCausalLM(config).save_pretrained(tmp_path)
    toy.build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Lfm2ForCausalLM: a packed sequence changes the next one"):
        load(Model(path=str(tmp_path), dtype="float32"))


def test_corrupt_weights_are_named(tmp_path):
    load(TOY).save(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"corrupt weights of model.path '{tmp_path}'"):
        load(Model(path=str(tmp_path), dtype="float32"))


def test_toy_tokenizer_keeps_its_class(tmp_path):
    load(TOY).save(tmp_path)
    assert "Qwen2" not in type(load_tokenizer(tmp_path)).__name__
