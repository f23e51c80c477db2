"""What a run tells: JSONL rows and samples, a log, console lines and tables, TensorBoard."""

import json
import math
import os
import resource
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from r1.types import Group

METRICS = "metrics.jsonl"
ROLLOUTS = "rollouts.jsonl"
LOG = "log.txt"
# (key, label, format) of what the console line shows, in order, where a row has it
LINE = (
    ("loss/cross_entropy", "loss", ".4f"),
    ("reward/mean", "reward", ".3f"),
    ("reward/accuracy", "accuracy", ".3f"),
    ("reward/format", "format", ".3f"),
    ("eval/pass@1", "held-out", ".3f"),
    ("length/mean", "tokens", ".1f"),
    ("policy/entropy", "entropy", ".3f"),
    ("policy/kl", "kl", ".5f"),
    ("policy/clip_fraction", "clipped", ".4f"),
    ("sampler/gap_mean", "gap", ".1e"),
    ("train/grad_norm", "|grad|", ".3f"),
    ("train/lr", "lr", ".1e"),
    ("time/step", "seconds", ".2f"),
)


class Timer:
    """Seconds spent in each named part of a step."""

    def __init__(self):
        self.parts: dict[str, float] = defaultdict(float)
        self.started = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] += time.perf_counter() - began

    def spent(self, name: str) -> None:
        """Count all the time since the last `pop` as this part."""
        self.parts[name] = time.perf_counter() - self.started

    def pop(self) -> dict[str, float]:
        """`time/<part>` and `time/step`, the seconds since the last call; starts anew."""
        now = time.perf_counter()
        row = {f"time/{name}": seconds for name, seconds in self.parts.items()}
        row["time/step"] = now - self.started
        self.parts.clear()
        self.started = now
        return row


class RunLog:
    """The files and the console of one run.

    `step` is the step the run goes on from (-1: from the start): rows of later steps, and a line
    torn by a kill, are taken out of the files first, so that a resumed run rewrites them and never
    repeats them. A run without steps has `total` 0 and no bar.
    """

    def __init__(
        self, folder: Path, *, step: int, total: int, tensorboard: bool = True, title: str = ""
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        for name in (METRICS, ROLLOUTS):
            rewind(folder / name, step)
        self._metrics, self._rollouts, self._text = (
            (folder / name).open("a", encoding="utf-8") for name in (METRICS, ROLLOUTS, LOG)
        )
        # in a file the bar is a line of its own every 15 seconds
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            disable=not total,
            initial=max(step, 0),
            desc=title,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if terminal else 15.0,
            bar_format=None if terminal else "{l_bar}{bar:30}{r_bar}\n",
        )
        self._total = total
        self._board = _summary_writer(folder / "tensorboard", step) if tensorboard else None

    def say(self, text: str) -> None:
        # over a terminal's bar a line must be written by tqdm; into a file it would repeat the bar
        # each time
        tqdm.write(text, file=sys.stdout) if sys.stderr.isatty() else print(text)
        sys.stdout.flush()
        self._text.write(text + "\n")
        self._text.flush()

    def warn(self, text: str) -> None:
        self.say(f"WARNING: {text}")

    def row(
        self, step: int, metrics: Mapping[str, float | int | str], *, show: bool = True
    ) -> None:
        """Write one row and `show` it; a number that is not finite becomes null: JSON has none."""
        clean = {key: _number(value) for key, value in metrics.items()}
        self._metrics.write(json.dumps({"step": step, **clean}) + "\n")
        self._metrics.flush()
        if show:
            self.say(line(step, self._total, metrics))
        self._bar.update(max(step, 0) - self._bar.n)
        if self._board is not None:
            for key, value in clean.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(key, value, step)

    def samples(
        self, step: int, groups: Sequence[Group], *, kind: str, rows: int, show: int = 0
    ) -> None:
        """Record one completion of each of the first `rows` groups and print the first `show`."""
        shown = [
            (group, index % len(group.completions)) for index, group in enumerate(groups[:rows])
        ]
        for group, index in shown:
            completion = group.completions[index]
            record = {
                "step": step,
                "kind": kind,
                "id": group.prompt.id,
                "question": group.prompt.question,
                "answer": group.prompt.answer,
                "completion": completion.text,
                "tokens": len(completion.tokens),
                "finish": completion.finish,
                "reward": _number(group.rewards[index]),
                **{
                    f"reward/{name}": _number(value)
                    for name, value in group.breakdown[index].items()
                },
            }
            self._rollouts.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._rollouts.flush()
        if shown[:show]:
            self.say(table(shown[:show]))

    def sync(self) -> None:
        """Put the rows on the disk: called before the checkpoint that relies on them."""
        for file in (self._metrics, self._rollouts):
            os.fsync(file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        self._bar.close()
        for file in (self._metrics, self._rollouts, self._text):
            file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *raised) -> None:
        self.close()


def rewind(path: Path, step: int) -> None:
    """Drop every line of a JSONL file that is of a later step or not whole."""
    if not path.exists():
        return
    lines = _lines(path)
    kept = [one for one in lines if (row := _parse(one)) is not None and row["step"] <= step]
    if len(kept) == len(lines):
        return
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_rows(path: Path) -> list[dict]:
    """The whole rows of a JSONL file written by a run, in order; none where it does not exist."""
    if not path.exists():
        return []
    return [row for one in _lines(path) if (row := _parse(one)) is not None]


def line(step: int, total: int, metrics: Mapping[str, float | int | str]) -> str:
    """What the console shows of a step."""
    parts = [
        f"{label} {metrics[key]:{form}}"
        for key, label, form in LINE
        if metrics.get(key) is not None
    ]
    return "  ".join([f"step {step}/{total}", *parts] if total else parts)


def table(shown: Sequence[tuple[Group, int]], width: int = 110) -> str:
    """A plain text table of (group, index of the completion), long texts cut in the middle."""
    rule = "+" + "-" * (width - 2) + "+"
    lines = [rule]
    for group, index in shown:
        completion = group.completions[index]
        parts = "  ".join(f"{name} {value:.2f}" for name, value in group.breakdown[index].items())
        head = (
            f"reward {group.rewards[index]:.2f}  ({parts})"
            f"  {len(completion.tokens)} tokens, {completion.finish}"
            f"  gold: {shorten(group.prompt.answer, 24)}"
        )
        body = [
            *_wrapped("Q ", shorten(group.prompt.question, 300), width - 4),
            *_wrapped("A ", shorten(completion.text, 700), width - 4),
        ]
        lines += [f"| {text:<{width - 4}} |" for text in (shorten(head, width - 4), *body)]
        lines.append(rule)
    return "\n".join(lines)


def shorten(text: str, limit: int) -> str:
    """`text` on one line, the middle of what is longer than `limit` replaced by an ellipsis."""
    text = text.strip().replace("\r", "").replace("\n", "\\n").replace("\t", " ")
    text = "".join(char if char.isprintable() else "?" for char in text)
    if len(text) <= limit:
        return text
    head = (limit - 5) * 2 // 3
    return f"{text[:head]} ... {text[len(text) - (limit - 5 - head) :]}"


def memory() -> dict[str, float]:
    """MiB of this process: resident now, its peak, and the GPU's peak where there is one."""
    import torch

    pages = (
        int(Path("/proc/self/statm").read_text().split()[1])
        if Path("/proc/self/statm").exists()
        else 0
    )
    scale = 1 if sys.platform == "darwin" else 1024
    row = {
        "memory/rss_mib": pages * resource.getpagesize() / 2**20,
        "memory/peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**20,
    }
    if torch.cuda.is_available():
        row["memory/peak_gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return row


def _wrapped(head: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=head, subsequent_indent="  ") or [head]


def _number(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> list[str]:
    """The lines with their ends. str.splitlines would also cut at the U+2028 of a completion."""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        return list(file)


def _parse(text: str) -> dict | None:
    if not text.endswith("\n"):
        return None
    try:
        row = json.loads(text)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _summary_writer(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
