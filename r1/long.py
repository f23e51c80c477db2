"""Which way the backward pass of long sequences goes: what each needs, and the first that fits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from r1 import chat, folders, toy
from r1kernels.memory import MODES, PeakBytes, peak_bytes
from r1kernels.model_shape import NAMED, ModelShape, position_limit
from r1kernels.pinned_pool import available_host_bytes
from r1kernels.stream_model import default_chunk_size

if TYPE_CHECKING:
    from r1.config import Config

# of the memory there is. Predictions of what tensors take are within 5%; glibc keeps what is freed
# between live blocks, so that what a CPU's process holds may be twice as much
USABLE = {"cuda": 0.95, "cpu": 0.5}
GIB = 2**30


class Budget(NamedTuple):
    """Bytes that training may take: on the device, and beside it on the host (0: the same)."""

    device: int
    host: int


class Choice(NamedTuple):
    """`mode` is one of `r1kernels.memory.MODES`, as CausalLM.use takes it; `peaks` what every mode
    that was looked at is predicted to need for a pack of `tokens`."""

    mode: str
    why: str
    fits: bool
    tokens: int
    budget: Budget
    peaks: dict[str, PeakBytes]

    def record(self) -> dict[str, Any]:
        """For run.json."""
        return {
            "mode": self.mode,
            "why": self.why,
            "tokens": self.tokens,
            "budget_bytes": self.budget.device,
            "predicted_bytes": {name: peak.device for name, peak in self.peaks.items()},
        }


def sequence_tokens(config: Config) -> int:
    """Tokens of the longest sequence that the sampler may return, whatever the model takes."""
    return config.rollout.max_prompt_tokens + config.rollout.max_tokens


def pack_tokens(config: Config, max_length: int) -> int:
    """Tokens of the largest micro-batch."""
    sequence = min(sequence_tokens(config), max_length)
    outputs = config.rl.prompts_per_step * config.rl.group_size
    return min(max(config.rl.micro_batch_tokens, sequence), outputs * sequence)


def shape_of(config: Config) -> ModelShape:
    """The sizes of `model.path` without its weights.

    It may also be the path of a config.json, and a hub id whose last part is a built-in shape.

    Raises: ValueError for a hub id or a form of model that is not known.
    """
    path = folders.resolve(config.model.path)
    if path == "toy":
        tokenizer = toy.build_tokenizer(chat.load_template(config.chat.template))
        return ModelShape.from_config(toy.model_config(config.model.toy, tokenizer))
    if Path(path).exists():
        return ModelShape.from_config(path)
    name = path.rpartition("/")[2].lower()
    if name not in NAMED:
        raise ValueError(
            f"model.path {config.model.path!r} is neither a path nor one of the shapes known "
            f"without a download ({', '.join(NAMED)}): give the path of its config.json"
        )
    return NAMED[name]


def budget(config: Config, device: torch.device, gpu_gib: float | None = None) -> Budget:
    """What the device (or a GPU of so many GiB) has for training beside the sampler.

    To be asked before the model is loaded: on the CPU it is the memory that is free.
    """
    vllm, rollout = config.rollout.engine == "vllm", config.rollout
    free = _free_host_bytes()
    if gpu_gib is None and device.type == "cpu":
        return Budget(free - int(vllm * rollout.kv_cache_gib * GIB), 0)
    if gpu_gib is None:
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = int(gpu_gib * GIB)
    return Budget(int(total * (1 - vllm * rollout.gpu_memory_utilization)), free)


def choose(
    config: Config,
    sizes: object,
    budget: Budget,
    *,
    fused_layers: bool = False,
    reference: bool = False,
    first: str | None = None,
    without: dict[str, str] | None = None,
) -> Choice:
    """The first way of `long.mode` whose predicted peak fits; the smallest where none does.

    For a model whose peaks cannot be predicted "auto" is "checkpoint".

    Args:
        sizes: a ModelShape, or the configuration of a transformers model.
        fused_layers: Liger's kernels run.
        reference: a frozen copy of the model is on the device too.
        first: mode that is taken before cheaper ones if it fits: what a resumed run began with.
        without: refused mode ("stream") -> why, for the text.
    """
    settings, kind = config.long, config.model.dtype
    on = "cuda" if budget.host else "cpu"
    limit = getattr(sizes, "max_positions", None) or position_limit(sizes)
    tokens = pack_tokens(config, limit or 2**31)
    try:
        shape = sizes if isinstance(sizes, ModelShape) else ModelShape.from_config(sizes)
    except ValueError as error:
        mode = "checkpoint" if settings.mode == "auto" else settings.mode
        return Choice(mode, f"its peak is not predicted: {error}", True, tokens, budget, {})
    itemsize = torch.finfo(getattr(torch, kind)).bits // 8
    copy = shape.params * itemsize * reference
    # attention's output and float32 log-sum-exp of a layer
    saved = tokens * (shape.query_width * itemsize + 4 * shape.heads) * settings.save_attention
    kept = int((settings.device_gib or 0) * GIB)
    peaks = {}
    for name in MODES:
        way, _, offload = name.partition("+")
        wanted = settings.mode in ("auto", way) and way not in (without or {})
        # on the CPU there is nowhere else to keep inputs; a bound on those of a GPU asks for it
        partial = settings.device_gib is not None and way != "plain"
        if wanted and (not offload if on == "cpu" else bool(offload) or not partial):
            peak = peak_bytes(
                shape,
                tokens,
                mode=name,
                dtype=kind,
                device=on,
                fused_layers=fused_layers and way != "stream",
                chunk_size=settings.chunk_size or default_chunk_size(shape.hidden),
            )
            extra, host = copy + (kept if offload else 0), peak.host
            if way != "plain":
                # with an offload those of the layer that runs and of the one before
                extra += saved * (min(2, shape.layers) if offload else shape.layers)
                host += saved * shape.layers if offload else 0
            peaks[name] = peak._replace(device=peak.device + extra, host=host)
    fitting = [
        name
        for name, peak in peaks.items()
        if peak.device <= USABLE[on] * budget.device
        and (on == "cpu" or peak.host <= USABLE[on] * budget.host)
    ]
    smallest = min(peaks, key=lambda name: peaks[name].device)
    mode = first if first in fitting else fitting[0] if fitting else smallest
    why = (
        f"{peaks[mode].device / GIB:.2f} GiB predicted for packs of {tokens:,} tokens, "
        f"{budget.device / GIB:.2f} GiB there"
    )
    larger = [name for name in peaks if MODES.index(name) < MODES.index(mode)]
    if larger and mode != first:
        why += "; " + ", ".join(f"{name} {peaks[name].device / GIB:.2f}" for name in larger)
    for name, reason in (without or {}).items():
        why += f"; {name} is out: {reason}"
    if not fitting:
        why += (
            f"; that is over {USABLE[on]:.0%} of the device's memory or the host's: lower "
            "rl.micro_batch_tokens, rollout.max_tokens or rollout.gpu_memory_utilization"
        )
    return Choice(mode, why, bool(fitting), tokens, budget, peaks)


def _free_host_bytes() -> int:
    """Memory that this process may still take; off Linux all that the machine has."""
    if Path("/proc/meminfo").exists():
        return available_host_bytes()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
