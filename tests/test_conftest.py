import pytest
import torch


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


def test_integers_are_poisoned_and_tracers_are_not():
    names = {"__name__": "r1kernels.packing", "torch": torch}
    assert (eval("torch.empty(2, dtype=torch.int32)", names) == torch.iinfo(torch.int32).min).all()
    exec("def allocate(x): return torch.empty_like(x).copy_(x)", names)
    compiled = torch.compile(names["allocate"], fullgraph=True, backend="aot_eager")
    assert compiled(torch.ones(3)).eq(1).all()


def test_backend_fixture_puts_its_backend_in_force(backend):
    from r1kernels.backend import implementation

    x = torch.zeros(2, 4)
    module = implementation("token_logp", "cpu", x, x).__name__
    assert module.split(".")[1].lstrip("_") == backend
