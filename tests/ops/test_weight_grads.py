"""Weight gradients summed over chunks: float32 sums lose nothing, bfloat16 sums a quarter."""

import pytest
import torch
from numerics import relative_l2

from r1kernels.weight_grads import WeightGrads, accumulate

CHUNKS, ROWS, M, N = 512, 2, 24, 40


@pytest.fixture(scope="module")
def signal():
    """dy and x whose product has the same sign in every row, as a gradient worth following has."""
    generator = torch.Generator().manual_seed(0)

    def draw(width):
        rows = 1 + 0.1 * torch.randn(CHUNKS * ROWS, width, generator=generator)
        return (rows * (0.5 + torch.rand(width, generator=generator))).bfloat16()

    return draw(M), draw(N)


def chunked(dy, x, grads):
    for dy_CM, x_CN in zip(dy.chunk(CHUNKS), x.chunk(CHUNKS), strict=True):
        grads.add("weight", dy_CM, x_CN)
        grads.add("frozen", dy_CM, x_CN)
        grads.add_sum("bias", dy_CM)
        grads.add_sum("frozen bias", dy_CM)


def test_512_chunks_are_as_good_as_one(signal):
    dy, x = signal
    truth = dy.double().T @ x.double()
    # Products of 16-bit matrices as hardware makes them: summed in float32, then rounded.
    whole = relative_l2((dy.float().T @ x.float()).bfloat16(), truth)
    naive = torch.zeros(M, N, dtype=torch.bfloat16)
    for dy_CM, x_CN in zip(dy.chunk(CHUNKS), x.chunk(CHUNKS), strict=True):
        naive += (dy_CM.float().T @ x_CN.float()).bfloat16()
    lost = relative_l2(naive, truth)
    assert lost > 0.2, f"bfloat16 sums err by {lost:.3f} only: the case shows nothing"

    weight, bias = torch.empty(M, N).bfloat16(), torch.empty(M).bfloat16()
    found = []
    for dtype in (None, torch.float32):
        grads = WeightGrads({"weight": weight, "bias": bias})
        chunked(dy, x, grads)
        assert "weight" in grads and "frozen" not in grads
        found.append([grads.deliver(key, dtype) for key in ("weight", "bias", "frozen")])
    (dweight, dbias, none), (exact, exact_bias, _) = found
    ours = relative_l2(dweight, truth)
    assert ours <= 1.1 * whole, f"error {ours:.2e} in {CHUNKS} chunks, {whole:.2e} in one"
    assert relative_l2(exact, truth) < 1e-6
    assert relative_l2(exact_bias, dy.double().sum(0)) < 1e-6
    assert none is None and dweight.dtype == dbias.dtype == torch.bfloat16
    assert torch.equal(dweight, exact.bfloat16()) and torch.equal(dbias, exact_bias.bfloat16())


def test_float64_stays_float64(signal):
    dy, x = (t.double() for t in signal)
    grads = WeightGrads({"weight": torch.empty(M, N, dtype=torch.float64)})
    chunked(dy, x, grads)
    found = grads.deliver("weight")
    assert found.dtype == torch.float64 and relative_l2(found, dy.T @ x) < 1e-14
    with pytest.raises(KeyError, match="weight"):
        grads.deliver("weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accumulate_adds_in_place(dtype):
    # Small integers: exact in every dtype and order.
    left, right = torch.randint(-4, 5, (5, 7)).to(dtype), torch.randint(-4, 5, (7, 3)).to(dtype)
    out = torch.ones(5, 3)
    address = out.data_ptr()
    accumulate(out, left, right)
    assert torch.equal(out, 1 + left.float() @ right.float()) and out.data_ptr() == address
