"""Tables and pictures of GPUs: what was measured, and the roofline model where nothing was."""

from pathlib import Path

from benchmarks import gpu_plan
from benchmarks.cpu_suite import is_ours
from benchmarks.report_text import LABELS, MODE_LABELS, number, table
from benchmarks.roofline import GPUS, Gpu, assumptions, floor_ms, logits_ms, ours_ms
from benchmarks.shapes import Shape

HEAD_OPS = ("linear_logp", "linear_policy_loss", "linear_cross_entropy")
LLAMA_32K = gpu_plan.tokens(32768, **gpu_plan.LLAMA)
LOGITS = Shape(T=8192, D=1, V=gpu_plan.QWEN_8B["V"], S=8192)
# (shape, mode, what is asked of it)
BARS = (
    (LLAMA_32K, "forward_backward", "at most 1.10 of the bare GEMMs"),
    (LLAMA_32K, "forward", "at least 0.90 of the bare GEMM's rate"),
    (LLAMA_32K, "frozen", "at most 1.10 of two GEMMs"),
    (LLAMA_32K, "masked_50", "at most 0.60 of the dense time"),
    (LLAMA_32K, "zero_50", "at most 0.75 of the dense time"),
    (LLAMA_32K, "zero_80", "-"),
    (LLAMA_32K, "entropy", "-"),
    (gpu_plan.tokens(8192, **gpu_plan.QWEN_8B), "forward_backward", "at most 1.10 of the GEMMs"),
    (gpu_plan.tokens(32768, **gpu_plan.QWEN_1B), "forward_backward", "at most 1.10 of the GEMMs"),
    (gpu_plan.tokens(32768, **gpu_plan.QWEN_7B), "forward_backward", "at most 1.10 of the GEMMs"),
    (gpu_plan.tokens(131072, **gpu_plan.LLAMA), "forward_backward", "at most 1.10 of the GEMMs"),
    (LOGITS, "logits_step", "at least 85% of the copy bandwidth"),
)
WIDTHS = (896, 1536, 2048, 3584, 4096, 5120)
OURS_COLOR = "#c0392b"
STYLES = {"forward_backward": "-", "frozen": "--", "forward": ":"}


def of_card(rows: list[dict], card: Gpu) -> list[dict]:
    """The rows that were measured on a card, A100 say."""
    return [row for row in rows if card.name.split()[0] in row["device"]]


def timed(rows: list[dict], shape: Shape, mode: str) -> dict[str, dict]:
    """Provider -> its row with a time, at one shape and mode."""
    at = (shape.T, shape.D, shape.V)
    return {
        row["provider"]: row
        for row in rows
        if row["mode"] == mode
        and row["status"] == "ok"
        and row["op"] in (*HEAD_OPS, "token_logp")
        and tuple(row["shape"][k] for k in "TDV") == at
    }


def best(found: dict[str, dict], ours: bool) -> dict | None:
    """The fastest row of ours, or of the peers."""
    some = [
        row for name, row in found.items() if is_ours(row) == ours and not name.startswith("floor")
    ]
    return min(some, key=lambda row: row["ms_p50"], default=None)


def predicted(shape: Shape, mode: str, card: Gpu) -> str:
    """Our predicted milliseconds, and the bare GEMMs'."""
    if mode.startswith("logits"):
        return f"{logits_ms(shape.T, shape.V, 3, card):.2f}"
    least, most = ours_ms(shape, mode, card)
    return f"{least:.1f} to {most:.1f}, GEMMs {floor_ms(shape, mode, card):.1f}"


def reached(rows: list[dict], shape: Shape, mode: str) -> str:
    """Our best time at a bar, and that time in the bar's own terms."""
    row = best(timed(rows, shape, mode), True)
    if row is None:
        return "not measured"
    dense = best(timed(rows, shape, "forward_backward"), True)
    share = "no floor beside it"
    if mode.startswith(("masked", "zero")) and dense:
        share = f"{row['ms_p50'] / dense['ms_p50']:.2f} of dense"
    elif mode.startswith("logits") and row["percent_of_copy"]:
        share = f"{row['percent_of_copy']:.0f}%"
    elif row["ratio_to_floor"]:
        ratio = row["ratio_to_floor"]
        share = f"{1 / ratio:.2f}" if mode == "forward" else f"{ratio:.3f}x"
    return f"**{number(row['ms_p50'], 4)}** ({share})"


def status(rows: list[dict]) -> str:
    """Which cards were measured and which were not, in one sentence each."""
    lines = []
    for card in GPUS:
        found = [row for row in of_card(rows, card) if row["op"] in HEAD_OPS]
        if not found:
            lines.append(f"{card.name}: **not measured**.")
            continue
        machine = found[0]["machine"]
        lines.append(
            f"{card.name}: measured on one {found[0]['device']}, driver {machine.get('driver')}, "
            f"torch {machine['torch']}, triton {machine.get('triton')}, commit "
            f"{', '.join(sorted({row['commit'] for row in found}))}."
        )
    return " ".join(lines)


def bars(rows: list[dict]) -> str:
    """What is asked for, what was measured, and what the model says."""
    body = []
    for shape, mode, asked in BARS:
        head = f"{MODE_LABELS[mode]}, T={shape.T}"
        head += f", V={shape.V}" if mode.startswith("logits") else f", D={shape.D}, V={shape.V}"
        cells = []
        for card in GPUS:
            cells.append(f"{reached(of_card(rows, card), shape, mode)} "
                         f"[{predicted(shape, mode, card)}]")  # fmt: skip
        body.append([head, asked, *cells])
    return "\n".join(
        [
            f"**GPUs, bfloat16.** {status(rows)} In brackets, in ms: the prediction of "
            "`benchmarks/roofline.py`, which is a model and no measurement. It assumes "
            f"{assumptions()}. Ours: the first number with the epilogue hidden behind the "
            "products, the second with none of it hidden.",
            "",
            table(["", "asked", *(card.name for card in GPUS)], body),
        ]
    )


def measured(rows: list[dict], card: Gpu) -> str | None:
    """Every cell of one card by provider: time, share of the floor, memory."""
    found: dict[tuple, dict[str, dict]] = {}
    for row in of_card(rows, card):
        if row["op"] in (*HEAD_OPS, "token_logp"):
            key = (row["mode"], *(row["shape"][k] for k in "TDV"))
            found.setdefault(key, {})[row["provider"]] = row
    if not found:
        return None
    names = {name for cell in found.values() for name in cell}
    providers = [name for name in LABELS if name in names] + sorted(names - set(LABELS))
    body = []
    for (mode, T, D, V), cell in found.items():
        line = [f"{MODE_LABELS[mode]}, {T} x {D} x {V}"]
        for name in providers:
            row = cell.get(name)
            if row is None:
                line.append("")
            elif row["status"] != "ok":
                line.append(row["status"])
            elif name.startswith("floor"):
                line.append(number(row["ms_p50"], 4))
            else:
                ratio = f"{row['ratio_to_floor']:.2f}x, " if row["ratio_to_floor"] else ""
                memory = number(row["peak_mib"] / 1024)
                line.append(f"{number(row['ms_p50'], 4)} ({ratio}{memory} GiB)")
        body.append(line)
    rates = [
        f"{name} {row[key]:.0f} {unit}"
        for row in of_card(rows, card)
        for op, key, unit, name in (
            ("copy", "gb_per_s", "GB/s", "copy"),
            ("gemm", "tflops", "TFLOP/s", "x".join(map(str, row["shape"].values()))),
        )
        if row["op"] == op and row["status"] == "ok"
    ]
    failed = sorted(
        {
            f"{LABELS.get(row['provider'], row['provider'])}: {row['reason']}"
            for cell in found.values()
            for row in cell.values()
            if row["status"] != "ok"
        }
    )
    text = [
        f"**{card.name}: median ms (times the bare GEMMs, peak GiB above inputs and gradients).** "
        f"In the same run: {', '.join(rates)}.",
        "",
        table(["", *(LABELS.get(name, name) for name in providers)], body),
    ]
    if failed:
        text += ["", "No time: " + "; ".join(failed) + "."]
    return "\n".join(text)


def block(rows: list[dict]) -> list[str]:
    """The GPU's parts of the README."""
    return [bars(rows), *filter(None, (measured(rows, card) for card in GPUS))]


def plot(rows: list[dict], folder: Path) -> dict[str, Path]:
    """PNG files by caption: the model, and for every measured card its times and memory."""
    made = {"The roofline model: predictions, no measurement": roofline_picture(folder)}
    for card in GPUS:
        found = of_card(rows, card)
        for caption, path in (
            (f"{card.name}: time and memory against tokens", tokens_picture(found, card, folder)),
            (f"{card.name}: time over the bare GEMMs", ratio_picture(found, card, folder)),
        ):
            if path:
                made[caption] = path
    return made


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    _pyplot().close(figure)
    return path


def _tokens_axis(axis, tokens: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(tokens, [f"{T >> 10}k" for T in tokens])
    axis.set_xlabel("tokens")


def plain(mode: str) -> str:
    return mode.replace("_", " + ")


def roofline_picture(folder: Path) -> Path:
    """Left: predicted time against tokens. Right: the predicted share over the bare GEMMs."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    tokens = [2048 * 2**i for i in range(7)]
    for card, color in zip(GPUS, ("#7f8c8d", "#2471a3", OURS_COLOR), strict=True):
        for mode, style in STYLES.items():
            values = [floor_ms(gpu_plan.tokens(T, **gpu_plan.LLAMA), mode, card) for T in tokens]
            left.plot(tokens, values, style, color=color, label=f"{card.name}, {plain(mode)}")
        for mode in ("forward_backward", "forward"):
            style = STYLES[mode]
            shapes = [gpu_plan.tokens(32768, D, 151936) for D in WIDTHS]
            floors = [floor_ms(shape, mode, card) for shape in shapes]
            spans = [ours_ms(shape, mode, card) for shape in shapes]
            low, high = (
                [span[i] / floor for span, floor in zip(spans, floors, strict=True)] for i in (0, 1)
            )
            right.plot(WIDTHS, high, style, color=color, label=f"{card.name}, {plain(mode)}")
            if mode == "forward_backward":
                right.fill_between(WIDTHS, low, high, color=color, alpha=0.12)
    _tokens_axis(left, tokens)
    left.set_yscale("log")
    left.set_ylabel("ms")
    left.set_title("bare GEMMs, D=4096, V=131072", fontsize=10)
    left.legend(fontsize=6)
    right.axhline(1.10, color="black", linewidth=1, linestyle="--")
    right.set_xlabel("head width D")
    right.set_ylabel("ours over the bare GEMMs")
    right.set_title("32k tokens, V=151936: lines with no epilogue hidden", fontsize=10)
    right.legend(fontsize=6)
    figure.suptitle("Roofline model: predictions, not measurements", fontsize=11)
    return _save(figure, folder / "gpu_roofline.png")


def tokens_picture(rows: list[dict], card: Gpu, folder: Path) -> Path | None:
    """Time and memory of the GRPO loss on one head against tokens, by provider, and the model."""
    head = gpu_plan.LLAMA
    lines: dict[str, dict[int, dict]] = {}
    for row in rows:
        if row["op"] in HEAD_OPS and row["status"] == "ok" and row["mode"] == "forward_backward":
            shape = row["shape"]
            if (shape["D"], shape["V"]) == (head["D"], head["V"]):
                lines.setdefault(row["provider"], {})[shape["T"]] = row
    if not lines:
        return None
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    names = [name for name in LABELS if name in lines] + sorted(set(lines) - set(LABELS))
    blues = iter(plt.get_cmap("tab20b").colors * 2)
    for name in names:
        points = sorted(lines[name].items())
        color = OURS_COLOR if is_ours(points[0][1]) else next(blues)
        color = "black" if name == "floor" else color
        style = "s--" if name == "cuda" else "o-"
        label = LABELS.get(name, name)
        axes[0].plot([T for T, _ in points], [r["ms_p50"] for _, r in points], style, color=color,
                     label=label, markersize=4)  # fmt: skip
        if not name.startswith("floor"):
            axes[1].plot([T for T, _ in points], [r["peak_mib"] / 1024 for _, r in points], style,
                         color=color, label=label, markersize=4)  # fmt: skip
    tokens = sorted({T for points in lines.values() for T in points})
    spans = [ours_ms(gpu_plan.tokens(T, **head), "forward_backward", card) for T in tokens]
    axes[0].fill_between(tokens, *zip(*spans, strict=True), color=OURS_COLOR, alpha=0.15,
                         label="model of ours")  # fmt: skip
    for axis, label in zip(axes, ("ms", "peak GiB above inputs and gradients"), strict=True):
        _tokens_axis(axis, tokens)
        axis.set_yscale("log")
        axis.set_ylabel(label)
    axes[0].legend(fontsize=6, ncols=2)
    figure.suptitle(
        f"{card.name}: GRPO loss, forward + backward, D={head['D']}, V={head['V']}", fontsize=11
    )
    return _save(figure, folder / f"gpu_tokens_{card.name.split()[0].lower()}.png")


def ratio_picture(rows: list[dict], card: Gpu, folder: Path) -> Path | None:
    """Time over the bare GEMMs at each bar's shape, ours and peers."""
    cells = [(s, m, timed(rows, s, m)) for s, m, _ in BARS if not m.startswith("logits")]
    cells = [
        (shape, mode, {n: r for n, r in found.items() if r["ratio_to_floor"]})
        for shape, mode, found in cells
        if "floor" in found
    ]
    if not cells:
        return None
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(11, 0.6 + 0.5 * len(cells)), layout="constrained")
    names = {name for *_, found in cells for name in found if not name.startswith("floor")}
    ordered = [name for name in LABELS if name in names] + sorted(names - set(LABELS))
    blues = iter(plt.get_cmap("tab20b").colors * 2)
    for name in ordered:
        at = [(r[name]["ratio_to_floor"], i) for i, (*_, r) in enumerate(cells) if name in r]
        ours = any(is_ours(found[name]) for *_, found in cells if name in found)
        color = OURS_COLOR if ours else next(blues)
        marker = "D" if name == "cuda" else "o"
        axes.scatter(*zip(*at, strict=True), color=color, marker=marker, s=36 if ours else 22,
                     label=LABELS.get(name, name), zorder=3 if ours else 2)  # fmt: skip
    axes.axvline(1.0, color="black", linewidth=1)
    axes.axvline(1.1, color="black", linewidth=1, linestyle="--")
    labels = [f"{MODE_LABELS[mode]}, {s.T} x {s.D} x {s.V}" for s, mode, _ in cells]
    axes.set_yticks(range(len(cells)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("time / bare GEMMs (log scale); dashed: 1.10")
    axes.grid(axis="y", linewidth=0.3)
    axes.legend(fontsize=6, ncols=2)
    return _save(figure, folder / f"gpu_ratio_{card.name.split()[0].lower()}.png")
