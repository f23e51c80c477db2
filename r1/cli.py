"""`r1 base|rl|eval|run|report|grade`."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from r1 import __version__, config
from r1.config import Config

STAGES = {
    "base": "train the embedded model into a weak base",
    "rl": "reinforcement learning on verifiable rewards (GRPO, R1-Zero)",
    "eval": "pass@1, pass@k and majority vote on held-out prompts",
    "run": "every stage of the recipe's [[pipeline]], in order; finished ones are skipped",
}
SMALL_BYTES = 32 << 20
OVERRIDE_HELP = "settings on top of the recipe, as section.key=value (rl.group_size=8)"
EPILOG = """examples:
  r1 run recipes/toy.toml                      the whole toy chain on a CPU
  r1 rl recipes/r1_zero.toml model.path=...    R1-Zero from a model folder or hub id
  r1 rl recipes/long_32k.toml --dry-run --gpu 80   what of 32k-token RL fits on 80 GiB
  r1 report runs/toy-rl                        curves and report.md of a run

The same command goes on with a run that was stopped, at its last checkpoint.
R1_DEBUG=1 shows where an error comes from; the log.txt of a run keeps it too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 an error the message explains, 130 interrupted."""
    options = _parse(arguments)
    # a completion may hold what the terminal's encoding does not
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        return options.handler(options)
    except KeyboardInterrupt:
        print(
            "\nr1: interrupted; the same command goes on from the last checkpoint", file=sys.stderr
        )
        return 130
    except BrokenPipeError:
        # whoever read our output has gone; without this Python complains once more when it flushes
        # at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, RuntimeError, ImportError, MemoryError) as error:
        if os.environ.get("R1_DEBUG"):
            traceback.print_exc()
        print(f"r1: error: {_describe(error)}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may stand behind options, which argparse's own rule for `*` does not allow."""
    form = parser()
    options, rest = form.parse_known_args(arguments)
    strange = [text for text in rest if text.startswith("-") or not hasattr(options, "overrides")]
    if strange:
        form.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        options.overrides += rest
    return options


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = str(error) or type(error).__name__
    if isinstance(error, ModuleNotFoundError):
        return f"{text}: pip install 'r1kernels[train]' brings what r1 needs"
    if type(error).__name__ == "OutOfMemoryError":
        return (
            f"{text}\nThe same command goes on from the last checkpoint with a smaller "
            "rl.micro_batch_tokens or rollout.gpu_memory_utilization, or with long.mode=stream"
        )
    return text


def parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="r1",
        description="Train a reasoning model through DeepSeek-R1's recipe.",
        epilog=EPILOG,
        formatter_class=form,
    )
    top.add_argument("--version", action="version", version=f"r1 {__version__}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for name, text in STAGES.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.add_argument("recipe", type=Path, help="TOML file of settings")
        command.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDE_HELP)
        command.add_argument(
            "--restart", action="store_true", help="move an existing run aside and start anew"
        )
        command.add_argument(
            "--print-config", action="store_true", help="print all settings and stop"
        )
        if name == "rl":
            command.add_argument(
                "--dry-run", action="store_true",
                help="check settings, data, rewards, memory and schedule without weights, and stop",
            )  # fmt: skip
            command.add_argument(
                "--gpu", type=float, metavar="GIB",
                help="--dry-run: plan for a GPU of this memory in place of the device found",
            )  # fmt: skip
        command.set_defaults(handler=_stage, command=name)
    report = commands.add_parser("report", help="write plots/*.png and report.md of a run")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    report.set_defaults(handler=_report)
    grade = commands.add_parser(
        "grade",
        help="score completions read from stdin",
        description='Reads JSONL lines {"completion": ..., "answer": ...} on stdin, writes '
        '{"reward": 0|1, "reason": ...} lines, in order, one per input, whatever the input.',
    )
    grade.add_argument("verifier", choices=["math"], help="how an answer is checked")
    grade.set_defaults(handler=_grade)
    return top


def _stage(options: argparse.Namespace) -> int:
    settings = config.load(options.recipe, options.overrides)
    if options.print_config:
        print(config.dumps(settings), end="")
        return 0
    if getattr(options, "gpu", None) is not None and not (options.dry_run and options.gpu > 0):
        raise ValueError(
            "--gpu GIB goes with --dry-run and is more than 0: a run has the GPU it has"
        )
    if getattr(options, "dry_run", False):
        from r1.stages import dry_run

        return 0 if dry_run.run(settings, options.gpu) else 2
    _set_threads(settings)
    # these import torch, which takes seconds that --help and errors in the settings should not
    from r1 import stages
    from r1.stages import pipeline

    if options.command == "run":
        pipeline.run(settings, restart=options.restart)
    else:
        stages.run(options.command, settings, restart=options.restart)
    return 0


def _report(options: argparse.Namespace) -> int:
    from r1 import report

    for run in options.runs:
        print(report.write(run))
    return 0


def _grade(options: argparse.Namespace) -> int:
    from r1 import grade

    return grade.main(sys.stdin, sys.stdout)


def _set_threads(settings: Config) -> None:
    """One thread for a model as small as the embedded one: its operations are too small to share,
    and with busy cores sharing is 30 times slower.

    It has to be said before torch is imported: vLLM on a CPU makes a later torch.set_num_threads do
    nothing.
    """
    sizes = [file.stat().st_size for file in Path(settings.model.path).rglob("*.safetensors")]
    if settings.model.path == "toy" or 0 < max(sizes, default=0) < SMALL_BYTES:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
