"""Rows of the gpu suite, and how they read for a person."""

import statistics

from benchmarks.cpu_suite import is_ours, percentile
from benchmarks.gpu_plan import Cell

EMPTY_ROW = {
    "backend": "torch",
    "dtype": "bfloat16",
    "status": "ok",
    "reason": None,
    "ms_p50": None,
    "ms_min": None,
    "ms_p20": None,
    "ms_p80": None,
    "samples": 0,
    "floor_ms": None,
    "ratio_to_floor": None,
    "peak_mib": None,
    "grad_mib": None,
    "rel_err_fp64": None,
    "eager_err_fp64": None,
    "tflops": None,
    "percent_of_gemm": None,
    "gb_per_s": None,
    "percent_of_copy": None,
    "gpu_state": {},
    "note": "",
}


def quantiles(ms: list[float]) -> dict:
    return {
        "ms_p50": statistics.median(ms),
        "ms_min": min(ms),
        "ms_p20": percentile(ms, 0.2),
        "ms_p80": percentile(ms, 0.8),
        "samples": len(ms),
    }


def tdv(found: Cell | dict) -> dict:
    """A row's shape, of a cell or of the arguments of a check."""
    if isinstance(found, dict):
        found = found.get("shape", found)
        return {k: found[k] if isinstance(found, dict) else getattr(found, k) for k in "TDV"}
    return {k: getattr(found.shape, k) for k in "TDV"}


def line(row: dict) -> str:
    """One row for a person."""
    shape = " ".join(f"{k}={v}" for k, v in row["shape"].items())
    head = f"{row['mode']:17} {row['provider']:16} {shape:26}"
    if row["status"] != "ok":
        return f"{head} {row['status']}: {row['reason']}"
    text = head
    if row["ms_p50"] is not None:
        text += f" {row['ms_p50']:9.2f} ms"
    if row["ratio_to_floor"]:
        text += f" {row['ratio_to_floor']:6.3f}x"
    for key, unit in (("tflops", "TFLOP/s"), ("gb_per_s", "GB/s"), ("percent_of_gemm", "% of GEMM"),
                      ("percent_of_copy", "% of copy"), ("peak_mib", "MiB")):  # fmt: skip
        if row[key] is not None:
            text += f" {row[key]:8.1f} {unit}"
    errors = {k: v for k, v in (row["rel_err_fp64"] or {}).items() if v is not None}
    return text + "".join(f" {name} {value:.1e}" for name, value in errors.items())


def summary(rows: list[dict]) -> str:
    """A short table: each cell's floor, our best and the best peer."""
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["op"].startswith(("linear_", "token_logp")):
            cells.setdefault((row["mode"], *row["shape"].values()), []).append(row)
    bad = [row for row in rows if row["op"] == "smoke" and row["status"] in ("refused", "failed")]
    passed = sum(row["op"] == "smoke" and row["status"] == "ok" for row in rows)
    out = [f"smoke: {passed} passed, {len(bad)} failed"]
    out += [f"  {line(row)}"[:200] for row in bad]
    rates = [row for row in rows if row["op"] in ("copy", "gemm")]
    out += [line(row) for row in rates]
    out.append(
        f"{'mode':17} {'T':>7} {'D':>5} {'V':>7} {'floor ms':>9}  ours               best peer"
    )
    for (mode, T, D, V), found in cells.items():
        timed = [row for row in found if row["status"] == "ok"]
        floor = next((row["ms_p50"] for row in timed if row["provider"] == "floor"), None)
        ours = [row for row in timed if is_ours(row)]
        peers = [
            row for row in timed if not is_ours(row) and not row["provider"].startswith("floor")
        ]
        text = f"{mode:17} {T:7} {D:5} {V:7} " + (f"{floor:9.2f}" if floor else "        -")
        for group in (ours, peers):
            best = min(group, key=lambda row: row["ms_p50"], default=None)
            text += f"  {best['provider']} {best['ms_p50']:.2f} ms" if best else "  -"
            if best and best["ratio_to_floor"]:
                text += f" ({best['ratio_to_floor']:.3f}x, {best['peak_mib']:.0f} MiB)"
        out.append(text)
    return "\n".join(out)
