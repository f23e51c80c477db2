"""The benchmarks themselves: truth, schema, refusals, report. Shapes are tiny.

Nothing here is a measurement.
"""

import json
import re
from dataclasses import replace

import pytest

from benchmarks import harness, mlp, prefix_sharing, report, run, stream
from benchmarks import problem as problems
from benchmarks.cpu_suite import percentile, verdict
from benchmarks.problem import MODES
from benchmarks.providers import Provider, Result, find
from benchmarks.shapes import Shape

TINY = Shape(T=32, D=8, V=64, S=8)


def _wrong(problem, mode):
    right = find("eager").make(problem, mode)

    def iteration():
        result = right()
        return Result(result.logp, result.dhidden * 1.01, result.dweight)

    return iteration


def _broken(problem, mode):
    raise RuntimeError("this provider cannot start")


WRONG = Provider("wrong", _wrong)
BROKEN = Provider("broken", _broken)


@pytest.fixture(scope="module")
def tiny():
    return problems.build(TINY, "float32")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """One quick run of the command line, with a wrong and a broken provider beside ours."""
    file = tmp_path_factory.mktemp("cpu") / "cpu.jsonl"
    names = "native,tests.test_benchmarks:WRONG,tests.test_benchmarks:BROKEN"
    argv = [
        "--suite",
        "cpu",
        "--quick",
        "--minutes",
        "0.02",
        "--threads",
        "1",
        "--modes",
        "forward_backward,zero_50",
    ]
    assert run.main([*argv, "--providers", names, "--json", str(file)]) == 0
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "forward"])
@pytest.mark.parametrize("objective", ["policy", "ce"])
def test_gradient_truth_is_that_of_autograd(tiny, mode, objective):
    truth = problems.gradient_truth(tiny, mode, objective)
    hidden_TD = tiny["hidden"].double().requires_grad_()
    weight_VD = tiny["weight"].double().requires_grad_()
    logp_TV = (hidden_TD @ weight_VD.T).log_softmax(-1)
    logp_T = logp_TV.gather(1, tiny["targets"].unsqueeze(1)).squeeze(1)
    entropy_T = -(logp_TV.exp() * logp_TV).sum(-1)
    streams = problems.streams(tiny, mode)
    if objective == "ce":
        loss = -(logp_T * streams[2]).sum() / streams[2].sum()
    else:
        loss = problems.clipped_loss(logp_T, entropy_T, *streams)
    loss.backward()
    # 1 - p loses digits in a plain log_softmax where p is 1 - 1e-6; the truth does not.
    for value, name, index in (
        (hidden_TD.grad, "dhidden", "rows"),
        (weight_VD.grad, "dweight", "vocab"),
    ):
        assert problems.relative_error(value[truth[index]], truth[name]) < 1e-9
    assert problems.relative_error(logp_T.detach(), tiny["truth_logp"]) < 1e-12
    assert problems.relative_error(entropy_T.detach(), tiny["truth_entropy"]) < 1e-9


def test_problem_has_the_rows_its_modes_name(tiny):
    share = {
        mode: problems.rows_with_coefficient(tiny, mode).float().mean().item() for mode in MODES
    }
    assert share["zero_50"] == 0.5
    assert share["masked_50"] == 0.5
    assert share["forward_backward"] == share["entropy"] == share["frozen"] == 1.0
    assert (tiny["logp_old"] <= 0).all()
    assert tiny["truth_logp"].exp().max() > 0.999
    assert tiny["truth_logp"].min() < -1


def test_repeated_sequences_have_the_truth_of_the_whole_problem():
    once = problems.build(TINY, "float32")
    twice = problems.build(Shape(T=64, D=8, V=64, S=8), "float32", drawn=TINY.T)
    assert twice["copies"] == 2
    assert twice["hidden"].shape == (64, 8)
    assert (twice["targets"][32:] == once["targets"]).all()
    whole = problems.gradient_truth(twice | {"copies": 1}, "entropy", "policy")
    halves = problems.gradient_truth(twice, "entropy", "policy")
    assert problems.relative_error(halves["dweight"], whole["dweight"]) < 1e-12
    assert (
        problems.relative_error(find("eager").make(twice, "entropy")().dweight, once_dweight(once))
        < 1e-5
    )


def once_dweight(problem):
    return find("eager").make(problem, "entropy")().dweight.double()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["native", "eager"])
def test_providers_compute_the_mode(tiny, mode, name):
    result = find(name).make(tiny, mode)()
    truth = problems.gradient_truth(tiny, mode, "policy") if mode != "forward" else None
    errors = problems.errors(tiny, mode, truth, *result)
    assert verdict(errors, None, "float32", False) is None, errors
    assert (errors["dhidden"] is None) == (mode == "forward")
    assert (errors["dweight"] is None) == (mode in ("forward", "frozen"))


def test_rows_have_every_field_and_ours_are_timed(rows):
    for row in rows:
        assert not [key for key in report.REQUIRED if key not in row]
        assert set(row["shape"]) == set("TDV")
        assert row["machine"]["threads"] == 1
    timed = {
        (r["provider"], r["mode"], r["dtype"], r["shape"]["T"]) for r in rows if r["status"] == "ok"
    }
    for provider in ("native", "floor", "eager"):
        for mode, dtype, T in (
            ("forward_backward", "float32", 64),
            ("zero_50", "float32", 64),
            ("forward_backward", "bfloat16", 64),
        ):
            assert (provider, mode, dtype, T) in timed
    for row in rows:
        if row["status"] == "ok":
            assert 0 < row["ms_min"] <= row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
            assert row["ratio_to_floor"] == pytest.approx(row["ms_p50"] / row["floor_ms"])
            assert row["peak_mib"] >= 0
        if row["provider"] == "native":
            assert row["rel_err_fp64"]["dhidden"] < 5e-3
            assert row["grad_mib"] > 0


def test_a_wrong_provider_is_refused_with_its_numbers(rows):
    wrong = [row for row in rows if row["provider"] == "wrong" and row["dtype"] == "float32"]
    assert len(wrong) == 2
    for row in wrong:
        assert row["status"] == "refused"
        assert "dhidden" in row["reason"]
        assert row["rel_err_fp64"]["dhidden"] == pytest.approx(0.01, rel=0.01)
        assert row["ms_p50"] is None
        assert row["ratio_to_floor"] is None


def test_a_broken_provider_is_missing_with_its_reason(rows):
    broken = [row for row in rows if row["provider"] == "broken"]
    assert broken
    for row in broken:
        assert row["status"] == "missing"
        assert "this provider cannot start" in row["reason"]


def test_verdict_holds_ours_to_twice_eager():
    errors = {"logp": 1e-7, "logp_near_one": 1.0, "dhidden": 5e-5, "dweight": None}
    eager = {"logp": 1e-7, "logp_near_one": 1e-3, "dhidden": 1e-5, "dweight": 1e-5}
    assert verdict(errors, eager, "float32", is_ours=False) is None
    assert "twice eager's" in verdict(errors, eager, "float32", is_ours=True)
    assert verdict(errors | {"dhidden": 2e-5}, eager, "float32", is_ours=True) is None
    assert "differs" in verdict(errors | {"dhidden": float("nan")}, eager, "float32", is_ours=False)
    assert "nothing to check" in verdict(
        {"logp": None, "logp_near_one": None}, None, "float32", False
    )


@pytest.mark.parametrize("argv", [["--providers", "nobody"], ["--modes", "sideways"]])
def test_unknown_names_are_named(argv):
    with pytest.raises(ValueError, match=f"no {argv[0][2:-1]} '{argv[1]}'"):
        run.main(["--suite", "cpu", "--quick", *argv])


def test_percentile_interpolates():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.2) == pytest.approx(1.2)
    assert percentile([5.0], 0.8) == 5.0


def test_report_round_trip(rows, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    (results / "cpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\nbefore\n\n{report.BEGIN}\nold figures\n{report.END}\n\nafter\n")
    arguments = ["--results", str(results), "--readme", str(readme)]
    report.main(arguments)
    text = readme.read_text()
    assert text.startswith("# Title\n\nbefore\n\n" + report.BEGIN)
    assert text.endswith(report.END + "\n\nafter\n")
    assert "old figures" not in text
    ours = next(r for r in rows if r["provider"] == "native" and r["mode"] == "zero_50")
    assert f"({ours['ratio_to_floor']:.2f}x)" in text
    assert "refused" in text
    assert "not measured" in text
    assert (results / "head_time.png").stat().st_size > 5000
    report.main(arguments)
    assert readme.read_text() == text


def test_report_rejects_bad_rows_and_files(rows, tmp_path):
    (tmp_path / "x.jsonl").write_text(
        json.dumps(rows[0] | {"status": "refused", "ms_p50": 1.0}) + "\n"
    )
    with pytest.raises(ValueError, match="has a time and the status 'refused'"):
        report.load(tmp_path)
    (tmp_path / "x.jsonl").write_text(
        json.dumps({k: v for k, v in rows[0].items() if k != "commit"}) + "\n"
    )
    with pytest.raises(ValueError, match="lacks commit"):
        report.load(tmp_path)
    with pytest.raises(ValueError, match="once each"):
        report.replace_block("no markers", "new")


def test_rl_verdict():
    from benchmarks import rl_suite

    step = {"completions": 128, "longest": 48, "moved": True}
    assert rl_suite.verdict([step | {"moved": False}, step]) is None
    assert "not move" in rl_suite.verdict([step | {"moved": False}])
    assert "127 completions" in rl_suite.verdict([step | {"completions": 127}])
    assert "49 tokens" in rl_suite.verdict([step | {"longest": 49}])


def test_commit_is_a_hash_of_the_sources_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert re.fullmatch("sources-[0-9a-f]{12}", harness.commit())


def test_prefix_sharing_compares_gradients_before_it_times(monkeypatch, capsys):
    small = replace(prefix_sharing.SMALL, hidden=16, layers=1, head_dim=8, intermediate=24)
    monkeypatch.setattr(prefix_sharing, "SMALL", small)
    sizes = ["--prompt", "6", "--completion", "3", "--group", "4", "--turns", "1"]
    monkeypatch.setattr("sys.argv", ["prefix_sharing", *sizes, "--device", "cpu"])
    prefix_sharing.main()
    assert "tokens 2.00x, operations 1." in capsys.readouterr().out
    monkeypatch.setattr(prefix_sharing, "AGREE", {"float32": 0.0, "bfloat16": 0.0})
    with pytest.raises(SystemExit, match="which rounding does not explain"):
        prefix_sharing.main()


def test_mlp_table(monkeypatch, capsys):
    monkeypatch.setattr(mlp, "ROUNDS", 1)
    monkeypatch.setattr("sys.argv", ["mlp", "40", "8", "12"])
    mlp.main()
    printed = capsys.readouterr().out
    assert all(f"\n{name}  " in printed for name in mlp.providers())
    monkeypatch.setattr(mlp, "tiled_mlp", lambda *x: 1.1 * mlp.untiled(*x))
    with pytest.raises(RuntimeError, match="tiled_mlp differs from the untiled MLP by 1"):
        mlp.main()


def test_stream_table(monkeypatch, capsys):
    monkeypatch.setattr(stream, "ROUNDS", 1)
    monkeypatch.setattr("sys.argv", ["stream", "24", "32", "1"])
    stream.main()
    printed = capsys.readouterr().out
    names = ("plain", "checkpointed", "stream_model", "saved attention")
    assert all(f"\n{name}  " in printed for name in names)
    right = stream.stream_model
    monkeypatch.setattr(
        stream, "stream_model", lambda *x, **more: lambda ids: 1.1 * right(*x, **more)(ids)
    )
    with pytest.raises(RuntimeError, match="stream_model differs from the plain model by 1"):
        stream.main()
