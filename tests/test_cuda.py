"""The CUDA kernels where there is no GPU: their own source runs on an emulated one, their machine
code is what it should be; and, where there is a GPU, they agree with float64."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1kernels import backend

ROOT = Path(__file__).parent.parent
EMULATION = ROOT / "tests" / "emulation"
GXX = shutil.which("g++")
needs_compiler = pytest.mark.skipif(GXX is None, reason="needs g++")

# mode (sums, store, gradient), softcap, entropy, C, V, D, blocks of a cluster, clusters
HEAD_CASES = [
    (0, 0, 0, 200, 300, 136, 1, 1),
    (0, 1, 1, 200, 300, 136, 2, 1),
    (1, 0, 1, 130, 300, 200, 2, 1),
    (1, 1, 0, 300, 200, 72, 2, 2),
    (2, 0, 0, 140, 300, 512, 1, 1),
    (2, 1, 0, 1, 17, 8, 2, 1),
]
# dtype, softcap, gradient too, vocabulary, blocks of a cluster
ROW_CASES = [(0, 0, 1, 1003, 2), (1, 0, 1, 5000, 4), (2, 1, 1, 300, 1), (1, 1, 0, 9, 2)]
# What breaks when a line of the kernel changes: the emulation must notice.
MUTANTS = {
    "consumers out of order": ("ptx::wait(order(consumer), order_parity);", ""),
    "released too early": ("ptx::products_wait<1>();", ""),
    "wrong step in a row": ("+ 2 * step", "+ 4 * step"),
    "stage not awaited": ("ptx::wait(empty(ring.stage), ring.parity ^ 1);", ""),
}


def build(source: Path, out: Path, *include: Path) -> Path:
    flags = ["-std=c++20", "-O1", "-pthread", "-ffp-contract=off"]
    paths = [f"-I{path}" for path in (EMULATION, *include, ROOT / "csrc")]
    done = subprocess.run([GXX, *flags, *paths, source, "-o", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def run(program: Path, case: tuple, timeout: float) -> tuple[int, str]:
    words = [str(word) for word in case]
    try:
        done = subprocess.run(
            [program, *words], capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return 124, "timed out"
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("emulation")
    return {name: build(EMULATION / f"{name}.cpp", folder / name) for name in ("head", "rows")}


@needs_compiler
@pytest.mark.parametrize("case", HEAD_CASES, ids=str)
def test_head_kernel_emulated(programs, case):
    status, output = run(programs["head"], case, 120)
    assert status == 0, output


@needs_compiler
@pytest.mark.parametrize("case", ROW_CASES, ids=str)
def test_row_kernels_emulated(programs, case):
    status, output = run(programs["rows"], case, 120)
    assert status == 0, output


@needs_compiler
@pytest.mark.parametrize("name", MUTANTS)
def test_the_emulation_notices_a_broken_kernel(tmp_path, name):
    line, instead = MUTANTS[name]
    text = (ROOT / "csrc" / "cuda" / "head_kernel.cuh").read_text()
    assert line in text
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "head_kernel.cuh").write_text(text.replace(line, instead))
    program = build(EMULATION / "head.cpp", tmp_path / "head", tmp_path)
    # Its threads may happen to run in the right order, on a busy machine above all.
    assert any(run(program, (0, 0, 0, 300, 300, 512, 1, 1), 20)[0] != 0 for _ in range(5))


@pytest.mark.slow
def test_machine_code():
    pytest.importorskip("triton", reason="the builds need Triton's tools")
    from benchmarks.aot import compile_cuda, cuda_sources, faults

    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    records = {record.name: record for record in map(compile_cuda, cuda_sources())}
    assert set(records) == {"head_gemm.cu", "row_logp.cu"}
    for record in records.values():
        assert not faults(record), (record, faults(record))
    head, rows = records["head_gemm.cu"].sass, records["row_logp.cu"].sass
    # Two blocks of 64 rows, four steps of 16, in each of ten kernels; one shrinks, one grows.
    assert head["HGMMA"] == 80
    assert head["USETMAXREG"] == 20
    assert head["UTMALDG"] == 30
    assert head["SYNCS"] > 0 and rows["SYNCS"] > 0
    assert rows["UBLKCP"] > 0
    assert head["LDL"] + head["STL"] + rows["LDL"] + rows["STL"] == 0


def test_cuda_runs_only_by_name(monkeypatch):
    assert "cuda" not in backend.candidates("linear_logp", "cuda")
    monkeypatch.setattr(backend, "CUDA_FIRST", frozenset({("linear_logp", 90)}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    assert backend.candidates("linear_logp", "cuda") == ("cuda", "triton", "reference")
    assert backend.candidates("token_logp", "cuda") == ("triton", "reference")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert backend.candidates("linear_logp", "cuda") == ("triton", "reference")


def test_refusals_have_reasons():
    for op in ("linear_logp", "token_logp"):
        reason = backend.refusal(op, "cuda", torch.zeros(2, 8), torch.zeros(3, 8))
        assert reason and not reason.startswith("ModuleNotFound"), reason
    from r1kernels._cuda.common import rows_refusal

    assert rows_refusal("hidden", torch.zeros(4, 8, dtype=torch.bfloat16)) is None
    assert "hidden" in rows_refusal("hidden", torch.zeros(4, 7, dtype=torch.bfloat16))
    assert "hidden" in rows_refusal("hidden", torch.zeros(4, 16, dtype=torch.bfloat16)[:, 1:])


def test_gemm_takes_the_kernel_s_place(monkeypatch):
    """The seam through which the CUDA kernel runs, with a GEMM in torch."""
    if torch.cuda.is_available():
        pytest.skip("runs in the interpreter")
    pytest.importorskip("triton", reason="needs Triton")
    from r1kernels._triton import head_kernels as kernels
    from r1kernels._triton import linear_logp as triton_head
    from r1kernels.head_contract import Gradients, Head, Rows

    calls = []

    def gemm(hidden, targets, per_tau, anchor, row_terms, head, entropy, store, mode):
        calls.append(mode)
        d = (hidden @ head.weight_VD.T) * per_tau[:, None] - anchor[:, None]
        e = d.exp().scatter(1, targets[:, None], 0.0)
        planes = []
        if mode != kernels.GRADIENT.value:
            planes = [e, e * d] if entropy else [e]
        if mode != kernels.SUMS.value:
            if mode == kernels.GRADIENT.value:
                alpha, beta, centre = (x[:, None] for x in row_terms)
                e = e * (alpha + beta * (d + centre))
            store.zero_()
            store[:, : e.shape[1]] = e
            planes.append(torch.zeros_like(e))
        tiles = [torch.stack([x.sum(1) for x in plane.split(48, 1)]) for plane in planes]
        return torch.stack(tiles)

    class Chunk(triton_head.HeadChunk):
        pass

    Chunk.gemm = staticmethod(gemm)
    hidden, weight = torch.randn(9, 24), torch.randn(131, 24)
    targets, upstream = torch.randint(0, 131, (9,)), torch.randn(2, 9)
    found = []
    for kind in (Chunk, triton_head.HeadChunk):
        head = Head(weight, None, 0.0, 1.0)
        chunk = kind(head, 9, True, True)
        grads = Gradients.zeros(head, *[True] * 2, *[False] * (len(Gradients._fields) - 2))
        rows = Rows(hidden, targets, *[None] * (len(Rows._fields) - 2))
        stats = chunk.forward(rows, True)
        dhidden = chunk.gradients(None, upstream[0].clone(), None, grads, False)
        again = chunk.backward(rows, stats, upstream[0].clone(), upstream[1].clone(), None, grads)
        found.append([*stats, dhidden, again, grads.weight_VD])
    assert calls == [kernels.STORE.value, kernels.GRADIENT.value]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", ["head", "tails", "one_row", "repeat", "rows", "fused_rows", "bad_rows"]
)
def test_on_a_gpu(case):
    """In a process of its own, so that a kernel that hangs costs no more than its time-out."""
    reason = backend.refusal("linear_logp", "cuda")
    if reason is not None:
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "emulation" / "on_gpu.py", case],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
