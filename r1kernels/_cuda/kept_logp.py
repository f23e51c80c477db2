"""The CUDA C++ slot of the ragged logp op."""


def refuses(*_args: object) -> str | None:
    """Always a reason: none is written; Triton runs it."""
    return "there is no CUDA C++ kernel of this op"
