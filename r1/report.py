"""`r1 report RUN`: a Markdown page with curves from the files of a run directory."""

import json
from pathlib import Path
from statistics import median

from r1 import plots
from r1.metrics import METRICS, ROLLOUTS, read_rows, shorten
from r1.plots import series, time_parts

BEFORE_AFTER = 3


def write(run: Path) -> Path:
    """Write plots/*.png and report.md of a run directory; returns the page.

    Raises: ValueError when the folder has no rows to show.
    """
    rows = read_rows(run / METRICS)
    if not rows:
        raise ValueError(f"{run / METRICS}: missing or empty, so there is nothing to report")
    figures = plots.draw(run / "plots", rows)
    facts = _read_json(run / "run.json")
    config = _read_json(run / "config.json")
    sections = [
        f"# {run.name}: {facts.get('stage', 'run')}\n",
        _summary(rows, config, facts),
        _held_out(rows),
        _curves(figures),
        _time(rows),
        _samples(read_rows(run / ROLLOUTS)),
        _settings(config, facts),
    ]
    page = run / "report.md"
    page.write_text("\n".join(part for part in sections if part), encoding="utf-8")
    return page


def _summary(rows: list[dict], config: dict, facts: dict) -> str:
    def ends(key: str, form: str) -> str:
        values = series(rows, key)[1]
        return (
            f"{values[0]:{form}} -> {values[-1]:{form}}"
            if len(values) > 1
            else "".join(f"{v:{form}}" for v in values)
        )

    def total(key: str) -> float:
        return sum(series(rows, key)[1])

    peaks = series(rows, "memory/peak_rss_mib")[1]
    gpu_peaks = series(rows, "memory/peak_gpu_mib")[1]
    ways = facts.get("long", {})
    way = ways.get("mode", "")
    if way in ways.get("predicted_bytes", {}):
        peak = ways["predicted_bytes"][way] / 2**20
        way += f", tensors of {peak:,.0f} MiB predicted for {ways['tokens']:,} tokens"
    steps = series(rows, "time/step")[1]
    parity = series(rows, "parity/max")[1]
    lines = [
        ("model", config.get("model", {}).get("path", "")),
        ("sampler", config.get("rollout", {}).get("engine", "")),
        ("steps", str(rows[-1]["step"])),
        ("held-out pass@1", ends("eval/pass@1", ".3f")),
        ("reward", ends("reward/mean", ".3f")),
        ("cross-entropy", ends("loss/cross_entropy", ".3f")),
        ("completion length", ends("length/mean", ".1f")),
        ("entropy", ends("policy/entropy", ".3f")),
        ("seconds, all steps", f"{sum(steps):.0f}" if steps else ""),
        ("seconds per step, median", f"{median(steps):.2f}" if steps else ""),
        ("tokens sampled", f"{total('length/sum'):,.0f}" if total("length/sum") else ""),
        ("largest gap found by the parity probe", f"{max(parity):.1e} nats" if parity else ""),
        (
            "prompts dropped",
            f"{total('dropped/prompts'):.0f}" if series(rows, "dropped/prompts")[1] else "",
        ),
        (
            "optimizer steps skipped (not finite)",
            f"{total('train/skipped'):.0f}" if series(rows, "train/skipped")[1] else "",
        ),
        ("peak resident memory", f"{max(peaks):.0f} MiB" if peaks else ""),
        ("peak GPU memory", f"{max(gpu_peaks):.0f} MiB" if gpu_peaks else ""),
        ("hidden states", way),
        *facts.get("kernels", {}).items(),
        ("started", facts.get("started", "")),
    ]
    return (
        "| | |\n|---|---|\n"
        + "\n".join(f"| {name} | {value} |" for name, value in lines if value)
        + "\n"
    )


def _held_out(rows: list[dict]) -> str:
    """Every figure of the last evaluation."""
    evaluated = [row for row in rows if "eval/pass@1" in row]
    if not evaluated:
        return ""
    last = evaluated[-1]
    figures = {key[5:]: value for key, value in last.items() if key.startswith("eval/")}
    low, high = figures.pop("pass@1/low", None), figures.pop("pass@1/high", None)
    shown = {name: f"{value:.4g}" for name, value in figures.items()}
    if low is not None and high is not None:
        shown["pass@1"] += f" (95% interval {low:.4g} to {high:.4g})"
    body = "\n".join(f"| {name} | {value} |" for name, value in shown.items())
    return f"## Held-out prompts, step {last['step']}\n\n| | |\n|---|---|\n{body}\n"


def _curves(figures: list[tuple[str, str]]) -> str:
    cells = [f"![{title}](plots/{file})" for file, title in figures]
    pairs = [cells[index : index + 2] for index in range(0, len(cells), 2)]
    body = "\n".join(f"| {' | '.join([*pair, ''][:2])} |" for pair in pairs)
    return f"## Curves\n\n| | |\n|---|---|\n{body}\n" if cells else ""


def _time(rows: list[dict]) -> str:
    parts = time_parts(rows)
    if not parts:
        return ""
    whole = sum(series(rows, "time/step")[1])
    lines = []
    for name in parts:
        seconds = series(rows, f"time/{name}")[1]
        lines.append((name, len(seconds), median(seconds), sum(seconds)))
    lines.append(("other", len(rows), 0.0, max(0.0, whole - sum(line[3] for line in lines))))
    body = "\n".join(
        f"| {name} | {count} | {middle:.3f} | {seconds:.1f} | {seconds / whole:.0%} |"
        if name != "other"
        else f"| other | | | {seconds:.1f} | {seconds / whole:.0%} |"
        for name, count, middle, seconds in lines
    )
    head = "| part | steps | median seconds | total seconds | share |\n|---|---|---|---|---|\n"
    return f"## Where the time goes\n\n{head}{body}\n"


def _samples(records: list[dict]) -> str:
    """The same held-out prompts at the first and at the last evaluation."""
    held_out = [record for record in records if record["kind"] == "eval"]
    steps = sorted({record["step"] for record in held_out})
    if not steps:
        return ""
    parts = ["## Completions of held-out prompts\n"]
    first = {record["id"]: record for record in held_out if record["step"] == steps[0]}
    last = {record["id"]: record for record in held_out if record["step"] == steps[-1]}
    for name in list(first)[:BEFORE_AFTER]:
        parts.append(
            f"**{_escape(shorten(first[name]['question'], 200))}** "
            f"(answer {_escape(first[name]['answer'])})\n"
        )
        for record in [first[name], *([last[name]] if name in last and len(steps) > 1 else [])]:
            parts.append(
                f"- step {record['step']}, reward {record['reward']}: "
                f"`{shorten(record['completion'], 400).replace('`', chr(39))}`"
            )
        parts.append("")
    return "\n".join(parts)


def _settings(config: dict, facts: dict) -> str:
    versions = "\n".join(
        f"| {name} | {version} |" for name, version in facts.get("versions", {}).items()
    )
    settings = json.dumps(config, indent=2, ensure_ascii=False)
    return (
        f"## Versions\n\n| | |\n|---|---|\n{versions}\n\n"
        "## Settings\n\n<details><summary>config.json</summary>\n\n"
        f"```json\n{settings}\n```\n\n</details>\n"
    )


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}
