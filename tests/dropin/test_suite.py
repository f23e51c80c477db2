import json

import pytest

# The originals are these libraries'.
pytest.importorskip("trl")
pytest.importorskip("liger_kernel")

import r1kernels
from benchmarks import dropin_suite, report, run


@pytest.mark.parametrize("case", dropin_suite.CASES)
def test_both_sides_of_a_case_agree(case):
    library = dropin_suite.LIBRARIES.get(case, case)
    steps = {}
    try:
        for side in dropin_suite.SIDES:
            steps[side] = [dropin_suite._Side(case, side, dropin_suite.QUICK).step()]
    finally:
        assert r1kernels.unpatch(library)
    found = dropin_suite.outcome("patched", steps, {})
    assert "reason" not in found, found
    assert found["norm"] > 0 and found["ratio_to_original"] > 0


def test_another_gradient_is_refused():
    step = {"ms": 1.0, "peak_mib": 0.0, "loss": 0.5, "norm": 2.0}
    steps = {"original": [step], "patched": [step | {"norm": 2.001}]}
    found = dropin_suite.outcome("patched", steps, {})
    assert found["status"] == "refused" and found["reason"].startswith("norm 2.001")
    assert dropin_suite.outcome("patched", steps, {"patched": "died"})["status"] == "missing"


def test_command_line(tmp_path, capsys):
    file = tmp_path / "dropin.jsonl"
    argv = ["--suite", "dropin", "--quick", "--threads", "1", "--modes", "liger"]
    assert run.main([*argv, "--json", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["provider"] for row in rows] == list(dropin_suite.SIDES)
    assert all(row["status"] == "ok" and row["samples"] == 1 for row in rows)
    assert "liger        patched" in capsys.readouterr().out
    ratio = rows[1]["ratio_to_original"]
    text = dropin_suite.section(report.load(tmp_path))
    assert f"| {ratio:.2f} |" in text and "| not run |" in text
    died = {**rows[1], "status": "missing", "reason": "out of memory", "ms_p50": None}
    assert "| out of memory |" in dropin_suite.section([rows[0], died])
    with pytest.raises(ValueError, match="no mode 'verl'"):
        run.main([*argv[:-1], "verl"])
