"""A training step on groups that share prompts, with the prompts once and with a copy for each.

python -m benchmarks.prefix_sharing --prompt 1024 --completion 256 --group 8

Both sides run the same transformers model under "r1kernels" attention and the fused policy loss,
in turns; what is printed are medians, and the speed-up beside the one that counted operations
allow. Gradients are compared first. Weights are random, nothing is downloaded.
"""

import argparse
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.longseq_problem import build_model
from benchmarks.meter import meter
from r1kernels import PolicyObjective, SharedPrefixes, linear_policy_loss
from r1kernels.model_shape import NAMED, ModelShape

SMALL = ModelShape(
    hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, intermediate=704, vocab=2048,
    tied=True, qkv_bias=True,
)  # fmt: skip
# largest relative difference of all gradients in 2-norm, as rounding explains it
AGREE = {"float32": 1e-4, "bfloat16": 5e-2}


def operations(shape: ModelShape, groups: list[tuple[int, list[int]]], shared: bool) -> float:
    """Multiplications of a forward pass, a causal square counted as its half."""
    layout = SharedPrefixes(groups)
    matrices = shape.layers * (shape.attention_matrices + shape.mlp_matrices)
    tokens = layout.num_tokens if shared else layout.num_unshared
    pairs = 0.0
    for prompt, rest in groups:
        if shared:
            pairs += prompt**2 / 2 + sum(length**2 / 2 + prompt * length for length in rest)
        else:
            pairs += sum((prompt + length) ** 2 / 2 for length in rest)
    head = len(layout.rows) * shape.hidden * shape.vocab
    return tokens * matrices + head + 2 * shape.layers * shape.query_width * pairs


def steps(model, groups, device: str) -> dict[str, Callable[[], None]]:
    """A forward and backward pass of both batches; gradients are added to those that are there."""
    layout = SharedPrefixes(groups).to(device)
    T, U, vocab = layout.num_tokens, layout.num_unshared, model.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    tokens_T = torch.randint(0, vocab, (T,), generator=generator).to(device)
    rows, rows_U = layout.rows.cpu(), layout.unshared(torch.arange(T))
    targets_R = torch.randint(0, vocab, rows.shape, generator=generator)
    advantages_B = torch.randn(layout.num_sequences, generator=generator)
    # the rows that predict, in the batch without sharing: behind each sequence's prompt
    starts = layout.cu_seqlens.tolist()
    prompts = [prompt for prompt, rest in groups for _ in rest]
    at = [
        row
        for start, stop, prompt in zip(starts[:-1], starts[1:], prompts, strict=True)
        for row in range(start + prompt - 1, stop - 1)
    ]
    assert torch.equal(rows_U[at], rows)
    targets_U = torch.full((U,), -100).index_copy(0, torch.tensor(at), targets_R)
    tokens_U, positions_U = layout.unshared(tokens_T), layout.unshared(layout.position_ids)
    options = {"objective": PolicyObjective.dapo(), "weight": model.lm_head.weight}

    def hidden(tokens, positions, **more):
        return model.model(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, **more
        ).last_hidden_state[0]

    def shared() -> None:
        rows_RD = layout.head_rows(hidden(tokens_T, layout.position_ids, layout=layout))
        linear_policy_loss(
            rows_RD, targets=targets_R, advantages=advantages_B,
            cu_seqlens=layout.row_cu_seqlens.cpu(), **options,
        ).loss.backward()  # fmt: skip

    def unshared() -> None:
        linear_policy_loss(
            hidden(tokens_U, positions_U), targets=targets_U, advantages=advantages_B,
            cu_seqlens=layout.cu_seqlens, **options,
        ).loss.backward()  # fmt: skip

    return {"unshared": unshared, "shared": shared}


def gradient(model, step) -> torch.Tensor:
    model.zero_grad()
    step()
    return torch.cat([p.grad.double().flatten() for p in model.parameters()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--completion", type=int, default=256)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--model", choices=["small", *NAMED], default="small")
    parser.add_argument("--dtype", choices=AGREE, default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    shape = SMALL if args.model == "small" else NAMED[args.model]
    groups = [(args.prompt, [args.completion] * args.group)] * args.groups
    longest, watch = args.prompt + args.completion, meter(args.device)
    model = build_model(shape, longest, args.dtype, args.device, "r1kernels")
    both = steps(model, groups, args.device)
    ours, theirs = (gradient(model, both[name]) for name in ("shared", "unshared"))
    gap = float((ours - theirs).norm() / theirs.norm())
    if not gap <= AGREE[args.dtype]:
        raise SystemExit(f"gradients differ by {gap:.1e}, which rounding does not explain")
    found: dict[str, list[float]] = {name: [] for name in both}
    for turn in range(args.turns):
        for name in sorted(both, reverse=bool(turn % 2)):
            found[name].append(watch.clock(both[name]) / 1e3)
    ratios = [a / b for a, b in zip(found["unshared"], found["shared"], strict=True)]
    ideal = operations(shape, groups, False) / operations(shape, groups, True)
    print(
        f"{args.model} {args.dtype} {args.device}: prompt {args.prompt}, {args.group} completions "
        f"of {args.completion}, {args.groups} groups; gradients differ by {gap:.1e}\n"
        f"tokens {SharedPrefixes(groups).token_ratio:.2f}x, operations {ideal:.2f}x, measured "
        f"{median(ratios):.2f}x ({median(ratios) / ideal:.0%} of the operations' ratio), seconds "
        + ", ".join(f"{name} {median(times):.3f}" for name, times in found.items())
    )


if __name__ == "__main__":
    main()
