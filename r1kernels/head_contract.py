"""What `chunked_head` and the backends of the linear head hand each other.

`HeadChunk` is what a backend supplies; the rest is what it is given.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from r1kernels.reference.token_logp import Logp
from r1kernels.shards import Shard


@dataclass(frozen=True, slots=True)
class Head:
    """What turns hidden states into logits.

    `l = softcap tanh(logit_scale (h (W + s B A)^T + b) / softcap) / temperature`, the temperature
    per row. The low-rank term is another product, `low = s h A^T` times B^T, in the tile of the
    first.
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    softcap: float  # 0: none
    logit_scale: float
    lora_RD: Tensor | None = None  # A
    lora_VR: Tensor | None = None  # B, in the dtype of the weight
    lora_scale: float = 1.0
    shard: Shard | None = None  # None: the weight is the whole vocabulary

    def low(self, hidden_CD: Tensor) -> Tensor | None:
        """s h A^T in float32; None without a low-rank term."""
        if self.lora_RD is None:
            return None
        return self.lora_scale * (hidden_CD.float() @ self.lora_RD.float().T)

    def add_low(
        self,
        dlow_CR: Tensor | None,
        hidden_CD: Tensor,
        dhidden_CD: Tensor | None,
        grads: "Gradients",
    ) -> None:
        """Adds to dhidden and to the gradient of A what the gradient of `low` comes to."""
        if dlow_CR is None:
            return
        dlow_CR = dlow_CR * self.lora_scale
        if dhidden_CD is not None:
            dhidden_CD.addmm_(dlow_CR, self.lora_RD.float())
        if grads.lora_RD is not None:
            grads.lora_RD.addmm_(dlow_CR.T, hidden_CD.float())


class Rows(NamedTuple):
    """The rows that count, in order."""

    hidden_TD: Tensor
    targets_T: Tensor
    temperature_T: Tensor | None
    prior_T: Tensor | None
    target_logit_T: Tensor | None = None  # given where a shard may not have the target (-1)
    # Where they stand among the `total` rows of the call; None: they are all of them.
    place_T: Tensor | None = None
    total: int | None = None

    def take(self, at: slice | Tensor) -> "Rows":
        found = Rows(*(x[at] if isinstance(x, Tensor) else x for x in self))
        if self.place_T is None and isinstance(at, Tensor):
            return found._replace(place_T=at, total=len(self.targets_T))
        return found

    def buffer(self, dtype: torch.dtype, zero: bool = False) -> Tensor:
        """[total, D] for results of these rows, 0 where a row of the call is none of them."""
        if self.place_T is not None:
            return self.hidden_TD.new_zeros((self.total, self.hidden_TD.shape[1]), dtype=dtype)
        new = self.hidden_TD.new_zeros if zero else self.hidden_TD.new_empty
        return new(self.hidden_TD.shape, dtype=dtype)

    def put(
        self, out_TD: Tensor, at: slice, value_AD: Tensor, active: Tensor | None = None
    ) -> None:
        """Writes results of the rows `at`, or of `active` among them, to their places in `out`."""
        where = None if self.place_T is None else self.place_T[at]
        if active is not None:
            where = at.start + active if where is None else where[active]
        if where is None:
            out_TD[at] = value_AD
        else:
            out_TD.index_copy_(0, where, value_AD.to(out_TD.dtype))


class Gradients(NamedTuple):
    """Which gradients are wanted; those of the head are accumulated in float32 over all chunks."""

    hidden: bool
    weight_VD: Tensor | None
    bias_V: Tensor | None
    lora_RD: Tensor | None = None
    lora_VR: Tensor | None = None

    @classmethod
    def zeros(
        cls,
        head: Head,
        hidden: bool,
        weight: bool,
        bias: bool,
        lora_RD: bool = False,
        lora_VR: bool = False,
        weight_grad_VD: Tensor | None = None,
    ) -> "Gradients":
        """Buffers of zeros; for the weight's, weight_grad_VD if given, whatever it holds."""

        def buffer(like: Tensor | None, wanted: bool) -> Tensor | None:
            return (
                torch.zeros_like(like, dtype=torch.float32, memory_format=torch.contiguous_format)
                if wanted
                else None
            )

        return cls(
            hidden,
            weight_grad_VD
            if weight and weight_grad_VD is not None
            else buffer(head.weight_VD, weight),
            buffer(head.bias_V, bias),
            buffer(head.lora_RD, lora_RD),
            buffer(head.lora_VR, lora_VR),
        )

    @property
    def of_head(self) -> tuple[Tensor | None, ...]:
        return self[1:]

    @property
    def any(self) -> bool:
        return self.hidden or any(x is not None for x in self.of_head)

    @property
    def low(self) -> bool:
        """Whether the gradient of `Head.low` is wanted."""
        return self.hidden or self.lora_RD is not None


class HeadChunk(Protocol):
    """One backend's work on up to `rows` rows at a time.

    every_row: set where all rows are known to have a coefficient, so that none looks for them.
    """

    every_row: bool = False

    # Above 0: `gradients` leaves tiles of the vocabulary out (`rows.left_out`), and `forward` with
    # `keep` puts their mass [C] into dropped_C. Never together with an entropy gradient.
    skip_mass: float
    dropped_C: Tensor

    def __init__(self, head: Head, rows: int, entropy: bool, entropy_grad: bool): ...

    @staticmethod
    def bytes_per_row(head: Head) -> int:
        """Workspace of one kept row."""

    @staticmethod
    def block_rows() -> int:
        """Under `batch_invariant` a chunk has a multiple of as many rows; 1: any number will do."""

    def target_logits(self, rows: Rows) -> Tensor:
        """Transformed logits of the targets, [C] float32; 0 where another shard has them."""

    def forward(self, rows: Rows, keep: bool) -> Logp:
        """GEMM 1 and the row statistics, [C] float64: their low bits matter to a gradient.

        With `keep`, `gradients` may follow. The statistics are those of the whole vocabulary: a
        shard combines its sums with the other ranks'.
        """

    def gradients(
        self,
        active: Tensor | None,
        dlogp_C: Tensor,
        dentropy_C: Tensor | None,
        grads: Gradients,
        last: bool,
    ) -> Tensor | None:
        """GEMMs 2 and 3 of the kept chunk, for the rows `active` (all: None).

        Adds to grads; returns dhidden of those rows in float32. With `last` false the kept chunk
        survives for another call.
        """

    def backward(
        self,
        rows: Rows,
        stats: Logp,
        dlogp_C: Tensor,
        dentropy_C: Tensor | None,
        dlse_C: Tensor | None,
        grads: Gradients,
    ) -> Tensor | None:
        """GEMMs 1 to 3 of a chunk whose statistics are known.

        Adds to grads; returns dhidden in float32.
        """
