"""Memory that r1kernels allocates and does not write reads as NaN, or as the smallest integer."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch._dynamo import trace_rules

ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within the block, torch.empty and its kin are poisoned where r1kernels calls them."""
    # torch.compile finds its own functions by name, in a table that init_process_group clears. Made
    # anew within the block it would hold the poisoned functions, and the true ones not traced.
    rules = trace_rules.get_torch_obj_rule_map()
    with contextlib.ExitStack() as stack:
        held = functools.cache(lambda: rules)
        stack.enter_context(mock.patch.object(trace_rules, "get_torch_obj_rule_map", held))
        for owner, name in ALLOCATORS:
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield


def poisoned(allocate: Callable) -> Callable:
    @functools.wraps(allocate)
    def allocate_poisoned(*args, **kwargs):
        out = allocate(*args, **kwargs)
        # Tracers see the plain call; only eager code in the package gets the poison.
        if torch.compiler.is_compiling() or type(out) is not torch.Tensor or out.is_meta:
            return out
        if sys._getframe(1).f_globals["__name__"].split(".")[0] == "r1kernels":
            with torch.no_grad():
                if out.is_floating_point():
                    out.fill_(float("nan"))
                elif out.dtype != torch.bool and not out.is_complex():
                    out.fill_(torch.iinfo(out.dtype).min)
        return out

    return allocate_poisoned
