"""The GPU part of the report: the model, and rows made up here to see where they land."""

import pytest

from benchmarks import gpu_plan, report_gpu, roofline
from benchmarks.gpu_rows import EMPTY_ROW
from benchmarks.report_gpu import LLAMA_32K, LOGITS

H200 = next(card for card in roofline.GPUS if card.name == "H200")
H100 = next(card for card in roofline.GPUS if card.name.startswith("H100"))


def row(op, provider, mode, shape, ms, floor, **rest):
    fields = {
        "op": op,
        "provider": provider,
        "mode": mode,
        "shape": {k: getattr(shape, k) for k in "TDV"},
        "ms_p50": ms,
        "floor_ms": floor,
        "ratio_to_floor": ms and ms / floor,
        "peak_mib": 2048.0,
        "device": "NVIDIA H200",
        "commit": "abc",
        "machine": {"torch": "2.11.0", "triton": "3.6.0", "driver": "580"},
    }
    return EMPTY_ROW | fields | rest


@pytest.fixture
def rows():
    loss = "linear_policy_loss"
    return [
        row(loss, "floor", "forward_backward", LLAMA_32K, 100.0, 100.0),
        row(loss, "triton", "forward_backward", LLAMA_32K, 108.0, 100.0),
        row(loss, "cuda", "forward_backward", LLAMA_32K, 104.0, 100.0),
        row(loss, "eager", "forward_backward", LLAMA_32K, 50.0, 100.0),
        row(loss, "triton", "masked_50", LLAMA_32K, 52.0, 50.0),
        row("linear_logp", "triton", "forward", LLAMA_32K, 40.0, 32.0),
        row("token_logp", "triton", "logits_step", LOGITS, 2.0, 1.7, percent_of_copy=87.6),
        row(loss, "verl", "forward_backward", LLAMA_32K, None, 100.0, status="missing",
            reason="verl is not installed"),
        row("gemm", "torch", "product", LLAMA_32K, 1.0, 1.0, tflops=788.4),
    ]  # fmt: skip


def test_roofline_of_the_published_head():
    thv = LLAMA_32K.T * LLAMA_32K.D * LLAMA_32K.V
    assert roofline.flops(LLAMA_32K, "forward") == 2 * thv
    assert roofline.flops(LLAMA_32K, "forward_backward") == 6 * thv
    assert roofline.flops(LLAMA_32K, "recompute") == 8 * thv
    assert roofline.mode_flops(LLAMA_32K, "masked_50") == 3 * thv
    assert roofline.mode_flops(LLAMA_32K, "zero_80") == pytest.approx(2.8 * thv)
    # 49.7 ms is the best published forward at this shape on this card.
    assert 0.85 * 49.7 < roofline.floor_ms(LLAMA_32K, "forward", H100) < 1.15 * 49.7


def test_products_add_up_to_the_paths_operations():
    for path in roofline.PATHS:
        total = sum(operations for operations, _ in roofline.products(LLAMA_32K, path))
        assert total == pytest.approx(roofline.flops(LLAMA_32K, path))


def test_small_products_are_bound_by_memory():
    narrow = gpu_plan.tokens(32768, 64, 131072)
    operations = roofline.mode_flops(narrow, "forward_backward") / (H200.tflops * 1e9)
    assert roofline.floor_ms(narrow, "forward_backward", H200) > 2 * operations


@pytest.mark.parametrize("mode", roofline.MODES)
def test_ours_lies_above_the_floor_and_the_epilogue_is_the_span(mode):
    least, most = roofline.ours_ms(LLAMA_32K, mode, H200)
    assert roofline.floor_ms(LLAMA_32K, mode, H200) <= least < most
    passes = 2 if mode == "entropy" else 1
    rows = 0.5 if mode == "masked_50" else 1.0
    assert most - least == pytest.approx(passes * roofline.epilogue_ms(LLAMA_32K, H200, rows))


def test_without_rows_every_card_is_not_measured(tmp_path):
    text = report_gpu.bars([])
    for card in roofline.GPUS:
        assert f"{card.name}: **not measured**." in text
    assert "**" not in text.split("| --- |")[-1]
    assert report_gpu.block([]) == [text]
    assert set(report_gpu.plot([], tmp_path)) == {"The roofline model: predictions, no measurement"}


def test_measured_bars_are_in_their_own_terms(rows):
    def cell(mode, shape=LLAMA_32K):
        return report_gpu.reached(rows, shape, mode)

    assert cell("forward_backward") == "**104.0** (1.040x)"
    assert cell("masked_50") == "**52.00** (0.50 of dense)"
    assert cell("forward") == "**40.00** (0.80)"
    assert cell("logits_step", LOGITS) == "**2.000** (88%)"
    assert cell("frozen") == "not measured"
    text = report_gpu.bars(rows)
    assert "H200: measured on one NVIDIA H200, driver 580, torch 2.11.0" in text
    assert "H100 SXM: **not measured**." in text


def test_measured_cells_name_every_provider_and_reason(rows):
    text = report_gpu.measured(rows, H200)
    assert "108.0 (1.08x, 2.00 GiB)" in text and "50.00 (0.50x, 2.00 GiB)" in text
    assert "verl: verl is not installed" in text
    assert "788 TFLOP/s" in text
    assert report_gpu.measured(rows, H100) is None


def test_pictures_of_what_was_measured(rows, tmp_path):
    made = report_gpu.plot(rows, tmp_path)
    assert len(made) == 3
    for path in made.values():
        assert path.stat().st_size > 10000
