"""The gpu suite without a GPU: plan, processes, rows, refusals. Nothing here is a measurement."""

import json
import os
import sys
import time
import types
import weakref

import pytest
import torch

from benchmarks import checks, gpu_plan, gpu_pool, gpu_suite, logits_op, providers, report, run
from benchmarks import problem as problems
from benchmarks.cpu_suite import is_ours, verdict
from benchmarks.gpu_rows import summary
from benchmarks.gpu_worker import GpuWorker
from benchmarks.harness import WorkerError
from benchmarks.meter import guarded
from benchmarks.provider import Missing, Provider, Result
from benchmarks.providers import PROVIDERS, accumulate, find, variants
from benchmarks.shapes import Shape
from r1kernels import use_backend
from r1kernels.backend import refusal

TINY = Shape(T=64, D=16, V=512, S=8)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROBE = torch.zeros(2, 4, device=DEVICE)
BACKENDS = [
    name
    for name in ("native", "triton", "cuda", "reference")
    if refusal("linear_logp", name, PROBE, PROBE) is None
]


def _exits(problem, mode):
    os._exit(11)


def _sleeps(problem, mode):
    time.sleep(3600)


def _scaled(problem, mode):
    right = find("eager").make(problem, mode)

    def iteration():
        result = right()
        return Result(result.logp, result.dhidden * 1.01, result.dweight)

    return iteration


EXITS = Provider("exits", _exits, family="exits", modes=("forward_backward",))
SLEEPS = Provider("sleeps", _sleeps)
SCALED = Provider("scaled", _scaled)
HERE = "tests.test_gpu_suite"


@pytest.fixture(scope="module")
def problem():
    return problems.build(TINY, "float32", drawn=TINY.T)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One dry run of the command line: (rows, exit status, seconds, what it printed)."""
    out = tmp_path_factory.mktemp("gpu")
    names = f"native,eager,cce,{HERE}:EXITS,{HERE}:SCALED"
    argv = ["--suite", "gpu", "--device", "cpu", "--quick", "--out", str(out), "--minutes", "3"]
    start = time.monotonic()
    modes = "forward_backward,zero_80,logits_step"
    status = run.main(
        [*argv, "--threads", "1", "--modes", modes, "--providers", names, "--commit", "abc"]
    )
    taken = time.monotonic() - start
    rows = [json.loads(line) for line in (out / "dry-run.jsonl").read_text().splitlines()]
    return rows, status, taken, (out / "workers.log").read_text()


def cell_rows(rows, provider):
    return {
        row["mode"]: row
        for row in rows
        if row["provider"] == provider and row["op"] not in ("smoke", "environment")
    }


def test_rows_have_every_field(finished):
    rows, status, taken, _ = finished
    assert status == 0
    assert taken < 180
    for row in rows:
        assert not [key for key in report.REQUIRED if key not in row]
        assert row["commit"] == "abc" and row["device"] == "cpu"
        assert (row["status"] == "ok") == (row["reason"] is None)
        if row["status"] != "ok":
            assert row["ms_p50"] is None


def test_cells_are_timed_against_their_floor(finished):
    rows = finished[0]
    for mode in ("forward_backward", "zero_80", "logits_step"):
        for provider in ("floor", "native", "eager"):
            row = cell_rows(rows, provider)[mode]
            assert row["status"] == "ok", row
            assert 0 < row["ms_min"] <= row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
            assert row["samples"] >= 2
            assert row["ratio_to_floor"] == pytest.approx(row["ms_p50"] / row["floor_ms"])
            assert row["peak_mib"] >= 0
    fb = cell_rows(rows, "native")["forward_backward"]
    assert fb["tflops"] == pytest.approx(6 * 64 * 16 * 512 / fb["ms_p50"] / 1e9)
    gemm = next(row for row in rows if row["op"] == "gemm")
    assert fb["percent_of_gemm"] == pytest.approx(100 * fb["tflops"] / gemm["tflops"])
    step = cell_rows(rows, "native")["logits_step"]
    # Its gradient lies in the logits; eager's takes memory that peak_mib leaves out.
    assert step["grad_mib"] == 0
    assert cell_rows(rows, "eager")["logits_step"]["grad_mib"] == 64 * 512 * 4 / 2**20
    assert step["gb_per_s"] == pytest.approx(3 * 64 * 512 * 4 / step["ms_p50"] / 1e6)


def test_smoke_covers_every_check_and_refusals_say_why(finished):
    smoke = {row["mode"]: row for row in finished[0] if row["op"] == "smoke"}
    assert set(smoke) == {name for name, _ in gpu_plan.smoke(True)}
    assert {row["provider"] for row in smoke.values()} == {"native"}
    assert [row for row in smoke.values() if row["status"] != "ok"] == []
    assert smoke["forward_backward"]["rel_err_fp64"]["dweight"] < 1e-5
    assert smoke["any_upstream"]["rel_err_fp64"]["linear_loss dhidden"] < 1e-5


def test_a_crash_loses_its_own_row(finished):
    rows, _, _, log = finished
    exits = cell_rows(rows, "exits")
    assert set(exits) == {"forward_backward"}
    assert exits["forward_backward"]["status"] == "failed"
    assert "exit status 11" in exits["forward_backward"]["reason"]
    assert "==== exits" in log


def test_a_hang_costs_its_process_and_the_deadline_ends_it(tmp_path, monkeypatch):
    pool = gpu_pool.Pool("cpu", 1, tmp_path, time.monotonic() + 300)
    turn = {
        "do": "turn",
        "provider": f"{HERE}:SLEEPS",
        "kind": "head",
        "shape": {"T": 64, "D": 16, "V": 512, "S": 8},
        "dtype": "float32",
        "mode": "forward",
        "files": {"base": None},
        "seconds": 0.0,
        "check": False,
    }
    try:
        assert pool.hello("sleeps")["device"] == "cpu"
        first = pool.workers["sleeps"].process
        monkeypatch.setattr(gpu_pool, "TURN_TIMEOUT", 1.0)
        with pytest.raises(WorkerError, match="no answer within 1 s"):
            pool.ask("sleeps", turn)
        assert first.poll() is not None
        assert pool.hello("sleeps")["device"] == "cpu"
        monkeypatch.setattr(gpu_pool, "TURN_TIMEOUT", 300.0)
        pool.deadline = time.monotonic() + 1.0
        start = time.monotonic()
        with pytest.raises(gpu_pool.OutOfTime):
            pool.ask("sleeps", turn)
        assert time.monotonic() - start < 5
    finally:
        pool.close()


def test_a_missing_peer_and_a_wrong_one_are_rows(finished):
    missing = cell_rows(finished[0], "cce")["forward_backward"]
    assert missing["status"] == "missing"
    assert missing["reason"] == "cut-cross-entropy is not installed"
    assert "==== cce" not in finished[3]
    wrong = cell_rows(finished[0], "scaled")["forward_backward"]
    assert wrong["status"] == "refused"
    assert "dhidden differs from float64 by 1.0e-02" in wrong["reason"]


def test_summary_names_our_best_and_the_best_peer(finished):
    text = summary(finished[0])
    assert f"smoke: {len(gpu_plan.smoke(True))} passed, 0 failed" in text
    line = next(line for line in text.splitlines() if line.startswith("zero_80"))
    assert "native" in line and "eager" in line and "scaled" not in line


class FakePool:
    """Answers at once, and fails as it is told to."""

    def __init__(self, left, eager_says="no entropy"):
        self.deadline, self.eager_says = time.monotonic() + left, eager_says
        self.turns = []

    def ask(self, family, request):
        if request["do"] == "turn":
            self.turns.append(request["provider"])
            if request["provider"] == "eager":
                raise WorkerError(self.eager_says, True)
            if request["provider"] == "trl":
                raise WorkerError("CUDA error: an illegal memory access", False)
            return {"ms": [1.0, 2.0], "peak_mib": 1.0, "grad_mib": 1.0, "errors": {"logp": 1e-7}}
        return {"eager": {"logp": 1e-7}}


class EndingPool(FakePool):
    """The deadline comes while the third provider is asked."""

    def ask(self, family, request):
        if len(self.turns) == 2:
            raise gpu_pool.OutOfTime
        return super().ask(family, request)


def suite_on(pool, tmp_path, rows):
    return gpu_suite.Suite(pool, tmp_path, rows.append, lambda text: None, {}, False)


def test_peers_are_dropped_before_a_cell_is_skipped(tmp_path):
    cell = gpu_plan.head_cell(32768, gpu_plan.LLAMA, "forward", ("eager", "trl"))
    whole = gpu_suite.chosen(cell, "cuda", None)
    assert whole.providers == ("floor", "triton", "cuda", "eager", "trl")
    rows: list = []
    suite = suite_on(FakePool(1e6), tmp_path, rows)
    providers = gpu_suite.providers_of(whole)
    needs = suite.estimate(whole, providers)
    ours = suite.estimate(
        whole, {k: p for k, p in providers.items() if k != "trl" and k != "eager"}
    )
    assert 1.0 < ours < needs < 60
    short = suite_on(FakePool((ours + needs) / 2), tmp_path, rows)
    assert short.cell(whole)
    assert set(short.pool.turns) == {"floor", "triton", "cuda"}
    assert not suite_on(FakePool(0.5 * ours), tmp_path, rows).cell(whole)


def test_a_run_that_is_cut_off_keeps_its_rows(tmp_path):
    cell = gpu_plan.head_cell(32768, gpu_plan.LLAMA, "forward", ())
    rows: list = []
    suite = suite_on(EndingPool(1e6), tmp_path, rows)
    with pytest.raises(gpu_pool.OutOfTime):
        suite.cell(gpu_suite.chosen(cell, "cuda", ["triton", "cuda", "native"]))
    found = {row["provider"]: row for row in rows}
    assert found["floor"]["status"] == found["triton"]["status"] == "ok"
    assert found["triton"]["samples"] == 2
    assert found["cuda"]["reason"].startswith("the run was stopped")


def test_what_fails_twice_the_same_way_is_not_asked_a_third_time(tmp_path):
    cell = gpu_suite.chosen(
        gpu_plan.head_cell(32768, gpu_plan.LLAMA, "forward", ("eager", "trl")), "cuda", None
    )
    rows: list = []
    suite = suite_on(FakePool(1e6), tmp_path, rows)
    for _ in range(3):
        suite.cell(cell)
    assert suite.pool.turns.count("eager") == suite.pool.turns.count("trl") == 2
    reasons = [row["reason"] for row in rows if row["provider"] == "trl"]
    assert reasons[1].startswith("CUDA error") and reasons[2].startswith("not asked again: CUDA")
    statuses = {row["provider"]: row["status"] for row in rows}
    assert statuses["eager"] == "missing" and statuses["trl"] == "failed"
    assert statuses["triton"] == "ok"


def test_out_of_memory_is_asked_again_where_less_is_needed(tmp_path):
    rows: list = []
    suite = suite_on(FakePool(1e6, "out of memory: CUDA out of memory"), tmp_path, rows)
    cell = gpu_plan.head_cell(2048, gpu_plan.LLAMA, "forward", ("eager",))
    for _ in range(3):
        suite.cell(gpu_suite.chosen(cell, "cuda", None))
    assert suite.pool.turns.count("eager") == 3
    assert {row["status"] for row in rows if row["provider"] == "eager"} == {"missing"}


def test_plan_starts_with_the_published_head_and_names_real_providers():
    cells = gpu_plan.cells()
    first = cells[0]
    assert (first.mode, first.shape.T, first.shape.D, first.shape.V) == (
        "forward_backward",
        32768,
        4096,
        131072,
    )
    assert [cell.mode for cell in cells[:3]] == ["forward_backward", "forward", "frozen"]
    for cell in (*cells, *gpu_plan.cells(quick=True)):
        known = logits_op.LOGITS_PROVIDERS if cell.kind == "logits" else PROVIDERS
        assert not set(cell.providers) - set(known)
        assert "floor" in cell.providers
    names = [cell.name for cell in gpu_plan.cells(full=True)]
    assert len(names) == len(set(names))
    sizes = {(c.shape.D, c.shape.V, c.shape.T) for c in gpu_plan.cells(full=True)}
    assert len(sizes & {(896, 128256, 2048), (5120, 151936, 131072)}) == 2


@pytest.mark.parametrize("mode", problems.GPU_MODES)
def test_eager_errors_are_those_of_the_eager_provider(mode):
    """In bfloat16, where rounding is what they are made of."""
    problem = problems.build(Shape(T=128, D=32, V=512, S=16), "bfloat16", drawn=128)
    truth = problems.gradient_truth(problem, mode, "policy") if mode != "forward" else None
    ours = problems.eager_errors(problem, mode, truth)
    result = find("eager").make(problem, mode)()
    theirs = problems.errors(problem, mode, truth, *result)
    assert set(ours) == set(theirs)
    for name, error in theirs.items():
        if error is None:
            assert ours[name] is None
        else:
            assert ours[name] == pytest.approx(error, rel=0.1), name


def test_four_fifths_of_the_rows_have_no_coefficient(problem):
    share = problems.rows_with_coefficient(problem, "zero_80").float().mean().item()
    assert share == pytest.approx(0.2, abs=0.01)


def test_more_tokens_than_vocabulary_have_one_peak_per_weight_row():
    problem = problems.build(Shape(T=256, D=16, V=64, S=64), "float32", drawn=256)
    peaked_T = problem["truth_logp"] > -0.7
    targets = problem["targets"][peaked_T]
    assert peaked_T.any() and len(targets) <= 64


def test_a_worker_draws_the_problem_of_the_truth(tmp_path):
    worker = GpuWorker("cpu", 1)
    shape = {"T": 64, "D": 16, "V": 512, "S": 8}
    files = {"base": str(tmp_path / "base.pt"), "policy": str(tmp_path / "policy.pt")}
    asked = {"kind": "head", "shape": shape, "dtype": "float32", "mode": "frozen"}
    answer = worker.handlers["truth"](files=files | {"make": ["base", "policy"]}, **asked)
    assert set(answer["eager"]) == {"logp", "logp_near_one", "dhidden", "dweight"}
    turn = worker.handlers["turn"](
        provider="native", files=files, seconds=0.01, check=True, poison=True, **asked
    )
    assert turn["errors"]["dhidden"] < 1e-5 and len(turn["ms"]) >= 2
    known = torch.load(files["base"])
    torch.save(known | {"sums": [0.0, 0.0, 0.0]}, files["base"])
    with pytest.raises(RuntimeError, match="another problem"):
        worker.handlers["turn"](provider="native", files=files, seconds=0, check=False, **asked)


def test_out_of_memory_is_missing_and_leaves_nothing_behind(monkeypatch):
    worker = GpuWorker("cpu", 1)
    kept = []

    def runs_out():
        tensor = torch.ones(3)
        kept.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. More words")

    def lacks():
        tensor = torch.ones(3)
        kept.append(weakref.ref(tensor))
        raise Missing("no entropy")

    for handler, reason in ((runs_out, "out of memory: CUDA out of memory"), (lacks, "no entropy")):
        seen = []
        monkeypatch.setattr(worker.meter, "release", lambda seen=seen: seen.append(kept[-1]()))
        with pytest.raises(Missing) as raised:
            guarded(worker.meter, handler)()
        assert str(raised.value) == reason
        assert seen == [None]


def test_logits_truth_is_that_of_autograd():
    problem = logits_op.build(Shape(T=32, D=1, V=100, S=32), "float32")
    truth = logits_op.truth(problem)
    logits_TV = problem["source"].double().requires_grad_()
    logp_TV = logits_TV.log_softmax(-1)
    logp_T = logp_TV.gather(1, problem["targets"].unsqueeze(1)).squeeze(1)
    (logp_T * problem["dlogp"]).sum().backward()
    assert problems.relative_error(logp_T.detach(), truth["logp"]) < 1e-12
    entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
    assert problems.relative_error(entropy_T.detach(), truth["entropy"]) < 1e-12
    assert problems.relative_error(logits_TV.grad[truth["rows"]], truth["dlogits"]) < 1e-12


@pytest.mark.parametrize("mode", logits_op.MODES)
@pytest.mark.parametrize("name", ["native", "reference", "eager"])
def test_logits_providers_compute_the_mode(mode, name):
    problem = logits_op.build(Shape(T=32, D=1, V=100, S=32), "float32")
    truth = logits_op.truth(problem)
    run_once = logits_op.LOGITS_PROVIDERS[name].make(problem, mode)
    for _ in range(2):
        getattr(run_once, "before", lambda: None)()
        errors = logits_op.errors(problem, truth, *run_once())
        assert max(e for n, e in errors.items() if e is not None and n != "logp_near_one") < 1e-5
    assert (errors["dlogits"] is None) == (mode == "logits_forward")


@pytest.mark.parametrize("name", checks.ON_A_PROBLEM)
@pytest.mark.parametrize("implementation", BACKENDS)
def test_checks_pass_on_every_backend(name, implementation):
    """Triton's interpreter takes a smaller problem."""
    shape = Shape(T=16, D=16, V=160, S=4) if implementation == "triton" else TINY
    problem = problems.build(shape, "float32", device=DEVICE, drawn=shape.T)
    with use_backend(implementation):
        checks.ON_A_PROBLEM[name](problem)


def test_beyond_int32_at_a_small_size(backend):
    checks.beyond_int32(DEVICE, 64, 16, 128, 1)


def test_checks_fail_on_wrong_numbers(problem, monkeypatch):
    import r1kernels

    right = r1kernels.linear_logp

    def wrong(hidden, *rest, **options):
        out = right(hidden, *rest, **options)
        return out._replace(logp=out.logp * (1 + 1e-3 * torch.is_grad_enabled()))

    monkeypatch.setattr(r1kernels, "linear_logp", wrong)
    with pytest.raises(AssertionError, match="numbers differ"):
        checks.paths_agree(problem)
    with pytest.raises(AssertionError, match="linear_logp's d"):
        checks.any_upstream(problem)


def test_float32_sums_of_bfloat16_products():
    """A CPU rounds the products; the check then only has the order of magnitude."""
    assert checks.float32_accumulation("cpu", 32, 64, 48)["error"] < 1e-2
    out = torch.zeros(4, 4)
    left, right = torch.randn(4, 8), torch.randn(8, 4)
    accumulate(out, left, right, True)
    accumulate(out, left, right, False)
    torch.testing.assert_close(out, 2 * left @ right)


def test_memory_formula_grows_by_gradients_and_vectors_alone():
    low, high = (checks.allowance_mib(T, 4096, 131072, 1280) for T in (8192, 131072))
    assert high - low == pytest.approx((131072 - 8192) * (2 * 4096 + 256) / 2**20)


@pytest.mark.parametrize(("name", "table"), [("wide", "CHOICE"), ("counted", "COUNTED")])
def test_variants_of_our_products_run_with_their_own_entry(problem, monkeypatch, name, table):
    """With a stand-in for the tables: an entry is swapped for the time of a run."""
    configs = types.ModuleType("r1kernels._triton.head_configs")
    configs.CHOICE, configs.COUNTED = {0: "plain"}, {0: False}
    configs.VARIANTS = {"plain": {0: None}, "wide": {0: None, 90: None}, "wgmma": {90: None}}
    monkeypatch.setitem(sys.modules, configs.__name__, configs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert variants() == ["triton@wide", "triton@counted"]
    seen = []

    def ours(backend):
        seen.append((backend, getattr(configs, table)[0]))
        return lambda problem, mode: lambda: seen.append((backend, getattr(configs, table)[0]))

    monkeypatch.setattr(providers, "_ours", ours)
    provider = find(f"triton@{name}")
    assert provider.is_ours and provider.name == f"triton@{name}" and provider.family == "triton"
    before = getattr(configs, table)[0]
    provider.make(problem, "forward")()
    assert seen == [("triton", True if name == "counted" else name)] * 2
    assert getattr(configs, table) == {0: before}
    assert is_ours({"provider": f"triton@{name}"})


def test_cells_get_the_variants_that_matter_to_them():
    cells = gpu_plan.cells()
    others = ("triton@tma", "triton@counted")

    def added(mode):
        cell = next(cell for cell in cells if cell.mode == mode)
        whole = gpu_suite.with_variants(gpu_suite.chosen(cell, "cuda", None), others)
        return set(whole.providers) - set(cell.providers)

    assert added("forward_backward") == set(others)
    assert added("forward") == {"triton@tma"}
    assert added("zero_80") == added("zero_50") == {"triton@counted"}
    assert added("masked_50") == set()
    peers_alone = gpu_suite.chosen(cells[0], "cuda", ["eager"])
    assert "triton@tma" not in gpu_suite.with_variants(peers_alone, others).providers


def test_skipping_more_cells_than_there_are_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no cell is left of mode any after the first 99"):
        gpu_suite.run(folder=tmp_path, write=None, minutes=1, skip=99)


def test_every_variant_of_the_tables_computes_the_loss():
    shape = Shape(T=32, D=64, V=160, S=4)
    problem = problems.build(shape, "float32", device=DEVICE, drawn=shape.T)
    truth = problems.gradient_truth(problem, "zero_80", "policy")
    eager = problems.eager_errors(problem, "zero_80", truth)
    names = variants()
    assert "triton@counted" in names and len(names) > 2
    for name in names:
        result = find(name).make(problem, "zero_80")()
        errors = problems.errors(problem, "zero_80", truth, *result)
        assert verdict(errors, eager, "float32", True) is None, (name, errors, eager)


def test_memory_check_measures_and_fails_on_a_smaller_allowance(monkeypatch):
    found = checks.memory_is_flat(DEVICE, 16, 512, (256, 1024), 64)
    assert set(found) == {256, 1024}
    monkeypatch.setattr(checks, "allowance_mib", lambda *_: -1.0)
    with pytest.raises(AssertionError, match="the formula gives -1"):
        checks.memory_is_flat(DEVICE, 16, 512, (256,), 64)
