"""The whole chain on a tiny model, base -> rl -> eval; killed and resumed as if never killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from r1 import toy

ROOT = Path(__file__).resolve().parents[2]

RECIPE = """
[run]
name = "tiny"
seed = 3

[model]
path = "toy"
dtype = "float32"
toy = { hidden = 32, layers = 1, heads = 1, intermediate = 32, max_positions = 96 }

[task]
name = "jsonl"
path = "questions.jsonl"
held_out = 0.4

[chat]
template = "compact"

[rollout]
engine = "transformers"
max_tokens = 12
max_prompt_tokens = 64

[eval]
prompts = 6
k = 2
temperature = 1.0
pass_at = [1, 2]
bootstrap = 50

[base]
steps = 6
batch_size = 8
sequence_length = 24
eval_every = 0
save_every = 4

[rl]
steps = 5
prompts_per_step = 4
group_size = 4
minibatch_size = 8
micro_batch_tokens = 256
epochs = 2
rewards = { "tiny_reward:score" = 1.0, format = 0.1 }
reward_workers = 1
ref_refresh_every = 8
eval_every = 4
save_every = 2

[rl.optim]
lr = 1e-3

[rl.objective]
preset = "grpo"
kl_coef = 0.01

[[pipeline]]
stage = "base"

[[pipeline]]
stage = "rl"

[[pipeline]]
stage = "eval"
"""

# A reward with spread on untrained text. It runs in a worker, and its call number KILL_AT kills the
# whole run.
REWARD = """
import os, signal, zlib
from pathlib import Path

CALLS = Path(__file__).with_name("calls")

def score(question, answer, completion):
    if "KILL_AT" in os.environ:
        with CALLS.open("a") as file:
            file.write("x")
        if CALLS.stat().st_size == int(os.environ["KILL_AT"]):
            os.kill(os.getppid(), getattr(signal, os.environ.get("KILL_BY", "SIGKILL")))
    return zlib.crc32(completion.encode()) % 5 / 4
"""

# 12 evaluation completions, then 16 a step: in the middle of step 4, two steps after the checkpoint
# of step 2
KILL_AT = 12 + 3 * 16 + 7


def workplace(folder):
    folder.mkdir()
    generator = random.Random(0)
    texts = {toy.expression(generator, 2, 3) for _ in range(80)}
    rows = [{"question": toy.question(text), "answer": str(sum_of(text))} for text in sorted(texts)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "tiny_reward.py").write_text(REWARD)
    return folder


def sum_of(text):
    first, *rest = text.split(" ")
    signs = {"+": 1, "-": -1}
    return int(first) + sum(
        signs[op] * int(term) for op, term in zip(rest[::2], rest[1::2], strict=True)
    )


def r1(folder, *arguments, **environment):
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "r1", *arguments],
        cwd=folder, env=os.environ | path | environment,
        capture_output=True, text=True, timeout=240,
        # a shell starts its background jobs with SIGINT ignored, and so would be their children's
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def processes_left(folder, seconds=10.0):
    """The processes that still work in `folder` when so many seconds are over."""
    end = time.monotonic() + seconds

    def works_here(process):
        try:
            return os.readlink(process / "cwd") == str(folder)
        except OSError:
            return False

    while True:
        left = [process for process in Path("/proc").glob("[0-9]*") if works_here(process)]
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.1)


def rows(folder, stage="rl"):
    """The rows of a run without what the clock and the machine put in."""
    lines = (folder / "runs" / f"tiny-{stage}" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [
        {k: v for k, v in row.items() if k.split("/")[0] not in ("time", "memory", "speed")}
        for row in found
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = workplace(tmp_path_factory.mktemp("whole") / "w")
    done = r1(folder, "run", "recipe.toml")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_chain_leaves_what_it_should(finished):
    folder, printed = finished
    for stage in ("base", "rl", "eval"):
        run = folder / "runs" / f"tiny-{stage}"
        assert json.loads((run / "done.json").read_text())["stage"] == stage
        assert json.loads((run / "config.json").read_text())["rollout"]["engine"] == "transformers"
        assert "Versions" in (run / "report.md").read_text()
        assert any((run / "tensorboard").iterdir())
        assert (run / "plots" / "overview.png").exists() == (stage != "eval")
        assert 0 <= rows(folder, stage)[-1]["eval/pass@1"] <= 1
    assert [row["step"] for row in rows(folder)] == [0, 1, 2, 3, 4, 5]
    assert [row["step"] for row in rows(folder) if "eval/pass@1" in row] == [0, 4, 5]
    kept = sorted(
        path.name for path in (folder / "runs" / "tiny-rl" / "checkpoints").glob("step_*")
    )
    assert kept == ["step_000004", "step_000005"]
    assert "step 5/5  reward" in printed and "| A " in printed


def test_a_step_learns_on_policy_first(finished):
    folder, _ = finished
    updates = [row["train/updates"] for row in rows(folder)[1:]]
    assert updates == [4, 8, 12, 16, 20]
    for row in rows(folder)[1:]:
        assert row["train/skipped"] == 0 and row["train/grad_norm"] > 0
        assert row["sampler/gap_max"] < 1e-4 and row["parity/max"] < 1e-4
        assert 0 <= row["policy/kl"] < 1 and row["policy/entropy"] > 0
    # a reference as old as eight updates is the policy itself at the next rollout
    assert [row["policy/reference_age"] for row in rows(folder)[1:]] == [4, 0, 4, 0, 4]


def test_killed_and_resumed_is_as_never_killed(finished, tmp_path):
    folder = workplace(tmp_path / "w")
    os.symlink(finished[0] / "runs" / "tiny-base", folder / "base")
    command = ("rl", "recipe.toml", "run.name=tiny-rl", "model.path=base/checkpoints/step_000006")
    killed = r1(folder, *command, KILL_AT=str(KILL_AT))
    assert killed.returncode == -signal.SIGKILL and not processes_left(folder)
    assert [row["step"] for row in rows(folder)] == [0, 1, 2, 3]
    resumed = r1(folder, *command)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from runs/tiny-rl/checkpoints/step_000002" in resumed.stdout
    assert rows(folder) == rows(finished[0])
    for name in ("model.safetensors", "reference.safetensors"):
        ours, theirs = (
            place / "runs" / "tiny-rl" / "checkpoints" / "step_000005" / name
            for place in (folder, finished[0])
        )
        assert ours.read_bytes() == theirs.read_bytes() and load_file(ours)
    samples = [place / "runs" / "tiny-rl" / "rollouts.jsonl" for place in (folder, finished[0])]
    assert samples[0].read_text() == samples[1].read_text()

    # a checkpoint that rots on the disk costs the steps since the one before it, and nothing else
    last = folder / "runs" / "tiny-rl" / "checkpoints" / "step_000005" / "model.safetensors"
    whole = last.read_bytes()
    last.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    again = r1(folder, *command)
    assert (
        again.returncode == 0 and "WARNING: checkpoint step_000005 cannot be used" in again.stdout
    )
    assert "model.safetensors: corrupt" in (folder / "runs" / "tiny-rl" / "log.txt").read_text()
    assert last.read_bytes() == whole and rows(folder) == rows(finished[0])


def test_a_killed_base_run_is_resumed_as_never_killed(finished, tmp_path):
    folder = workplace(tmp_path / "w")
    command = ("base", "recipe.toml", "run.name=tiny-base")
    # in the evaluation after the last step: steps 5 and 6 come after the checkpoint
    killed = r1(folder, *command, KILL_AT=str(12 + 7))
    assert killed.returncode == -signal.SIGKILL
    assert [row["step"] for row in rows(folder, "base")] == [0, 1, 2, 3, 4, 5]
    resumed = r1(folder, *command)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from runs/tiny-base/checkpoints/step_000004" in resumed.stdout
    assert rows(folder, "base") == rows(finished[0], "base")
    for name in ("checkpoints/step_000006/model.safetensors", "rollouts.jsonl"):
        ours, theirs = (place / "runs/tiny-base" / name for place in (folder, finished[0]))
        assert ours.read_bytes() == theirs.read_bytes()


def test_the_same_with_vllm(finished, tmp_path):
    """Sampled by vLLM: weights pushed after every update, the probe passing after every sync."""
    pytest.importorskip("vllm", reason="an optional package: the engine under test")
    folder = workplace(tmp_path / "w")
    os.symlink(finished[0] / "runs" / "tiny-base", folder / "base")
    done = r1(
        folder, "rl", "recipe.toml", "run.name=tiny-rl", "rollout.engine=vllm", "rl.steps=3",
        "rollout.kv_cache_gib=0.1", "model.path=base/checkpoints/step_000006",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    settings = json.loads((folder / "runs" / "tiny-rl" / "config.json").read_text())
    assert settings["rollout"]["engine"] == "vllm"
    found = rows(folder)
    assert [row["step"] for row in found] == [0, 1, 2, 3]
    assert all(row["parity/tokens"] > 0 and row["parity/max"] < 1e-4 for row in found)
    assert all(row["sampler/gap_max"] < 1e-4 and row["train/grad_norm"] > 0 for row in found[1:])


def test_an_interrupted_run_says_how_to_go_on(finished, tmp_path):
    folder = workplace(tmp_path / "w")
    os.symlink(finished[0] / "runs" / "tiny-base", folder / "base")
    command = ("rl", "recipe.toml", "run.name=tiny-rl", "model.path=base/checkpoints/step_000006")
    stopped = r1(folder, *command, KILL_AT=str(KILL_AT), KILL_BY="SIGINT")
    assert stopped.returncode == 130
    assert stopped.stderr.endswith("the same command goes on from the last checkpoint\n")
    assert "Traceback" not in stopped.stderr and not processes_left(folder, 0.0)
    kept = sorted(path.name for path in (folder / "runs/tiny-rl/checkpoints").iterdir())
    assert kept == ["latest", "step_000002"]


def test_finished_stages_are_skipped_and_other_settings_refused(finished):
    folder, _ = finished
    before = (folder / "runs" / "tiny-rl" / "metrics.jsonl").stat().st_mtime_ns
    again = r1(folder, "run", "recipe.toml")
    assert again.returncode == 0 and again.stdout.count("done already") == 3
    assert (folder / "runs" / "tiny-rl" / "metrics.jsonl").stat().st_mtime_ns == before
    other = r1(folder, "run", "recipe.toml", "rl.group_size=8", "rl.table_rows=0")
    assert other.returncode == 2
    assert "rl.group_size (4 -> 8)" in other.stderr and "table_rows" not in other.stderr
