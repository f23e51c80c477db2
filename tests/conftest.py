import functools
import os
import random
import sys

import pytest
import torch

# Triton reads it when its kernels are decorated, so it is set before anything imports triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from torch._dynamo import trace_rules

from r1kernels import backend as backends

# torch.compile looks its own functions up by name, once; it must find them, not those put in their
# place below.
trace_rules.get_torch_obj_rule_map()

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


@pytest.fixture(autouse=True)
def seeds():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """What r1kernels allocates and does not write reads as NaN, or as the smallest integer."""
    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def poisoned(allocate):
    @functools.wraps(allocate)
    def allocate_poisoned(*args, **kwargs):
        out = allocate(*args, **kwargs)
        # Tracers see the plain call; only eager code in the package gets the poison.
        if torch.compiler.is_compiling() or type(out) is not torch.Tensor or out.is_meta:
            return out
        if sys._getframe(1).f_globals["__name__"].split(".")[0] == "r1kernels":
            with torch.no_grad():
                if out.is_floating_point():
                    out.fill_(float("nan"))
                elif out.dtype != torch.bool and not out.is_complex():
                    out.fill_(torch.iinfo(out.dtype).min)
        return out

    return allocate_poisoned


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
