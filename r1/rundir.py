"""The directory of a run: its settings, its lock, what it leaves when it is done."""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from r1 import config as settings
from r1.config import Config

CONFIG = "config.json"
FACTS = "run.json"
DONE = "done.json"
# settings that change nothing of a run but its speed, its memory and the rounding of its numbers: a
# resumed run may differ in them, as one that ran out of memory has to
FREE = (
    "run.dir",
    "run.keep_checkpoints",
    "run.tensorboard",
    "model.kernels",
    "long.mode",
    "long.chunk_size",
    "long.device_gib",
    "long.save_attention",
    "rollout.batch",
    "rollout.gpu_memory_utilization",
    "rollout.kv_cache_gib",
    "rollout.enforce_eager",
    "eval.batch",
    "base.save_every",
    "rl.micro_batch_tokens",
    "rl.reward_workers",
    "rl.save_every",
    "rl.table_rows",
)


@contextmanager
def opened(config: Config, stage: str, *, restart: bool = False) -> Iterator[Path]:
    """The directory of the run, made or found to have the same settings, and locked against a
    second process.

    With `restart` what is there is moved aside first, to the first free `<name>.old-N`. A run that
    failed before its first row leaves nothing to protect: other settings may take its place.

    Raises: ValueError when a run of other settings or another stage is there; it names the keys
        that differ.
    """
    folder = config.run.path
    if restart and folder.exists():
        with _locked(folder):
            print(f"the old run is kept in {_move_aside(folder)}")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if _begun(folder):
            _check_same(folder, config, stage)
        else:
            (folder / FACTS).unlink(missing_ok=True)
        write_atomically(folder / CONFIG, settings.dumps(config))
        if not (folder / FACTS).exists():
            # torch is not needed to refuse a run, so it is not imported before here
            from r1.checkpoint import versions

            facts = {
                "stage": stage,
                "started": time.strftime("%Y-%m-%d %H:%M:%S"),
                "versions": versions(),
            }
            write_atomically(folder / FACTS, json.dumps(facts, indent=1) + "\n")
        yield folder


def read_facts(folder: Path) -> dict[str, Any]:
    """What run.json holds; nothing where there is none."""
    path = folder / FACTS
    return json.loads(path.read_text()) if path.exists() else {}


def add_facts(folder: Path, **facts: Any) -> None:
    """Put what a run found out about itself into its run.json."""
    text = json.dumps({**read_facts(folder), **facts}, indent=1)
    write_atomically(folder / FACTS, text + "\n")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys, with both values, at which two nested settings differ."""
    found = []
    for name in sorted({*old, *new}):
        key = f"{prefix}{name}"
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{key}.")
        elif before != after and key not in FREE:
            found.append(f"{key} ({_short(before)} -> {_short(after)})")
    return found


def read_done(folder: Path) -> dict | None:
    """What a finished run left, or None."""
    path = folder / DONE
    return json.loads(path.read_text()) if path.exists() else None


def write_done(folder: Path, record: Mapping[str, Any]) -> None:
    write_atomically(folder / DONE, json.dumps(record, indent=1) + "\n")


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{folder} is in use by another process") from None
        yield


def _begun(folder: Path) -> bool:
    rows = folder / "metrics.jsonl"
    return (rows.exists() and rows.stat().st_size > 0) or any(folder.glob("checkpoints/step_*"))


def _check_same(folder: Path, config: Config, stage: str) -> None:
    if not (folder / CONFIG).exists():
        return
    facts = {"stage": stage, **read_facts(folder)}
    old = json.loads((folder / CONFIG).read_text())
    found = differences(old, json.loads(settings.dumps(config)))
    if facts["stage"] != stage:
        found.insert(0, f"stage ({facts['stage']} -> {stage})")
    if found:
        raise ValueError(
            f"{folder} holds a run with other settings: {', '.join(found)}. "
            "Give another run.name, or --restart to move that run aside and start anew"
        )


def _move_aside(folder: Path) -> Path:
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(target)
    return target


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
