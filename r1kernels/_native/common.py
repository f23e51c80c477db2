"""The extension and what its callers share."""

import torch
from torch import Tensor

try:
    from r1kernels import _C as extension
except ImportError as error:
    raise ImportError(
        f"the C++ extension is not built ({error}); `pip install .` with a C++ compiler builds it"
    ) from error

__all__ = ["CODES", "address", "extension", "missing", "refusal"]

# `Dtype` in csrc/cpu/kernels.hpp
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def refusal(x: Tensor | None) -> str | None:
    """Why no kernel can take this tensor (None: on this machine), or None."""
    if x is None:
        return None
    if x.device.type != "cpu":
        return f"tensor is on {x.device.type}"
    return None if x.dtype in CODES else f"dtype {x.dtype}"


def missing(*functions: str) -> str | None:
    """Why an extension without these functions has to be built again, or None."""
    if all(hasattr(extension, name) for name in functions):
        return None
    return (
        f"the C++ extension was built from older sources, without {' and '.join(functions)}: "
        "`pip install .`, or `python setup.py build_ext --inplace` in a checkout, builds it again"
    )


def address(x: Tensor | None) -> int:
    """Where a tensor starts; 0 for None."""
    return 0 if x is None else x.data_ptr()
