"""The extension and what its callers share."""

import torch
from torch import Tensor

try:
    from r1kernels import _C_cuda as extension
except ImportError as error:  # built without nvcc, or for another Python
    extension, MISSING = None, f"no CUDA C++ kernel is built ({error})"


def device_refusal(tensor: Tensor | None) -> str | None:
    """Why no CUDA kernel can run on this tensor's device (None: on this machine), or None."""
    if extension is None:
        return MISSING
    if tensor is not None and tensor.device.type != "cuda":
        return f"tensor is on {tensor.device.type}"
    if not torch.cuda.is_available():
        return "no GPU"
    device = torch.cuda.current_device() if tensor is None else tensor.device.index
    return extension.refusal(device) or None


def address(tensor: Tensor | None) -> int:
    """Where a tensor starts; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def place(tensor: Tensor) -> dict[str, int]:
    """The device, and the stream that torch puts work on there."""
    device = tensor.device.index
    return dict(device=device, stream=torch.cuda.current_stream(device).cuda_stream)


def rows_refusal(name: str, matrix: Tensor) -> str | None:
    """Why a matrix's rows are not at multiples of 16 bytes, or None.

    A matrix whose columns are not contiguous is copied first.
    """
    step = matrix.stride(0) if matrix.stride(1) == 1 else matrix.shape[1]
    if step * matrix.element_size() % 16 or matrix.data_ptr() % 16:
        return f"rows of {name} do not start at multiples of 16 bytes"
    return None
