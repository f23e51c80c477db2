"""Rows, samples, rewinding, the console."""

import json
import math

import pytest

from r1 import metrics
from r1.metrics import RunLog
from r1.types import Completion, Group, Prompt


def group(text, reward=1.0, question="1 + 1 =", finish="stop"):
    completion = Completion((1, 2, 3), (-0.1, -0.2, -0.3), finish, 0, text)
    prompt = Prompt(question, question, "2", "toy", (1,))
    return Group(prompt, [completion], [reward], [{"accuracy": reward, "format": 0.0}])


def rows(folder):
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_lines_and_samples(tmp_path, capsys):
    with RunLog(tmp_path, step=-1, total=10, tensorboard=False) as log:
        log.row(1, {"reward/mean": 0.5, "train/grad_norm": math.nan, "time/step": 1.5})
        log.samples(1, [group("<answer>2</answer>")], kind="eval", rows=1, show=1)
        log.warn("something odd")
    assert rows(tmp_path) == [
        {"step": 1, "reward/mean": 0.5, "train/grad_norm": None, "time/step": 1.5}
    ]
    printed = capsys.readouterr().out
    assert "step 1/10  reward 0.500" in printed and "<answer>2</answer>" in printed
    assert (tmp_path / "log.txt").read_text() == printed and "WARNING: something odd" in printed
    sample = json.loads((tmp_path / "rollouts.jsonl").read_text())
    assert sample["completion"] == "<answer>2</answer>" and sample["reward/accuracy"] == 1.0


def test_a_resumed_run_takes_back_later_rows_and_torn_lines(tmp_path):
    with RunLog(tmp_path, step=-1, total=10, tensorboard=False) as log:
        for step in range(5):
            log.row(step, {"x": step})
            log.samples(step, [group("a")], kind="train", rows=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "x"')
    with RunLog(tmp_path, step=2, total=10, tensorboard=False) as log:
        log.row(3, {"x": 30})
    assert [(row["step"], row["x"]) for row in rows(tmp_path)] == [(0, 0), (1, 1), (2, 2), (3, 30)]
    kept = [
        json.loads(text)["step"] for text in (tmp_path / "rollouts.jsonl").read_text().splitlines()
    ]
    assert kept == [0, 1, 2]


def test_a_completion_with_odd_line_ends_survives_a_resume(tmp_path):
    text = "a\u2028b\u0085c\u2029d\rf\x0bg\x1eh"
    with RunLog(tmp_path, step=-1, total=10, tensorboard=False) as log:
        log.samples(1, [group(text)], kind="eval", rows=1)
        log.samples(2, [group("later")], kind="eval", rows=1)
    RunLog(tmp_path, step=1, total=10, tensorboard=False).close()
    (record,) = metrics.read_rows(tmp_path / "rollouts.jsonl")
    assert record["completion"] == text


def test_a_fresh_start_drops_everything(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nnot json\n')
    RunLog(tmp_path, step=-1, total=1, tensorboard=False).close()
    assert rows(tmp_path) == []


def test_tensorboard_files_hold_the_scalars(tmp_path):
    event = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunLog(tmp_path, step=-1, total=3) as log:
        for step in range(1, 4):
            log.row(step, {"reward/mean": step / 4})
    accumulator = event.EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert [point.value for point in accumulator.Scalars("reward/mean")] == [0.25, 0.5, 0.75]


def test_the_table_keeps_its_width_and_both_ends_of_a_long_text():
    text = metrics.table([(group("start" + "x" * 5000 + "\x1b[31m\nend"), 0)], width=80)
    assert {len(line) for line in text.splitlines()} == {80}
    assert "start" in text and "end" in text and "\x1b" not in text and " ... " in text


@pytest.mark.parametrize("length", [9, 10, 11, 500])
def test_shorten(length):
    out = metrics.shorten("a" * (length - 1) + "z", 10)
    assert len(out) == min(length, 10) and out.endswith("z")


def test_timer_adds_up_parts():
    timer = metrics.Timer()
    for _ in range(2):
        with timer("train"):
            pass
    first = timer.pop()
    assert 0 <= first["time/train"] <= first["time/step"]
    assert "time/train" not in timer.pop()


def test_memory_is_of_this_process():
    row = metrics.memory()
    assert 20 < row["memory/rss_mib"] <= row["memory/peak_rss_mib"] * 1.01
