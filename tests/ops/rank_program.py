"""Starts a program that runs ranks of a process group, and reads what they found."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(
    program: ModuleType, folder: Path, ranks: int, *arguments: str, timeout: float = 300
) -> list:
    """What every rank wrote to folder/RANK.pt, in rank order.

    Args:
        program: a module that is run as `python FILE *arguments FOLDER`.
        timeout: seconds until it is killed, its ranks with it.
    """
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = subprocess.Popen(
        [sys.executable, program.__file__, *arguments, str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        errors = process.communicate(timeout=timeout)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
