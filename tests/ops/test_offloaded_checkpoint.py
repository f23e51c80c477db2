"""offloaded_checkpoint and checkpoint_layers: the gradients of torch's own, and what is kept."""

import copy
import gc
import importlib
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from r1kernels import (
    SharedPrefixes,
    host_store,
    pinned_pool,
    prefix_attention,
    register_attention,
    varlen_attention,
)
from r1kernels.host_store import HostStore
from r1kernels.offloaded_checkpoint import checkpoint_layers, offloaded_checkpoint
from tests.ops import offload_ranks
from tests.ops.fake_streams import EagerStreams
from tests.ops.rank_program import run_ranks

T, D = 9, 8
torch_checkpoint = partial(checkpoint, use_reentrant=False)


def plain(function, *args):
    return function(*args)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Any tensor here is offloaded by a store that has streams, in more blocks than one."""
    monkeypatch.setattr(host_store, "SMALL", 1)
    monkeypatch.setattr(host_store, "BLOCK", 128)
    monkeypatch.setattr(pinned_pool, "BLOCK", 128)
    monkeypatch.setattr(pinned_pool, "SLAB", 1024)
    monkeypatch.setattr(pinned_pool, "available_host_bytes", lambda: 1 << 40)


@pytest.fixture(params=["cpu", "offloaded", "split"])
def store(request):
    return {
        "cpu": HostStore,
        "offloaded": lambda: HostStore(streams=EagerStreams()),
        "split": lambda: HostStore(2 * T * D * 8, streams=EagerStreams()),
    }[request.param]()


class _SavedByFunction(torch.autograd.Function):
    """How checkpoint saved its inputs up to torch 2.12: hooks see one tensor more."""

    @staticmethod
    def forward(*args):
        return torch.empty(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs[1:]]
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))

    @staticmethod
    def save(frame, *args):
        frame.saver = _SavedByFunction.apply(torch.empty(0, requires_grad=True), *args)

    @staticmethod
    def get(frame):
        _, *tensors = frame.saver.grad_fn.saved_tensors
        return [tensors.pop(0) if x is None else x for x in frame.saver.grad_fn.others]


@pytest.fixture(params=["this torch", "an older one"])
def any_torch(request, monkeypatch):
    frame = torch.utils.checkpoint._CheckpointFrame
    if request.param == "an older one" and hasattr(frame, "save_inputs"):
        monkeypatch.setattr(frame, "save_inputs", _SavedByFunction.save)
        monkeypatch.setattr(frame, "get_inputs", _SavedByFunction.get)


def layers(count: int = 3, dtype: torch.dtype = torch.float64, dropout: float = 0.3):
    torch.manual_seed(0)
    return nn.ModuleList(
        nn.Sequential(nn.Linear(D, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, D))
        for _ in range(count)
    ).to(dtype)


def gradients(model: nn.ModuleList, how, x: Tensor | None = None, **options) -> list[Tensor]:
    """Loss, input gradient if there is one, and parameter gradients of layers run by `how`."""
    torch.manual_seed(1)
    if x is None:
        x = torch.randn(T, D, dtype=next(model.parameters()).dtype, requires_grad=True)
    # Not a leaf, which would stay where it is.
    hidden = x.clone()
    for layer in model:
        hidden = how(layer, hidden)
    loss = hidden.square().sum()
    wanted = [p for p in (x, *model.parameters()) if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted, **options)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_are_those_of_torchs_checkpoint_and_of_none(store, dtype):
    model, how = layers(dtype=dtype), partial(offloaded_checkpoint, store=store)
    found = gradients(model, how)
    assert equal(found, gradients(model, torch_checkpoint))
    assert equal(found, gradients(model, plain))
    assert equal(found, gradients(model, how))
    assert store.usage()[:2] == (0, 0)


def test_only_the_inputs_are_kept(monkeypatch, any_torch):
    store, seen, put = HostStore(streams=EagerStreams()), [], []
    monkeypatch.setattr(store, "put", lambda x, **more: put.append(x.shape) or original(x, **more))
    original = HostStore.put.__get__(store)

    def see(x):
        seen.append(x.shape)
        return x

    model = layers()
    with saved_tensors_hooks(see, lambda x: x):
        gradients(model, plain)
        without = len(seen)
        seen.clear()
        gradients(model, partial(offloaded_checkpoint, store=store))
    # square() saves its input, outside of the layers.
    assert put == [(T, D)] * 3 and seen == [(T, D)] and without > 4 * 3


def test_the_input_before_comes_back_while_a_layer_runs_its_backward(any_torch):
    streams = EagerStreams()
    store = HostStore(streams=streams)

    def layer(name, x):
        streams.log.append(name)
        return x.sin()

    x = torch.randn(T, D, requires_grad=True).clone()
    for name in "012":
        x = offloaded_checkpoint(partial(layer, name), x, store=store)
    streams.log.append("backward")
    x.sum().backward()
    forward = ["out", "0", "out", "1", "out", "2", "backward"]
    # The last input is on the device still.
    assert streams.log == [*forward, "back", "2", "back", "1", "0"]


def test_blocks_are_free_after_the_backward_without_the_collector(store, any_torch):
    gc.disable()
    try:
        gradients(layers(), partial(offloaded_checkpoint, store=store))
        assert store.usage()[:2] == (0, 0)
        store.release()
    finally:
        gc.enable()


def test_a_graph_that_is_kept_can_be_used_again(store, any_torch):
    model = layers()
    torch.manual_seed(1)
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    hidden = x
    for layer in model:
        hidden = offloaded_checkpoint(layer, hidden, store=store)
    wanted = [x, *model.parameters()]
    found = [torch.autograd.grad(hidden.sum(), wanted, retain_graph=True) for _ in range(3)]
    part = torch.autograd.grad(hidden.sum(), wanted[3], retain_graph=True)[0]
    assert equal(found[0], found[1]) and equal(found[0], found[2])
    assert torch.equal(part, found[0][3])
    torch.autograd.grad(hidden.sum(), wanted)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(hidden.sum(), wanted)


def test_second_derivatives(store):
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)

    def second(how):
        y = how(torch.tanh, how(torch.sin, x))
        first = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), x)[0]

    assert torch.equal(second(partial(offloaded_checkpoint, store=store)), second(plain))


def test_frozen_inputs_and_layers(store):
    """As with adapters: nothing before the second layer takes a gradient, and not all after it."""
    x = torch.randn(T, D, dtype=torch.float64)
    model = layers()
    model[0].requires_grad_(False)
    model[2][0].requires_grad_(False)
    found = gradients(model, partial(offloaded_checkpoint, store=store), x)
    assert equal(found, gradients(model, plain, x))
    assert store.usage()[:2] == (0, 0)
    model.requires_grad_(False)
    assert not offloaded_checkpoint(model[0], x, store=store).requires_grad
    with torch.no_grad():
        offloaded_checkpoint(model[0], x.clone().requires_grad_(), store=store)
    assert store.usage()[:2] == (0, 0)


def test_other_arguments_pass(monkeypatch, any_torch):
    store, put = HostStore(streams=EagerStreams()), []
    original = HostStore.put.__get__(store)
    monkeypatch.setattr(store, "put", lambda x, **more: put.append(x) or original(x, **more))
    weight = nn.Parameter(torch.randn(D, D))
    rows, scale = torch.tensor([3, 1, 1]), torch.randn(D, requires_grad=True)

    def function(x, name, weight, rows, pair, *, scale, debug=False, use_reentrant=None):
        assert (name, debug, use_reentrant) == ("name", True, "mine")
        return (x @ weight)[rows] * scale, {"sum": (x * pair[0]).sum()}, None

    def run(how):
        torch.manual_seed(0)
        x, other = (torch.randn(T, D, requires_grad=True) for _ in "ab")
        given = function, x.sin(), "name", weight, rows, [other]
        out, more, none = how(*given, scale=scale, debug=True, use_reentrant="mine")
        assert none is None
        wanted = x, other, weight, scale
        return [*torch.autograd.grad(out.square().sum() + more["sum"], wanted)]

    found = run(partial(offloaded_checkpoint, store=store))
    assert [x.shape for x in put] == [(T, D)]
    assert equal(found, run(lambda function, *args, **kwargs: function(*args, **kwargs)))


def test_nesting_and_hooks(store):
    model, ours = layers(), partial(offloaded_checkpoint, store=store)
    expected = gradients(model, plain)
    inner, calls = partial(partial, ours), []
    assert equal(gradients(model, lambda f, x: ours(inner(f), x)), expected)
    assert equal(gradients(model, lambda f, x: torch_checkpoint(inner(f), x)), expected)
    assert equal(gradients(model, lambda f, x: ours(partial(torch_checkpoint, f), x)), expected)
    with torch.autograd.graph.save_on_cpu():
        assert equal(gradients(model, ours), expected)

    model[1][1].register_forward_hook(lambda *_: calls.append("module"))

    def hooked(how, function, x):
        y = how(function, x)
        y.register_hook(lambda grad: calls.append("tensor"))
        return y

    assert equal(gradients(model, partial(hooked, ours)), expected)
    seen = calls.copy()
    calls.clear()
    gradients(model, partial(hooked, torch_checkpoint))
    assert seen == calls and (calls.count("module"), calls.count("tensor")) == (2, 3)
    assert store.usage()[:2] == (0, 0)


def test_autocast_is_that_of_the_first_pass(store):
    model = layers(dtype=torch.float32)

    def under(how, function, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return how(function, x)

    found = gradients(model, partial(under, partial(offloaded_checkpoint, store=store)))
    assert equal(found, gradients(model, partial(under, plain)))
    assert not equal(found, gradients(model, plain))


def test_compiled_functions():
    store = HostStore(streams=EagerStreams())
    model, ours = layers(1, dropout=0.0), partial(offloaded_checkpoint, store=store)
    compiled = torch.compile(model[0], backend="aot_eager")
    expected = gradients(model, lambda _, x: compiled(x))
    assert equal(gradients(model, lambda _, x: ours(compiled, x)), expected)
    around = torch.compile(lambda f, x: ours(f, x) * 2, backend="aot_eager")
    assert equal(gradients(model, around), gradients(model, lambda f, x: f(x) * 2))


def test_a_change_in_place_is_an_error(store):
    x = torch.randn(T, D, requires_grad=True)
    y = x * 2
    z = offloaded_checkpoint(torch.sin, y, store=store)
    with torch.no_grad():
        y += 1
    with pytest.raises(RuntimeError, match=r"shape \[9, 8\] was modified in place"):
        z.sum().backward()


def test_bad_arguments():
    x = torch.zeros(2, requires_grad=True)
    with pytest.raises(TypeError, match="function must be callable, got torch"):
        offloaded_checkpoint(x, x)
    with pytest.raises(TypeError, match="store must be a HostStore, got int 3"):
        offloaded_checkpoint(torch.sin, x, store=3)
    with pytest.raises(ValueError, match=r"called no attention of r1kernels: give"):
        offloaded_checkpoint(torch.sin, x, save_attention=True)


def attention(q, k, v):
    """One head, one sequence."""
    return varlen_attention(*(x[:, None] for x in (q, k, v)), torch.tensor([0, len(q)]))[:, 0]


class Block(nn.Module):
    def __init__(self, calls: int = 1):
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.calls = calls

    def forward(self, x):
        for _ in range(self.calls):
            x = x + self.out(attention(*self.qkv(x).split(D, -1)))
        return x


@pytest.fixture
def attended(monkeypatch) -> list[int]:
    """Grows by one whenever an attention computes its output."""
    calls = []
    for name in ("varlen_attention", "prefix_attention"):
        module = importlib.import_module(f"r1kernels.{name}")
        monkeypatch.setattr(module, "attend", partial(_counted, module.attend, calls))
    return calls


def _counted(attend, calls, *args, **options):
    calls.append(1)
    return attend(*args, **options)


def test_attention_is_not_computed_again(store, attended):
    torch.manual_seed(0)
    model = nn.ModuleList([Block(), Block(2), Block()]).double()
    ours = partial(offloaded_checkpoint, store=store, save_attention=True)
    found = gradients(model, ours)
    assert len(attended) == 4
    assert equal(found, gradients(model, torch_checkpoint)) and len(attended) == 4 + 8
    assert equal(found, gradients(model, plain)) and len(attended) == 4 + 8 + 4
    # Around it, a checkpoint that keeps nothing of attention.
    assert equal(found, gradients(model, lambda f, x: torch_checkpoint(partial(ours, f), x)))
    assert store.usage()[:2] == (0, 0)


def test_attention_of_a_kept_graph(store, attended):
    torch.manual_seed(0)
    block, x = Block(2).double(), torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    y = offloaded_checkpoint(block, x, store=store, save_attention=True)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and len(attended) == 2


def test_attention_of_shared_prefixes(store, attended):
    torch.manual_seed(0)
    layout = SharedPrefixes([(3, [2, 4])])
    x = torch.randn(9, 1, D, dtype=torch.float64, requires_grad=True)

    def function(x):
        return prefix_attention(x, x.sin(), x.cos(), layout)

    y = offloaded_checkpoint(function, x.clone(), store=store, save_attention=True)
    found = torch.autograd.grad(y.square().sum(), x)[0]
    assert len(attended) == 2
    assert torch.equal(found, torch.autograd.grad(function(x).square().sum(), x)[0])


def test_attention_of_a_compiled_layer(attended):
    torch.manual_seed(0)
    store, model = HostStore(streams=EagerStreams()), nn.ModuleList([Block()]).double()
    compiled = torch.compile(model[0], backend="aot_eager", fullgraph=True)
    ours = partial(offloaded_checkpoint, store=store, save_attention=True)
    found = gradients(model, lambda _, x: ours(compiled, x))
    assert len(attended) == 1
    assert equal(found, gradients(model, lambda _, x: compiled(x)))


def test_a_function_that_does_more_when_it_is_run_again_is_an_error():
    block, x = Block(), torch.randn(T, D, requires_grad=True)
    y = offloaded_checkpoint(block, x, save_attention=True)
    block.calls = 0
    with pytest.raises(RuntimeError, match="number of tensors"):
        torch.autograd.grad(y.sum(), x, retain_graph=True)
    block.forward = lambda x: attention(x, x, attention(x, x, x).exp())
    with pytest.raises(RuntimeError, match="more than the 1 times of its first pass"):
        torch.autograd.grad(y.sum(), x)


def build(name: str, dropout: float):
    transformers = pytest.importorskip("transformers", reason="the decoders are its own")
    title = {"qwen2": "Qwen2", "llama": "Llama"}[name]
    config = getattr(transformers, f"{title}Config")(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=dropout,
        tie_word_embeddings=name == "qwen2",
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{title}ForCausalLM")(config).train()


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def decoder(request):
    return build(request.param, dropout=0.2)


def decoder_gradients(model, padded: bool = True) -> list[Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(40, (2, 13))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0 if padded else 1
    loss = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def test_layers_of_a_decoder(decoder):
    before = decoder_gradients(decoder)
    with checkpoint_layers(decoder) as done:
        assert done.names == [f"model.layers.{i}" for i in range(3)]
        assert equal(decoder_gradients(decoder), before)
        copied = copy.deepcopy(decoder)
        assert equal(decoder_gradients(copied), before) and copied.is_gradient_checkpointing
        with pytest.raises(ValueError, match="under checkpoint_layers already"):
            checkpoint_layers(decoder)
    assert not decoder.is_gradient_checkpointing
    decoder.gradient_checkpointing_enable()
    try:
        assert equal(decoder_gradients(decoder), before)
        streams = EagerStreams()
        with checkpoint_layers(decoder, device_bytes=2 * 13 * 16 * 4) as done:
            done.store._given_streams = streams
            assert equal(decoder_gradients(decoder), before)
            assert streams.log == ["out", "out", "back"]
        assert decoder.is_gradient_checkpointing and done.store.usage() == (0, 0, 0)
        assert equal(decoder_gradients(decoder), before)
    finally:
        decoder.gradient_checkpointing_disable()


def test_attention_of_a_decoder(attended):
    model = build("qwen2", dropout=0.0)
    model.set_attn_implementation(register_attention())
    before = decoder_gradients(model, padded=False)
    attended.clear()
    with checkpoint_layers(model) as done:
        assert equal(decoder_gradients(model, padded=False), before) and len(attended) == 6
    attended.clear()
    with checkpoint_layers(model, save_attention=True) as done:
        done.store._given_streams = EagerStreams()
        assert equal(decoder_gradients(model, padded=False), before) and len(attended) == 3


def test_models_without_the_hook_are_refused_by_name(decoder):
    with pytest.raises(ValueError, match="Sequential has no gradient checkpointing of transform"):
        checkpoint_layers(nn.Sequential(nn.Linear(2, 2)))

    class Other(nn.Linear):
        supports_gradient_checkpointing = True

        def _set_gradient_checkpointing(self, **options):
            raise AssertionError

    with pytest.raises(ValueError, match="Other has no layer with a gradient_checkpointing flag"):
        checkpoint_layers(Other(2, 2))
    with pytest.raises(ValueError, match="must not be negative"):
        checkpoint_layers(decoder, device_bytes=-1)
    with checkpoint_layers(decoder, save_attention=True), pytest.raises(ValueError, match="called"):
        decoder_gradients(decoder)


def test_data_parallel_and_sharded_models(tmp_path):
    for found in run_ranks(offload_ranks, tmp_path, offload_ranks.RANKS, timeout=120):
        for name in ("ddp", "fsdp"):
            for title, x in found[name].items():
                torch.testing.assert_close(x, found["plain"][title], rtol=1e-12, atol=1e-12)
        assert found["host"] == [0, 0]
