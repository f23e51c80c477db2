import io
import json
import random
import subprocess
import sys
import threading

import pytest

from r1 import grade

RUN = [sys.executable, "-c", "import sys; from r1.grade import main; main(sys.stdin, sys.stdout)"]


def verdicts(data, **options):
    out = io.StringIO()
    assert grade.main(io.BytesIO(data), out, **options) == 0
    return [json.loads(line) for line in out.getvalue().splitlines()]


def line(completion, answer):
    return json.dumps({"completion": completion, "answer": answer}).encode() + b"\n"


CASES = [
    (line(r"\boxed{1/2}", "0.5"), 1, "correct"),
    (line(r"\boxed{9^{9^{9^9}}+x}", "x"), 0, "timeout"),
    (line(r"\boxed{1+x}", "x+1"), 1, "correct"),
    (line(r"\boxed{3}", "4"), 0, "wrong"),
    (line("3", "3"), 0, "no_answer"),
    (line(r"\boxed{3}", ""), 0, "bad_gold"),
    (line("\ud800\\boxed{\ud800}", "3"), 0, "parse_fail"),
    (line("\\boxed{" + "(" * 5000 + "}", "3"), 0, "too_long"),
    (line("x" * 3_000_000 + r"\boxed{3}", "3"), 1, "correct"),
    (line("y" * (grade.MAX_LINE_BYTES + 1), "3"), 0, "bad_input: the line is longer"),
    (b"\n", 0, "bad_input: the line is blank"),
    (b" \t\n", 0, "bad_input: the line is blank"),
    (b"{\n", 0, "bad_input: not JSON"),
    (b"\xff\xfe\x00\x01\n", 0, "bad_input: not JSON"),
    (b"[" * 100_000 + b"\n", 0, "bad_input: not JSON"),
    (b"[1]\n", 0, "bad_input: a JSON object"),
    (b"{}\n", 0, "bad_input: no 'completion'"),
    (b'{"completion": "x"}\n', 0, "bad_input: no 'answer'"),
    (b'{"completion": 1, "answer": "2"}\n', 0, "bad_input: 'completion' is int"),
    (b'{"completion": "\\\\boxed{18}", "answer": 18}\n', 1, "correct"),
    (b'{"completion": "\\\\boxed{18}", "answer": true}\n', 0, "bad_input: 'answer' is bool"),
    (b'{"completion": "\\\\boxed{18}", "answer": NaN}\n', 0, "wrong"),
    (b'{"completion": "2", "answer": null}\n', 0, "bad_input: 'answer' is NoneType"),
    (b'{"completion": "\\\\boxed{3}", "answer": "3"}', 1, "correct"),
]


def test_each_line_gets_its_verdict_in_order():
    # two seconds would do for the one that hangs; a busy machine may need more for the others
    got = verdicts(b"".join(data for data, _, _ in CASES), timeout=4.0)
    assert len(got) == len(CASES)
    for verdict, (data, reward, reason) in zip(got, CASES, strict=True):
        assert set(verdict) == {"reward", "reason"}
        matches = verdict["reward"] == reward and verdict["reason"].startswith(reason)
        assert matches, (verdict, data[:100], reason)


@pytest.mark.parametrize("seed", [0, 1])
def test_noise_gets_a_verdict_per_line(seed):
    data = random.Random(seed).randbytes(100_000)
    got = verdicts(data)
    assert len(got) == data.count(b"\n") + (not data.endswith(b"\n"))
    assert not any(verdict["reward"] for verdict in got)


def test_nothing_in_nothing_out():
    assert verdicts(b"") == []
    assert verdicts(b"\n") == [{"reward": 0, "reason": "bad_input: the line is blank"}]


def test_text_streams_will_do():
    out = io.StringIO()
    grade.main(io.StringIO(line(r"\boxed{3}", "3").decode() + "\n"), out)
    rewards = [json.loads(row)["reward"] for row in out.getvalue().splitlines()]
    assert rewards == [1, 0]


def test_a_verdict_is_written_before_the_next_line_comes():
    process = subprocess.Popen(RUN, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    guard = threading.Timer(60, process.kill)
    guard.start()
    for answer, reward in (("1", 1), ("2", 0), ("0+1", 1)):
        process.stdin.write(line(r"\boxed{1}", answer))
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["reward"] == reward
    process.stdin.close()
    assert process.wait() == 0
    guard.cancel()
    process.stdout.close()


def test_a_reader_that_leaves_ends_the_grading():
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    assert grade.main(io.BytesIO(line(r"\boxed{1}", "1") * 50), Closed()) == 1


def test_other_write_errors_are_raised():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        grade.main(io.BytesIO(line(r"\boxed{1}", "1") * 50), Full())
