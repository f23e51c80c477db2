"""The exactness report: its numbers are errors of what ran, its bars can be missed."""

import json

import pytest

from benchmarks import exactness, report


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    pytest.importorskip("r1kernels._C", reason="needs the C++ extension")
    file = tmp_path_factory.mktemp("exactness") / "exactness.jsonl"
    exactness.main(["--quick", "--threads", "1", "--json", str(file)])
    return report.load(file.parent)


def test_ours_meets_the_bars_where_eager_does_not(rows):
    assert exactness.missed(rows) == []
    found = {row["provider"]: row["rel_err_fp64"] for row in rows}
    assert found["native"]["entropy"] < 1e-5 < found["eager"]["entropy"]
    assert all(0 < value < 1e-2 for value in found["native"].values())


def test_bars_can_be_missed(rows):
    worse = json.loads(json.dumps(rows))
    for row in worse:
        if row["provider"] == "native":
            row["rel_err_fp64"]["dhidden"] *= 20
    assert [text.split(":")[0] for text in exactness.missed(worse)][:2] == ["dhidden", "dhidden"]
    assert "missed: dhidden" in exactness.section(worse)
    others = [row for row in rows if row["provider"] != "native"]
    assert exactness.missed(others) == ["no row of ours"]


def test_section_of_the_report(rows):
    text = report.block(rows, {})
    assert "where every token is peaked" in text and "all met" in text
    assert "Exactness on peaked tokens: not measured." in report.block([], {})
