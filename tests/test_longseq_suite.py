"""The suite of long sequences on tiny decoders: processes, checks, plan, rows, report.

Nothing here is a measurement.
"""

import gc
import json
import os
import time

import pytest
import torch

from benchmarks import longseq_gpu, longseq_suite, report, run
from benchmarks import longseq_problem as problems
from benchmarks.gpu_pool import OutOfTime
from benchmarks.harness import WorkerError
from benchmarks.longseq_gpu import LongSuite, Part, bisect, extrapolated, plan
from benchmarks.longseq_problem import QWEN_1B, TINY, Case, decoder
from benchmarks.longseq_providers import PROVIDERS, LongProvider, find
from benchmarks.longseq_step import STEPS
from benchmarks.longseq_worker import LongWorker
from benchmarks.provider import Missing

HERE = "tests.test_longseq_suite"


def _wrong(model, rows):
    right = find("plain").apply(model, rows)
    return lambda tokens: 1.01 * right(tokens)


def _exits(model, rows):
    os._exit(11)


def _runs_out(model, rows):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. More words")


WRONG = LongProvider(name="wrong", apply=_wrong)
EXITS = LongProvider(name="exits", apply=_exits)
RUNS_OUT = LongProvider(name="runs_out", apply=_runs_out)
ABSENT = LongProvider(name="absent", apply=_wrong, package="no_such_package")


class LocalPool:
    """The worker in this process, where the pool would have several."""

    device = "cpu"

    def __init__(self, device, threads, folder, deadline, module, env):
        assert (device, module) == ("cpu", "benchmarks.longseq_worker")
        self.worker, self.deadline = LongWorker(device, threads, forks=False), deadline

    def hello(self, family):
        return self.worker.handlers["hello"]()

    def ask(self, family, request, timeout=None):
        if time.monotonic() > self.deadline:
            raise OutOfTime
        try:
            return self.worker.handlers[request.pop("do")](**request)
        except Missing as error:
            raise WorkerError(str(error), True) from error

    def start(self, families):
        assert set(families) <= {"all"}

    def only(self, family):
        assert family == "all"

    def close(self):
        pass


@pytest.fixture(scope="module")
def cpu_rows(tmp_path_factory):
    """One quick run on the CPU's plan by the command line, with bad providers beside ours."""
    file = tmp_path_factory.mktemp("longseq") / "longseq_cpu.jsonl"
    names = f"plain,stream,{HERE}:WRONG,{HERE}:EXITS,{HERE}:ABSENT"
    argv = ["--suite", "longseq", "--quick", "--threads", "1", "--minutes", "3", "--commit", "abc"]
    assert run.main([*argv, "--providers", names, "--json", str(file)]) == 0
    return [json.loads(text) for text in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def gpu_rows(tmp_path_factory):
    """A dry run of the GPU's plan, whole but for TRL, which takes long to import."""
    out = tmp_path_factory.mktemp("longseq_gpu")
    names = ",".join(name for name in (*PROVIDERS, *STEPS) if name != "trl")
    argv = ["--suite", "longseq", "--device", "cpu", "--quick", "--minutes", "3", "--threads", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(longseq_gpu, "Pool", LocalPool)
        argv += ["--commit", "abc", "--out", str(out), "--providers", names]
        assert run.main(argv) == 0
    gc.unfreeze()
    return [json.loads(text) for text in (out / "dry-run_longseq.jsonl").read_text().splitlines()]


def of(rows, provider, op="longseq"):
    return [row for row in rows if row["provider"] == provider and row["op"] == op]


def test_rows_have_every_field(cpu_rows, gpu_rows):
    for row in cpu_rows + gpu_rows:
        assert not [key for key in report.REQUIRED if key not in row]
        assert row["commit"] == "abc" and row["device"] == "cpu"
        assert (row["status"] == "ok") == (row["reason"] is None)
        assert row["status"] == "ok" or row["ms_p50"] is None


def test_cpu_peaks_are_measured_where_gradients_are_right(cpu_rows):
    for name in ("plain", "stream"):
        first, second = of(cpu_rows, name)
        assert first["rel_err_fp64"].keys() == {"embedding", "attention", "mlp", "norm"}
        assert 0 < max(first["rel_err_fp64"].values()) < 1e-5
        assert first["status"] == second["status"] == "ok"
        assert 0 < first["peak_mib"] < second["peak_mib"]
        assert first["predicted_mib"] < second["predicted_mib"]
        assert second["tokens_per_s"] == pytest.approx(1e3 * 512 / second["ms_p50"])
        (slope,) = of(cpu_rows, name, "longseq_slope")
        rise = (second["peak_mib"] - first["peak_mib"]) * 2**20 / (512 - 192)
        assert slope["bytes_per_token"] == pytest.approx(rise)


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("wrong", "refused", "differs from float64 by"),
        ("exits", "failed", "the measuring process ended with exit status 11"),
        ("absent", "missing", "no_such_package is not installed"),
    ],
)
def test_a_provider_that_fails_has_one_row_that_says_why(cpu_rows, name, status, reason):
    (row,) = of(cpu_rows, name)
    assert row["status"] == status and reason in row["reason"], row["reason"]
    assert not of(cpu_rows, name, "longseq_slope")


def test_dry_run_walks_the_whole_plan(gpu_rows):
    for part in plan(quick=True):
        op = "longseq" if part.kind == "train" else f"longseq_{part.kind}"
        for name in part.providers:
            found = [row for row in of(gpu_rows, name, op)
                     if row["shape"].get("T", 0) == part.tokens]  # fmt: skip
            if name == "trl":
                assert not found
                continue
            if name == "transformers_offload":
                assert [row["status"] for row in found] == ["missing"]
                continue
            assert [row["status"] for row in found] == ["ok"], found
            if part.kind == "train":
                assert found[0]["extrapolated"] == (part.tokens == 256)
                assert max(found[0]["rel_err_fp64"].values()) < 1e-5
                assert found[0]["ms_p50"] > 0
    for name, least in (("stream", 0.5), ("checkpoint", 0.0)):
        (step,) = of(gpu_rows, name, "longseq_step")
        assert least < step["share_ours"] < 1
        assert sum(step["parts_ms"].values()) == pytest.approx(step["ms_p50"], rel=0.2)
    (largest,) = of(gpu_rows, "stream", "longseq_largest")
    assert largest["probes"] and largest["packed"] == 64
    assert largest["largest_tokens"] == max(tokens for tokens, fits in largest["probes"] if fits)


def test_gradients_are_those_of_plain_autograd_in_float64():
    """Packed, in chunks that divide nothing, prompts masked; the truth is one by one."""
    shape = decoder(TINY, 2)
    tokens = problems.build_tokens(shape.vocab, 150, "cpu", packed=70)
    assert tokens.lengths == [70, 70, 10]
    assert tokens.mask_T[:7].tolist() == [0] * 7 and tokens.mask_T[7:70].all()
    plain = problems.build_model(shape, 150, "float32", "cpu", "sdpa")

    def one_by_one(tokens):
        sequences = tokens.ids_T.split(tokens.lengths)
        return torch.cat([plain.base_model(ids[None]).last_hidden_state[0] for ids in sequences])

    truth = problems.truth(plain, one_by_one, tokens)
    for name in ("checkpoint", "offload", "stream"):
        model = problems.build_model(shape, 150, "float32", "cpu", "r1kernels")
        hidden = find(name).apply(model, 32)
        problems.policy_loss(model, hidden(tokens), tokens, None).backward()
        errors = problems.gradient_errors(model, truth)
        assert max(errors.values()) < 2e-6, (name, errors)


class FakePool:
    """Answers at once."""

    device = "cuda"

    def __init__(self, left, limit=None):
        self.deadline, self.limit, self.asked = time.monotonic() + left, limit, []

    def ask(self, family, request, timeout=None):
        case = request.get("case")
        self.asked.append((request["do"], request.get("provider"), case and case["T"]))
        if request["do"] == "errors":
            return {"errors": {"mlp": 1e-3}}
        if request["do"] == "probe" and case["T"] > self.limit:
            raise WorkerError("out of memory: CUDA out of memory", True)
        if request["do"] == "turn" and request["provider"] == f"{HERE}:RUNS_OUT":
            raise WorkerError("out of memory: CUDA out of memory", True)
        if request["do"] == "turn":
            layers = case["layers"]
            return {"ms": [10.0 + 5.0 * layers], "peak_mib": 7.0 + 2.0 * layers,
                    "weights_mib": 1.0, "others_cores": 0.0}  # fmt: skip
        return {}

    def start(self, families):
        self.started = families

    def only(self, family):
        self.alone = family


def suite_on(pool, tmp_path, rows):
    common = {"device": "NVIDIA H100", "commit": "abc", "machine": {"gpu_memory_gib": 80.0}}
    return LongSuite(pool, tmp_path, rows.append, lambda text: None, common, False, 989e12)


def test_what_runs_out_of_memory_does_not_stop_the_others(tmp_path):
    rows: list = []
    names = (f"{HERE}:RUNS_OUT", f"{HERE}:ABSENT", "stream")
    part = Part(kind="train", model=QWEN_1B, tokens=32768, providers=names)
    suite_on(FakePool(1e4), tmp_path, rows).part(part)
    assert [row["status"] for row in rows] == ["missing", "missing", "ok"]
    assert rows[0]["reason"].startswith("out of memory")
    assert rows[2]["peak_mib"] == 7 + 2 * 28
    flops = problems.step_flops(decoder(QWEN_1B), [32768])
    assert rows[2]["mfu"] == pytest.approx(flops / 0.150 / 989e12)


def test_beyond_128k_two_and_three_layers_are_multiplied(tmp_path):
    rows: list = []
    pool = FakePool(1e4)
    part = Part(kind="train", model=QWEN_1B, tokens=524288, providers=("stream",))
    suite_on(pool, tmp_path, rows).part(part)
    assert [T for do, _, T in pool.asked if do == "turn"] == [524288, 524288]
    assert rows[0]["extrapolated"] and rows[0]["ms_p50"] == pytest.approx(150.0)
    assert rows[0]["peak_mib"] == pytest.approx(63.0)
    assert rows[0]["weights_mib"] == pytest.approx(4 * decoder(QWEN_1B).params / 2**20)
    few = {3: {"ms": [9.0, 1.0, 5.0], "peak_mib": 4.0}, 2: {"ms": [3.0], "peak_mib": 4.0}}
    assert extrapolated(few, 5) == {"ms": [9.0], "peak_mib": 4.0}


def test_what_does_not_fit_the_time_is_said_and_not_run(tmp_path):
    rows: list = []
    pool = FakePool(30.0)
    part = Part(kind="train", model=QWEN_1B, tokens=131072, providers=("stream", "liger"))
    suite_on(pool, tmp_path, rows).part(part)
    assert not pool.asked
    assert all("would take about" in row["reason"] for row in rows)


@pytest.mark.parametrize("limit", [50_000, 400_000, 3_000_000])
def test_the_longest_that_fits_is_found_from_the_prediction(tmp_path, limit):
    rows: list = []
    pool = FakePool(1e4, limit)
    suite = suite_on(pool, tmp_path, rows)
    suite.part(Part(kind="largest", model=QWEN_1B, providers=("transformers",)))
    (row,) = rows
    probes = [T for do, _, T in pool.asked if do == "probe"]
    predicted = row["predicted_tokens"]
    assert probes[0] == predicted
    space = 80 * 2**10 - suite.weights_mib(QWEN_1B)
    needs = [
        find("transformers").predict(
            Case(decoder=QWEN_1B, layers=28, T=tokens, dtype="bfloat16"), "cuda"
        )
        for tokens in (predicted, predicted + 8192)
    ]
    assert needs[0] <= space < needs[1]
    assert row["largest_tokens"] <= limit and pool.alone == "transformers"
    if row["fails_tokens"] is None:
        assert len(probes) == 8 and limit == 3_000_000
    else:
        assert row["largest_tokens"] <= limit < row["fails_tokens"]


def test_bisection_stops_at_the_host_and_near_the_end():
    def below(limit):
        return lambda tokens: tokens <= limit

    assert bisect(below(900), 400, 10, None, 1e18)[0] in range(850, 901, 10)
    low, high, probes = bisect(below(10**6), 400, 10, 1005, 1e18)
    assert (low, high) == (1000, None) and probes[-1] == [1000, True]
    low, high, _ = bisect(below(35), 1000, 10, None, 1e18)
    assert low == 0 and high > 35
    assert bisect(below(35), 40, 10, None, 0.0) == (0, 40, [[40, False]])


def test_plan_asks_for_what_exists_and_the_command_line_refuses_the_rest(tmp_path):
    parts = plan(quick=False)
    assert (parts[0].kind, parts[0].model, parts[0].tokens) == ("train", QWEN_1B, 32768)
    for part in parts:
        known = STEPS if part.kind == "step" else PROVIDERS
        assert set(part.providers) <= set(known)
    lengths = {(part.model, part.tokens) for part in parts if part.kind == "train"}
    assert len(lengths) == 8
    asked = [(part, name) for part in parts for name in part.providers]
    assert len(asked) == len({(p.kind, p.model, p.tokens, name) for p, name in asked})
    with pytest.raises(ValueError, match="no provider 'nobody'"):
        run.main(["--suite", "longseq", "--quick", "--providers", "nobody"])
    with pytest.raises(ValueError, match="no mode 'sideways'"):
        run.main(["--suite", "longseq", "--device", "cpu", "--modes", "sideways"])
    with pytest.raises(SystemExit):
        run.main(["--suite", "rl", "--out", str(tmp_path)])


def test_report_shows_peaks_slopes_and_what_was_not_measured(cpu_rows, gpu_rows, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    (results / "longseq_cpu.jsonl").write_text("".join(json.dumps(r) + "\n" for r in cpu_rows))
    dry = "".join(json.dumps(row) + "\n" for row in gpu_rows)
    (results / "dry-run_longseq.jsonl").write_text(dry)
    assert report.load(results) == cpu_rows
    readme = tmp_path / "README.md"
    arguments = ["--results", str(results), "--readme", str(readme)]
    report.main(arguments)
    text = readme.read_text()
    (slope,) = of(cpu_rows, "stream", "longseq_slope")
    assert f"{slope['bytes_per_token']:,.0f}" in text
    assert "wrong: " in text and "Long sequences on a GPU: not measured" in text
    assert (results / "longseq_cpu.png").stat().st_size > 5000
    report.main(arguments)
    assert readme.read_text() == text
    # As if the dry run had been a GPU's.
    as_gpu = [row | {"device": "NVIDIA H200", "shape": row["shape"] | {"model": QWEN_1B}}
              for row in gpu_rows]  # fmt: skip
    (results / "gpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in as_gpu))
    report.main(arguments)
    text = readme.read_text()
    assert "Long sequences, one NVIDIA H200" in text and "One GRPO step of qwen2.5-1.5b" in text
    assert longseq_suite.summary(gpu_rows).count("longseq_step") == 2
