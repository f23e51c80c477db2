"""What a training step of a decoder allocates and frees, in order: the account behind `memory`.

Each function plays one part of the step on an `Account`: `add` where a tensor comes to life, `drop`
where its last reference goes. Sizes are bytes. "Half" stands for bfloat16 and float16, whose norms
run in float32; "saved" for what autograd keeps for the backward.
"""

from collections import Counter
from dataclasses import dataclass

from r1kernels.model_shape import ModelShape


class Account:
    """Bytes alive by part, and what they were when there were most."""

    def __init__(self, held: dict[str, int]):
        self.live = Counter(held)
        self.total = sum(held.values())
        self.peak, self.at_peak = self.total, dict(held)

    def add(self, part: str, *sizes: int) -> None:
        self.live[part] += sum(sizes)
        self.total += sum(sizes)
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.live)

    def drop(self, part: str, *sizes: int) -> None:
        self.live[part] -= sum(sizes)
        self.total -= sum(sizes)

    def brief(self, part: str, *sizes: int) -> None:
        """Alive together, and gone at once."""
        self.add(part, *sizes)
        self.drop(part, *sizes)


@dataclass(frozen=True, slots=True)
class Gradients:
    """How weight gradients come about.

    itemsize: of a weight. held: of the gradient that stays. exist: it is there before the backward
    (a later micro-batch); a new one is then added to it and freed.
    """

    itemsize: int
    held: int
    exist: bool

    def deliver(self, account: Account, numel: int) -> None:
        """A backward hands over the gradient of a weight in the weight's dtype."""
        account.add("gradients", self.itemsize * numel)
        if self.exist:
            account.drop("gradients", self.itemsize * numel)
        elif self.held != self.itemsize:
            account.add("gradients", self.held * numel)
            account.drop("gradients", self.itemsize * numel)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer over `rows` tokens that attend to `keys` keys.

    fused: Liger's RMSNorm, RoPE and SwiGLU in place of the model's own code.
    mlp_rows: rows of a tile of `tiled_mlp`; 0: not tiled.
    attention: of `WORKSPACE`; head_groups: the backward's workspace holds one group at a time.
    """

    shape: ModelShape
    rows: int
    keys: int
    itemsize: int
    fused: bool
    mlp_rows: int
    attention: str
    head_groups: int

    @property
    def half(self) -> bool:
        return self.itemsize < 4

    @property
    def x(self) -> int:
        """The residual stream."""
        return self.rows * self.shape.hidden * self.itemsize

    @property
    def q(self) -> int:
        return self.rows * self.shape.query_width * self.itemsize

    @property
    def k(self) -> int:
        return self.rows * self.shape.kv_width * self.itemsize

    @property
    def m(self) -> int:
        """One activation of the MLP."""
        return self.rows * self.shape.intermediate * self.itemsize

    @property
    def keeps_input(self) -> bool:
        """Whether a norm saves its input itself; otherwise it saves a float32 copy."""
        return self.fused or not self.half

    def forward(self, account: Account, save: bool, last: bool = True) -> None:
        """From x (the caller's) to the layer's output, of the same size.

        With `last` false it ends before the last product, whose result no backward reads.
        """
        x = self.x
        self.norm("norms", account, x, save)
        self._attention(account, save)
        account.add("residual", x)
        account.drop("attention", x)
        self.norm("norms", account, x, save)
        self._mlp(account, save, last)
        if not save:
            account.drop("norms", x)
        if last:
            account.add("residual", x)
            account.drop("mlp", x)
        # The sum after attention is saved as the second norm's input, or no longer needed.
        if not (save and self.keeps_input):
            account.drop("residual", x)

    def backward(self, account: Account, gradients: Gradients) -> None:
        """From dy (the caller's, which becomes dx) and what `forward` saved."""
        shape, x = self.shape, self.x
        self._mlp_backward(account, gradients)
        self.norm_backward("norms", account, x)
        gradients.deliver(account, shape.hidden)
        account.drop("norms", x)
        if self.keeps_input:
            account.drop("residual", x)
        self._attention_backward(account, gradients)
        self.norm_backward("norms", account, x)
        gradients.deliver(account, shape.hidden)
        account.drop("norms", x)

    def norm(self, part: str, account: Account, x: int, save: bool) -> None:
        """Leaves the result, of x bytes, and with `save` what the backward needs."""
        if self.fused:
            account.add(part, x)
            return
        wide = x * 4 // self.itemsize
        copy = wide if self.half else 0
        account.add(part, copy)
        account.brief(part, wide)
        account.add(part, wide)
        if not save:
            account.drop(part, copy)
        account.add(part, x if self.half else 0)
        account.add(part, x)
        if self.half:
            account.drop(part, wide)
        if not save:
            account.drop(part, x)

    def norm_backward(self, part: str, account: Account, x: int) -> None:
        """From dy to dx, of x bytes each; both belong to `part`."""
        if self.fused:
            return
        wide = x * 4 // self.itemsize
        account.add(part, x, x)
        account.drop(part, x, x, x)
        if self.half:
            account.add(part, wide)
            account.drop(part, x)
        account.add(part, wide, wide)
        account.drop(part, wide, wide)
        account.brief(part, wide, wide, wide, wide)
        if self.half:
            account.drop(part, wide)
            account.add(part, x)
            account.drop(part, wide)

    def _attention(self, account: Account, save: bool) -> None:
        """Leaves its result, of x bytes."""
        part, x, q, k = "attention", self.x, self.q, self.k
        lse = 4 * self.rows * self.shape.heads
        account.add(part, q, k, k)
        if self.shape.qk_norm:
            for each in (q, k):
                self.norm(part, account, each, save)
                if not (save and self.keeps_input):
                    account.drop(part, each)
        if not self.fused:
            for each in (q, k):
                account.brief(part, each, each, each)
                account.add(part, each)
            account.drop(part, q, k)
        account.add(part, q, lse)
        account.add(part, x)
        if not save:
            account.drop(part, q, q, k, k, lse)
            account.drop("norms", x)

    def _attention_backward(self, account: Account, gradients: Gradients) -> None:
        """From dy to the gradient of the projections' input, which belongs to "norms"."""
        shape, part, x, q, k = self.shape, "attention", self.x, self.q, self.k
        lse = 4 * self.rows * shape.heads
        account.add(part, q)
        gradients.deliver(account, shape.hidden * (shape.query_width + shape.out_bias))
        work = WORKSPACE[self.attention](shape, self.rows, self.keys, self.itemsize)
        account.add(part, q, k, k)
        account.brief(part, work // self.head_groups)
        account.drop(part, q, q, k, k, q, lse)
        for each in (k, q):
            if not self.fused:
                account.brief(part, each, each, each)
            if shape.qk_norm:
                self.norm_backward(part, account, each)
                gradients.deliver(account, shape.head_dim)
                if self.keeps_input:
                    account.drop(part, each)
        account.add("norms", x)
        for each, width in ((k, shape.kv_width), (k, shape.kv_width), (q, shape.query_width)):
            account.brief("norms", x)
            gradients.deliver(account, width * (shape.hidden + shape.qkv_bias))
            account.drop(part, each)
        account.drop("norms", x)

    def _mlp(self, account: Account, save: bool, last: bool) -> None:
        """Leaves its result, of x bytes, unless `last` is false."""
        part, x, m = "mlp", self.x, self.m
        if self.mlp_rows:
            account.brief(part, self._tile(2))
            account.add(part, x if last else 0)
            return
        account.add(part, m, m)
        if not self.fused:
            if not save:
                account.drop(part, m)
            account.add(part, m)
        account.add(part, m)
        if not save:
            account.drop(part, m, m)
        account.add(part, x if last else 0)
        if not save:
            account.drop(part, m)

    def _mlp_backward(self, account: Account, gradients: Gradients) -> None:
        """From dy to the gradient of the MLP's input, which belongs to "norms"."""
        shape, part, x, m = self.shape, "mlp", self.x, self.m
        matrix = shape.hidden * shape.intermediate
        down, side = (
            matrix + shape.hidden * shape.mlp_bias,
            matrix + shape.intermediate * shape.mlp_bias,
        )
        if self.mlp_rows:
            account.add("norms", x)
            account.add("weight gradient sums", 12 * matrix)
            account.brief(part, self._tile(3))
            for numel in (down, side, side):
                gradients.deliver(account, numel)
            account.drop("weight gradient sums", 12 * matrix)
            account.drop("norms", x)
            return
        account.add(part, m)
        gradients.deliver(account, down)
        account.drop(part, m)
        if not self.fused:
            account.add(part, m, m)
            account.drop(part, m, m, m)
        else:
            account.drop(part, m)
        account.add("norms", x)
        gradients.deliver(account, side)
        account.drop(part, m)
        if not self.fused:
            account.brief(part, m)
            account.drop(part, m)
        account.brief("norms", x)
        gradients.deliver(account, side)
        account.drop(part, m)
        account.drop("norms", x)

    def _tile(self, copies: int) -> int:
        rows = min(self.mlp_rows, self.rows)
        return copies * rows * self.shape.intermediate * self.itemsize


def _flash2(shape: ModelShape, rows: int, keys: int, itemsize: int) -> int:
    """float32 dQ; dK and dV of every query head where heads share them."""
    expanded = 2 * keys * shape.query_width * itemsize if shape.heads > shape.kv_heads else 0
    return 4 * rows * shape.query_width + expanded


def _flash3(shape: ModelShape, rows: int, keys: int, _itemsize: int) -> int:
    """float32 dQ, dK and dV."""
    return 4 * rows * shape.query_width + 8 * keys * shape.kv_width


def _none(_shape: ModelShape, _rows: int, _keys: int, _itemsize: int) -> int:
    return 0


# Bytes of an attention backward beside its inputs and outputs.
WORKSPACE = {"flash2": _flash2, "flash3": _flash3, "native": _none, "cpu": _none}
