"""Time and memory of a decoder, forward and backward: `python -m benchmarks.stream [T D L DTYPE]`.

Providers take turns in one process, so that what else the machine does hits all alike: read the
ratios. Time on a CPU is the process's own, of all threads; memory is the peak of the process above
what it held before the call. The model is a random Qwen2 with 8 query heads on 2 key heads; there
is no head and no loss.
"""

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.meter import meter, print_ratios
from r1kernels import stream_model

DEFAULT = ("4096", "256", "4", "float32")
ROUNDS = 5
VOCABULARY = 512


def build(T: int, D: int, L: int, dtype: torch.dtype, device: str):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=D, intermediate_size=3 * D, num_hidden_layers=L,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=T,
        attn_implementation="sdpa",
    )  # fmt: skip
    return Qwen2ForCausalLM(config).to(device, dtype)


def providers(model, chunk_size: int) -> dict[str, Callable[[Tensor], Tensor]]:
    def plain(ids: Tensor) -> Tensor:
        model.gradient_checkpointing_disable()
        return model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]

    def checkpointed(ids: Tensor) -> Tensor:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]

    return {
        "plain": plain,
        "checkpointed": checkpointed,
        "stream_model": stream_model(model, chunk_size=chunk_size),
        "saved attention": stream_model(model, chunk_size=chunk_size, save_attention=True),
    }


def process_ms(once: Callable) -> float:
    start = time.process_time()
    once()
    return (time.process_time() - start) * 1e3


def main() -> None:
    T, D, L, dtype = (*sys.argv[1:], *DEFAULT[len(sys.argv) - 1 :])
    T, D, L, dtype = int(T), int(D), int(L), getattr(torch, dtype)
    device, chunk_size = "cuda" if torch.cuda.is_available() else "cpu", max(1, T // 8)
    model, watch = build(T, D, L, dtype, device).train(), meter(device)
    ids, dy = torch.randint(VOCABULARY, (T,), device=device), torch.randn(T, D).to(device, dtype)

    def step(run: Callable) -> Callable:
        def once() -> None:
            model.zero_grad()
            run(ids).backward(dy)

        return once

    steps = {name: step(run) for name, run in providers(model, chunk_size).items()}
    times, peaks = ({name: [] for name in steps} for _ in range(2))
    expected = None
    for turn in range(ROUNDS + 1):
        for name, once in steps.items():
            ms = watch.times(once, 0, 1, 1) if device == "cuda" else [process_ms(once)]
            grads = torch.cat([x.grad.flatten() for x in model.model.parameters()]).double()
            expected = grads if expected is None else expected
            if not (error := float((grads - expected).norm() / expected.norm())) < 0.05:
                raise RuntimeError(f"{name} differs from the plain model by {error:.2e}")
            if turn:  # the first round warms up
                times[name] += ms
                model.zero_grad()
                peaks[name].append(watch.peak(once)[1])
    threads = torch.get_num_threads()
    print(f"T={T} D={D} L={L} chunk={chunk_size} {dtype} on {watch.name()}, {threads} threads")
    print_ratios(times, peaks, "plain")


if __name__ == "__main__":
    main()
