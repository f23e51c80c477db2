"""The predicted peak of a training step, against what torch's allocator saw and what others ran."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

from r1kernels import PolicyObjective, linear_policy_loss, memory
from r1kernels.balance import largest_tokens
from r1kernels.memory import ITEMSIZE, MODES, OPTIMIZERS, executed_flops, peak_bytes
from r1kernels.memory_events import Account, Gradients, Layer
from r1kernels.model_shape import NAMED, ModelShape
from r1kernels.packing import shift_targets
from r1kernels.stream_model import stream_model

SHAPE = ModelShape(hidden=48, layers=3, heads=6, kv_heads=2, head_dim=16, intermediate=80, vocab=97)


def allocated_at_most(run) -> int:
    """The most bytes alive at once of those that torch's CPU allocator handed out within a call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = found.profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    sizes.sort(key=lambda event: event[0])
    return max(itertools.accumulate(size for _, size in sizes))


@pytest.fixture(scope="module")
def models():
    """Models by (type, dtype), all of the same sizes."""
    import transformers as t

    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 288,
        "vocab_size": 512,
        "head_dim": 16,
    }
    made = {}
    for name, dtype in itertools.product(("Qwen2", "Qwen3"), ("float32", "bfloat16")):
        config = getattr(t, f"{name}Config")(**sizes, tie_word_embeddings=name == "Qwen2")
        torch.manual_seed(0)
        model = t.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        made[name, dtype] = model.train(), ModelShape.from_config(config)
    return made


def train(model, tokens: int) -> None:
    """Forward and backward as the driver does them: the hidden states are nobody's afterwards."""
    input_ids = torch.arange(tokens)[None] % 500
    hidden_TD = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[0]
    weight = model.get_output_embeddings().weight
    ones_T, targets_T = torch.ones(tokens), shift_targets(input_ids)[0]
    out = linear_policy_loss(hidden_TD, weight, targets_T, ones_T, PolicyObjective.dapo())
    del hidden_TD
    out.loss.backward()


@pytest.mark.parametrize("mode", ["plain", "checkpoint"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["Qwen2", "Qwen3"])
def test_within_five_percent_of_what_is_allocated(models, name, dtype, mode):
    model, shape = models[name, dtype]
    model.gradient_checkpointing_disable()
    if mode == "checkpoint":
        model.gradient_checkpointing_enable()
    for tokens, accumulate in ((128, False), (384, True)):
        model.zero_grad()
        # The first backward makes gradients, and whatever a library keeps for good.
        train(model, 8)
        if not accumulate:
            model.zero_grad()
        measured = allocated_at_most(lambda tokens=tokens: train(model, tokens))
        found = peak_bytes(
            shape, tokens, mode=mode, dtype=dtype, optimizer="none", accumulate=accumulate,
            device="cpu",
        )  # fmt: skip
        there = found.parts["weights"] + accumulate * shape.params * ITEMSIZE[dtype]
        predicted = found.device - there
        assert predicted == pytest.approx(measured, rel=0.05), (tokens, accumulate, found.parts)


@pytest.mark.parametrize("chunk_size", [32, 128])
def test_streamed_layers_within_five_percent(chunk_size):
    """On a model so small that the transients of a chunk are up to a third of everything."""
    import transformers as t

    config = t.Qwen2Config(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=288, vocab_size=96, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    stream = stream_model(model, chunk_size=chunk_size)
    weight, objective = model.get_output_embeddings().weight, PolicyObjective.dapo()

    def run(tokens):
        tokens_T = torch.arange(tokens) % 90
        hidden_TD, targets_T = stream(tokens_T), shift_targets(tokens_T[None])[0]
        out = linear_policy_loss(hidden_TD, weight, targets_T, torch.ones(tokens), objective)
        del hidden_TD
        out.loss.backward()

    run(8)
    for tokens in (256, 768):
        model.zero_grad()
        measured = allocated_at_most(lambda tokens=tokens: run(tokens))
        found = peak_bytes(
            ModelShape.from_config(config), tokens, mode="stream", dtype="float32",
            optimizer="none", accumulate=False, device="cpu", chunk_size=chunk_size,
        )  # fmt: skip
        predicted = found.device - found.parts["weights"]
        assert predicted == pytest.approx(measured, rel=0.05), (tokens, found.parts)


@pytest.mark.parametrize(
    ("mode", "mlp_rows", "tokens", "measured"),
    [
        ("checkpoint", 0, 300_000, 135.0e9),
        ("checkpoint+offload", 0, 650_000, 126.8e9),
        ("checkpoint+offload", 4096, 1_200_000, 136.2e9),
    ],
)
def test_what_another_stack_ran_on_an_h200(mode, mlp_rows, tokens, measured):
    """Arctic Long Sequence Training, Llama-3.1-8B: fused loss, norms, RoPE and SwiGLU, then offload
    of checkpoints, then a tiled MLP; parameters, gradients and states on the host."""
    shape = NAMED["llama-3.1-8b"]

    def bytes_of(tokens):
        found = peak_bytes(
            shape, tokens, mode=mode, fused_layers=True, mlp_rows=mlp_rows, optimizer="none",
            accumulate=False,
        )  # fmt: skip
        return found.device - found.parts["weights"] - found.parts.get("gradients", 0)

    assert bytes_of(tokens) == pytest.approx(measured, rel=0.12)
    assert largest_tokens(bytes_of, 136 * 10**9) == pytest.approx(tokens, rel=0.12)


def test_every_layer_frees_what_it_allocates():
    for itemsize, fused, tile, norm, save in itertools.product(
        (2, 4), (False, True), (0, 5), (False, True), (False, True)
    ):
        shape = replace(SHAPE, qk_norm=norm, qkv_bias=True)
        layer = Layer(shape, 11, 11, itemsize, fused, tile, "flash2", 1)
        account = Account({"residual": layer.x})
        layer.forward(account, save)
        if save:
            layer.backward(account, Gradients(itemsize, itemsize, False))
        else:
            account.drop("residual", layer.x)
        # the layer's output, or the gradient that took its place
        account.drop("residual", layer.x if save else 0)
        left = {name: size for name, size in account.live.items() if size}
        grown = {"gradients": itemsize * shape.layer_params} if save else {}
        assert left == {"residual": layer.x, **grown}, (itemsize, fused, tile, norm, save)
        assert min(account.live.values()) >= 0


def test_every_step_frees_what_it_allocates(monkeypatch):
    accounts = []
    run = memory.Step.run
    monkeypatch.setattr(memory.Step, "run", lambda step: accounts.append(run(step)) or accounts[-1])
    for mode, dtype, optimizer, fused, head, tied in itertools.product(
        MODES, ITEMSIZE, OPTIMIZERS, (False, True), (False, True), (False, True)
    ):
        options = {"mode": mode, "dtype": dtype, "optimizer": optimizer, "accumulate": False}
        shape = replace(SHAPE, tied=tied)
        found = peak_bytes(shape, 64, fused_layers=fused, fused_head=head, **options)
        assert sum(found.parts.values()) == found.device and min(found.parts.values()) > 0
        live = accounts[-1].live
        left = {x for x in live if live[x]}
        assert left <= {"weights", "gradients", "optimizer", "inputs"}, (options, fused, head, live)
        held = OPTIMIZERS[optimizer].gradient or ITEMSIZE[dtype]
        assert live["gradients"] == held * shape.params, (options, tied)


def test_modes_need_ever_less_and_offload_moves_it_to_the_host():
    found = [peak_bytes(NAMED["qwen2.5-7b"], 131072, mode=mode) for mode in MODES]
    plain, checkpoint, offload, stream, both = (x.device for x in found)
    assert plain > checkpoint > offload > both and checkpoint > stream > both
    assert [x.host > 0 for x in found] == [mode.endswith("+offload") for mode in MODES]


def test_what_is_executed_is_what_is_needed_and_what_is_done_again():
    shape = NAMED["qwen2.5-7b"]
    needed, plain = shape.flops(32768), executed_flops(shape, 32768, "plain")
    # Attention's backward makes the scores again: half a forward more than the twice of it needed.
    extra = shape.query_width * shape.pairs(32768)
    assert plain == needed + extra
    again = executed_flops(shape, 32768, "checkpoint") - plain
    matrices = shape.attention_matrices + 2 * shape.hidden * shape.intermediate
    assert again == 2 * 32768 * shape.layers * matrices + 2 * extra


ARGUMENTS = ["--model", "qwen2.5-1.5b", "--tokens", "32768", "--gpu", "80", "--tflops", "100"]


def test_command_line(capsys, tmp_path):
    assert memory.main([*ARGUMENTS, "--json", "--host", "20"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["modes"]) == list(MODES) and report["parameters"] == 1_543_714_304
    for mode, found in report["modes"].items():
        here = peak_bytes(NAMED["qwen2.5-1.5b"], 32768, mode=mode)
        assert (found["peak"], found["host"], found["parts"]) == here
        longest = peak_bytes(NAMED["qwen2.5-1.5b"], found["largest_tokens"], mode=mode)
        more = peak_bytes(NAMED["qwen2.5-1.5b"], found["largest_tokens"] + 1, mode=mode)
        assert longest.device <= 80e9 and longest.host <= 20e9
        assert more.device > 80e9 or more.host > 20e9
        assert found["fits"] == (found["largest_tokens"] >= 32768)
        assert found["seconds"] == found["flops"] / 1e14
    assert memory.main([*ARGUMENTS, "--mode", "stream"]) == 0
    text = capsys.readouterr().out
    assert "Predicted, not measured" in text and "largest tokens" in text and "plain" not in text
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for arguments, message in (
        (
            ["--model", str(tmp_path), "--tokens", "5"],
            "lacks num_attention_heads, intermediate_siz",
        ),
        (["--model", "gpt9", "--tokens", "5"], "unknown model 'gpt9'"),
        ([*ARGUMENTS, "--gpu", "-1"], "--gpu must be positive"),
        ([*ARGUMENTS, "--gpu", "inf"], "--gpu must be positive and finite, got inf"),
        ([*ARGUMENTS, "--host", "nan"], "--host must be positive and finite, got nan"),
        ([*ARGUMENTS, "--gpu", "1e200"], "tokens still fit: give a smaller limit"),
        ([*ARGUMENTS, "--slack", "inf"], "--slack must be finite, got inf"),
        (["--model", "qwen2.5-7b", "--tokens", "0"], "tokens must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            memory.main(arguments)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "magic"}, "mode must be one of plain, checkpoint"),
        ({"dtype": "float64"}, "dtype must be one of float32"),
        ({"optimizer": "sgd"}, "optimizer must be one of none, adamw"),
        ({"device": "tpu"}, "device must be one of cpu, cuda"),
        ({"attention": "eager"}, "attention must be one of flash2"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"workspace_mb": 0}, "workspace_mb must be at least 1, got 0"),
        ({"mlp_rows": -1}, "mlp_rows must not be negative, got -1"),
        ({"slack": -1}, "slack must not be negative, got -1"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        peak_bytes(SHAPE, **{"tokens": 4, **options})
