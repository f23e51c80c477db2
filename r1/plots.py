"""The curves of a run as PNG files."""

from pathlib import Path
from typing import NamedTuple

ACCENT = ("#2563a8", "#d9772b", "#3a8f5c", "#a63d57", "#7656a8", "#8a7a3c", "#4c9db0", "#777777")

MAX_POINTS = 200
# parts of a step that most steps do not have
RARE = ("eval", "save", "startup")
TIME_TITLE = "Where a step's time goes"


class Panel(NamedTuple):
    """One figure: `lines` are (key, label), those without data are left out."""

    file: str
    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    scale: str = "linear"


PANELS = (
    Panel(
        "accuracy",
        "Held-out accuracy",
        "fraction",
        (("eval/pass@1", "pass@1"), ("eval/format", "well-formed")),
    ),
    Panel(
        "reward",
        "Reward of the sampled completions",
        "reward",
        (("reward/mean", "total"), ("reward/accuracy", "accuracy"), ("reward/format", "format")),
    ),
    Panel("loss", "Loss", "nats per token", (("loss/cross_entropy", "cross-entropy"),)),
    Panel(
        "careful",
        "Careful solutions, net of the style",
        "nats per solution",
        (("eval/careful", "held-out questions"),),
        scale="symlog",
    ),
    Panel(
        "length",
        "Completion length",
        "tokens",
        (("length/mean", "mean"), ("length/max", "longest"), ("eval/length", "held-out mean")),
    ),
    Panel(
        "groups",
        "Groups without signal, completions cut",
        "share",
        (
            ("groups/zero_variance", "groups of equal reward"),
            ("length/truncated", "completions cut at the limit"),
        ),
    ),
    Panel("entropy", "Entropy of the policy", "nats per token", (("policy/entropy", "entropy"),)),
    Panel(
        "kl",
        "Divergence from the reference",
        "nats per token",
        (("policy/kl", "KL to the reference"),),
    ),
    Panel(
        "clip",
        "Tokens clipped",
        "share of tokens",
        (
            ("policy/clip_low_fraction", "ratio below, negative advantage"),
            ("policy/clip_high_fraction", "ratio above, positive advantage"),
        ),
    ),
    Panel(
        "sampler_gap",
        "Gap of sampler and trainer",
        "nats per token",
        (
            ("sampler/gap_mean", "mean"),
            ("sampler/gap_max", "largest"),
            ("parity/mean", "probe after the sync"),
        ),
        scale="log",
    ),
    Panel("grad_norm", "Gradient norm before clipping", "norm", (("train/grad_norm", "norm"),)),
    Panel("lr", "Learning rate", "rate", (("train/lr", "learning rate"),)),
    Panel(
        "throughput",
        "Throughput",
        "tokens per second",
        (("speed/tokens_per_second", "whole step"), ("speed/sampled_per_second", "sampling alone")),
    ),
    Panel(
        "memory",
        "Memory",
        "MiB",
        (
            ("memory/rss_mib", "resident"),
            ("memory/peak_rss_mib", "resident, peak"),
            ("memory/peak_gpu_mib", "GPU, peak"),
        ),
    ),
)


def draw(folder: Path, rows: list[dict]) -> list[tuple[str, str]]:
    """PNGs of the panels that have data, as (file name, title); `overview.png` has them all.

    A run of one row has no curves.
    """
    if len(rows) < 2:
        return []
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    panels = [panel for panel in PANELS if any(series(rows, key)[0] for key, _ in panel.lines)]
    drawn = []
    style = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "axes.titlesize": 12,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "legend.frameon": False,
        "legend.fontsize": 9,
        "font.size": 10,
    }
    with pyplot.rc_context(style):
        for panel in panels:
            figure, axes = pyplot.subplots(figsize=(6.4, 3.6), dpi=120, layout="constrained")
            _panel(axes, panel, rows)
            figure.savefig(folder / f"{panel.file}.png")
            pyplot.close(figure)
            drawn.append((f"{panel.file}.png", panel.title))
        if set(time_parts(rows)) - set(RARE):
            figure, axes = pyplot.subplots(figsize=(6.4, 3.6), dpi=120, layout="constrained")
            _time_panel(axes, rows)
            figure.savefig(folder / "time.png")
            pyplot.close(figure)
            drawn.append(("time.png", TIME_TITLE))
        count = len(drawn)
        if count:
            columns = min(3, count)
            lines = -(-count // columns)
            size = (5.4 * columns, 3.3 * lines)
            figure, grid = pyplot.subplots(
                lines, columns, figsize=size, dpi=100, layout="constrained", squeeze=False
            )
            for axes, panel in zip(
                grid.flat, [*panels, *[None] * (count - len(panels))], strict=False
            ):
                _time_panel(axes, rows) if panel is None else _panel(axes, panel, rows)
            for axes in grid.flat[count:]:
                axes.set_axis_off()
            figure.savefig(folder / "overview.png")
            pyplot.close(figure)
    return drawn


def _panel(axes, panel: Panel, rows: list[dict]) -> None:
    labels = 0
    for color, (key, label) in zip(ACCENT, panel.lines, strict=False):
        steps, values = series(rows, key)
        if panel.scale == "log":
            shown = [(step, value) for step, value in zip(steps, values, strict=True) if value > 0]
            steps, values = [step for step, _ in shown], [value for _, value in shown]
        if not steps:
            continue
        labels += 1
        sparse = len(steps) <= 40
        smooth = _smooth(values) if len(values) > 20 and not key.startswith("eval/") else None
        axes.plot(
            steps,
            values,
            color=color,
            label=label if smooth is None else None,
            alpha=1.0 if smooth is None else 0.3,
            linewidth=1.8 if smooth is None else 1.0,
            marker="o" if sparse and smooth is None else None,
            markersize=4,
        )
        if smooth is not None:
            axes.plot(steps, smooth, color=color, label=label, linewidth=1.8)
        low, high = series(rows, f"{key}/low")[1], series(rows, f"{key}/high")[1]
        if len(low) == len(high) == len(steps):
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_title(panel.title)
    axes.set_xlabel("step")
    axes.set_ylabel(panel.unit)
    if panel.scale != "linear":
        axes.set_yscale(panel.scale)
    elif panel.unit in ("fraction", "share"):
        axes.set_ylim(-0.03, 1.03)
    elif panel.file != "loss":
        axes.set_ylim(bottom=0)
    if labels > 1:
        axes.legend(loc="best")


def _time_panel(axes, rows: list[dict]) -> None:
    """Seconds of each part as stacked areas; what happens only now and then is left to the page."""
    parts = [name for name in time_parts(rows) if name not in RARE][: len(ACCENT)]
    timed = [row for row in rows if row.get("time/step") and row.get(f"time/{parts[0]}")]
    width = -(-len(timed) // MAX_POINTS)
    groups = [timed[start : start + width] for start in range(0, len(timed), width)]
    steps = [group[0]["step"] for group in groups]
    stack = [
        [sum(row.get(f"time/{name}") or 0.0 for row in group) / len(group) for group in groups]
        for name in parts
    ]
    axes.stackplot(steps, *stack, labels=parts, colors=ACCENT[: len(parts)], linewidth=0)
    # one slow step would flatten all the others; a third of the height is the legend's
    totals = sorted(map(sum, zip(*stack, strict=True)))
    axes.set_ylim(0, 1.5 * totals[int(0.95 * (len(totals) - 1))])
    axes.set_xlim(steps[0], max(steps[-1], steps[0] + 1))
    axes.set_title(TIME_TITLE)
    axes.set_xlabel("step")
    axes.set_ylabel("seconds")
    axes.legend(loc="upper right", ncols=3, frameon=True, framealpha=0.85, edgecolor="none")


def series(rows: list[dict], key: str) -> tuple[list[int], list[float]]:
    points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: list[float]) -> list[float]:
    """Exponential mean with the bias of its start taken out."""
    keep, mean, weight, out = 0.7, 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(mean / weight)
    return out


def time_parts(rows: list[dict]) -> list[str]:
    names = {key[5:] for row in rows for key in row if key.startswith("time/")} - {"step"}
    return sorted(names, key=lambda name: -sum(series(rows, f"time/{name}")[1]))
