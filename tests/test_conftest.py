import pytest
import torch
from torch._dynamo import trace_rules

from benchmarks.poison import poisoned_memory


@pytest.mark.parametrize(
    "allocate",
    [
        "torch.empty(3)",
        "torch.empty_like(torch.ones(3))",
        "torch.empty_strided((3,), (1,))",
        "torch.ones(3).new_empty(3)",
    ],
)
def test_memory_the_package_does_not_write_reads_as_nan(allocate):
    inside = eval(allocate, {"__name__": "r1kernels._native.linear_logp", "torch": torch})
    outside = eval(f"{allocate}.fill_(1)", {"__name__": "r1.trainer", "torch": torch})
    assert inside.isnan().all() and outside.eq(1).all()


def test_integers_are_poisoned():
    names = {"__name__": "r1kernels.packing", "torch": torch}
    assert (eval("torch.empty(2, dtype=torch.int32)", names) == torch.iinfo(torch.int32).min).all()


def test_tracers_are_not_poisoned():
    names = {"__name__": "r1kernels.packing", "torch": torch}
    exec("def allocate(x): return torch.empty_like(x).copy_(x)", names)

    def compiled():
        torch.compiler.reset()
        traced = torch.compile(names["allocate"], fullgraph=True, backend="aot_eager")
        return traced(torch.ones(3))

    assert compiled().eq(1).all()
    with poisoned_memory():
        trace_rules.clear_lru_cache()  # as init_process_group does
        assert compiled().eq(1).all()
    assert compiled().eq(1).all()


def test_backend_fixture_puts_its_backend_in_force(backend):
    from r1kernels.backend import implementation

    x = torch.zeros(2, 4)
    module = implementation("token_logp", "cpu", x, x).__name__
    assert module.split(".")[1].lstrip("_") == backend
