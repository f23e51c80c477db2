import re
import subprocess
import sys

import pytest
import torch

from r1kernels import backend, token_logp, use_backend

ARGS = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64)


def chosen() -> str:
    return backend.implementation("token_logp", "cpu", ARGS[0]).__name__.split(".")[1].strip("_")


def test_order_on_the_cpu():
    pytest.importorskip("r1kernels._C", reason="needs the C++ extension")
    assert chosen() == "native"


def test_override_and_its_end():
    before = chosen()
    with use_backend("reference"):
        assert chosen() == "reference"
        with use_backend(None):
            assert chosen() == before
        assert chosen() == "reference"
    assert chosen() == before


def test_override_ends_with_an_exception():
    before = chosen()
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert chosen() == before


def test_named_backend_that_refuses_says_why():
    with (
        use_backend("cuda"),
        pytest.raises(RuntimeError, match=r"token_logp: cuda: (no CUDA|tensor is on cpu)"),
    ):
        token_logp(*ARGS)


def test_unknown_name_lists_the_known_ones():
    with (
        pytest.raises(ValueError, match=r"unknown backend 'fast'.*reference, native, triton, cuda"),
        use_backend("fast"),
    ):
        pass


def test_missing_extension_falls_back_once_with_a_word(monkeypatch, caplog):
    monkeypatch.setattr(
        backend,
        "load",
        lambda op, name, load=backend.load: (
            "ImportError: gone" if name == "native" else load(op, name)
        ),
    )
    monkeypatch.setattr(backend, "_told", set())
    for _ in range(2):
        assert chosen() == "reference"
    assert [record.message for record in caplog.records] == [
        "token_logp runs on the reference backend; native refuses: ImportError: gone"
    ]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("reference", r"token_logp +default"),
        # Refuses everything, and the report still says why.
        ("cuda", r"token_logp +yes .*no *\n[^$]*cuda: (no CUDA C\+\+ kernel|tensor is on cpu)"),
        ("nonsense", "unknown backend 'nonsense'"),
    ],
)
def test_environment_variable(value, says):
    run = subprocess.run(
        [sys.executable, "-m", "r1kernels"],
        capture_output=True,
        text=True,
        env={"R1KERNELS_BACKEND": value, "PATH": ""} | python_path(),
    )
    assert (run.returncode == 0) == (value != "nonsense")
    assert re.search(says, run.stdout + run.stderr)


def python_path() -> dict[str, str]:
    return {"PYTHONPATH": ":".join(path for path in sys.path if path)}


def test_report_names_every_op_and_backend():
    run = subprocess.run(
        [sys.executable, "-m", "r1kernels"],
        capture_output=True,
        text=True,
        env={"PATH": ""} | python_path(),
        check=True,
    )
    for word in (*backend.OPS, *backend.FOLDERS, "by name", "tensor is on cpu"):
        assert word in run.stdout
