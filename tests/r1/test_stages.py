"""The parts of the stages that need no training run."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from r1 import config, model, rewards, rundir, stages
from r1.config import Model, Toy
from r1.loss import objective_of
from r1.rewards import Result, Scorer
from r1.rollout.transformers import TransformersEngine
from r1.stages import base, pipeline, rl, rollouts
from r1.stages.session import Session, tokenize
from r1.types import Completion, Group, Prompt, Sampling


def prompt(name="p", answer="2"):
    return Prompt(name, f"1 + 1 = ({name})", answer, "toy", (5, 6, 7))


def completion(text, finish="stop", tokens=(1, 2)):
    return Completion(tokens, (-0.5,) * len(tokens), finish, 0, text)


def test_seeds_are_the_same_everywhere_and_differ():
    assert rollouts.hash_seed(0, 1, "chain_sum:0:5", 2) == 1872243139846084505
    seeds = {rollouts.hash_seed(0, step, "p", n) for step in range(50) for n in range(50)}
    assert len(seeds) == 2500 and all(0 <= seed < 2**63 for seed in seeds)


def test_groups_that_cannot_be_scored_are_dropped_whole():
    def odd(one, answer):
        if "raise" in answer.text:
            raise KeyError("lost")
        return Result(math.nan if "nan" in answer.text else 1.0)

    rewards.register("odd_for_test", odd)
    sampled = [
        (prompt("good"), [completion("<answer>2</answer>"), completion("raise")]),
        (prompt("unreadable", answer=""), [completion("<answer>2</answer>")] * 2),
        (prompt("broken"), [completion("<answer>2</answer>"), completion("nan")]),
    ]
    with Scorer({"accuracy": 1.0, "odd_for_test": 0.5}, workers=1) as scorer:
        found = rollouts.score(scorer, sampled)
    assert [group.prompt.id for group in found.groups] == ["good"]
    assert list(found.groups[0].rewards) == [1.5, 0.0]
    dropped = [(one.prompt, one.kind) for one in found.dropped]
    assert dropped == [("unreadable", "bad_gold"), ("broken", "bad_reward")]
    assert found.failures == {"odd_for_test": 1}
    row = rollouts.statistics(found.groups, found.dropped, found.failures)
    assert row["dropped/prompts"] == 2 and row["failed/odd_for_test"] == 1
    assert row["reward/mean"] == 0.75 and row["groups/zero_variance"] == 0


def test_a_rollout_without_groups_has_counts_only():
    assert rollouts.statistics([], [], {}) == {"dropped/prompts": 0}


@pytest.mark.parametrize(("truncated", "outputs"), [("keep", 4), ("mask", 3)])
def test_advantages_come_before_the_shuffle_and_masked_outputs_go_after(truncated, outputs):
    finishes = ["stop", "length", "stop", "stop"]
    completions = [completion("x", finish, tokens=(n, n)) for n, finish in enumerate(finishes)]
    parts = [{"r": value} for value in (1.0, 0.0, 0.0, 0.0)]
    group = Group(prompt(), completions, [1.0, 0.0, 0.0, 0.0], parts)
    session = SimpleNamespace(
        trainer=SimpleNamespace(objective=objective_of(config.Objective(preset="dapo"))),
        generators={"minibatches": torch.Generator().manual_seed(0)},
    )
    settings = config.RL(
        truncated=truncated, minibatch_size=2, group_size=4, prompts_per_step=1,
        share_prefix="never",
    )  # fmt: skip
    found = {}
    for part in rl.minibatches([group], session, settings):
        for pack in part.packs:
            for end in pack.cu_seqlens[1:].tolist():
                found[int(pack.tokens_T[end - 1])] = float(pack.advantages_T[end - 2])
    assert len(found) == outputs and (1 in found) == (truncated == "keep")
    # mean 1/4, standard deviation 1/2: masking an output does not change the others' advantages
    assert found[0] == pytest.approx(1.5, abs=1e-5) and found[2] == pytest.approx(-0.5, abs=1e-5)


@pytest.mark.parametrize("able", [True, False])
@pytest.mark.parametrize("share", ["auto", "never"])
def test_prompts_are_shared_where_the_settings_and_the_model_allow(share, able):
    completions = [completion("x", tokens=(n, n)) for n in range(5)]
    group = Group(prompt(), completions, [1.0, 0.0, 0.0, 0.0, 0.0], [{}] * 5)
    session = SimpleNamespace(
        trainer=SimpleNamespace(objective=objective_of(config.Objective(preset="dapo"))),
        generators={"minibatches": torch.Generator().manual_seed(0)},
        model=SimpleNamespace(shares_prefixes=able),
    )
    settings = config.RL(group_size=5, prompts_per_step=1, share_prefix=share)
    [part] = rl.minibatches([group], session, settings)
    assert [pack.layout is not None for pack in part.packs] == [share == "auto" and able]


def test_failed_rewards_and_skipped_updates_are_told():
    class Log:
        def __init__(self):
            self.told = []

        def warn(self, text):
            self.told.append(text)

    log = Log()
    rollouts.warn_of_faults(log, "step 3", [rollouts.Dropped("p", "bad_gold", "why")], {"r": 2})
    rollouts.warn_of_skips(log, 3, {"train/skipped": 0.0})
    rollouts.warn_of_skips(log, 4, {"train/skipped": 1.0})
    assert log.told == [
        "step 3: 1 prompts dropped; the first, 'p': why",
        "step 3: reward 'r' failed on 2 completions, which count 0",
        "step 4: 1 updates skipped, loss or gradient not finite",
    ]


def test_a_mistake_in_the_last_stage_stops_the_chain_before_the_first(tmp_path):
    chain = [{"stage": "base"}, {"stage": "eval", "overrides": ["eval.kk=3"]}]
    with pytest.raises(ValueError, match=r"unknown key 'eval\.kk'"):
        pipeline.run(settings(tmp_path, pipeline=chain))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def lm():
    toy = Toy(hidden=32, layers=1, heads=1, intermediate=32, max_positions=40)
    return model.load(Model(path="toy", dtype="float32", toy=toy))


def test_prompts_too_long_are_left_out_and_named(lm):
    prompts = [Prompt(str(n), "7" * n, "7", "toy") for n in (3, 20, 60)]
    kept, dropped = tokenize(prompts, lm, "Q{question}", 15)
    assert [(one.id, len(one.tokens)) for one in kept] == [("3", 4)]
    assert [(one.prompt, one.kind) for one in dropped] == [("20", "too_long"), ("60", "too_long")]
    assert "21 tokens, 1 to 15 fit" in dropped[0].reason


def test_rollouts_depend_on_seed_step_prompt_and_number_alone(lm):
    engine = TransformersEngine(lm)
    prompts = [prompt(name) for name in "abc"]
    sampling = Sampling(n=2, max_tokens=6)
    whole = rollouts.sample(engine, prompts, sampling, 0, 4)
    alone = rollouts.sample(engine, prompts[1:2], sampling, 0, 4)
    assert [one.tokens for one in alone[0][1]] == [one.tokens for one in whole[1][1]]
    assert whole[0][1][0].tokens != whole[0][1][1].tokens
    *same, other = rollouts.sample(engine, [*prompts, prompts[1]], sampling, 0, 4)
    for (_, those), (_, these) in zip(same, whole, strict=True):
        for one, two in zip(those, these, strict=True):
            assert one.tokens == two.tokens
            # a matrix product's last bit may depend on the number of its rows
            assert one.logps == pytest.approx(two.logps, abs=1e-5)
    assert [one.tokens for one in other[1]] != [one.tokens for one in whole[1][1]]
    assert rollouts.sample(engine, prompts[1:2], sampling, 0, 5)[0][1] != alone[0][1]


def settings(folder, **changes):
    raw = {"run": {"name": "x", "dir": str(folder)}, "model": {"path": "toy"}, **changes}
    return config.from_dict(raw)


def test_a_directory_of_other_settings_is_refused_until_restart(tmp_path, capsys):
    with rundir.opened(settings(tmp_path), "rl") as folder:
        (folder / "kept").touch()
        (folder / "metrics.jsonl").write_text('{"step": 0}\n')
    # what a run that ran out of memory is started again with
    smaller = {"rl": {"table_rows": 7, "micro_batch_tokens": 64}, "rollout": {"batch": 1}}
    with rundir.opened(settings(tmp_path, **smaller), "rl"):
        pass
    changed = settings(tmp_path, rl={"steps": 7}, eval={"k": 3})
    message = r"other settings: eval\.k \(16 -> 3\), rl\.steps \(1000 -> 7\)"
    with pytest.raises(ValueError, match=message), rundir.opened(changed, "rl"):
        pass
    wrong_stage = pytest.raises(ValueError, match=r"stage \(rl -> base\)")
    with wrong_stage, rundir.opened(settings(tmp_path), "base"):
        pass
    with rundir.opened(changed, "rl", restart=True) as folder:
        assert not (folder / "kept").exists()
    assert (tmp_path / "x.old-1" / "kept").exists()
    assert "x.old-1" in capsys.readouterr().out


def test_a_run_that_never_began_does_not_hold_its_name(tmp_path):
    with rundir.opened(settings(tmp_path, model={"path": "mistyped"}), "rl"):
        pass
    with rundir.opened(settings(tmp_path), "base") as folder:
        assert json.loads((folder / "run.json").read_text())["stage"] == "base"
        assert json.loads((folder / "config.json").read_text())["model"]["path"] == "toy"


def test_a_finished_run_without_checkpoints_keeps_its_rows(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    rundir.write_done(tmp_path, {"stage": "rl", "step": 3, "model": None, "metrics": {}})
    with pytest.raises(ValueError, match="checkpoints are gone"):
        Session(settings(tmp_path), tmp_path, total=3, optim=config.Optim(), updates=3)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n'


def test_training_in_float16_is_refused(tmp_path):
    half = settings(tmp_path, model={"path": "toy", "dtype": "float16"})
    with pytest.raises(ValueError, match="without loss scaling"):
        Session(half, tmp_path, total=3, optim=config.Optim(), updates=3)


def test_what_a_stage_raises_is_kept_in_its_log_and_names_its_folder(tmp_path, monkeypatch):
    def full(config, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(base, "run", full)
    with pytest.raises(OSError, match="No space left") as raised:
        stages.run("base", settings(tmp_path))
    assert raised.value.filename == str(tmp_path / "x")
    assert "Traceback" in (tmp_path / "x" / "log.txt").read_text()


@pytest.mark.parametrize("restart", [False, True])
def test_two_processes_cannot_share_a_directory(tmp_path, restart):
    refused = pytest.raises(ValueError, match="in use by another process")
    first = rundir.opened(settings(tmp_path), "rl")
    second = rundir.opened(settings(tmp_path), "rl", restart=restart)
    with first, refused, second:
        pass
    assert (tmp_path / "x").is_dir() and not (tmp_path / "x.old-1").exists()
