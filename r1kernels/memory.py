"""How many bytes a training step needs at its peak, predicted: `python -m r1kernels.memory`.

    python -m r1kernels.memory --model qwen2.5-7b --tokens 131072 --gpu 141

An account of what forward and backward allocate and free, in their order (`memory_events`), of one
packed micro-batch of a dense transformers decoder. docs/memory.md has the assumptions. Not in it:
the optimizer's own temporaries, a framework's buckets for communication, activations of a reference
model. Sizes are bytes; GB are 10^9 bytes.
"""

from dataclasses import replace
from typing import NamedTuple

from r1kernels.memory_events import WORKSPACE, Account, Gradients, Layer
from r1kernels.model_shape import ModelShape

# From the cheapest in time to the cheapest in memory.
MODES = ("plain", "checkpoint", "checkpoint+offload", "stream", "stream+offload")
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
# What a device needs beside the tensors that are counted: context and libraries, fragmentation.
SLACK = {"cpu": 0, "cuda": 6_000_000_000}
ATTENTION = {"cpu": "cpu", "cuda": "flash2"}
WORKSPACE_MB = {"cpu": 256, "cuda": 1280}
# Of a token beside what the model makes of it: ids, positions, targets and the loss's streams.
INPUT_BYTES = 64
# Rows of a chunk of `stream_model`.
CHUNK = 4096


class Optimizer(NamedTuple):
    """Bytes per parameter: of the gradient that stays (None: as the weight), of states on the
    device for float32 weights and for narrower ones, of states on the host."""

    gradient: int | None
    states: int
    states_half: int
    host: int


OPTIMIZERS = {
    "none": Optimizer(None, 0, 0, 0),
    # two moments, a float32 master and gradient, as r1.optim
    "adamw": Optimizer(4, 8, 12, 0),
    # the same, gradients in the dtype of the weights
    "adamw-16bit-gradients": Optimizer(None, 8, 12, 0),
    # master and moments on the host; float32 gradients on the device
    "adamw-cpu": Optimizer(4, 0, 0, 12),
    # moments in the dtype of the weights, no master
    "adamw-16bit": Optimizer(None, 8, 4, 0),
}


class PeakBytes(NamedTuple):
    """device: most bytes alive at once on the training device, slack included. host: pinned memory
    of checkpoints and optimizer states. parts: what `device` consists of at that moment."""

    device: int
    host: int
    parts: dict[str, int]


def peak_bytes(
    shape: ModelShape,
    tokens: int,
    *,
    mode: str = "plain",
    dtype: str = "bfloat16",
    optimizer: str = "adamw",
    accumulate: bool = True,
    device: str = "cuda",
    fused_head: bool = True,
    fused_layers: bool = False,
    attention: str | None = None,
    head_groups: int = 1,
    mlp_rows: int = 0,
    chunk_size: int = CHUNK,
    workspace_mb: int | None = None,
    slack: int | None = None,
) -> PeakBytes:
    """Predicted peak of a forward and backward pass over `tokens` packed tokens.

    Args:
        shape: of the model, all of whose parameters are trained.
        tokens: of the micro-batch. How they divide into sequences does not matter.
        mode: one of MODES: all activations kept; layer inputs kept and layers run again; the inputs
            on the host; a layer at a time in chunks of queries (`stream_model`); that and inputs on
            the host.
        dtype: of weights and activations, a key of ITEMSIZE.
        optimizer: a key of OPTIMIZERS.
        accumulate: gradients of an earlier micro-batch are there already.
        device: "cuda" or "cpu": slack, attention and the head's workspace go by it.
        fused_head: `linear_policy_loss`; false: logits [T, V] and torch's cross-entropy.
        fused_layers: Liger's RMSNorm, RoPE and SwiGLU.
        attention: backward's workspace, a key of `memory_events.WORKSPACE`.
        head_groups: groups of heads that attention's backward takes one after another.
        mlp_rows: rows of a tile of `tiled_mlp`; 0: not tiled.
        chunk_size: queries of a chunk in the stream modes.
        workspace_mb: of the head; None: the default of `linear_logp`.
        slack: bytes added on top; None: SLACK.

    Raises: ValueError on tokens below 1 and on names that are not known.
    """
    for name, value, known in (
        ("mode", mode, MODES),
        ("dtype", dtype, ITEMSIZE),
        ("optimizer", optimizer, OPTIMIZERS),
        ("device", device, SLACK),
        ("attention", attention or ATTENTION.get(device), WORKSPACE),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    for name, value in (
        ("tokens", tokens),
        ("chunk_size", chunk_size),
        ("head_groups", head_groups),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")
    layer = Layer(
        shape, tokens, tokens, ITEMSIZE[dtype], fused_layers, mlp_rows,
        attention or ATTENTION[device], head_groups,
    )  # fmt: skip
    step = _Step(
        layer, mode, OPTIMIZERS[optimizer], accumulate, fused_head, chunk_size,
        workspace_mb or WORKSPACE_MB[device], device,
    )  # fmt: skip
    account = step.run()
    slack = SLACK[device] if slack is None else slack
    parts = {name: size for name, size in (account.at_peak | {"slack": slack}).items() if size}
    return PeakBytes(account.peak + slack, step.host, parts)


class _Step:
    """Forward and backward of one micro-batch in the events of `memory_events`."""

    def __init__(
        self, layer, mode, optimizer, accumulate, fused_head, chunk_size, workspace, device
    ):
        shape, e = layer.shape, layer.itemsize
        self.layer, self.shape, self.mode, self.device = layer, shape, mode, device
        self.fused_head, self.workspace = fused_head, workspace
        self.chunk = replace(layer, rows=min(chunk_size, layer.rows))
        held = e if optimizer.gradient is None else optimizer.gradient
        self.gradients = Gradients(e, held, accumulate)
        self.account = Account(
            {
                "weights": e * shape.params,
                "gradients": held * shape.params * accumulate,
                "optimizer": shape.params * (optimizer.states_half if e < 4 else optimizer.states),
                "inputs": layer.rows * (INPUT_BYTES + 2 * shape.head_dim * e),
            }
        )
        self.offload = mode.endswith("+offload")
        self.host = optimizer.host * shape.params
        if self.offload:
            self.host += (shape.layers - 1) * layer.x

    def run(self) -> Account:
        account, layer, x = self.account, self.layer, self.layer.x
        plain, stream = self.mode == "plain", self.mode.startswith("stream")
        account.add("residual", x)
        for index in range(self.shape.layers):
            if plain:
                layer.forward(account, save=True)
                if not layer.keeps_input:
                    account.drop("residual", x)
                continue
            self._stream_forward() if stream else layer.forward(account, save=False)
            account.drop("residual", x)
            account.add("layer inputs", x)
            if self.offload and index:
                account.drop("layer inputs", x)
        layer.norm("head", account, x, True)
        if not layer.keeps_input:
            account.drop("residual", x)
        self._fused_head() if self.fused_head else self._stored_logits()
        layer.norm_backward("head", account, x)
        self.gradients.deliver(account, self.shape.hidden)
        account.drop("head", x)
        account.add("residual", 0 if layer.keeps_input else x)
        for index in reversed(range(self.shape.layers)):
            if plain:
                layer.backward(account, self.gradients)
                if layer.keeps_input:
                    account.drop("residual", x)
                continue
            account.add("layer inputs", x if self.offload and index else 0)
            if stream:
                self._stream_backward()
            else:
                layer.forward(account, save=True, last=False)
                layer.backward(account, self.gradients)
            account.drop("layer inputs", x)
        embedding = self.shape.vocab * self.shape.hidden
        if self.shape.tied:
            account.brief("gradients", layer.itemsize * embedding)
        else:
            self.gradients.deliver(account, embedding)
        account.drop("residual", x)
        return account

    def _fused_head(self) -> None:
        """`linear_policy_loss`: gradients are made in the forward and rounded in the backward."""
        account, layer, shape = self.account, self.layer, self.shape
        e, weight = layer.itemsize, shape.vocab * shape.hidden
        account.add("head", 4 * weight, layer.x)
        if self.device == "cpu":
            # float32 rows: logits; hidden, its gradient and its product with the row factor
            row = 4 * shape.vocab
            beside = 4 * shape.hidden * (3 if layer.half else 2)
        else:
            row = (e if e < 4 else 4) * shape.vocab + 4 * shape.hidden
            beside = (4 + e) * shape.hidden
        rows = min(layer.rows, max(16, self.workspace * 2**20 // row))
        account.brief("head workspace", rows * (row + beside))
        account.drop("head", layer.x)
        if layer.half:
            account.brief("gradients", e * weight)
        account.drop("head", 4 * weight)
        self.gradients.deliver(account, weight)

    def _stored_logits(self) -> None:
        """Logits [T, V], their float32 copy, log-softmax, and the gradients of both."""
        account, layer, shape = self.account, self.layer, self.shape
        logits, wide = layer.rows * shape.vocab * layer.itemsize, 4 * layer.rows * shape.vocab
        account.add("logits", logits, wide if layer.half else 0, wide)
        account.drop("logits", wide if layer.half else 0)
        account.add("logits", wide)
        account.brief("logits", wide)
        account.drop("logits", wide)
        if layer.half:
            account.add("logits", logits)
            account.drop("logits", wide)
        account.add("head", layer.x)
        self.gradients.deliver(account, shape.vocab * shape.hidden)
        account.drop("logits", logits, logits)
        account.drop("head", layer.x)

    def _stream_forward(self) -> None:
        """A layer in chunks of queries, its keys and values whole."""
        account, layer = self.account, self.layer
        account.add("residual", layer.x)
        account.add("keys and values", layer.k, layer.k)
        self.chunk.forward(account, save=False)
        account.drop("residual", self.chunk.x)
        account.drop("keys and values", layer.k, layer.k)

    def _stream_backward(self) -> None:
        """The same, dx over dy; float32 sums of the layer's and of keys' and values' gradients."""
        account, layer, shape = self.account, self.layer, self.shape
        wide = 4 * layer.rows * shape.kv_width
        account.add("keys and values", layer.k, layer.k, wide, wide)
        account.add("weight gradient sums", 4 * shape.layer_params)
        self.chunk.forward(account, save=True, last=False)
        self.chunk.backward(account, Gradients(0, 0, True))
        account.drop("keys and values", layer.k, layer.k, wide, wide)
        self.gradients.deliver(account, shape.layer_params)
        account.drop("weight gradient sums", 4 * shape.layer_params)
