import os
import random

import pytest
import torch

# Triton reads it when its kernels are decorated, so it is set before anything imports triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from benchmarks.poison import poisoned_memory
from r1kernels import backend as backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def available_backends() -> list[str]:
    probe = torch.zeros(2, 4, device=DEVICE)
    return [
        name
        for name in backends.FOLDERS
        if all(backends.refusal(op, name, probe, probe) is None for op in backends.OPS)
    ]


@pytest.fixture(params=available_backends())
def backend(request):
    """Every backend that runs on this machine, in force for the test."""
    with backends.use_backend(request.param):
        yield request.param


def process_state() -> dict:
    """What a test could leave changed for those that happen to run after it in its process."""
    watched = ("R1KERNELS", "TRITON", "OMP_", "CUDA_")
    # vLLM's import sets it, whichever test comes first to it
    unwatched = ("TRITON_CACHE_AUTOTUNING",)
    return {
        "environment": {
            k: v for k, v in os.environ.items() if k.startswith(watched) and k not in unwatched
        },
        "folder": os.getcwd(),
        "backend": (backends._backend.value, backends.is_batch_invariant()),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "process group": torch.distributed.is_initialized(),
    }


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """Files run in any order, several to a process."""
    before = process_state()
    yield
    assert process_state() == before


@pytest.fixture(autouse=True)
def seeds():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison():
    """What r1kernels allocates and does not write reads as NaN, or as the smallest integer."""
    with poisoned_memory():
        yield


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
