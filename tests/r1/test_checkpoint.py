"""Atomic saves, verification, fallback, random state."""

import random
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy
import pytest
import torch

from r1 import checkpoint
from r1.checkpoint import CheckpointError


def write_number(number):
    def write(folder: Path):
        (folder / "sub").mkdir()
        (folder / "sub" / "weights").write_bytes(bytes([number % 256]) * 1000)
        checkpoint.save_training(folder, {"number": number, "tensor": torch.arange(number % 256)})

    return write


def save(root, *steps, keep=10):
    return [
        checkpoint.save(root, step, write_number(step), keep=keep, config={"a": 1})
        for step in steps
    ][-1]


def never(text):
    raise AssertionError(f"unexpected warning: {text}")


def test_save_and_read(tmp_path):
    path = save(tmp_path, 3)
    assert path == tmp_path / "step_000003" == checkpoint.newest(tmp_path, never)
    manifest = checkpoint.verify(path)
    assert (
        manifest["step"] == 3 and manifest["config"] == {"a": 1} and "torch" in manifest["versions"]
    )
    assert checkpoint.load_training(path)["tensor"].tolist() == [0, 1, 2]
    assert (tmp_path / "latest").read_text() == "step_000003\n"


def test_keeps_the_last_k_in_order_of_number(tmp_path):
    save(tmp_path, 5, 999999, 1000000, keep=2)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step_999999", "step_1000000"]


def test_nothing_saved_is_none(tmp_path):
    assert checkpoint.newest(tmp_path / "absent", never) is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "training.pt").unlink(), "training.pt: missing"),
        (
            lambda path: (path / "sub" / "weights").write_bytes(b"short"),
            "weights: has 5 bytes, saved with 1000",
        ),
        (lambda path: (path / "sub" / "weights").write_bytes(b"x" * 1000), "weights: corrupt"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json: corrupt"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json: missing"),
    ],
)
def test_damage_falls_back_loudly(tmp_path, damage, message):
    save(tmp_path, 1, 2)
    damage(tmp_path / "step_000002")
    warnings = []
    assert checkpoint.newest(tmp_path, warnings.append) == tmp_path / "step_000001"
    assert (
        message in warnings[0]
        and "step_000002" in warnings[0]
        and "older checkpoint" in warnings[1]
    )
    # the broken one is out of the way: it neither warns again nor counts among those kept
    assert checkpoint.newest(tmp_path, never) == tmp_path / "step_000001"
    assert (tmp_path / "step_000002.corrupt").is_dir()


def test_no_usable_checkpoint_is_an_error(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step_000001" / "training.pt").unlink()
    # every time: a second start must not take the run for a new one and drop its rows
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no usable .*training\.pt: missing.*--restart"):
            checkpoint.newest(tmp_path, never)


def test_a_failing_write_leaves_the_older_ones(tmp_path):
    save(tmp_path, 1)

    def fail(folder):
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"cannot save .*step_000002.*No space left.*intact"):
        checkpoint.save(tmp_path, 2, fail, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000001"]
    checkpoint.verify(tmp_path / "step_000001")


def run(script, tmp_path, limit=None):
    def restrict():
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code = "import sys, pathlib\nroot = pathlib.Path(sys.argv[1])\n" + textwrap.dedent(script)
    return subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        preexec_fn=restrict,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_disk_that_takes_no_more(tmp_path):
    """The kernel refuses the write of a tensor file half way, as a full disk does."""
    save(tmp_path, 1)
    script = """
        import torch
        from r1 import checkpoint
        write = lambda folder: checkpoint.save_training(folder, {"big": torch.ones(1_000_000)})
        checkpoint.save(root, 2, write, keep=1)
    """
    done = run(script, tmp_path, limit=100_000)
    assert (
        done.returncode == 1
        and "CheckpointError: cannot save" in done.stderr
        and "intact" in done.stderr
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_000001"]
    checkpoint.verify(tmp_path / "step_000001")


@pytest.mark.parametrize("moment", ["while writing", "before the rename", "after the rename"])
def test_kill_during_a_save(tmp_path, moment):
    save(tmp_path, 1)
    script = f"""
        import os, signal
        from r1 import checkpoint
        die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        moment = {moment!r}
        if moment == "before the rename":
            pathlib.Path.rename = die
        if moment == "after the rename":
            checkpoint._replace = die
        def write(folder):
            checkpoint.save_training(folder, {{"number": 2}})
            if moment == "while writing":
                die()
        checkpoint.save(root, 2, write, keep=1)
    """
    assert run(script, tmp_path).returncode == -signal.SIGKILL
    checkpoint.remove_partial(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
    expected = "step_000002" if moment == "after the rename" else "step_000001"
    assert checkpoint.newest(tmp_path, never) == tmp_path / expected
    save(tmp_path, 2, keep=1)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step_000002"]


def test_loading_runs_no_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"x": Attack()}, tmp_path / "training.pt")
    with pytest.raises(CheckpointError, match=r"training\.pt: corrupt"):
        checkpoint.load_training(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_random_state_repeats_every_generator(tmp_path):
    generators = {"order": torch.Generator().manual_seed(4)}
    checkpoint.seed_everything(3)

    def draw():
        return (
            random.random(),
            random.gauss(0, 1),
            numpy.random.rand(),
            torch.rand(1).item(),
            torch.rand(1, generator=generators["order"]).item(),
        )

    draw()
    checkpoint.save_training(tmp_path, {"random": checkpoint.random_state(generators)})
    first = [draw(), draw()]
    checkpoint.set_random_state(checkpoint.load_training(tmp_path)["random"], generators)
    assert [draw(), draw()] == first
