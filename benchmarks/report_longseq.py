"""Tables and pictures of long sequences: what was measured, and the memory model beside it."""

from pathlib import Path

from benchmarks.longseq_problem import QWEN_1B, QWEN_7B
from benchmarks.report_text import number, table

LABELS = {
    "plain": "plain autograd",
    "torch_checkpoint": "torch's checkpointing",
    "transformers": "transformers' checkpointing",
    "transformers_offload": "transformers' checkpointing, offloaded",
    "liger": "Liger's tiled MLP, checkpointing",
    "checkpoint": "r1kernels: tiled MLP, checkpointing",
    "offload": "r1kernels: the same, offloaded",
    "stream": "r1kernels: `stream_model`",
    "stream_device": "r1kernels: `stream_model`, inputs on the device",
    "trl": "TRL's loss, transformers' checkpointing",
}
STYLES = {
    "plain": ("#7f8c8d", "o"),
    "torch_checkpoint": ("#1f618d", "o"),
    "transformers": ("#5dade2", "x"),
    "liger": ("#27ae60", "o"),
    "checkpoint": ("#f5b041", "o"),
    "offload": ("#d35400", "x"),
    "stream": ("#c0392b", "D"),
}


def label(row: dict) -> str:
    return LABELS.get(row["provider"], row["provider"])


def named(rows: list[dict], op: str, cpu: bool) -> list[dict]:
    """Rows of an op, of a CPU, or of GPUs and large decoders."""
    return [
        row
        for row in rows
        if row["op"] == op
        and (row["device"] == "cpu") == cpu
        and (cpu or row["shape"].get("model") in (QWEN_1B, QWEN_7B))
    ]


def providers(rows: list[dict]) -> list[str]:
    found = {row["provider"] for row in rows}
    return [name for name in LABELS if name in found] + sorted(found - set(LABELS))


def on_cpu(rows: list[dict]) -> str:
    """Resident peaks by length, slopes beside the memory model's, errors and times."""
    found = named(rows, "longseq", True)
    if not found:
        return "Long sequences on a CPU: not measured."
    slopes = {row["provider"]: row for row in named(rows, "longseq_slope", True)}
    peaks = {(row["provider"], row["shape"]["T"]): row for row in found}
    lengths = sorted({T for _, T in peaks})
    body = []
    for name in providers(found):
        cells = [LABELS.get(name, name)]
        for T in lengths:
            row = peaks.get((name, T))
            if row is None or row["status"] != "ok":
                cells.append("" if row is None else row["status"])
                continue
            seconds = "" if row["busy"] else f" ({row['ms_p50'] / 1e3:.1f} s)"
            cells.append(number(row["peak_mib"]) + seconds)
        slope = slopes.get(name)
        cells.append(f"{slope['bytes_per_token']:,.0f}" if slope else "-")
        predicted = slope and slope["predicted_bytes_per_token"]
        off = 100 * (slope["bytes_per_token"] / predicted - 1) if predicted else 0
        cells.append(f"{predicted:,.0f} ({off:+.1f}%)" if predicted else "-")
        first = peaks.get((name, lengths[0]))
        errors = (first and first["rel_err_fp64"]) or {}
        cells.append(f"{max(errors.values()):.1e}" if errors else "-")
        body.append(cells)
    shape, machine = found[0]["shape"], found[0]["machine"]
    versions = [f"{name} {machine[name]}" for name in ("torch", "transformers", "liger-kernel")
                if name in machine]  # fmt: skip
    busy = [row for row in found if row["status"] == "ok" and row["busy"]]
    times = "Times are left out where other processes computed: a peak is not changed by them."
    text = [
        "**Long sequences on a CPU: peak resident MiB above weights and gradients of one step**, "
        "forward and backward of a decoder and the fused policy loss, one sequence of T tokens, "
        f"{found[0]['dtype']}, a process per number. L={shape['L']}, D={shape['D']}, "
        f"I={shape['I']}, {shape['H']} heads of {shape['E']}, V={shape['V']}: small, since "
        f"attention at {lengths[-1] >> 10}k tokens takes a CPU long. Bytes per token is the slope "
        "of a line through the peaks, beside it that of `r1kernels.memory` and how far off it is; "
        "the error is the largest of the gradients of embedding, attention, MLP and norms against "
        f"float64 at {lengths[0]} tokens. A CPU has nowhere to offload to. "
        f"{times if busy else ''} {machine['cpu']}, {machine['threads']} threads; "
        f"{', '.join(versions)}; commit {', '.join(sorted({row['commit'] for row in found}))}.",
        "",
        table(
            ["", *(f"T={T}" for T in lengths), "bytes/token", "predicted", "error"], body
        ),
    ]  # fmt: skip
    lost = sorted({f"{label(row)}: {row['reason']}" for row in found if row["status"] != "ok"})
    if lost:
        text += ["", "No figure: " + "; ".join(lost) + "."]
    return "\n".join(text)


def on_gpus(rows: list[dict]) -> list[str]:
    """A section for each card that was measured."""
    found = named(rows, "longseq", False)
    devices = sorted({row["device"] for row in found})
    if not devices:
        return [
            "**Long sequences on a GPU: not measured.** `python -m benchmarks.run --suite longseq "
            "--minutes 8 --out DIR` measures decoders of 1.5 and 7 billion parameters from 8k to "
            "512k tokens, the longest that fits, and a GRPO step; docs/log.md has what is expected."
        ]
    return [on_gpu([row for row in rows if row["device"] == device]) for device in devices]


def on_gpu(rows: list[dict]) -> str:
    found, machine = named(rows, "longseq", False), rows[0]["machine"]
    cells = {(r["provider"], r["shape"]["model"], r["shape"]["T"]): r for r in found}
    columns = sorted({key[1:] for key in cells})
    body = []
    for name in providers(found):
        body.append([LABELS.get(name, name), *(_cell(cells.get((name, *c))) for c in columns)])
    text = [
        f"**Long sequences, one {rows[0]['device']}, {found[0]['dtype']}: peak GiB above weights "
        "and gradients, tokens/s, model FLOP utilisation** (causal attention, backward twice the "
        "forward, recomputation not counted; of the data sheet's rate). A star: two and three "
        f"layers were timed and the difference multiplied. torch {machine.get('torch')}, triton "
        f"{machine.get('triton')}, commit {', '.join(sorted({r['commit'] for r in found}))}.",
        "",
        table(["", *(f"{model}, {T >> 10}k" for model, T in columns)], body),
    ]
    largest = [row for row in named(rows, "longseq_largest", False) if row["status"] == "ok"]
    if largest:
        body = [
            [label(row), row["shape"]["model"],
             (">= " if row["fails_tokens"] is None else "") + f"{row['largest_tokens']:,}",
             f"{row['predicted_tokens']:,}" if row["predicted_tokens"] else "-",
             f"{row['host_tokens']:,}" if row["host_tokens"] else "-"]
            for row in largest
        ]  # fmt: skip
        head = ["", "model", "fits", "memory model", "host memory holds"]
        text += ["", "Longest step in tokens, weights and gradients on the GPU and no optimizer "
                 "state; long ones packed of sequences of 32k, which take the same memory:",
                 "", table(head, body)]  # fmt: skip
    steps = [row for row in named(rows, "longseq_step", False) if row["status"] == "ok"]
    if steps:
        body = [
            [label(row), number(row["peak_mib"] / 1024), number(row["ms_p50"] / 1e3),
             f"{100 * row['share_ours']:.0f}%",
             ", ".join(f"{part} {ms / 1e3:.2f}" for part, ms in row["parts_ms"].items())]
            for row in steps
        ]  # fmt: skip
        shape = steps[0]["shape"]
        text += ["", f"One GRPO step of {shape['model']} on {shape['T']} given tokens, AdamW in "
                 "the weights' dtype:", "",
                 table(["", "GiB in use", "s", "ours", "s by part"], body)]  # fmt: skip
    lost = sorted({_lost(row) for row in rows
                   if row["op"].startswith("longseq") and row["status"] != "ok"})  # fmt: skip
    if lost:
        text += ["", "No figure: " + "; ".join(lost) + "."]
    return "\n".join(text)


def _lost(row: dict) -> str:
    length = f" {row['shape']['T']}" if "T" in row["shape"] else ""
    return f"{label(row)}, {row['shape'].get('model')}{length}: {row['reason']}"


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return row["status"]
    used = f", {100 * row['mfu']:.0f}%" if row["mfu"] is not None else ""
    star = "*" if row["extrapolated"] else ""
    return f"{number(row['peak_mib'] / 1024)}{star} ({number(row['tokens_per_s'], 4)}{used})"


def block(rows: list[dict]) -> list[str]:
    """The README's parts."""
    return [on_cpu(rows), *on_gpus(rows)]


def plot(rows: list[dict], folder: Path) -> dict[str, Path]:
    """One picture of all providers' peaks on a CPU, the memory model's dashed."""
    found = [row for row in named(rows, "longseq", True) if row["status"] == "ok"]
    if not found:
        return {}
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for name in providers(found):
        points = sorted((r["shape"]["T"], r) for r in found if r["provider"] == name)
        color, marker = STYLES.get(name, ("black", "s"))
        tokens = [T for T, _ in points]
        text = LABELS.get(name, name).replace("`", "")
        axis.plot(tokens, [r["peak_mib"] for _, r in points], color=color, marker=marker,
                  label=text, markersize=5)  # fmt: skip
        if all(r["predicted_mib"] for _, r in points):
            axis.plot(tokens, [r["predicted_mib"] for _, r in points], color=color, linestyle=":",
                      linewidth=1)  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    lengths = sorted({r["shape"]["T"] for r in found})
    axis.set_xticks(lengths, [f"{T >> 10}k" if T >= 1024 else str(T) for T in lengths])
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("tokens of one sequence")
    axis.set_ylabel("peak MiB above weights and gradients")
    axis.set_title("One training step on a CPU; dotted: the memory model's prediction", fontsize=10)
    axis.grid(linewidth=0.3)
    axis.legend(fontsize=7)
    path = folder / "longseq_cpu.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return {"Peak memory of a training step against tokens, on a CPU": path}
