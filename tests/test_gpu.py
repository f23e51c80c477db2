"""What only a GPU can show: bfloat16 at real sizes, 64-bit offsets, memory, library products."""

import subprocess
import sys

import pytest
import torch

import r1kernels
from benchmarks import checks, logits_op
from benchmarks import problem as problems
from benchmarks.cpu_suite import verdict
from benchmarks.harness import ROOT
from benchmarks.logits_op import LOGITS_PROVIDERS
from benchmarks.provider import Missing
from benchmarks.providers import chunk_rows, find
from benchmarks.shapes import Shape
from r1kernels.backend import refusal

pytestmark = pytest.mark.gpu

HEAD = Shape(T=2048, D=2048, V=151936, S=256)
BACKENDS = ("triton", "cuda")
FLAT_TOKENS = (8192, 32768, 131072)


@pytest.fixture(scope="module")
def head():
    """One problem of a real size with the float64 truth of its tokens."""
    return problems.build(HEAD, "bfloat16", device="cuda", drawn=HEAD.T)


@pytest.fixture(scope="module")
def logits():
    return logits_op.build(Shape(T=4096, D=1, V=151936, S=4096), "bfloat16", device="cuda")


@pytest.fixture(autouse=True)
def empty_cache():
    yield
    torch.cuda.empty_cache()


def iteration(providers, backend, problem, mode):
    try:
        return providers(backend).make(problem, mode)
    except Missing as reason:
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("mode", problems.GPU_MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_in_bfloat16_is_no_worse_than_twice_eager(head, mode, backend):
    truth = problems.gradient_truth(head, mode, "policy", 1024) if mode != "forward" else None
    result = iteration(find, backend, head, mode)()
    errors = problems.errors(head, mode, truth, *result)
    eager = problems.eager_errors(head, mode, truth)
    assert verdict(errors, eager, "bfloat16", True) is None, (errors, eager)
    assert all(errors[name] <= 4e-3 for name in ("dhidden", "dweight") if errors[name] is not None)
    assert errors["logp_near_one"] <= eager["logp_near_one"] / 5


@pytest.mark.parametrize("mode", logits_op.MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_in_bfloat16_are_no_worse_than_twice_eager(logits, mode, backend):
    run = iteration(LOGITS_PROVIDERS.get, backend, logits, mode)
    truth = logits_op.truth(logits)
    errors = logits_op.errors(logits, truth, *run())
    eager = logits_op.eager_errors(logits, mode, truth)
    assert verdict(errors, eager, "bfloat16", True) is None, (errors, eager)


@pytest.mark.parametrize("name", checks.ON_A_PROBLEM)
@pytest.mark.parametrize("backend", BACKENDS)
def test_properties(head, name, backend):
    iteration(find, backend, head, "forward")
    if name == "kept_sets" and (reason := refusal("kept_logp", backend, head["hidden"])):
        pytest.skip(f"{backend}: {reason}")
    with r1kernels.use_backend(backend):
        checks.ON_A_PROBLEM[name](head)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_int32(head, backend):
    iteration(find, backend, head, "forward")
    with r1kernels.use_backend(backend):
        found = checks.beyond_int32("cuda", 16384, 256, 151936, 8192)
    assert found["elements"] > 2**31


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_is_flat_in_tokens(head, backend):
    """Above inputs and gradients: one float32 dweight and the workspace, at any T."""
    iteration(find, backend, head, "forward")
    with r1kernels.use_backend(backend):
        found = checks.memory_is_flat("cuda", 1536, 151936, FLAT_TOKENS, 1280)
    D, (low, high) = 1536, (min(FLAT_TOKENS), max(FLAT_TOKENS))
    grown = found[high] - found[low]
    assert grown <= 1.1 * (high - low) * (2 * D + 256) / 2**20 + 64, found


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_only_stores_no_logits(head, backend):
    run = iteration(find, backend, head, "forward")
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    taken = torch.cuda.max_memory_allocated() - base
    # Three partial sums for every 32 to 128 columns and vectors of [T]: a fraction of 2 T V.
    assert taken < 2 * HEAD.T * HEAD.V / 4, f"{taken / 2**20:.0f} MiB"


def test_products_are_added_in_float32_and_in_place():
    """As `weight_grads.accumulate` and the GEMM rows of the benchmarks use torch.addmm and mm."""
    checks.float32_accumulation("cuda", 32768, 4096, 2048)


def test_no_wait_for_the_device_once_warm(head):
    """With targets, mask and advantages on the host, the fused loss reads nothing back."""
    run = iteration(find, "triton", head, "forward_backward")
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning) as caught:
            run()
            # So that there is something to catch where nothing waits.
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) == 1, waits


def test_chunks_are_those_of_the_default_workspace():
    weight_VD = torch.empty(131072, 4096, dtype=torch.bfloat16, device="cuda")
    assert 4000 < chunk_rows(weight_VD) < 5200


def test_python_m_r1kernels_names_the_gpu():
    command = [sys.executable, "-m", "r1kernels"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert torch.cuda.get_device_name() in said
