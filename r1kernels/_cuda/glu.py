"""The CUDA C++ slot of the gated activation."""


def refuses(*_args: object) -> str | None:
    """Always a reason: no CUDA C++ kernel is part of this build."""
    return "no CUDA C++ kernel is built"
