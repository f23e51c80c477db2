"""Packed batches in which a prompt that several sequences begin with is there once.

The row holds the shared prompts, then the completions of all groups, then the sequences that share
nothing: so the prompts' keys and the completions' queries are slices, and attention needs no copy
of either (prefix_attention.py).

Shapes: T tokens of the packed row, U tokens without sharing, B sequences, P groups, R rows that
predict a token of a completion, D hidden width.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from r1kernels import check

# Tokens without sharing over tokens with it from which on a second call and a merge per layer pay:
# benchmarks/prefix_sharing.py measures it for a shape.
WORTH_SHARING = 1.2

# A group by its lengths: tokens of the prompt, tokens of every completion.
Group = tuple[int, Sequence[int]]


def token_ratio(groups: Iterable[Group]) -> float:
    """Tokens that the groups' sequences have over those left when each prompt is there once."""
    unshared = shared = 0
    for prompt, completions in groups:
        total = sum(completions)
        unshared += prompt * len(completions) + total
        shared += prompt + total
    return unshared / shared


class SharedPrefixes:
    """Where everything stands in a row of T packed tokens whose prompts are there once.

    Sequence b of the B sequences, counted through the groups, is its group's prompt and one
    completion. A group of one completion shares nothing: a plain sequence, with at least one token
    to predict the rest from.

    Args:
        groups: (tokens of the prompt, tokens of every completion), each at least 1.
        device: where the index tensors go.

    Attributes:
        num_tokens, num_unshared, num_sequences: T, U, B.
        longest: tokens of the longest sequence, its prompt included.
        token_ratio: U / T; `worth_sharing` from 1.2 on.
        position_ids: [T] int64; a completion goes on from its prompt.
        rows: [R] int64, the row that predicts each token of the completions, sequence by sequence:
            a prompt's last row stands at the head of each of its completions.
        row_cu_seqlens: [B + 1] int32, the sequences' boundaries among `rows`.
        offsets: (own, cross_query, cross_key), int64 on the CPU: where the pieces lie that attend
            to themselves; where the groups' completions lie, counted from the end of the shared
            prompts, and those prompts. The last two are None where nothing is shared.

    Raises: ValueError on an empty prompt or completion, or no group.
    """

    def __init__(self, groups: Sequence[Group], device: torch.device | str = "cpu"):
        groups = [(prompt, list(completions)) for prompt, completions in groups]
        _check_groups(groups)
        shared = [group for group in groups if len(group[1]) > 1]
        alone = [(prompt, rest[0]) for prompt, rest in groups if len(rest) == 1]
        first = sum(prompt for prompt, _ in shared)
        middle = sum(sum(completions) for _, completions in shared)
        pieces = [prompt for prompt, _ in shared]
        own = [*pieces, *chain.from_iterable(rest for _, rest in shared), *map(sum, alone)]
        cross = [[sum(rest) for _, rest in shared], pieces] if shared else [None, None]
        self.offsets = tuple(None if x is None else _offsets(x) for x in (own, *cross))
        after = [prompt for prompt, rest in shared for _ in rest]
        begins = [*(0 for _ in shared), *after, *(0 for _ in alone)]
        self.position_ids = _ranges(begins, own).to(device)

        # of every sequence: where its prompt and its completion begin in the row, and their lengths
        self._parts: list[tuple[int, int, int, int]] = []
        at_prompt, at_completion, at_alone = 0, first, first + middle
        for prompt, completions in groups:
            if len(completions) == 1:
                self._parts.append((at_alone, prompt, at_alone + prompt, completions[0]))
                at_alone += prompt + completions[0]
                continue
            for length in completions:
                self._parts.append((at_prompt, prompt, at_completion, length))
                at_completion += length
            at_prompt += prompt
        self.num_tokens, self.num_sequences = at_alone, len(self._parts)
        self.num_unshared = sum(prompt + length for _, prompt, _, length in self._parts)
        self.longest = max(prompt + length for _, prompt, _, length in self._parts)
        starts, lengths = [], []
        for prompt_at, prompt, completion_at, length in self._parts:
            starts += [prompt_at + prompt - 1, completion_at]
            lengths += [1, length - 1]
        self.rows = _ranges(starts, lengths).to(device)
        ends = _offsets([length for *_, length in self._parts])
        self.row_cu_seqlens = ends.to(device, torch.int32)
        counts = torch.tensor([len(completions) for _, completions in groups])
        self._group_B = torch.arange(len(groups)).repeat_interleave(counts).to(device)
        self._groups = len(groups)

    @property
    def token_ratio(self) -> float:
        return self.num_unshared / self.num_tokens

    @property
    def worth_sharing(self) -> bool:
        return self.token_ratio >= WORTH_SHARING

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 [B + 1] on the CPU: the boundaries of the sequences without sharing."""
        lengths = [prompt + length for _, prompt, _, length in self._parts]
        return _offsets(lengths).int()

    def to(self, device: torch.device | str) -> "SharedPrefixes":
        """The same on another device."""
        moved = object.__new__(SharedPrefixes)
        moved.__dict__ = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.__dict__.items()
        }
        return moved

    def head_rows(self, hidden: Tensor) -> Tensor:
        """The hidden states [R, D] that predict the completions' tokens, in the order of `rows`.

        A copy of the rows that count and of no other, which is what the head makes of a batch with
        prompts: given this it makes none. The gradient of a prompt's last row is the sum over its
        completions, taken in float32 (float64 for float64) and rounded once.

        Args:
            hidden: [T, D].

        Raises: ValueError on another number of tokens, or another device than the layout's.
        """
        self.check_tokens("hidden", hidden)
        if hidden.device != self.rows.device:
            raise ValueError(
                f"hidden is on {hidden.device} and the layout on {self.rows.device}: "
                "layout.to(device) moves it"
            )
        return _HeadRows.apply(hidden, self)

    def unshared(self, x: Tensor) -> Tensor:
        """x [T, ...] as the batch without sharing has it, [U, ...]: a prompt's rows once for every
        completion."""
        self.check_tokens("x", x)
        starts = [start for part in self._parts for start in part[::2]]
        lengths = [length for part in self._parts for length in part[1::2]]
        return x.index_select(0, _ranges(starts, lengths).to(x.device))

    def shared(self, x: Tensor) -> Tensor:
        """The inverse: [T, ...] of x [U, ...], a prompt's rows from its first completion."""
        check.tensor("x", x)
        if x.ndim < 1 or x.shape[0] != self.num_unshared:
            raise ValueError(
                f"x must have the {self.num_unshared} rows of the batch without sharing, "
                f"got {check.describe(x)}"
            )
        places = self.unshared(torch.arange(self.num_tokens))
        first_T = torch.full((self.num_tokens,), self.num_unshared)
        first_T.scatter_reduce_(0, places, torch.arange(self.num_unshared), "amin")
        return x.index_select(0, first_T.to(x.device))

    def check_tokens(self, name: str, x: object) -> None:
        check.tensor(name, x)
        if x.ndim < 1 or x.shape[0] != self.num_tokens:
            raise ValueError(
                f"{name} must have the layout's {self.num_tokens} tokens as its first axis, got "
                f"{check.describe(x)}: the layout belongs to another batch"
            )


def share_prefixes(
    groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
) -> tuple[Tensor, SharedPrefixes]:
    """Packed tokens [T] int64 and their layout.

    Args:
        groups: (prompt, completions) as token ids; each at least one.

    Raises: ValueError on an empty prompt or completion, or no group.
    """
    layout = SharedPrefixes([(len(prompt), [len(c) for c in rest]) for prompt, rest in groups])
    shared = [group for group in groups if len(group[1]) > 1]
    ids = chain(
        chain.from_iterable(prompt for prompt, _ in shared),
        chain.from_iterable(chain.from_iterable(rest) for _, rest in shared),
        chain.from_iterable((*prompt, *rest[0]) for prompt, rest in groups if len(rest) == 1),
    )
    return torch.tensor(list(ids), dtype=torch.int64), layout


class _HeadRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_TD, layout):
        ctx.layout = layout
        return hidden_TD.index_select(0, layout.rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, drows_RD):
        layout = ctx.layout
        dhidden_TD = drows_RD.new_zeros(layout.num_tokens, drows_RD.shape[1])
        # which of a prompt's rows wins is open until their sum is written over it
        dhidden_TD.index_copy_(0, layout.rows, drows_RD)
        first_B = layout.row_cu_seqlens[:-1].long()
        wide = torch.float64 if drows_RD.dtype == torch.float64 else torch.float32
        sums_PD = torch.zeros(layout._groups, drows_RD.shape[1], dtype=wide, device=drows_RD.device)
        # index_put with accumulate sorts on CUDA, so it is deterministic there; index_add is not
        sums_PD.index_put_((layout._group_B,), drows_RD[first_B].to(wide), accumulate=True)
        fork_B = layout.rows[first_B]
        dhidden_TD.index_copy_(0, fork_B, sums_PD.to(drows_RD.dtype)[layout._group_B])
        return dhidden_TD, None


def _check_groups(groups: list[tuple[int, list[int]]]) -> None:
    if not groups:
        raise ValueError("groups: expected at least one, got none")
    for index, (prompt, completions) in enumerate(groups):
        if prompt < 1:
            raise ValueError(
                f"groups[{index}]: its prompt has {prompt} tokens; it needs one at least, which "
                "predicts the first token of the completions"
            )
        if not completions or min(completions) < 1:
            raise ValueError(
                f"groups[{index}]: expected completions of at least 1 token each, got lengths "
                f"{completions[:8]}"
            )


def _offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int64)


def _ranges(starts: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """The numbers from each start on, as many as its length says, laid end to end."""
    lengths_N = torch.tensor(lengths, dtype=torch.int64)
    shift_N = torch.tensor(starts, dtype=torch.int64) - (lengths_N.cumsum(0) - lengths_N)
    shifts = shift_N.repeat_interleave(lengths_N)
    return shifts + torch.arange(len(shifts))
