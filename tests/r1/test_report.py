"""Curves and page from a run directory."""

import json
import math

import pytest

from r1 import report


def fake_run(folder, steps=60):
    folder.mkdir()
    lines = []
    for step in range(steps + 1):
        rise = 1 - math.exp(-step / 12)
        row = {
            "step": step,
            "reward/mean": 0.4 + 0.8 * rise + 0.05 * math.sin(step * 2.1),
            "reward/accuracy": 0.3 + 0.6 * rise + 0.04 * math.sin(step * 1.7),
            "reward/format": 0.6 + 0.38 * rise,
            "length/mean": 13 + 6 * rise,
            "length/max": 30 + 4 * math.sin(step),
            "length/truncated": 0.1 * (1 - rise),
            "groups/zero_variance": 0.2 + 0.5 * rise,
            "policy/entropy": 0.6 * math.exp(-step / 20),
            "policy/clip_low_fraction": 0.001 * step / 60,
            "policy/clip_high_fraction": 0.002 * step / 60,
            "sampler/gap_mean": 1e-7 * (1 + math.sin(step) ** 2),
            "sampler/gap_max": 2e-5 * (1 + math.sin(step) ** 2),
            "parity/mean": 2e-7,
            "parity/max": 3e-6,
            "train/grad_norm": 0.5 + 0.3 * math.sin(step),
            "train/lr": 3e-4,
            "speed/tokens_per_second": 5000 + 300 * math.sin(step),
            "speed/sampled_per_second": 9000.0,
            "memory/rss_mib": 900 + step,
            "memory/peak_rss_mib": 950 + step,
            "time/step": 1.9 + 0.1 * math.sin(step) + (8 if step == 0 else 0),
            "time/rollout": 0.9,
            "time/train": 0.6,
            "time/old_logp": 0.15,
            "time/reward": 0.05,
            "time/sync": 0.03,
        }
        if step % 10 == 0:
            row |= {"eval/pass@1": 0.35 + 0.6 * rise, "eval/pass@1/low": 0.30 + 0.6 * rise}
            row |= {"eval/pass@1/high": 0.40 + 0.6 * rise}
        lines.append(json.dumps(row if step else {**row, "reward/mean": None}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    samples = [
        {
            "step": step,
            "kind": "eval",
            "id": "p1",
            "question": "2 * 3 | 4 <b>",
            "answer": "7",
            "completion": text,
            "reward": reward,
        }
        for step, text, reward in (
            (0, "no `idea`", 0.0),
            (60, "<think>...</think><answer>7</answer>", 1.3),
        )
    ]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
    (folder / "config.json").write_text(
        json.dumps({"rollout": {"engine": "vllm"}, "model": {"path": "toy"}})
    )
    facts = {"stage": "rl", "versions": {"torch": "2.13.0"}, "started": "2026-01-01 10:00"}
    facts["long"] = {"mode": "stream", "tokens": 2048, "predicted_bytes": {"stream": 3 << 20}}
    facts["kernels"] = {"Liger": "none: no GPU"}
    (folder / "run.json").write_text(json.dumps(facts))
    return folder


def test_report(tmp_path):
    page = report.write(fake_run(tmp_path / "toy-rl"))
    text = page.read_text()
    assert "| held-out pass@1 | 0.350 -> 0.946 |" in text
    assert "| hidden states | stream, tensors of 3 MiB predicted for 2,048 tokens |" in text
    assert "| Liger | none: no GPU |" in text
    assert "| sampler | vllm |" in text and "| torch | 2.13.0 |" in text
    assert "| rollout | 61 | 0.900 | 54.9 |" in text
    assert text.index("no 'idea'") < text.index("<answer>7</answer>")
    assert "2 \\* 3 \\| 4 &lt;b>" in text
    for name in (
        "reward",
        "accuracy",
        "length",
        "entropy",
        "clip",
        "sampler_gap",
        "throughput",
        "memory",
        "time",
    ):
        assert f"plots/{name}.png" in text
        assert (tmp_path / "toy-rl" / "plots" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert "plots/kl.png" not in text


def test_a_run_of_one_row_has_a_report(tmp_path):
    fake_run(tmp_path / "short", steps=0)
    text = report.write(tmp_path / "short").read_text()
    assert "| pass@1 | 0.35 (95% interval 0.3 to 0.4) |" in text and "Curves" not in text


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"metrics\.jsonl: missing or empty"):
        report.write(tmp_path)
