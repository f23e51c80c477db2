"""`r1 grade math`: a verdict per line, in order, whatever the line holds."""

import contextlib
import json
import queue
import threading
from concurrent.futures import Future
from typing import Any, BinaryIO, TextIO

from r1.rewards.accuracy import math_accuracy, settle
from r1.rewards.result import Result
from r1.rewards.workers import Call, Outcome, Pool

MAX_LINE_BYTES = 8 << 20
"""A longer line is not read into memory; its verdict says so."""

_Pending = Result | tuple[Call, "Future[Outcome]"]


def main(
    stdin: TextIO | BinaryIO, stdout: TextIO, *, workers: int = 2, timeout: float = 5.0
) -> int:
    """Reads JSON lines {"completion", "answer"}; writes {"reward": 0 or 1, "reason"} for each.

    Every line gets a verdict, blank and broken ones included, and is written as soon as those
    before it are. Returns 0, or 1 when stdout was closed by its reader.

    Raises:
        WorkerStartError: when math-verify cannot be loaded.
    """
    lines = getattr(stdin, "buffer", stdin)
    pending: queue.Queue[_Pending | None] = queue.Queue(maxsize=8 * workers)
    failures: list[BaseException] = []
    with Pool(workers, timeout) as pool:
        writer = threading.Thread(target=_write, args=(pending, pool, stdout, failures))
        writer.start()
        try:
            while not failures and (line := _read_line(lines)) is not None:
                result = _grade(line)
                pending.put((result, pool.submit(result)) if isinstance(result, Call) else result)
        finally:
            pending.put(None)
            writer.join()
    if failures and not isinstance(failures[0], BrokenPipeError):
        raise failures[0]
    return 1 if failures else 0


def _read_line(lines: Any) -> bytes | str | None:
    """The next line without its end, cut just above the limit; None at the end of the input."""
    line = lines.readline(MAX_LINE_BYTES + 1)
    if not line:
        return None
    newline = b"\n" if isinstance(line, bytes) else "\n"
    if line.endswith(newline):
        return line[:-1]
    rest = line
    while len(rest) > MAX_LINE_BYTES and not rest.endswith(newline):
        rest = lines.readline(MAX_LINE_BYTES + 1)
    return line


def _grade(line: bytes | str) -> Result | Call:
    if len(line) > MAX_LINE_BYTES:
        return Result(0.0, f"bad_input: the line is longer than {MAX_LINE_BYTES} bytes")
    if not line.strip():
        return Result(0.0, "bad_input: the line is blank")
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Result(0.0, f"bad_input: not JSON: {str(error)[:200]}")
    if not isinstance(row, dict):
        return Result(0.0, f"bad_input: a JSON object is needed, got {type(row).__name__}")
    if isinstance(row.get("answer"), int | float) and not isinstance(row["answer"], bool):
        row["answer"] = str(row["answer"])
    for key in ("completion", "answer"):
        if key not in row:
            return Result(0.0, f"bad_input: no {key!r}")
        if not isinstance(row[key], str):
            return Result(0.0, f"bad_input: {key!r} is {type(row[key]).__name__}, not a string")
    try:
        return math_accuracy(row["completion"], row["answer"])
    except Exception as error:
        # One line must not cost the others their verdicts.
        return Result(0.0, f"error: {type(error).__name__}: {error}"[:500])


def _write(
    pending: "queue.Queue[_Pending | None]",
    pool: Pool,
    stdout: TextIO,
    failures: list[BaseException],
) -> None:
    while (item := pending.get()) is not None:
        if failures:
            continue
        try:
            result = item if isinstance(item, Result) else settle(item[0], item[1].result(), pool)
            verdict = {"reward": int(result.value == 1.0), "reason": result.status}
            stdout.write(json.dumps(verdict) + "\n")
            stdout.flush()
        except BaseException as error:
            # Raised again by the reader's thread, which stops at its next line.
            failures.append(error)
            if isinstance(error, BrokenPipeError):
                with contextlib.suppress(OSError):
                    stdout.close()
