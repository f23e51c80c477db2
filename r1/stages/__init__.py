"""Stages: each is `run(config, folder) -> Result` on an open run directory."""

import contextlib
import importlib
import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path

from r1 import rundir
from r1.config import Config

STAGES = ("base", "rl", "eval")


@dataclass(frozen=True, slots=True)
class Result:
    """What a stage ends with.

    `model` is a folder that a later stage can load, if the stage made one; `metrics` are the
    figures of its last evaluation.
    """

    stage: str
    folder: Path
    step: int
    model: Path | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def run(stage: str, config: Config, *, restart: bool = False) -> Result:
    """Run or resume one stage in its run directory, and write its report.

    Raises: ValueError for settings the stage cannot work with, or a directory of other settings.
    """
    with rundir.opened(config, stage, restart=restart) as folder:
        began = time.perf_counter()
        try:
            result = importlib.import_module(f"r1.stages.{stage}").run(config, folder)
        except Exception as error:
            if isinstance(error, OSError) and not error.filename:
                # a disk that is full does not say which one
                error.filename = str(folder)
            # what is printed of an error is one line
            with contextlib.suppress(OSError), (folder / "log.txt").open("a") as log:
                traceback.print_exc(file=log)
            raise
        from r1 import metrics, report

        rows = [row for row in metrics.read_rows(folder / metrics.METRICS) if "eval/pass@1" in row]
        figures = {key: value for key, value in rows[-1].items() if key.startswith("eval/")}
        result = replace(result, metrics=figures)
        page = report.write(folder)
        record = {
            "stage": stage,
            "step": result.step,
            "model": str(result.model.relative_to(folder)) if result.model else None,
            "metrics": result.metrics,
            "seconds": round(time.perf_counter() - began, 1),
        }
        rundir.write_done(folder, record)
        print(f"{stage} done: {folder} at step {result.step}, report in {page}")
    return result
