"""Training steps on long sequences: peak memory, time and exactness of ours and of others.

On a CPU, resident memory of a small decoder from 4k to 64k tokens; on a GPU, decoders of 1.5 and 7
billion parameters from 8k to 512k tokens. Every step is forward and backward of model and fused
policy loss; a provider whose gradients are wrong has no row.
"""

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import longseq_cpu, longseq_gpu
from benchmarks.longseq_providers import PROVIDERS, find
from benchmarks.longseq_rows import line, summary
from benchmarks.meter import gpu_state

__all__ = ["file_name", "is_ours", "line", "run", "summary"]


def is_ours(row: dict) -> bool:
    """Whether a row is r1kernels'."""
    return row["provider"] in PROVIDERS and PROVIDERS[row["provider"]].is_ours


def default_device() -> str | None:
    """That of the GPU's plan where there is a GPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else None


def file_name(device: str | None) -> str:
    """Of the rows: the device's name as a file may be called, and the suite's."""
    if device is None:
        return "longseq_cpu"
    name = gpu_state().get("name", "gpu") if device == "cuda" else "dry-run"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + "_longseq"


def run(
    *,
    folder: Path,
    write: Callable[[dict], None],
    minutes: float,
    threads: int = 2,
    quick: bool = False,
    skip: int = 0,
    device: str | None = None,
    commit_name: str | None = None,
    providers: list[str] | None = None,
    modes: list[str] | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Rows go to `write` as they are known.

    device: of the GPU's plan, "cpu" to try it out; None for the CPU's. modes: which parts of the
    GPU's plan, "train", "step" or "largest"; skip: how many of its first parts to leave out.
    """
    for name in providers or ():
        find(name)
    common = {"folder": folder, "write": write, "minutes": minutes, "threads": threads}
    common |= {"quick": quick, "providers": providers, "say": say, "commit_name": commit_name}
    if device is None:
        if modes:
            raise ValueError(f"no mode {modes[0]!r}: the longseq suite has none on a CPU")
        longseq_cpu.run(**common)
    else:
        longseq_gpu.run(**common, skip=skip, device=device, modes=modes)
