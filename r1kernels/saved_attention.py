"""Where an attention asks whether its output is known already, from before a recomputation."""

from collections.abc import Callable
from contextvars import ContextVar

from torch import Tensor

OutputAndLse = tuple[Tensor, Tensor]

# None: compute. Otherwise it is given what would compute, and decides. Set around a function's
# first pass and around its recomputation, in the thread that runs them.
_memory: ContextVar[Callable[[Callable[[], OutputAndLse]], OutputAndLse] | None] = ContextVar(
    "r1kernels_saved_attention", default=None
)


def remembered(compute: Callable[[], OutputAndLse]) -> OutputAndLse:
    """compute() -> (output, log-sum-exp), or, in a recomputation, what it gave the first time.

    An attention calls it in its forward, outside of what torch.compile traces, once per call: the
    calls of a function are told apart by their order. `compute` must repeat bit for bit.
    """
    memory = _memory.get()
    return compute() if memory is None else memory(compute)


class Remembering:
    """A context in which `remembered` asks memory(); may be entered again, on any thread."""

    def __init__(self, memory: Callable[[], Callable[[Callable[[], OutputAndLse]], OutputAndLse]]):
        self._memory = memory
        self._tokens = []

    def __enter__(self) -> None:
        self._tokens.append(_memory.set(self._memory()))

    def __exit__(self, *exc: object) -> None:
        _memory.reset(self._tokens.pop())
