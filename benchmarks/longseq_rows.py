"""Rows of the longseq suite, and how they read for a person."""

import statistics

from benchmarks.gpu_rows import EMPTY_ROW, quantiles
from r1kernels.model_shape import ModelShape


def empty(op: str, mode: str, provider, **shape) -> dict:
    """A row with every field, of a provider that has not been run."""
    return EMPTY_ROW | {
        "op": op,
        "mode": mode,
        "provider": provider.name,
        "backend": provider.backend,
        "shape": shape,
        "note": provider.note,
        "weights_mib": None,
        "predicted_mib": None,
        "tokens_per_s": None,
        "mfu": None,
        "extrapolated": False,
        "packed": None,
    }


def sizes(name: str, shape: ModelShape) -> dict:
    """A row's shape: the decoder by name and numbers."""
    keys = {"D": shape.hidden, "I": shape.intermediate, "L": shape.layers, "H": shape.heads,
            "N": shape.kv_heads, "E": shape.head_dim, "V": shape.vocab}  # fmt: skip
    return {"model": name} | keys


def timed(ms: list[float], tokens: int) -> dict:
    """What times add to a row."""
    return quantiles(ms) | {"tokens_per_s": 1e3 * tokens / statistics.median(ms)}


def line(row: dict) -> str:
    """One row for a person."""
    shape = row["shape"]
    length = f"{shape['T']:>7}" if "T" in shape else " " * 7
    head = f"{row['op'][:16]:16} {shape.get('model', ''):13} {length} {row['provider']:18}"
    if row["status"] != "ok":
        return f"{head} {row['status']}: {row['reason']}"
    found = []
    if row["op"] == "longseq_slope":
        found.append(f"{row['bytes_per_token']:,.0f} bytes/token")
        if row["predicted_bytes_per_token"]:
            found.append(f"predicted {row['predicted_bytes_per_token']:,.0f}")
    if row["op"] == "longseq_largest":
        least = ">= " if row["fails_tokens"] is None else ""
        found.append(f"{least}{row['largest_tokens']:,} tokens, predicted "
                     f"{row['predicted_tokens'] or 0:,}")  # fmt: skip
    if row["peak_mib"] is not None:
        found.append(f"{row['peak_mib']:,.0f} MiB")
        if row["predicted_mib"]:
            found.append(f"predicted {row['predicted_mib']:,.0f}")
    if row["ms_p50"] is not None:
        found.append(f"{row['ms_p50'] / 1e3:.2f} s" + " (busy)" * bool(row.get("busy")))
    if row["mfu"] is not None:
        found.append(f"{row['tokens_per_s']:,.0f} tokens/s, {100 * row['mfu']:.1f}% of peak")
    if row["extrapolated"]:
        found.append("extrapolated")
    if row.get("parts_ms"):
        found += [f"{name} {ms / 1e3:.2f} s" for name, ms in row["parts_ms"].items()]
        found.append(f"ours {100 * row['share_ours']:.0f}%")
    errors = row["rel_err_fp64"] or {}
    found += [f"{name} {error:.1e}" for name, error in errors.items()]
    return f"{head} {', '.join(found)}"


def summary(rows: list[dict]) -> str:
    """Every row that measured something, a line each; how many did not."""
    rows = [row for row in rows if row["op"] != "environment"]
    shown = [line(row) for row in rows if row["status"] == "ok"]
    lost = [line(row) for row in rows if row["status"] != "ok"]
    return "\n".join([*shown, f"without a result: {len(lost)}", *lost])
