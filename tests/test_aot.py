"""Every Triton kernel compiles for sm_80 and sm_90, without spills and within shared memory."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the builds need Triton's compiler")
ROOT = Path(__file__).parent.parent
KERNEL = re.compile(r"^def (_\w+_kernel)\(", re.MULTILINE)


@pytest.mark.slow
def test_every_kernel_compiles_clean():
    # The interpreter's switch turns kernels into Python functions, so the builds run without it.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        # Variants that nothing runs by itself are left to the command without the flag.
        [sys.executable, "-m", "benchmarks.aot", "--chosen"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    shape = re.compile(r"^\S+ sm_(80|90) registers=\d+ shared=\d+ spills=0( [A-Z]+=\d+)*$")
    assert all(shape.match(line) for line in lines), done.stdout
    for path in sorted((ROOT / "r1kernels" / "_triton").glob("*.py")):
        for kernel in KERNEL.findall(path.read_text()):
            for arch in ("sm_90",) if "_tma_" in kernel else ("sm_80", "sm_90"):
                start = f"{kernel.strip('_')}["
                built = [line for line in lines if line.startswith(start) and f" {arch} " in line]
                assert built, f"{kernel} is not built for {arch}"


def test_refuses_to_run_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.aot"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


def test_bad_builds_are_faults():
    from benchmarks.aot import SHARED_LIMIT, Record, faults, read_report

    assert faults(Record("kernel", 90, 128, SHARED_LIMIT[90], 0)) == []
    assert "SHARED" in faults(Record("kernel", 90, 128, SHARED_LIMIT[90] + 1, 0))[0]
    assert "SHARED" in faults(Record("kernel", 80, 128, SHARED_LIMIT[90], 0))[0]
    assert faults(Record("kernel", 80, 255, 0, 4)) == ["SPILLS"]
    assert "boom" in faults(Record("kernel", 80, error="boom"))[0]
    assert faults(read_report("kernel", 90, "ptxas said nothing of use"))
    report = (
        "ptxas info: 8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info: Used 40 registers, used 1 barriers, 1024 bytes smem"
    )
    assert read_report("kernel", 90, report) == Record("kernel", 90, 40, 1024, 16)
