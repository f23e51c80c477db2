"""How many bytes a training step needs at its peak, predicted: `python -m r1kernels.memory`.

    python -m r1kernels.memory --model qwen2.5-7b --tokens 131072 --gpu 141

An account of what forward and backward allocate and free, in their order (`memory_events`), of one
packed micro-batch of a dense transformers decoder. docs/memory.md has the assumptions. Not in it:
the optimizer's own temporaries, a framework's buckets for communication, activations of a reference
model. Sizes are bytes; GB are 10^9 bytes.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

from r1kernels.balance import largest_tokens
from r1kernels.chunked_head import DEFAULT_WORKSPACE_MB
from r1kernels.memory_events import WORKSPACE, Layer
from r1kernels.memory_step import Optimizer, Step
from r1kernels.model_shape import NAMED, ModelShape, shape_of
from r1kernels.stream_model import default_chunk_size

GB = 10**9
# From the cheapest in time to the cheapest in memory.
MODES = ("plain", "checkpoint", "checkpoint+offload", "stream", "stream+offload")
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
# What a device needs beside the tensors that are counted: context and libraries, fragmentation.
SLACK = {"cpu": 0, "cuda": 6_000_000_000}
ATTENTION = {"cpu": "cpu", "cuda": "flash2"}

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
    chunk_size: int | None = None,
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
        chunk_size: queries of a chunk in the stream modes; None: `stream_model`'s own.
        workspace_mb: of the head; None: the default of `linear_logp`.
        slack: bytes added on top; None: SLACK.

    Raises: ValueError on tokens and other counts below 1, and on names that are not known.
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
    chunk_size = default_chunk_size(shape.hidden) if chunk_size is None else chunk_size
    for name, value in (
        ("tokens", tokens),
        ("chunk_size", chunk_size),
        ("head_groups", head_groups),
        ("workspace_mb", 1 if workspace_mb is None else workspace_mb),
    ):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")
    for name, value in (("mlp_rows", mlp_rows), ("slack", slack or 0)):
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value!r}")
    layer = Layer(
        shape, tokens, tokens, ITEMSIZE[dtype], fused_layers, mlp_rows,
        attention or ATTENTION[device], head_groups,
    )  # fmt: skip
    step = Step(
        layer, mode, OPTIMIZERS[optimizer], accumulate, fused_head, chunk_size,
        workspace_mb or DEFAULT_WORKSPACE_MB[device], device,
    )  # fmt: skip
    account = step.run()
    slack = SLACK[device] if slack is None else slack
    parts = {name: size for name, size in (account.at_peak | {"slack": slack}).items() if size}
    return PeakBytes(account.peak + slack, step.host, parts)


def executed_flops(shape: ModelShape, length: int, mode: str, mlp_rows: int = 0) -> int:
    """Floating-point operations that a training step on one sequence executes, what is computed
    again included; `ModelShape.flops` has what the step needs.

    A checkpointed layer runs again but for its last product; attention's backward is 2.5 forwards,
    as it makes the scores again.
    """
    linear = shape.attention_matrices + shape.mlp_matrices
    again = 0 if mode == "plain" else linear - shape.hidden * shape.intermediate
    if mlp_rows and not mode.startswith("stream"):
        again += 2 * shape.hidden * shape.intermediate
    products = shape.layers * (3 * linear + again) + 3 * shape.vocab * shape.hidden
    halves = 7 if mode == "plain" else 9
    return 2 * length * products + halves * shape.query_width * shape.pairs(length)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m r1kernels.memory",
        description="Predicts the peak memory of a training step, by mode, and what fits.",
    )
    parser.add_argument("--model", required=True, help=f"config.json, or {', '.join(NAMED)}")
    parser.add_argument("--tokens", type=int, required=True, help="packed tokens of a micro-batch")
    parser.add_argument("--gpu", type=float, help="GB of device memory")
    parser.add_argument("--host", type=float, help="GB of host memory that may be pinned")
    parser.add_argument("--mode", choices=MODES, help="this one only")
    parser.add_argument("--sequences", type=int, default=1, help="of equal length, for the FLOPs")
    parser.add_argument(
        "--dtype", choices=ITEMSIZE, default="bfloat16", help="of weights and activations"
    )
    parser.add_argument(
        "--optimizer", choices=OPTIMIZERS, default="adamw",
        help="adamw: float32 master, moments and gradients; -16bit-gradients: gradients as the "
        "weights; -cpu: master and moments on the host; -16bit: all as the weights",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=SLACK, default="cuda", help="slack, attention and workspace go by it"
    )
    parser.add_argument("--attention", choices=WORKSPACE, help="backward's workspace")
    parser.add_argument(
        "--head-groups", type=int, default=1, help="of heads, in turns in attention's backward"
    )
    parser.add_argument("--mlp-rows", type=int, default=0, help="rows of a tile of tiled_mlp")
    parser.add_argument("--chunk-size", type=int, help="queries at a time, in stream modes")
    parser.add_argument("--workspace-mb", type=int, help="of the fused head, in MiB")
    parser.add_argument("--stored-logits", action="store_true", help="no fused head")
    parser.add_argument("--fused-layers", action="store_true", help="Liger's norm, RoPE, SwiGLU")
    parser.add_argument("--slack", type=float, help="GB beside what is counted")
    parser.add_argument("--tflops", type=float, help="rate of the device, for a predicted time")
    parser.add_argument("--json", action="store_true", help="print bytes, FLOPs and seconds")
    given = parser.parse_args(arguments)
    try:
        report = _report(given)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    print(json.dumps(report) if given.json else _table(report))
    return 0


def _report(given: argparse.Namespace) -> dict:
    """What is printed, in bytes, floating-point operations and seconds."""
    shape = shape_of(given.model)
    for name in ("gpu", "host", "tflops", "sequences"):
        value = getattr(given, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} must be positive and finite, got {value:g}")
    if given.slack is not None and not math.isfinite(given.slack):
        raise ValueError(f"--slack must be finite, got {given.slack:g}")
    limits = [None if x is None else int(x * GB) for x in (given.gpu, given.host)]
    modes = {}
    for mode in [given.mode] if given.mode else MODES:

        def predict(tokens: int, mode: str = mode) -> PeakBytes:
            return peak_bytes(
                shape, tokens, mode=mode, dtype=given.dtype, optimizer=given.optimizer,
                device=given.device, fused_head=not given.stored_logits,
                fused_layers=given.fused_layers, attention=given.attention,
                head_groups=given.head_groups, mlp_rows=given.mlp_rows,
                chunk_size=given.chunk_size, workspace_mb=given.workspace_mb,
                slack=None if given.slack is None else int(given.slack * GB),
            )  # fmt: skip

        def beyond(tokens: int, predict=predict) -> int:
            """0 while everything fits."""
            pairs = zip(predict(tokens)[:2], limits, strict=True)
            return max(0 if limit is None else max(0, size - limit) for size, limit in pairs)

        found = predict(given.tokens)
        length = -(-given.tokens // given.sequences)
        flops = given.sequences * executed_flops(shape, length, mode, given.mlp_rows)
        modes[mode] = {"peak": found.device, "host": found.host, "parts": found.parts}
        modes[mode] |= {"flops": flops}
        if given.gpu is not None:
            modes[mode] |= {"fits": not beyond(given.tokens)}
            modes[mode] |= {"largest_tokens": largest_tokens(beyond, 0)}
        if given.tflops is not None:
            modes[mode] |= {"seconds": flops / (given.tflops * 1e12)}
    return {
        "model": given.model,
        "parameters": shape.params,
        "tokens": given.tokens,
        "sequences": given.sequences,
        "dtype": given.dtype,
        "optimizer": given.optimizer,
        "device": given.device,
        "gpu": limits[0],
        "host": limits[1],
        "model_flops": given.sequences * shape.flops(-(-given.tokens // given.sequences)),
        "modes": modes,
    }


def _table(report: dict) -> str:
    modes = report["modes"]
    names = sorted({name for mode in modes.values() for name in mode["parts"]})
    names.sort(key=lambda name: -max(mode["parts"].get(name, 0) for mode in modes.values()))
    rows = [(f"  {name}", [_gb(m["parts"].get(name, 0)) for m in modes.values()]) for name in names]
    rows = [("peak, GB", [_gb(mode["peak"]) for mode in modes.values()]), *rows]
    rows.append(("host, GB", [_gb(mode["host"]) for mode in modes.values()]))
    if report["gpu"] is not None:
        rows.append(("fits", ["yes" if mode["fits"] else "no" for mode in modes.values()]))
        rows.append(("largest tokens", [f"{m['largest_tokens']:,}" for m in modes.values()]))
    rows.append(("PFLOP executed", [f"{mode['flops'] / 1e15:.3g}" for mode in modes.values()]))
    if all("seconds" in mode for mode in modes.values()):
        rows.append(("seconds", [f"{mode['seconds']:.3g}" for mode in modes.values()]))
    width = max(len(name) for name, _ in rows)
    wide = [max(len(mode), 9) for mode in modes]
    limit = "" if report["gpu"] is None else f", {_gb(report['gpu'])} GB of memory"
    lines = [
        f"Predicted, not measured: {report['model']}, {report['parameters'] / 1e9:.2f} B parameters"
        f", {report['tokens']:,} tokens, {report['dtype']}, {report['optimizer']}, "
        f"{report['device']}{limit}; {report['model_flops'] / 1e15:.3g} PFLOP needed",
        "",
        " ".join([" " * width, *(f"{m:>{w}}" for m, w in zip(modes, wide, strict=True))]),
    ]
    for name, cells in rows:
        padded = (f"{cell:>{w}}" for cell, w in zip(cells, wide, strict=True))
        lines.append(" ".join([f"{name:<{width}}", *padded]))
    return "\n".join(lines)


def _gb(size: int) -> str:
    return f"{size / GB:.2f}" if size else "-"


if __name__ == "__main__":
    sys.exit(main())
