import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r1kernels import HostStore, PolicyObjective, host_store, linear_policy_loss
from r1kernels.check import IGNORE
from r1kernels.layer_chunks import cut
from r1kernels.packing import shift_targets
from r1kernels.pinned_pool import BLOCK
from r1kernels.reference.policy_loss import policy_loss as policy_loss_ref
from r1kernels.stream_layer import stream_layer, verify_layer
from r1kernels.stream_model import default_chunk_size, stream_model
from tests.numerics import assert_no_worse, relative_l2
from tests.ops import stream_ranks
from tests.ops.fake_streams import EagerStreams
from tests.ops.rank_program import run_ranks
from tests.ops.stream_cases import (
    OFFSETS,
    PROMPTS,
    TOKENS,
    VOCABULARY,
    assert_gradients_no_worse,
    build,
    exact,
    gradient_error,
    gradients,
    plain,
)

KINDS = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 16},
    "Mistral": {"sliding_window": 5},
}
DRAWS = 4


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return build(request.param, **KINDS[request.param])


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of calls on a few rows: two threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tokens():
    return torch.randint(VOCABULARY, (TOKENS,))


def upstream(width: int = 32) -> torch.Tensor:
    """A gradient of hidden states that prompts have no part in."""
    return torch.randn(TOKENS, width, dtype=torch.float64).masked_fill(PROMPTS[:, None], 0)


def test_exact_in_float64(model, tokens):
    model, dhidden = exact(model), upstream()
    truth = plain(model, tokens, OFFSETS)
    dtruth = gradients(model.base_model, (truth * dhidden).sum())
    for chunk_size, save_attention in ((1, False), (7, True), (16, False), (99, True)):
        stream = stream_model(model, chunk_size=chunk_size, save_attention=save_attention)
        hidden = stream(tokens, cu_seqlens=OFFSETS)
        found = gradients(model.base_model, (hidden * dhidden).sum())
        assert relative_l2(hidden, truth) < 1e-10
        errors = {name: relative_l2(found[name], x) for name, x in dtruth.items()}
        assert max(errors.values()) < 1e-10, (chunk_size, errors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_worse_than_eager(model, dtype):
    narrow = copy.deepcopy(model).to(dtype)
    truth_of, stream = exact(narrow), stream_model(narrow, chunk_size=7)
    dtruth, deager, found = {}, {}, {}
    for draw in range(DRAWS):
        tokens, dhidden = torch.randint(VOCABULARY, (TOKENS,)), upstream()

        def through(grads, module, hidden, dhidden=dhidden, draw=draw):
            parts = gradients(module.base_model, (hidden * dhidden).sum())
            grads |= {(draw, name): x for name, x in parts.items()}
            return hidden

        truth = through(dtruth, truth_of, plain(truth_of, tokens, OFFSETS))
        eager = through(deager, narrow, plain(narrow, tokens, OFFSETS))
        ours = through(found, narrow, stream(tokens, cu_seqlens=OFFSETS))
        assert_no_worse(ours, eager, truth, name="hidden")
    assert_gradients_no_worse(found, deager, dtruth)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_with_the_policy_loss(tied):
    """Hidden states, the head's loss over them, and the gradient of a head that is the embedding's
    too; prompts are masked."""
    model = build("Qwen2", tie_word_embeddings=tied).float()
    objective, truth_of, stream = (
        PolicyObjective.grpo(),
        exact(model),
        stream_model(model, chunk_size=16),
    )
    dtruth, deager, found = {}, {}, {}
    for draw in range(DRAWS):
        tokens = torch.randint(VOCABULARY, (TOKENS,))
        targets = shift_targets(tokens, OFFSETS, mask=~PROMPTS)
        advantages, logp_old = torch.randn(len(OFFSETS) - 1), -6 * torch.rand(TOKENS)

        def by_hand(module, tokens=tokens, targets=targets, given=(advantages, logp_old)):
            hidden = plain(module, tokens, OFFSETS)
            logp = (hidden @ module.lm_head.weight.T).log_softmax(-1)
            logp = logp.gather(-1, targets.clamp_min(0)[:, None])[:, 0]
            advantages, logp_old = (x.to(logp) for x in given)
            return policy_loss_ref(
                logp, advantages, objective, cu_seqlens=OFFSETS, logp_old=logp_old,
                mask=targets != IGNORE,
            ).loss  # fmt: skip

        hidden = stream(tokens, cu_seqlens=OFFSETS)
        loss = linear_policy_loss(
            hidden, model.lm_head.weight, targets, advantages, objective, logp_old=logp_old,
            cu_seqlens=OFFSETS,
        ).loss  # fmt: skip
        truth, eager = by_hand(truth_of), by_hand(model)
        assert_no_worse(loss, eager, truth, name="loss")
        for grads, module, x in (
            (dtruth, truth_of, truth), (deager, model, eager), (found, model, loss),
        ):  # fmt: skip
            grads |= {(draw, name): grad for name, grad in gradients(module, x).items()}
    assert ((0, "lm_head.weight") in found) != tied
    assert_gradients_no_worse(found, deager, dtruth)


def test_512_chunks_are_no_less_exact_than_one():
    """In bfloat16, of a gradient that all chunks agree on: the kind that a 16-bit sum loses."""
    model, T = build("Qwen3", layers=1, max_position_embeddings=512).bfloat16(), 512
    tokens, offsets = torch.randint(VOCABULARY, (T,)), torch.tensor([0, T])
    dhidden = torch.randn(T, 32, dtype=torch.float64) + torch.randn(32, dtype=torch.float64)
    truth_of = exact(model)
    dtruth = gradients(truth_of.base_model, (plain(truth_of, tokens, offsets) * dhidden).sum())
    errors = []
    for chunk_size in (T, 1):
        hidden = stream_model(model, chunk_size=chunk_size)(tokens)
        found = gradients(model.base_model, (hidden * dhidden).sum())
        # the embedding's is summed over tokens by torch itself
        del found["embed_tokens.weight"]
        errors.append(gradient_error(found, {name: dtruth[name] for name in found}))
    assert errors[1] <= 1.1 * errors[0], f"512 chunks: {errors[1]:.3e}, one: {errors[0]:.3e}"


def test_repeats_bitwise_and_without_gradients(model, tokens):
    narrow = copy.deepcopy(model).bfloat16()
    stream = stream_model(narrow, chunk_size=7)
    runs = []
    for _ in range(2):
        hidden = stream(tokens, cu_seqlens=OFFSETS)
        runs.append([hidden, *gradients(narrow.base_model, hidden.sum()).values()])
    with torch.no_grad():
        runs.append([stream(tokens[None], cu_seqlens=OFFSETS.int())])
    assert all(torch.equal(a, b) for a, b in zip(*runs[:2], strict=True))
    assert torch.equal(runs[0][0], runs[2][0])


def test_one_layer_alone(tokens):
    model = exact(build("Llama"))
    layer = model.model.layers[0]
    hidden = torch.randn(TOKENS, 32, dtype=torch.float64, requires_grad=True)
    angle = torch.randn(TOKENS, 4, dtype=torch.float64).repeat(1, 2)
    dy = torch.randn_like(hidden)
    rows = hidden.split(OFFSETS.diff().tolist())
    turns = angle.split(OFFSETS.diff().tolist())
    theirs = torch.cat(
        [
            layer(x[None], position_embeddings=(a.cos()[None], a.sin()[None]))[0]
            for x, a in zip(rows, turns, strict=True)
            if len(x)
        ]
    )
    ours = stream_layer(layer, hidden, (angle.cos(), angle.sin()), OFFSETS, chunk_size=6)
    inputs = [hidden, *layer.parameters()]
    kept = dy.clone()
    found = torch.autograd.grad(ours, inputs, kept)
    for x, y in zip(found, torch.autograd.grad(theirs, inputs, dy), strict=True):
        assert relative_l2(x, y) < 1e-10
    assert torch.equal(kept, dy), "the caller's gradient was overwritten"


def test_frozen_weights_get_no_gradient(tokens):
    model = exact(build("Qwen2"))
    for name, x in model.named_parameters():
        x.requires_grad_("layers.1.mlp.up" in name or "layers.1.self_attn.k" in name)
    dhidden = upstream()
    truth = gradients(model, (plain(model, tokens, OFFSETS) * dhidden).sum())
    hidden = stream_model(model, chunk_size=7)(tokens, cu_seqlens=OFFSETS)
    found = gradients(model, (hidden * dhidden).sum())
    assert len(found) == 3
    for name, x in truth.items():
        assert relative_l2(found[name], x) < 1e-10, name


class Adapted(nn.Module):
    """A linear layer as PEFT wraps it: attributes, their types, and the forward."""

    __module__ = "peft.tuners.lora.layer"

    def __init__(self, base: nn.Linear, rank: int, dropout: float = 0.0):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        like = {"bias": False, "dtype": base.weight.dtype}
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, **like)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, **like)})
        self.lora_dropout = nn.ModuleDict(
            {"default": nn.Dropout(dropout) if dropout else nn.Identity()}
        )
        self.scaling = {"default": 1.7}
        self.active_adapters = ["default"]
        self.merged = self.disable_adapters = False

    def forward(self, x):
        found = self.base_layer(x)
        for name in self.active_adapters:
            found = found + self.scaling[name] * self.lora_B[name](self.lora_A[name](x))
        return found


def adapt(model: nn.Module, **options) -> nn.Module:
    for parent in list(model.model.layers.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Adapted(child, 3, **options))
    return model


def test_adapters_beside_frozen_weights(tokens):
    model, dhidden = adapt(exact(build("Llama"))), upstream()
    truth = plain(model, tokens, OFFSETS)
    dtruth = gradients(model.base_model, (truth * dhidden).sum())
    stream = stream_model(model, chunk_size=7)
    hidden = stream(tokens, cu_seqlens=OFFSETS)
    found = gradients(model.base_model, (hidden * dhidden).sum())
    assert sum("lora" in name for name in found) == 2 * 7 * 2
    assert relative_l2(hidden, truth) < 1e-10
    for name, x in dtruth.items():
        assert relative_l2(found[name], x) < 1e-10, name
    for module in model.modules():
        if isinstance(module, Adapted):
            module.active_adapters = []
    assert relative_l2(stream(tokens, cu_seqlens=OFFSETS), truth) > 1e-3


def test_data_parallel(tmp_path):
    """Every parameter's gradient arrives once, and is the mean of the ranks' own."""
    ranks = run_ranks(stream_ranks, tmp_path, stream_ranks.RANKS)
    alone = stream_ranks.model()
    losses = [
        stream_ranks.loss(alone, stream_model(alone, chunk_size=16), rank)
        for rank in range(stream_ranks.RANKS)
    ]
    expected = gradients(alone, sum(losses) / len(losses))
    for grads, fired, refused in ranks:
        assert refused.startswith("model.layers.1.mlp.up_proj.weight is a DTensor")
        assert fired == dict.fromkeys(expected, 1)
        for name, x in expected.items():
            assert relative_l2(grads[name], x) < 1e-5, name


class Live(TorchDispatchMode):
    """The most bytes of tensors made within it that were alive at one time."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        found = op(*args, **(kwargs or {}))
        self.alive = {key: x for key, x in self.alive.items() if not x[0].expired()}
        if not op.is_view:
            for x in tree_leaves(found):
                if isinstance(x, torch.Tensor):
                    storage = x.untyped_storage()
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return found


def test_memory_of_the_backward():
    """Of a token: hidden's gradient, keys and values, and theirs in float32. Nothing else grows."""
    model, peaks = build("Llama", max_position_embeddings=2048).float(), []
    for T in (1024, 2048):
        hidden = stream_model(model, chunk_size=128)(torch.randint(VOCABULARY, (T,)))
        with Live() as live:
            gradients(model.base_model, hidden.sum())
        peaks.append(live.peak)
    slope, width, kv_width = (peaks[1] - peaks[0]) / 1024, 32, 2 * 8
    assert slope == 4 * width + 2 * 4 * kv_width + 2 * 4 * kv_width


def test_saved_attention_and_the_store_hold_what_they_say(tokens):
    class Store:
        """Of a device without a host: in order, what is put, asked for ahead, and taken."""

        def __init__(self):
            self.events, self.puts = [], 0

        def put(self, tensor, *, more=False):
            self.puts += 1
            return Handle(self, self.puts, tensor.detach().clone(), more)

    class Handle:
        def __init__(self, store, number, tensor, more):
            self.store, self.number, self.tensor, self.more = store, number, tensor, more
            store.events.append(("put", number, tuple(tensor.shape), more))

        def prefetch(self):
            self.store.events.append(("prefetch", self.number))

        def take(self):
            self.store.events.append(("take", self.number))
            return self.tensor

    model, dhidden = exact(build("Llama")), upstream()
    hidden = stream_model(model, chunk_size=16)(tokens, cu_seqlens=OFFSETS)
    truth = gradients(model.base_model, (hidden * dhidden).sum())
    for save_attention in (False, True):
        store = Store()
        stream = stream_model(model, chunk_size=16, store=store, save_attention=save_attention)
        with torch.no_grad():
            stream(tokens, cu_seqlens=OFFSETS)
        assert store.events == []
        hidden = stream(tokens, cu_seqlens=OFFSETS)
        found = gradients(model.base_model, (hidden * dhidden).sum())
        for name, x in truth.items():
            assert relative_l2(found[name], x) < 1e-12, name
        saved = [(TOKENS, 32)] + [(TOKENS, 4, 8), (TOKENS, 4)] * save_attention
        each = len(saved)
        puts = [("put", i + 1, saved[i % each], i % each > 0) for i in range(2 * each)]
        assert store.events[: 2 * each] == puts
        fetched = store.events[2 * each :]
        # The first layer's are asked for as soon as the last layer's are there.
        assert fetched[0] == ("take", each + 1)
        assert {e[1] for e in fetched if e[0] == "take"} == set(range(1, 2 * each + 1))
        for i in range(1, each + 1):
            assert fetched.index(("prefetch", i)) < fetched.index(("take", i))


def test_layer_inputs_in_host_memory(tokens, monkeypatch):
    monkeypatch.setattr(host_store, "SMALL", 1)
    model, dhidden = exact(build("Qwen3")), upstream()
    grads = []
    for store in (None, HostStore(streams=EagerStreams())):
        stream = stream_model(model, chunk_size=16, store=store, save_attention=True)
        hidden = stream(tokens, cu_seqlens=OFFSETS)
        if store is not None:
            # three tensors of each layer; the last layer's are still on their way
            used = store.usage()
            assert (used.host, used.device) == (2 * 3 * BLOCK, 8 * TOKENS * (32 + 4 * 8 + 4))
        loss = (hidden * dhidden).sum()
        trained = list(model.base_model.parameters())
        for _ in range(2):
            grads.append(torch.autograd.grad(loss, trained, retain_graph=True))
        del hidden, loss
    for other in grads[1:]:
        assert all(torch.equal(x, y) for x, y in zip(grads[0], other, strict=True))
    assert store.usage().host == 0


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("Phi3", {}, r"model.layers.0 \(Phi3DecoderLayer\).*resid_attn_dropout, resid_mlp_dropout"),
        ("Gemma2", {}, r"model.embed_tokens \(Gemma2TextScaled.*is no plain embedding"),
        ("Olmo2", {}, r"model.layers.0 \(Olmo2DecoderLayer\).*has no input_layernorm"),
        ("Qwen3Moe", {}, r"model.layers.0.mlp \(Qwen3Moe\w+\).*has no"),
        ("SmolLM3", {"layers": 2, "no_rope_layers": [1, 0]}, r"layers.1 \(SmolLM3D\w+\).*differs"),
        ("Granite", {"residual_multiplier": 0.5}, r"layers.0 \(GraniteDecoderLayer\).*differs"),
        ("Granite", {"embedding_multiplier": 3.0}, r"\(GraniteModel\): its hidden states differ"),
        ("Llama", {"hidden_act": "relu"}, r"model.layers.0.mlp \(LlamaMLP\).*activation"),
        ("Llama", {"sliding_window": 4}, r"self_attn \(LlamaAttention\).*sliding window 4"),
    ],
)
def test_models_of_another_form_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        stream_model(build(kind, **({"layers": 1} | options)))


def test_layers_of_another_form_are_refused():
    with pytest.raises(ValueError, match=r"layer \(GemmaDecoderLayer\).*differs"):
        verify_layer(build("Gemma").model.layers[0])
    with pytest.raises(ValueError, match=r"exactly one decoder .*, found \[\]"):
        stream_model(nn.Linear(2, 2))

    class Quantized(nn.Linear):
        pass

    model = build("Llama", layers=2)
    projection = model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.down_proj = Quantized(56, 32, bias=False).double()
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj is a .*Quantized"):
        stream_model(model)
    model.model.layers[1].mlp.down_proj = projection
    stream_model(model)
    # What was compared before is compared again when its parts are others.
    act = model.model.layers[1].self_attn
    act.scaling *= 2
    stream_model(model)
    act.forward = lambda *args, **kwargs: (0 * kwargs["hidden_states"], None)
    with pytest.raises(ValueError, match=r"layers.1 \(LlamaDecoderLayer\).*differs"):
        stream_model(model)
    del act.forward
    hook = act.q_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj \(Linear\).*has hooks"):
        stream_model(model)
    hook.remove()
    model.model.layers[0].self_attn.q_proj.float()
    with pytest.raises(TypeError, match=r"layers.0: .*weight must be"):
        stream_model(model)


def test_what_would_be_left_out_is_refused(tokens, monkeypatch):
    model = build("Llama", layers=1)
    stream, base = stream_model(model), model.model
    for module, register, name in (
        (base, "register_forward_hook", r"model \(LlamaModel\)"),
        (base.norm, "register_forward_pre_hook", r"model.norm \(LlamaRMSNorm\)"),
        (
            base.layers[0].mlp.up_proj,
            "register_full_backward_pre_hook",
            r"layers.0.mlp.up_proj \(Linear\)",
        ),
    ):
        hook = getattr(module, register)(lambda *_: None)
        with pytest.raises(ValueError, match=f"{name}.*has hooks, which would not be called"):
            stream(tokens)
        hook.remove()
    base.norm.forward = lambda x: 0 * x
    with pytest.raises(ValueError, match=r"^model.norm: another forward than when stream_model"):
        stream(tokens)
    del base.norm.forward
    stream(tokens)

    class Packed(torch.Tensor):
        pass

    projection = base.layers[0].mlp.up_proj
    plain_weight = projection.weight
    projection.weight = nn.Parameter(plain_weight.detach().as_subclass(Packed))
    with pytest.raises(ValueError, match=r"up_proj \(Linear\).*has a weight of type Packed"):
        stream(tokens)
    projection.weight = nn.Parameter(plain_weight.detach().to("meta"))
    with pytest.raises(ValueError, match=r"up_proj \(Linear\).*its weight on no device"):
        stream(tokens)
    projection.weight = plain_weight
    model.active_peft_config = SimpleNamespace(is_prompt_learning=True)
    with pytest.raises(ValueError, match=r"model \(LlamaForCausalLM\).*learns a prompt"):
        stream_model(model)
    del model.active_peft_config
    # Its constructor wants a process group.
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "__init__", nn.Module.__init__)
    wrapped = nn.parallel.DistributedDataParallel()
    wrapped.module = model
    with pytest.raises(
        ValueError, match=r"model is a DistributedDataParallel.*average no gradients"
    ):
        stream_model(wrapped)
    angle = torch.randn(3, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="position_embeddings: sin would get no gradient"):
        stream_layer(
            base.layers[0], torch.randn(3, 32, dtype=torch.float64),
            (angle, angle.clone().requires_grad_()), chunk_size=2,
        )  # fmt: skip


def test_after_a_call_that_captured_outputs(tokens):
    """transformers leaves idle hooks in the model for good."""
    model = build("Llama", layers=1)
    model(tokens[None], output_hidden_states=True, output_attentions=True)
    assert any(module._forward_hooks for module in model.modules())
    truth = plain(model, tokens, torch.tensor([0, TOKENS]))
    assert relative_l2(stream_model(model, chunk_size=7)(tokens), truth) < 1e-6


def test_no_tokens_give_zero_gradients():
    """A rank without tokens must hand DDP every gradient, too."""
    model = build("Qwen2", layers=1)
    none = torch.zeros(0, dtype=torch.int64)
    for options in ({}, {"save_attention": True, "store": HostStore()}):
        hidden = stream_model(model, **options)(none, cu_seqlens=torch.tensor([0, 0, 0]))
        assert hidden.shape == (0, 32)
        model.zero_grad()
        hidden.sum().backward()
        assert all(torch.equal(x.grad, 0 * x) for x in model.base_model.parameters())


def test_attention_is_not_saved_without_gradients():
    model, tokens, peaks = build("Llama", layers=1).float(), torch.randint(VOCABULARY, (500,)), []
    for save_attention in (False, True):
        stream = stream_model(model, chunk_size=50, save_attention=save_attention)
        with torch.no_grad(), Live() as live:
            stream(tokens)
        peaks.append(live.peak)
    assert peaks[0] == peaks[1]


def test_calls_that_are_refused(tokens):
    model = build("Llama", layers=1, max_position_embeddings=24, attention_dropout=0.1).eval()
    stream = stream_model(model, chunk_size=8)
    stream(tokens, cu_seqlens=OFFSETS)
    with pytest.raises(ValueError, match=r"reaches 50 positions.*max_position_embeddings\) 24"):
        stream(tokens)
    with pytest.raises(ValueError, match="reaches 25 positions"):
        stream(tokens[:5], torch.arange(20, 25))
    for positions in ([0, 1, 2, 0, 1], [0, 0, 0, 0, 0], [3, 4, 7, 8, 9]):
        with pytest.raises(ValueError, match="pass the boundaries as cu_seqlens"):
            stream(tokens[:5], torch.tensor(positions))
        stream(tokens[:5], torch.tensor(positions), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="must not decrease"):
        stream(tokens, cu_seqlens=torch.tensor([0, 9, 7, TOKENS]))
    with pytest.raises(ValueError, match="packed"):
        stream(tokens.view(2, -1))
    with pytest.raises(ValueError, match="autocast"), torch.autocast("cpu"):
        stream(tokens, cu_seqlens=OFFSETS)
    with pytest.raises(ValueError, match="chunk_size must be a positive integer, got 0"):
        stream_model(model, chunk_size=0)
    with pytest.raises(TypeError, match="store must be a HostStore, got str 'cpu'"):
        stream_model(model, store="cpu")
    hidden = stream(tokens, cu_seqlens=OFFSETS)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(hidden.sum(), list(model.parameters())[:1], create_graph=True)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(model.base_model, hidden.sum())
    with pytest.raises(ValueError, match=r"layers.0.self_attn: attention_dropout must be 0"):
        stream.train()(tokens, cu_seqlens=OFFSETS)
    dropped = adapt(build("Llama", layers=1), dropout=0.1).train()
    with pytest.raises(ValueError, match=r"q_proj has an adapter 'default' with dropout 0.1"):
        stream_model(dropped)


def test_the_limit_of_a_scaled_rotary_embedding(tokens):
    scaling = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 24}
    model = build("Qwen2", max_position_embeddings=24, rope_parameters=scaling)
    hidden = stream_model(model, chunk_size=16)(tokens)
    expected = plain(model, tokens, torch.tensor([0, TOKENS]))
    assert relative_l2(hidden, expected) < 1e-5
    with pytest.raises(ValueError, match="reaches 73 positions"):
        stream_model(model)(tokens.repeat(2)[:73])


def test_default_chunk_size():
    sizes = {1536: 16384, 3584: 8192, 4096: 8192, 8192: 4096, 2**25: 256}
    assert {width: default_chunk_size(width) for width in sizes} == sizes


def test_chunks_cover_the_keys_that_their_queries_see():
    for window in (None, 3):
        for size in (1, 4, 7, 100):
            chunks = cut(OFFSETS.tolist(), size, window)
            assert [t for c in chunks for t in range(c.rows.start, c.rows.stop)] == [*range(TOKENS)]
            for chunk in chunks:
                for q, q_end, k, k_end in chunk.bounds.spans:
                    start = chunk.keys.start + k
                    sequence = int((OFFSETS[1:] <= chunk.rows.start + q).sum())
                    first = int(OFFSETS[sequence])
                    if window:
                        first = max(first, chunk.rows.start + q - window + 1)
                    assert start == first
                    assert chunk.keys.start + k_end == chunk.rows.start + q_end
