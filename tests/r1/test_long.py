"""Long sequences: every way to compute hidden states gives the same step; which one is taken."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from r1 import batch, config, long, model, rewards, stages, toy
from r1.batch import Sample
from r1.cli import main
from r1.config import Long, Model, Objective, Optim, Toy
from r1.long import GIB, Budget
from r1.loss import objective_of
from r1.stages.session import Session
from r1.trainer import Trainer
from r1kernels.memory import MODES
from r1kernels.model_shape import NAMED

ROOT = Path(__file__).resolve().parents[2]
TOY = Toy(hidden=32, layers=2, heads=2, intermediate=48, max_positions=96)
# no length of a sequence or of the pack is a multiple of it
SETTINGS = Long(chunk_size=7, device_gib=0.0)
LENGTHS = [(9, 40), (1, 17), (30, 23)]


def minibatch():
    generator = torch.Generator().manual_seed(1)

    def one(index, context, length):
        tokens = torch.randint(3, 90, (context + length,), generator=generator).tolist()
        logps = (-5 * torch.rand(length, generator=generator)).tolist()
        return Sample(
            tokens=tokens,
            context=context,
            policy=1.0,
            advantage=1.0 - 0.7 * index,
            logp_sampler=logps,
        )

    return batch.minibatch_of([one(i, *pair) for i, pair in enumerate(LENGTHS)], 200)


def step(mode, save_attention=False):
    """Weights after one optimizer step in float32, its metrics, and what was found before it."""
    lm = model.load(Model(path="toy", dtype="float32", toy=TOY))
    lm.use(mode, replace(SETTINGS, save_attention=save_attention))
    reference = lm.frozen_copy()
    objective = objective_of(Objective(preset="r1"))
    # AdamW's first step is the sign of the gradient, but where a gradient is below eps: rounding is
    trainer = Trainer(lm, Optim(lr=1e-3, eps=1e-3), 10, objective=objective)
    part = minibatch()
    old, frozen = (trainer.score(part.packs, one)[0].logp_T for one in (lm, reference))
    packs = [part.packs[0].with_logp(old=old, ref=frozen)]
    metrics = trainer.step(batch.Minibatch(packs=packs, idle=[], counts=part.counts))
    weights = torch.cat([param.detach().flatten() for param in lm.module.parameters()])
    return weights, metrics, old, frozen, trainer.logps[0]


@pytest.fixture(scope="module")
def plain():
    return step("plain")


@pytest.mark.parametrize("save_attention", [False, True], ids=["again", "saved"])
@pytest.mark.parametrize("mode", MODES[1:])
def test_every_mode_takes_the_same_step(mode, save_attention, plain):
    weights, metrics, old, frozen, found = step(mode, save_attention)
    # scored and trained in one way: the ratio is 1 and the divergence 0 to the last bit
    assert torch.equal(old, found) and torch.equal(frozen, found)
    assert metrics["ratio"] == metrics["tokens"] == sum(length for _, length in LENGTHS)
    assert metrics["kl"] == 0
    if mode.startswith("checkpoint"):
        assert torch.equal(weights, plain[0])
    assert metrics["loss"] == pytest.approx(plain[1]["loss"], rel=1e-6, abs=1e-7)
    assert metrics["grad_norm"] == pytest.approx(plain[1]["grad_norm"], rel=1e-5)
    torch.testing.assert_close(weights, plain[0], rtol=0, atol=1e-6)


def test_a_mode_is_left_without_a_trace():
    lm = model.load(Model(path="toy", dtype="float32", toy=TOY))
    pack = minibatch().packs[0]
    kept = lm.hidden(pack.tokens_T, pack.cu_seqlens)
    for mode in ("checkpoint", "stream", "plain"):
        lm.use(mode, SETTINGS)
    assert torch.equal(lm.hidden(pack.tokens_T, pack.cu_seqlens), kept)
    assert not lm.module.is_gradient_checkpointing


def test_a_scaled_rotary_embedding_takes_longer_sequences():
    lm = model.load(Model(path="toy", dtype="float32", toy=TOY))
    assert lm.max_length == 96
    scaling = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 96}
    lm.text_config.rope_parameters = lm.text_config.rope_parameters | scaling
    assert lm.max_length == 288
    choice = long.choose(settings("rl.micro_batch_tokens=1"), lm.text_config, Budget(GIB, 0))
    assert choice.tokens == 288


def settings(*overrides):
    return config.load(ROOT / "recipes" / "long_32k.toml", list(overrides))


def gib(mode, *overrides, **options):
    return long.choose(
        settings(*overrides), NAMED["qwen2.5-1.5b"], Budget(1000 * GIB, 1000 * GIB), **options
    ).peaks[mode].device / GIB  # fmt: skip


def test_auto_takes_the_first_that_fits():
    shape = NAMED["qwen2.5-1.5b"]
    peaks = long.choose(settings(), shape, Budget(2000 * GIB, 2000 * GIB)).peaks
    assert list(peaks) == list(MODES)
    for name in MODES:
        enough = int(peaks[name].device / long.USABLE["cuda"]) + 1
        choice = long.choose(settings(), shape, Budget(enough, 2000 * GIB))
        fitting = [one for one in MODES if peaks[one].device <= peaks[name].device]
        assert choice.fits and choice.mode == fitting[0] and "lower" not in choice.why
    smallest = min(peaks, key=lambda name: peaks[name].device)
    choice = long.choose(settings(), shape, Budget(GIB, 2000 * GIB))
    assert (choice.mode, choice.fits) == (smallest, False)
    assert "over 95% of the device's memory or the host's: lower rl.micro_batch" in choice.why
    # no room on the host for what an offload needs
    choice = long.choose(settings(), shape, Budget(int(peaks[smallest].device * 1.2), GIB))
    assert not choice.mode.endswith("offload")


def test_what_else_decides_the_mode():
    # a reference model is one more copy of the weights
    more = gib("stream", reference=True) - gib("stream")
    assert more == pytest.approx(2 * NAMED["qwen2.5-1.5b"].params / GIB)
    assert gib("plain", fused_layers=True) < gib("plain")
    # what may stay on the GPU is added to the mode that moves the rest
    assert gib("stream+offload", "long.device_gib=3") == pytest.approx(gib("stream+offload") + 3)
    # attention's output, as wide as a layer's input here, and the log-sum-exp of its 12 heads
    saving, shape = "long.save_attention=true", NAMED["qwen2.5-1.5b"]
    saved = 34816 * (2 * 1536 + 4 * 12) / GIB
    assert gib("plain", saving) == gib("plain")
    assert gib("stream", saving) == pytest.approx(gib("stream") + 28 * saved)
    assert gib("stream+offload", saving) == pytest.approx(gib("stream+offload") + 2 * saved)
    host = [
        long.choose(settings(*more), shape, Budget(GIB, GIB)).peaks["checkpoint+offload"].host
        for more in ([saving], [])
    ]
    assert (host[0] - host[1]) / GIB == pytest.approx(28 * saved)
    with pytest.raises(KeyError, match="checkpoint"):
        gib("checkpoint", "long.device_gib=3")
    with pytest.raises(KeyError, match="plain"):
        gib("plain", "long.mode=stream")
    # the CPU has no host beside it; a resumed run goes on as it began
    on_cpu = long.choose(settings(), NAMED["qwen2.5-1.5b"], Budget(1000 * GIB, 0), first="stream")
    assert set(on_cpu.peaks) == {"plain", "checkpoint", "stream"} and on_cpu.mode == "stream"
    refused = long.choose(
        settings(), NAMED["qwen2.5-1.5b"], Budget(100 * GIB, 0), without={"stream": "layers.0"}
    )
    assert refused.mode == "checkpoint" and "stream is out: layers.0" in refused.why
    odd = type("Odd", (), {"to_dict": lambda self: {"model_type": "odd"}})()
    assert long.choose(settings(), odd, Budget(GIB, 0)).mode == "checkpoint"


def relu_model(folder):
    """A decoder that `stream` does not know, of a type whose peaks are predicted."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = Qwen2Config(
        vocab_size=112, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        hidden_act="relu", num_attention_heads=4, num_key_value_heads=2, eos_token_id=1,
        max_position_embeddings=4096,
    )  # fmt: skip
    Qwen2ForCausalLM(sizes).save_pretrained(folder)
    toy.build_tokenizer().save_pretrained(folder)
    return folder


def test_auto_says_that_stream_was_refused_and_stream_itself_names_the_module(
    tmp_path, monkeypatch, capsys
):
    relu_model(tmp_path / "relu")
    monkeypatch.setattr(long, "budget", lambda config, device: Budget(1, 0))

    def session(mode):
        own = settings(
            f"model.path={tmp_path / 'relu'}", "model.dtype=float32", f"long.mode={mode}",
            "long.chunk_size=16", "run.device=cpu",
        )  # fmt: skip
        return Session(own, tmp_path / mode, total=3, optim=Optim(), updates=3)

    with pytest.raises(ValueError, match=r"layers\.0\.mlp \(Qwen2MLP\) is not recognised"):
        session("stream")
    with session("auto").log:
        pass
    said = capsys.readouterr().out
    assert "WARNING: long.mode auto: checkpoint, " in said
    assert "stream is out: " in said and "layers.0.mlp (Qwen2MLP)" in said
    facts = json.loads((tmp_path / "auto" / "run.json").read_text())["long"]
    assert (facts["asked"], facts["mode"]) == ("auto", "checkpoint")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    rows = [{"question": f"{i} + {i} =", "answer": str(2 * i)} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_recipe_in_miniature(questions, tmp_path):
    rewards.register("length_for_test", lambda prompt, completion: len(completion.tokens) % 5)
    first = []
    for mode in ("checkpoint", "stream"):
        own = settings(
            "model.path=toy", "model.dtype=float32", "model.toy.max_positions=512",
            "run.device=cpu", f"run.dir={tmp_path / mode}", "run.tensorboard=false",
            f"task.path={questions}", f"long.mode={mode}", "long.chunk_size=50",
            "rollout.engine=transformers", "rollout.max_tokens=160", "rl.steps=1",
            "rl.prompts_per_step=2", "rl.group_size=3", "rl.micro_batch_tokens=500",
            "rl.rewards={length_for_test=1}", "rl.reward_workers=1", "eval.prompts=1", "eval.k=1",
            "rollout.parity_every=0",
        )  # fmt: skip
        folder = stages.run("rl", own).folder
        said = [one for one in (folder / "log.txt").read_text().splitlines() if "long.mode" in one]
        assert len(said) == 1 and said[0].startswith(f"long.mode {mode}: {mode}, ")
        assert "packs of 512 tokens" in said[0]
        rows = [json.loads(one) for one in (folder / "metrics.jsonl").read_text().splitlines()]
        assert rows[1]["policy/ratio"] == 1 and rows[1]["policy/kl"] == 0
        assert rows[1]["length/max"] > 50 and rows[1]["train/grad_norm"] > 0
        first.append(rows[1])
        facts = json.loads((folder / "run.json").read_text())
        page = (folder / "report.md").read_text()
        predicted = facts["long"]["predicted_bytes"][mode] / 2**20
        assert f"| hidden states | {mode}, tensors of {predicted:,.0f} MiB predicted" in page
        assert f"| Liger | {facts['kernels']['Liger']} |" in page
    for name in ("train/loss", "train/grad_norm", "policy/entropy", "length/sum"):
        assert first[0][name] == pytest.approx(first[1][name], rel=1e-5, abs=1e-6)


def test_a_dry_run_needs_no_weights(questions, capsys):
    arguments = ["rl", str(ROOT / "recipes" / "long_32k.toml"), "--dry-run", "--gpu", "80"]
    assert main([*arguments, f"task.path={questions}"]) == 0
    table = capsys.readouterr().out
    for text in ("FAILED", "checkpoint: ", "34,816 tokens", "10,400 optimizer steps", "1.54e9"):
        assert (text in table) == (text != "FAILED")
    sizes = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100,
        "num_attention_heads": 4, "intermediate_size": 128,
    }  # fmt: skip
    path = questions.with_name("config.json")
    path.write_text(json.dumps(sizes))
    assert main([*arguments, f"task.path={questions}", f"model.path={path}"]) == 0
    assert "34,816 tokens, the model takes any number" in capsys.readouterr().out
    # what is wrong is said all at once
    assert main([*arguments, "task.path=nowhere.jsonl", "model.path=some/model"]) == 2
    table = capsys.readouterr().out
    assert "nowhere.jsonl: No such file" in table and "'some/model' is neither a path" in table
    assert "nothing fits" not in table
    assert main([*arguments[:-1], "20", f"task.path={questions}"]) == 2
    assert "memory     FAILED nothing fits: stream+offload" in capsys.readouterr().out
    for wrong in (["--gpu", "80"], ["--dry-run", "--gpu", "0"]):
        assert main([*arguments[:2], *wrong, f"task.path={questions}"]) == 2
        assert "--gpu GIB goes with --dry-run" in capsys.readouterr().err
