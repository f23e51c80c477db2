"""What the reports share: names of things and how numbers are written."""

from collections.abc import Iterable

LABELS = {
    "floor": "bare GEMMs",
    "floor_whole": "bare GEMMs, unchunked",
    "native": "r1kernels",
    "native_invariant": "r1kernels, batch invariant",
    "triton": "r1kernels, Triton",
    "cuda": "r1kernels, CUDA",
    "triton_invariant": "r1kernels, Triton, batch invariant",
    "reference": "r1kernels reference",
    "eager": "eager torch",
    "compile": "torch.compile",
    "trl": "TRL",
    "liger": "Liger",
    "liger_flce": "Liger FLCE",
    "liger_flce_fp32": "Liger FLCE, float32 sums",
    "liger_sm90": "Liger scaled CE, CuTe",
    "liger_cutile": "Liger scaled CE, cuTile",
    "liger_torch": "Liger scaled CE, torch",
    "cce": "CCE",
    "cce_exact": "CCE, unfiltered",
    "verl": "verl",
    "torch_lce": "torch linear_cross_entropy",
    "r1_vllm": "r1, vLLM",
    "r1_transformers": "r1, transformers",
}
MODE_LABELS = {
    "forward": "log-probabilities, forward only",
    "forward_backward": "GRPO loss, forward + backward",
    "frozen": "GRPO loss, frozen head",
    "masked_50": "GRPO loss, half of the tokens masked",
    "zero_50": "GRPO loss, half of the tokens without a coefficient",
    "zero_80": "GRPO loss, four fifths of the tokens without a coefficient",
    "entropy": "GRPO loss with entropy bonus",
    "logits_forward": "stored logits, log-probabilities and entropy",
    "logits_step": "stored logits, the same and their gradient in place",
}


def table(header: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *map(list, body)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    if value is None:
        return "-"
    if value and abs(value) < 1e-2:
        return f"{value:.1e}"
    whole = max(0, digits - len(str(int(abs(value)))))
    return f"{value:,.{whole}f}"


def cell_text(row: dict | None) -> str:
    """A time with its ratio to the floor, or why there is none."""
    if row is None:
        return ""
    if row["status"] != "ok":
        return row["status"] if row["status"] == "refused" else "-"
    ratio = row["ratio_to_floor"]
    return (
        f"{number(row['ms_p50'], 4)} ({ratio:.2f}x)"
        if ratio and row["provider"] != "floor"
        else number(row["ms_p50"], 4)
    )
