"""The CUDA C++ slot of the linear head."""


def refuses(*_args: object) -> str | None:
    """Always a reason: no CUDA C++ kernel is part of this build."""
    return "no CUDA C++ kernel is built"
