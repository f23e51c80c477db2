"""Which implementation of an op runs: cuda, triton or native where they can, reference everywhere.

An implementation is the module `r1kernels.<folder>.<op>`; its `refuses(...)` says why it cannot
take a call, or None. The choice is made inside the custom ops, so `torch.compile` sees one node.
The override is process-wide and not a ContextVar, because autograd runs the backward of CUDA
tensors on threads of its own.
"""

import contextlib
import functools
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

FOLDERS = {"reference": "reference", "native": "_native", "triton": "_triton", "cuda": "_cuda"}
ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("native", "reference")}
OPS = ("token_logp", "linear_logp")

_log = logging.getLogger("r1kernels")
_told: set[tuple[str, str, str]] = set()
_override: str | None = os.environ.get("R1KERNELS_BACKEND") or None


@functools.cache
def load(op: str, backend: str) -> ModuleType | str:
    """The module that implements `op` on `backend`, or the reason why there is none."""
    try:
        return importlib.import_module(f"r1kernels.{FOLDERS[backend]}.{op}")
    except ImportError as error:
        return f"{type(error).__name__}: {error}"


def refusal(op: str, backend: str, *args: object) -> str | None:
    """Why `backend` cannot run `op` on these arguments; None if it can."""
    module = load(op, backend)
    return module if isinstance(module, str) else module.refuses(*args)


def implementation(op: str, device_type: str, *args: object) -> ModuleType:
    """The first implementation of `op` that does not refuse `args`.

    Raises: RuntimeError with every reason when a backend was asked for by name and refuses.
    """
    wanted = _checked(_override)
    reasons = {}
    for name in (wanted,) if wanted else ORDER.get(device_type, ("reference",)):
        reason = refusal(op, name, *args)
        if reason is None:
            for passed, why in reasons.items():
                if passed != "cuda" and (op, passed, why) not in _told:
                    _told.add((op, passed, why))
                    _log.warning("%s runs on the %s backend; %s refuses: %s", op, name, passed, why)
            return load(op, name)
        reasons[name] = reason
    raise RuntimeError(
        f"no backend runs {op}: " + "; ".join(f"{name}: {why}" for name, why in reasons.items())
    )


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block every op runs on backend `name`, or raises with the reason why it cannot.

    None restores the choice by device.

    Raises: ValueError on an unknown name.
    """
    global _override
    before, _override = _override, _checked(name)
    try:
        yield
    finally:
        _override = before


def isolated(body: Callable) -> Callable:
    """`body` with the GPU of its first tensor as the current one, and out of autocast's reach.

    Triton launches on the current GPU, wherever the tensors are; autocast would round float32
    products to 16 bits.
    """

    @functools.wraps(body)
    def run(*args):
        device = next(x for x in args if isinstance(x, torch.Tensor)).device
        with contextlib.ExitStack() as stack:
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(
                device.type
            ):
                stack.enter_context(torch.autocast(device.type, enabled=False))
            return body(*args)

    return run


def _checked(name: str | None) -> str | None:
    if name is not None and name not in FOLDERS:
        raise ValueError(
            f"unknown backend {name!r}: choose one of {', '.join(FOLDERS)} "
            "(R1KERNELS_BACKEND or use_backend)"
        )
    return name
