"""The CUDA C++ slot of the gated activation."""


def refuses(*_args: object) -> str | None:
    """Always a reason: none is written; Triton runs it."""
    return "there is no CUDA C++ kernel of this op"
