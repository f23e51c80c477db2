"""The same call gives the same bits: again, in another process, on other numbers of threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1kernels import batch_invariant, use_backend
from tests.ops.determinism_cases import ALIGNED, ODD, calls, digest

ROOT = Path(__file__).parent.parent.parent
NAMES = list(calls(ALIGNED))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_same(name: str, found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.isfinite().all() and torch.equal(a, b), (
            f"{name}: result {place} of {len(found)} differs by {(a - b).abs().max():.1e}"
        )


@pytest.mark.parametrize("name", NAMES)
def test_runs_repeat_bitwise(backend, name):
    run = calls(ODD[backend])[name]
    first = run()
    # What other calls leave in freed memory must not matter either.
    torch.randn(10_000)
    assert_same(name, run(), first)


def test_processes_agree_bitwise(backend):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.ops.determinism_cases",
            backend,
            str(torch.get_num_threads()),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = dict(line.split("\t") for line in done.stdout.splitlines())
    assert theirs == {name: digest(run()) for name, run in calls(ODD[backend]).items()}


# skip_mass and batch_invariant exclude each other.
@pytest.mark.parametrize(
    ("name", "invariant"),
    [(name, on) for name in NAMES for on in (False, True) if not (on and "skip_mass" in name)],
)
def test_native_does_not_depend_on_the_number_of_threads(threads, name, invariant):
    """Where width and vocabulary come in multiples of 64 and each thread has four rows or more, or
    the rows are padded."""
    pytest.importorskip("r1kernels._C", reason="needs the C++ extension")
    run = calls(ALIGNED)[name]
    with use_backend("native"), batch_invariant(invariant):
        threads(1)
        alone = run()
        for count in (2, 3, 4):
            threads(count)
            assert_same(f"{name} on {count} threads", run(), alone)
