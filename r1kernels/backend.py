"""Which implementation of an op runs: triton or native where they can, reference everywhere.

An implementation is the module `r1kernels.<folder>.<op>`; its `refuses(...)` says why it cannot
take a call, or None. The choice is made inside the custom ops, so `torch.compile` sees one node.
`use_backend` and `batch_invariant` are process-wide.
"""

import contextlib
import functools
import importlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType

import torch

FOLDERS = {"reference": "reference", "native": "_native", "triton": "_triton", "cuda": "_cuda"}
ORDER = {"cuda": ("triton", "reference"), "cpu": ("native", "reference")}
# (op, compute capability as 90) where cuda was measured to be faster than triton, and comes first.
# Elsewhere it runs only when asked for by name.
CUDA_FIRST: frozenset[tuple[str, int]] = frozenset()
OPS = ("token_logp", "linear_logp", "kept_logp", "glu")

_log = logging.getLogger("r1kernels")
_told: set[tuple[str, str, str]] = set()


class Switch:
    """A process-wide setting with blocks that override it, the one entered last in force.

    Not a ContextVar: autograd runs the backward of CUDA tensors on threads of its own. Each block
    takes its own entry off again, so blocks of several threads may end in any order.
    """

    def __init__(self, default: object):
        self.entries = [[default]]
        self.lock = threading.Lock()

    @property
    def value(self) -> object:
        return self.entries[-1][0]

    @contextlib.contextmanager
    def set(self, value: object) -> Iterator[None]:
        entry = [value]
        with self.lock:
            self.entries.append(entry)
        try:
            yield
        finally:
            with self.lock:  # by identity: equal values may come from several blocks
                self.entries[:] = [x for x in self.entries if x is not entry]


_backend = Switch(os.environ.get("R1KERNELS_BACKEND") or None)
_invariant = Switch(False)


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


def candidates(op: str, device_type: str) -> tuple[str, ...]:
    """The backends to try on a device, the preferred one first."""
    order = ORDER.get(device_type, ("reference",))
    if device_type == "cuda" and CUDA_FIRST:
        major, minor = torch.cuda.get_device_capability()
        if (op, 10 * major + minor) in CUDA_FIRST:
            return ("cuda", *order)
    return order


def implementation(op: str, device_type: str, *args: object) -> ModuleType:
    """The first implementation of `op` that does not refuse `args`.

    Raises: RuntimeError with every reason when a backend was asked for by name and refuses.
    """
    wanted = _checked(_backend.value)
    reasons = {}
    for name in (wanted,) if wanted else candidates(op, device_type):
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


def use_backend(name: str | None) -> AbstractContextManager[None]:
    """Within the block every op runs on backend `name`, or raises with the reason why it cannot.

    None restores the choice by device. In force for the whole process.

    Raises: ValueError on an unknown name.
    """
    return _backend.set(_checked(name))


def batch_invariant(enabled: bool = True) -> AbstractContextManager[None]:
    """Within the block a row's results do not depend, bitwise, on the rows beside it.

    Holds for logp, entropy, lse and dhidden of `token_logp` and `linear_logp`, and for the logp,
    and dhidden at a given coefficient, of `linear_policy_loss` and `linear_loss`: the number of
    rows, a row's place, its neighbours' values and the masking of others change nothing, nor does
    the number of CPU threads. Weight and bias gradients are sums over rows, as are losses and
    metrics, and cannot be invariant. In force for the whole process; the block has to enclose the
    backward. Costs: the CPU pads chunks to multiples of 64 rows; a GPU makes dhidden by a Triton
    GEMM of fixed tiles and reads stored logits of an odd width one by one; objectives over
    sequences always take two passes. The `reference` backend makes no such promise and refuses; so
    do a low-rank term and `skip_mass`.

    Raises: RuntimeError in the op, on a machine whose matrix product does not treat rows alike.
    """
    return _invariant.set(bool(enabled))


def is_batch_invariant() -> bool:
    """Whether a `batch_invariant` block is in force."""
    return _invariant.value


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
