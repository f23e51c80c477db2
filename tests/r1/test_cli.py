"""The command line: help, errors in one line, what starts without torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1 import cli, config

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


def r1(*arguments, cwd=ROOT, stdin="", **environment):
    path = {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-m", "r1", *arguments],
        cwd=cwd, env=os.environ | path, input=stdin, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("command", ["base", "rl", "eval", "run", "report", "grade"])
def test_help_of_every_command(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0 and f"r1 {command}" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_print_their_settings(recipe, capsys):
    assert cli.main(["rl", str(recipe), "--print-config", "rl.group_size=6"]) == 0
    settings = json.loads(capsys.readouterr().out)
    assert settings["rl"]["group_size"] == 6 and settings["rollout"]["engine"] == "vllm"


def test_the_paper_s_settings():
    settings = config.load(ROOT / "recipes" / "r1_zero.toml")
    rl = settings.rl
    outputs = rl.prompts_per_step * rl.group_size
    assert outputs == 8192 and outputs // rl.minibatch_size == 16
    assert rl.steps * outputs // rl.minibatch_size == 10_400
    assert (rl.optim.lr, rl.objective.args["kl_coef"], rl.ref_refresh_every) == (3e-6, 1e-3, 400)
    assert (settings.rollout.max_tokens, settings.rollout.temperature) == (32_768, 1.0)


def test_errors_are_one_line_and_exit_2(tmp_path):
    cases = {
        ("rl", "nowhere.toml"): "r1: error: nowhere.toml: No such file or directory",
        ("rl", str(RECIPES[0]), "rl.grup_size=8"): "unknown key 'rl.grup_size'",
        ("report", str(tmp_path)): "metrics.jsonl: missing or empty",
    }
    for arguments, message in cases.items():
        done = r1(*arguments)
        assert done.returncode == 2 and message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and not done.stdout
    shown = r1("rl", "nowhere.toml", R1_DEBUG="1").stderr
    assert "Traceback" in shown and "r1: error: nowhere.toml" in shown


def test_what_is_missing_is_said_with_what_to_do():
    class OutOfMemoryError(RuntimeError):
        """What torch calls its own."""

    told = cli._describe(OutOfMemoryError("CUDA out of memory"))
    assert told.startswith("CUDA out of memory") and "rl.micro_batch_tokens" in told
    assert "pip install 'r1kernels[train]'" in cli._describe(ModuleNotFoundError("No module"))


@pytest.mark.parametrize(("size", "threads"), [(1000, "1"), (cli.SMALL_BYTES, None)])
def test_small_models_take_one_thread(tmp_path, monkeypatch, size, threads):
    monkeypatch.setattr(os, "environ", {})
    (tmp_path / "checkpoints").mkdir()
    with (tmp_path / "checkpoints" / "model.safetensors").open("wb") as file:
        file.truncate(size)
    cli._set_threads(config.load(None, ["run.name=x", f"model.path={tmp_path}"]))
    assert os.environ.get("OMP_NUM_THREADS") == threads


def test_unknown_options_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["rl", "x.toml", "--fast"])
    assert ended.value.code == 2 and "--fast" in capsys.readouterr().err


def test_help_and_grade_start_without_torch():
    script = """
import sys
sys.modules["torch"] = None
from r1 import cli
try:
    cli.main(["--help"])
except SystemExit:
    pass
raise SystemExit(cli.main(["grade", "math"]))
"""
    lines = [{"completion": "<answer>3</answer>", "answer": "3"}, {"completion": "", "answer": "3"}]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, input="\n".join(map(json.dumps, lines)) + "\n",
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rewards = [
        json.loads(line)["reward"] for line in done.stdout.splitlines() if line.startswith("{")
    ]
    assert rewards == [1, 0]
