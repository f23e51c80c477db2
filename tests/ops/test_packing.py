import pytest
import torch

from r1kernels.packing import (
    IGNORE,
    cu_seqlens_from_lengths,
    pack,
    pad,
    position_ids,
    sequence_index,
    shift_targets,
    unpack,
    unpad,
)

LENGTHS = [3, 0, 1, 4, 0]


def test_boundaries():
    cu_seqlens = cu_seqlens_from_lengths(LENGTHS)
    assert cu_seqlens.dtype == torch.int32 and cu_seqlens.tolist() == [0, 3, 3, 4, 8, 8]
    assert torch.equal(cu_seqlens_from_lengths(torch.tensor(LENGTHS)), cu_seqlens)
    assert cu_seqlens_from_lengths([]).tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sequence_index_and_positions(dtype):
    cu_seqlens = cu_seqlens_from_lengths(LENGTHS).to(dtype)
    assert sequence_index(cu_seqlens, 8).tolist() == [0, 0, 0, 2, 3, 3, 3, 3]
    assert sequence_index(cu_seqlens, 8).dtype == torch.int64
    assert position_ids(cu_seqlens, 8).tolist() == [0, 1, 2, 0, 0, 1, 2, 3]


def test_no_tokens_and_no_sequences():
    cu_seqlens = cu_seqlens_from_lengths([])
    assert sequence_index(cu_seqlens, 0).shape == (0,)
    assert sequence_index(cu_seqlens_from_lengths([0, 0]), 0).shape == (0,)
    padded, mask = pad(torch.zeros(0, 2), cu_seqlens)
    assert padded.shape == (0, 0, 2) and mask.shape == (0, 0)


def test_pack_and_unpack_are_inverse():
    sequences = [torch.randn(n, 2) for n in LENGTHS]
    packed, cu_seqlens = pack(sequences)
    assert packed.shape == (8, 2)
    back = unpack(packed, cu_seqlens)
    assert len(back) == 5 and all(map(torch.equal, back, sequences))


def test_pad_and_unpad_are_inverse():
    packed, cu_seqlens = pack([torch.randn(n, 2) for n in LENGTHS])
    padded, mask = pad(packed, cu_seqlens, length=6, value=7)
    assert padded.shape == (5, 6, 2) and mask.sum(1).tolist() == LENGTHS
    assert (padded[~mask] == 7).all() and torch.equal(padded[3, :4], packed[4:])
    again, cu_again = unpad(padded, mask)
    assert torch.equal(again, packed) and torch.equal(cu_again, cu_seqlens)
    assert pad(packed, cu_seqlens)[0].shape == (5, 4, 2)


def test_unpad_takes_any_mask():
    padded = torch.arange(6).view(2, 3)
    packed, cu_seqlens = unpad(padded, torch.tensor([[0, 1, 1], [1, 0, 1]]))
    assert packed.tolist() == [1, 2, 3, 5] and cu_seqlens.tolist() == [0, 2, 4]


def test_shift_targets_packed():
    tokens = torch.tensor([10, 11, 12, 20, 30, 31, 32, 33])
    targets = shift_targets(tokens, cu_seqlens_from_lengths(LENGTHS))
    assert targets.tolist() == [11, 12, IGNORE, IGNORE, 31, 32, 33, IGNORE]
    counted = torch.tensor([0, 1, 1, 1, 0, 0, 1, 1])
    targets = shift_targets(tokens, cu_seqlens_from_lengths(LENGTHS), mask=counted)
    assert targets.tolist() == [11, 12, IGNORE, IGNORE, IGNORE, 32, 33, IGNORE]


def test_shift_targets_padded_agrees_with_packed():
    tokens, cu_seqlens = pack([torch.arange(n) + 10 * n for n in LENGTHS])
    padded, mask = pad(tokens, cu_seqlens)
    targets = shift_targets(padded, mask=mask)
    assert torch.equal(targets[mask], shift_targets(tokens, cu_seqlens))
    assert (targets[:, -1] == IGNORE).all() and (targets[~mask] == IGNORE).all()


def test_shift_targets_of_nothing():
    empty = torch.empty(0, dtype=torch.int64)
    assert shift_targets(empty, torch.tensor([0])).shape == (0,)
    assert shift_targets(empty.view(2, 0)).shape == (2, 0)


@pytest.mark.parametrize(
    "cu_seqlens, error, text",
    [
        (torch.tensor([0.0, 8.0]), TypeError, "cu_seqlens must be torch.int32 or torch.int64"),
        (torch.tensor([1, 8]), ValueError, "cu_seqlens must start at 0, got 1"),
        (torch.tensor([0, 5, 4, 8]), ValueError, "must not decrease, but does after index 1"),
        (torch.tensor([0, 7]), ValueError, "must end at the number of tokens, 8, got 7"),
        (torch.tensor([[0, 8]]), ValueError, r"must have shape \[B \+ 1\]"),
        (torch.empty(0, dtype=torch.int64), ValueError, r"must have shape \[B \+ 1\]"),
    ],
)
def test_bad_boundaries_are_named(cu_seqlens, error, text):
    with pytest.raises(error, match=text):
        sequence_index(cu_seqlens, 8)


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match="lengths must not be negative, got -2 at 1"):
        cu_seqlens_from_lengths([3, -2])
    with pytest.raises(TypeError, match="lengths must be integers"):
        cu_seqlens_from_lengths(torch.tensor([1.0]))
    with pytest.raises(ValueError, match="lengths sum to 4294967294 tokens"):
        cu_seqlens_from_lengths([2**31 - 1, 2**31 - 1])
    with pytest.raises(ValueError, match="must hold the longest sequence, 3 tokens, got 2"):
        pad(torch.zeros(3), torch.tensor([0, 3]), length=2)
    with pytest.raises(ValueError, match=r"mask must have shape \[2, 3\]"):
        unpad(torch.zeros(2, 3, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="cu_seqlens belongs to packed tokens"):
        shift_targets(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="sequences must hold at least one tensor"):
        pack([])
