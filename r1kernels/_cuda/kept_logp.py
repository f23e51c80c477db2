"""The CUDA C++ slot of the ragged logp op."""


def refuses(*_args: object) -> str | None:
    """Always a reason: no CUDA C++ kernel is part of this build."""
    return "no CUDA C++ kernel is built"
