"""What a reward function returns."""

from typing import NamedTuple


class Result(NamedTuple):
    """A reward and why: `status` is "ok" or a short reason such as "wrong" or "error: ..."."""

    value: float
    status: str = "ok"


BAD_GOLD = "bad_gold"
"""Status of a completion whose gold answer cannot be read: its prompt is dropped, not scored."""
