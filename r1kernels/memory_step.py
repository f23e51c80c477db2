"""A training step of a whole decoder in the events of `memory_events`, by mode."""

from dataclasses import replace
from typing import NamedTuple

import torch

from r1kernels.attention_parts import HEAD_WORKSPACE
from r1kernels.layer_chunks import KEYS_PER_QUERY, MIN_KEYS
from r1kernels.memory_events import Account, Gradients, Layer

# Of a token beside what the model makes of it: ids, positions, targets and the loss's streams.
INPUT_BYTES = 64
# Columns of the vocabulary that the CPU's head widens at a time.
SLICE_V = 2048


class Optimizer(NamedTuple):
    """Bytes per parameter: of the gradient that stays (None: as the weight), of states on the
    device for float32 weights and for narrower ones, of states on the host."""

    gradient: int | None
    states: int
    states_half: int
    host: int


class Step:
    """Forward and backward of one micro-batch in the events of `memory_events`."""

    def __init__(
        self,
        layer: Layer,
        mode: str,
        optimizer: Optimizer,
        accumulate: bool,
        fused_head: bool,
        chunk_size: int,
        workspace: int,
        device: str,
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
            self.host += shape.layers * layer.x

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
        # `stream_model` norms in chunks too and keeps what it takes.
        keeps = layer.keeps_input or stream
        account.add("head", x) if stream else layer.norm("head", account, x, True)
        if not keeps:
            account.drop("residual", x)
        self._fused_head() if self.fused_head else self._stored_logits()
        account.brief("head", x) if stream else layer.norm_backward("head", account, x)
        self.gradients.deliver(account, self.shape.hidden)
        account.drop("head", x)
        account.add("residual", 0 if keeps else x)
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
            fixed = 4 * min(SLICE_V, shape.vocab) * shape.hidden if layer.half else 0
        else:
            row = (e if e < 4 else 4) * shape.vocab + 4 * shape.hidden
            beside, fixed = (4 + e) * shape.hidden, 0
        rows = min(layer.rows, max(16, self.workspace * 2**20 // row))
        # Where a row does not count, and a sequence's last does not, those that do are gathered.
        account.add("head", layer.x)
        account.brief("head workspace", rows * (row + beside) + fixed)
        account.drop("head", layer.x, layer.x)
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
        account.brief("chunk", _chunk_forward(self.chunk))
        account.drop("keys and values", layer.k, layer.k)

    def _stream_backward(self) -> None:
        """The same, dx over dy; float32 sums of the layer's and of keys' and values' gradients."""
        account, layer, shape = self.account, self.layer, self.shape
        wide = 4 * layer.rows * shape.kv_width
        account.add("weight gradient sums", 4 * shape.layer_params)
        account.add("keys and values", layer.k, layer.k, wide, wide)
        account.brief("chunk", _chunk_backward(self.chunk, self.device))
        account.drop("keys and values", layer.k, layer.k, wide, wide)
        # Sums go as the gradients that they are rounded to come.
        account.drop("weight gradient sums", 4 * shape.layer_params)
        self.gradients.deliver(account, shape.layer_params)


def _chunk_forward(chunk: Layer) -> int:
    """Transients of a chunk of `stream_layer`'s forward."""
    wide_q = 4 * chunk.rows * chunk.shape.query_width
    rotary = chunk.q + 5 * wide_q
    return chunk.x + max(rotary, 3 * chunk.x + 2 * chunk.q + 2 * chunk.m)


def _chunk_backward(chunk: Layer, device: str) -> int:
    """Transients of a chunk of `stream_layer`'s backward."""
    shape, x, q = chunk.shape, chunk.x, chunk.q
    wide_x, wide_q = (4 * chunk.rows * width for width in (shape.hidden, shape.query_width))
    # normed rows, queries before and after rotation, attention's output, the sum after it
    kept = 3 * q + 2 * x
    mlp = 2 * x + 3 * chunk.m
    if chunk.rows < chunk.keys:
        # gradients of the chunk before, until this one's take their names
        kept += x + 2 * wide_q + 4 * chunk.rows * shape.kv_width
        mlp += x + wide_x
    # Keys go a few at a time, and heads in turns where their gradients, expanded, are large.
    keys = min(chunk.keys, max(MIN_KEYS, KEYS_PER_QUERY * chunk.rows))
    expanded = wide_q + 8 * keys * shape.query_width
    turn = min(expanded, max(HEAD_WORKSPACE[device], expanded // shape.kv_heads))
    attention = wide_x + x + q + wide_q + turn
    if device == "cpu":
        # each thread's tiles of scores and of their gradients in torch's kernel
        attention += 8 * torch.get_num_threads() * min(32, chunk.rows) * min(512, keys)
    if device == "cpu" and chunk.half:
        # products in float32 of operands that are widened
        attention += 3 * wide_q + 8 * keys * shape.kv_width
        mlp += wide_x + 4 * chunk.rows * shape.intermediate
    return kept + max(mlp, 6 * wide_x, attention)
