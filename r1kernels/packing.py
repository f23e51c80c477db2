"""Variable-length sequences laid end to end: boundaries, positions, padding, shifted targets.

A packed batch of B sequences is a tensor [T, ...] and `cu_seqlens`, int32 or int64 [B + 1]:
sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1]. Sequences may be empty.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from r1kernels import check
from r1kernels.check import IGNORE


def cu_seqlens_from_lengths(lengths: Tensor | Sequence[int]) -> Tensor:
    """Boundaries, int32 [B + 1], of B sequences of the given lengths.

    Raises: TypeError when lengths are not integers, ValueError when one is negative or the total
        does not fit int32.
    """
    lengths_B = lengths if isinstance(lengths, Tensor) else torch.tensor(lengths, dtype=torch.int64)
    if lengths_B.is_floating_point() or lengths_B.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {check.describe(lengths)}")
    if lengths_B.ndim != 1:
        raise ValueError(f"lengths must have one dimension, got {check.describe(lengths)}")
    ends_B = lengths_B.cumsum(0, dtype=torch.int64)
    if check.values_readable(lengths_B) and len(lengths_B):
        if lengths_B.min() < 0:
            at = int(lengths_B.argmin())
            raise ValueError(f"lengths must not be negative, got {int(lengths_B[at])} at {at}")
        if ends_B[-1] > torch.iinfo(torch.int32).max:
            raise ValueError(f"lengths sum to {int(ends_B[-1])} tokens, more than int32 holds")
    return torch.cat([ends_B.new_zeros(1), ends_B]).to(torch.int32)


def check_cu_seqlens(
    cu_seqlens: Tensor, num_tokens: int | None, device: torch.device, name: str = "cu_seqlens"
) -> None:
    """Raise unless cu_seqlens are boundaries of num_tokens tokens (None: of any number).

    Values are looked at on CPU tensors only, and not under torch.compile: elsewhere it would wait
    for the device.
    """
    check.dtype_in(name, cu_seqlens, (torch.int32, torch.int64))
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        got = check.describe(cu_seqlens)
        raise ValueError(f"{name} must have shape [B + 1], got {got}")
    check.device(name, cu_seqlens, device)
    if not check.values_readable(cu_seqlens):
        return
    if cu_seqlens[0] != 0:
        raise ValueError(f"{name} must start at 0, got {int(cu_seqlens[0])}")
    falls = (cu_seqlens.diff() < 0).nonzero()
    if len(falls):
        raise ValueError(f"{name} must not decrease, but does after index {int(falls[0])}")
    if num_tokens is not None and cu_seqlens[-1] != num_tokens:
        raise ValueError(
            f"{name} must end at the number of tokens, {num_tokens}, got {int(cu_seqlens[-1])}"
        )


def sequence_index(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The sequence each token belongs to, int64 [T]. Never waits for the device."""
    check_cu_seqlens(cu_seqlens, num_tokens, cu_seqlens.device)
    tokens_T = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), tokens_T, right=True)


def position_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Each token's position in its sequence, int64 [T]."""
    starts_T = cu_seqlens.long()[sequence_index(cu_seqlens, num_tokens)]
    return torch.arange(num_tokens, device=cu_seqlens.device) - starts_T


def pack(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences [S_b, ...], laid end to end: (packed [T, ...], cu_seqlens int32 [B + 1])."""
    if len(sequences) == 0:
        raise ValueError("sequences must hold at least one tensor, got none")
    for b, sequence in enumerate(sequences):
        check.tensor(f"sequences[{b}]", sequence)
        if sequence.ndim == 0:
            raise ValueError(f"sequences[{b}] must have a length, got {check.describe(sequence)}")
    lengths = [sequence.shape[0] for sequence in sequences]
    return torch.cat(list(sequences)), cu_seqlens_from_lengths(lengths).to(sequences[0].device)


def unpack(packed: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    """Views [S_b, ...] of a packed batch's sequences. Reads cu_seqlens on the host."""
    check.tensor("packed", packed)
    check_cu_seqlens(cu_seqlens, packed.shape[0], cu_seqlens.device)
    return packed.split(cu_seqlens.diff().tolist())


def pad(
    packed: Tensor, cu_seqlens: Tensor, *, length: int | None = None, value: float = 0
) -> tuple[Tensor, Tensor]:
    """A packed batch as rows padded on the right: (padded [B, S, ...], mask bool [B, S]).

    Args:
        packed: [T, ...].
        cu_seqlens: int32 or int64 [B + 1].
        length: S; None for the longest sequence's, which is read on the host.
        value: what the pads hold.

    Raises: ValueError when a sequence is longer than `length`.
    """
    check.tensor("packed", packed)
    check_cu_seqlens(cu_seqlens, packed.shape[0], packed.device)
    num_sequences = cu_seqlens.shape[0] - 1
    longest = int(cu_seqlens.diff().max()) if num_sequences else 0
    if length is not None and length < longest:
        raise ValueError(f"length must hold the longest sequence, {longest} tokens, got {length}")
    length = longest if length is None else length
    padded = packed.new_full((num_sequences, length, *packed.shape[1:]), value)
    mask_BS = torch.arange(length, device=packed.device) < cu_seqlens.diff().unsqueeze(1)
    padded[mask_BS] = packed
    return padded, mask_BS


def unpad(padded: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of padded [B, S, ...] where mask [B, S] is set: (packed [T, ...], cu_seqlens)."""
    check.tensor("padded", padded)
    check.shape("mask", mask, padded.shape[:2], "the first two of padded")
    mask_BS = mask.bool()
    return padded[mask_BS], cu_seqlens_from_lengths(mask_BS.sum(1))


def shift_targets(
    tokens: Tensor, cu_seqlens: Tensor | None = None, *, mask: Tensor | None = None
) -> Tensor:
    """targets[t] = tokens[t + 1], the token that hidden[t] predicts; IGNORE at a sequence's last.

    Args:
        tokens: int64, packed [T] with cu_seqlens or padded [B, S].
        cu_seqlens: int32 or int64 [B + 1] for packed tokens.
        mask: like tokens, set where a *token* counts (a completion's token, not a prompt's or a
            pad's): the target that is a token not set becomes IGNORE.

    Returns:
        int64 like tokens.
    """
    check.dtype_in("tokens", tokens, (torch.int64,))
    if tokens.ndim not in (1, 2):
        raise ValueError(f"tokens must be [T] or [B, S], got {check.describe(tokens)}")
    if (tokens.ndim == 1) != (cu_seqlens is not None):
        raise ValueError(
            f"cu_seqlens belongs to packed tokens [T] and only there, got tokens "
            f"{list(tokens.shape)} and cu_seqlens {check.describe(cu_seqlens)}"
        )
    if mask is not None:
        check.shape("mask", mask, tokens.shape, "that of tokens")
        tokens = tokens.masked_fill(~mask.bool(), IGNORE)
    targets = torch.nn.functional.pad(tokens[..., 1:], (0, min(1, tokens.shape[-1])), value=IGNORE)
    if cu_seqlens is None or tokens.shape[0] == 0:
        return targets
    sequence_T = sequence_index(cu_seqlens, tokens.shape[0])
    last_T = torch.ones_like(sequence_T, dtype=torch.bool)
    last_T[:-1] = sequence_T[1:] != sequence_T[:-1]
    return targets.masked_fill(last_T, IGNORE)
