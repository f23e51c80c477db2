from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch.utils.checkpoint import checkpoint

from r1kernels import tiled_mlp
from r1kernels.projection import Projection
from r1kernels.reference.glu import ACTIVATIONS, glu
from r1kernels.tiled_mlp import Mlp, mlp_chunk, mlp_chunk_backward
from r1kernels.weight_grads import WeightGrads
from tests.numerics import assert_no_worse, relative_l2
from tests.ops import mlp_ranks
from tests.ops.head_cases import supported
from tests.ops.rank_program import run_ranks

T, D, I, R, SCALE = 37, 24, 40, 3, 1.7
PARTS = {"gate": (I, D), "up": (I, D), "down": (D, I)}


def draw(dtype=torch.float32, bias=False, lora=False, rows=T, device="cpu"):
    """x and the parameters by name; products of about the size of their inputs."""
    given = {"x": torch.randn(rows, D)}
    for name, (outputs, inputs) in PARTS.items():
        given[f"{name}_weight"] = torch.randn(outputs, inputs) * inputs**-0.5
        if bias:
            given[f"{name}_bias"] = torch.randn(outputs)
        if lora:
            given[f"{name}_a"] = torch.randn(R, inputs) * inputs**-0.5
            given[f"{name}_b"] = torch.randn(outputs, R) * R**-0.5
    return {name: x.to(device, dtype) for name, x in given.items()}


def ours(given, activation="silu", **more):
    options = {name: x for name, x in given.items() if name.endswith("_bias")}
    for name in PARTS:
        if f"{name}_a" in given:
            options[f"{name}_lora"] = (given[f"{name}_a"], given[f"{name}_b"], SCALE)
    weights = (given[f"{name}_weight"] for name in PARTS)
    return tiled_mlp(given["x"], *weights, activation=activation, **options, **more)


def eager(given, activation="silu", **_):
    def linear(name, x):
        y = F.linear(x, given[f"{name}_weight"], given.get(f"{name}_bias"))
        if f"{name}_a" in given:
            y = y + F.linear(F.linear(x, given[f"{name}_a"]), given[f"{name}_b"]) * SCALE
        return y

    x = given["x"]
    return linear("down", glu(linear("gate", x), linear("up", x), activation))


def gradients(fn, given, dy, frozen=(), **options):
    """y and the gradients by name; None where there is none."""
    leaves = {name: x.clone().requires_grad_(name not in frozen) for name, x in given.items()}
    y = fn(leaves, **options)
    y.backward(dy)
    return {"y": y.detach()} | {name: x.grad for name, x in leaves.items()}


def double(given):
    return {name: x.double() for name, x in given.items()}


def check(given, dy, **options):
    found, expected = (gradients(fn, given, dy, **options) for fn in (ours, eager))
    truth = gradients(eager, double(given), dy.double(), **options)
    for name, x in truth.items():
        if x is None:
            assert found[name] is None, f"{name} is frozen and has a gradient"
        else:
            assert_no_worse(found[name], expected[name], x, name=name)
            assert found[name].dtype == expected[name].dtype
    return found


@pytest.mark.parametrize("tile_rows", [None, 1, 16, 37, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_eager(backend, dtype, tile_rows):
    given, dy = draw(dtype, bias=tile_rows == 16), torch.randn(T, D).to(dtype)
    given, dy = {name: x.to(DEVICE) for name, x in given.items()}, dy.to(DEVICE)
    if supported(backend, dtype):
        check(given, dy, tile_rows=tile_rows)
    else:
        with pytest.raises(RuntimeError, match="glu: triton: the interpreter truncates"):
            ours(given)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("frozen", ["weights", "gate_a", "x"])
def test_low_rank_terms(activation, frozen):
    given = draw(lora=True, bias=True)
    names = [x for x in given if x.endswith("_weight")] if frozen == "weights" else [frozen]
    check(given, torch.randn(T, D), activation=activation, frozen=names, tile_rows=10)


def test_float64():
    given, dy = double(draw(bias=True, lora=True)), torch.randn(T, D).double()
    found, truth = (gradients(fn, given, dy, tile_rows=10) for fn in (ours, eager))
    for name, x in truth.items():
        torch.testing.assert_close(found[name], x, rtol=1e-12, atol=1e-12)


def test_leading_shape_and_no_rows():
    given = draw()
    y = ours(given)
    batch = given | {"x": given["x"][:36].reshape(2, 3, 6, D).transpose(0, 1)}
    expected = y[:36].view(2, 3, 6, D).transpose(0, 1)
    torch.testing.assert_close(ours(batch), expected)
    empty = gradients(ours, draw(rows=0), torch.zeros(0, D))
    assert empty["y"].shape == (0, D)
    assert all(not empty[f"{name}_weight"].any() for name in PARTS)


def test_a_chunk_by_itself_whose_dx_overwrites_dy():
    given, dy = draw(), torch.randn(T, D)
    expected = gradients(ours, given, dy)
    parts = [Projection(given[f"{name}_weight"]) for name in PARTS]
    mlp = Mlp(*parts, "silu")
    grads = WeightGrads({"up.weight": parts[1].weight_NK})
    torch.testing.assert_close(mlp_chunk(given["x"], mlp), expected["y"])
    dx = mlp_chunk_backward(dy, given["x"], mlp, grads, out_CD=dy)
    assert dx is dy
    torch.testing.assert_close(dx, expected["x"])
    torch.testing.assert_close(grads.deliver("up.weight"), expected["up_weight"])
    assert grads.deliver("gate.weight") is None
    assert mlp_chunk_backward(dy, given["x"], mlp, WeightGrads({}), input_grad=False) is None


def test_512_tiles_are_as_good_as_one():
    """A gradient on which all rows agree, in bfloat16."""
    given = draw(torch.bfloat16, rows=2048)
    given["x"] = (1 + 0.25 * torch.randn(2048, D)).bfloat16()
    dy = (1 + 0.25 * torch.randn(2048, D)).bfloat16()
    truth = gradients(eager, double(given), dy.double())
    whole = gradients(ours, given, dy, tile_rows=2048)
    tiles = gradients(ours, given, dy, tile_rows=4)
    for name in PARTS:
        key = f"{name}_weight"
        one, many = (relative_l2(x[key], truth[key]) for x in (whole, tiles))
        assert many <= 1.1 * one, f"{key}: error {many:.2e} in 512 tiles, {one:.2e} in one"


def test_master_weights_get_unrounded_gradients():
    given = draw(torch.bfloat16, bias=True, lora=True)
    dy = torch.randn(T, D).bfloat16()
    rounded = gradients(ours, given, dy)
    masters = {name: x if name == "x" else x.float() for name, x in given.items()}
    found = gradients(ours, masters, dy)
    for name, x in rounded.items():
        assert found[name].dtype == (torch.bfloat16 if name in ("x", "y") else torch.float32)
        assert torch.equal(found[name].bfloat16(), x)


def test_autocast_is_that_of_linear_layers():
    given, dy = draw(bias=True), torch.randn(T, D)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (gradients(fn, given, dy.bfloat16()) for fn in (ours, eager))
    truth = gradients(eager, double(given), dy.bfloat16().double())
    for name, x in truth.items():
        assert found[name].dtype == expected[name].dtype
        assert_no_worse(found[name], expected[name], x, name=name)


def test_repeats_bitwise_also_under_checkpoint():
    given, dy = draw(lora=True), torch.randn(T, D)
    first, again = (gradients(ours, given, dy, tile_rows=10) for _ in range(2))
    kept = gradients(
        lambda leaves: checkpoint(ours, leaves, tile_rows=10, use_reentrant=False), given, dy
    )
    for name, x in first.items():
        assert torch.equal(again[name], x) and torch.equal(kept[name], x), name


def profile(body):
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as found:
        body()
    products = Counter(x.name for x in found.events() if x.name in ("aten::mm", "aten::addmm_"))
    return products.total(), max(x.self_cpu_memory_usage for x in found.events())


def test_eleven_products_a_tile_and_eight_with_frozen_weights():
    given, dy, tiles = draw(), torch.randn(T, D), 4
    weights = [name for name in given if name != "x"]
    for frozen, products in (((), 11), (weights, 8), (["x"], 9), (["x", *weights[1:]], 7)):
        count, _ = profile(
            lambda: gradients(ours, given, dy, frozen=frozen, tile_rows=10)  # noqa: B023
        )
        assert count == products * tiles, f"{frozen} frozen: {count / tiles} products a tile"


def test_nothing_beyond_a_tile_is_allocated():
    """Neither [T, I] nor, which tiles of 4 rows show, the size of a weight."""
    given, dy = draw(rows=1024, lora=True), torch.randn(1024, D)
    _, largest = profile(lambda: gradients(ours, given, dy, tile_rows=64))
    assert largest <= 4 * 1024 * D, f"{largest} bytes at once: x has {4 * 1024 * D}"
    few = {name: x[:8] if name == "x" else x for name, x in given.items()}
    weights = [name for name in given if name.endswith("_weight")]
    leaves = {name: x.clone().requires_grad_(name not in weights) for name, x in few.items()}
    _, largest = profile(lambda: ours(leaves, tile_rows=4).backward(dy[:8]))
    assert largest < 4 * D * I, f"{largest} bytes at once: the size of a weight"


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_on_a_gpu(dtype, activation):
    given = draw(dtype, bias=True, lora=True, rows=600, device="cuda")
    check(given, torch.randn(600, D).to("cuda", dtype), activation=activation, tile_rows=256)


@pytest.mark.gpu
def test_memory_on_a_gpu():
    """Beside y, dx and the float32 sums: one tile."""
    rows, D, I, tile = 32768, 512, 4096, 1024
    sizes = ((rows, D), (I, D), (I, D), (D, I))
    leaves = [torch.randn(*x, device="cuda").mul_(x[1] ** -0.5).bfloat16() for x in sizes]
    leaves = [x.requires_grad_() for x in leaves]
    dy = torch.randn(rows, D, device="cuda").bfloat16()
    tiled_mlp(*leaves, tile_rows=tile).backward(dy)  # the library's workspace
    for x in leaves:
        x.grad = None
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    tiled_mlp(*leaves, tile_rows=tile).backward(dy)
    taken = torch.cuda.max_memory_allocated() - base
    assert taken <= 1.05 * (2 * 2 * rows * D + 6 * tile * I + 3 * 6 * D * I), taken


def test_no_second_derivative():
    given = draw()
    x = given["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="tiled_mlp has no second derivative"):
        torch.autograd.grad(ours(given).sum(), x, create_graph=True)


GIVEN = draw(lora=True, bias=True)
GATE = GIVEN["gate_weight"]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": GIVEN["x"].int()}, TypeError, "x must be torch.float32 or"),
        ({"x": GIVEN["x"][:, 1:]}, ValueError, r"gate_weight must have shape \[40, 23\]"),
        ({"up_weight": GATE[1:]}, ValueError, r"up_weight must have shape \[40, 24\]"),
        ({"down_weight": GATE}, ValueError, r"down_weight must have shape \[24, 40\]"),
        ({"gate_weight": GATE.half()}, TypeError, "gate_weight must be torch.float32"),
        ({"up_bias": GIVEN["up_bias"][1:]}, ValueError, r"up_bias must have shape \[40\]"),
        ({"down_a": GIVEN["gate_a"]}, ValueError, r"down_lora's A must have shape \[3, 40\]"),
        ({"activation": "relu"}, ValueError, "activation must be one of 'silu'"),
        ({"tile_rows": 0}, ValueError, "tile_rows must be at least 1"),
        ({"tile_rows": 2.0}, TypeError, "tile_rows must be an int"),
        ({"x": GIVEN["x"].to("meta")}, ValueError, "gate_weight must be on meta"),
    ],
)  # fmt: skip
def test_bad_input(change, error, match):
    options = {name: change[name] for name in ("activation", "tile_rows") if name in change}
    given = GIVEN | {name: x for name, x in change.items() if name not in options}
    with pytest.raises(error, match=match):
        ours(given, **options)


def test_a_low_rank_term_without_its_scale():
    weights = (GIVEN[f"{name}_weight"] for name in PARTS)
    term = GIVEN["gate_a"], GIVEN["gate_b"]
    with pytest.raises(TypeError, match=r"gate_lora must be \(A .*, scale\), got a tuple of 2$"):
        tiled_mlp(GIVEN["x"], *weights, gate_lora=term)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks found (`mlp_ranks`), in rank order."""
    return run_ranks(mlp_ranks, tmp_path_factory.mktemp("ranks"), mlp_ranks.RANKS)


@pytest.mark.parametrize("way", ["ddp", "ddp checkpoint", "fsdp", "fsdp checkpoint"])
def test_gradients_over_two_processes_are_those_of_one(ranks, way):
    model = mlp_ranks.make()
    mlp_ranks.loss(model, mlp_ranks.rows()).backward()
    expected = mlp_ranks.gradients(model)
    for found in ranks:
        assert found[way].keys() == expected.keys()
        for name, x in expected.items():
            torch.testing.assert_close(found[way][name], x, rtol=1e-5, atol=1e-6)
            assert torch.equal(found[way][name], ranks[0][way][name])


@pytest.mark.parametrize("way", ["ddp", "ddp checkpoint"])
def test_each_gradient_is_delivered_once(ranks, way):
    for found in ranks:
        assert set(found[f"{way} hooks"].values()) == {1}, found[f"{way} hooks"]
