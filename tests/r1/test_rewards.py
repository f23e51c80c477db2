import json
import os
import threading
import time
from pathlib import Path

import pytest

from r1 import rewards
from r1.rewards import workers
from r1.rewards.accuracy import math_accuracy, settle
from r1.rewards.math_text import extract, last_boxed
from r1.rewards.workers import Call, Pool
from r1.types import Completion, Prompt

HANG = Call("time:sleep", (600,))
# Math-Verify#65: parsing this never ends, its own timeout notwithstanding.
TOWER = r"\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}"


@pytest.fixture(scope="module")
def pool():
    with Pool(1, timeout=20.0) as shared:
        yield shared


def grade(answer, gold, pool):
    first = math_accuracy(f"\\boxed{{{answer}}}", gold)
    return settle(first, *pool.map([first]), pool) if isinstance(first, Call) else first


def completion(text, finish="stop"):
    return Completion((1,), (0.0,), finish, 0, text)


def prompt(answer, question="?"):
    return Prompt("p", question, answer, "t")


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("18", "18"),
        ("0.5", "1/2"),
        (r"\frac12", "0.5"),
        (r"\dfrac{1}{2}", "1/2"),
        ("1,234", "1234"),
        ("1234.00", "1,234"),
        (r"\$18", "18"),
        ("$18$", "18"),
        (r"10,\!000", "10000"),
        (r"-\frac{3}{4}", "-0.75"),
        (r"1\frac{1}{2}", "1.5"),
        ("0.33333333", "1/3"),
        ("\u22125", "-5"),
        (r"90^\circ", "90"),
        (r"12 \text{ cm}", "12"),
        (r"50\%", "50"),
        (r"\text{Evelyn}", "evelyn"),
        ("C", r"\text{(C)}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        ("1+x^2", "x^2+1"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        (r"\{2,1\}", r"\{1,2\}"),
        ("x=5", "5"),
        ("(x+1)(x-1)", "x^2-1"),
        ("2516", "2516_8"),
        ("2516_{8}", "2516_8"),
        ("4", "She has 2+2 left.\n#### 4"),
        ("4", r"so it is \boxed{4}"),
    ],
)
def test_equal_answers(answer, gold, pool):
    assert grade(answer, gold, pool) == (1.0, "correct")


@pytest.mark.parametrize(
    "answer, gold",
    [
        ("19", "18"),
        ("1000001", "1000000"),
        ("1000000.5", "1000000"),
        ("0.333", "1/3"),
        ("3,4", "3"),
        (r"3 \text{ or } 4", "3"),
        ("(2,1)", "(1,2)"),
        ("[1,2)", "(1,2)"),
        ("nevely", "evelyn"),
        ("10_2", "10"),
        ("52_9", "52_8"),
        (r"15\mbox{ cm}^3", r"15\mbox{ cm}^2"),
        ("D", r"\text{(C)}"),
        ("x^2+2", "x^2+1"),
        (r"\sqrt{7}", r"\sqrt{8}"),
        ("y", "x"),
        ("18 million", "18"),
    ],
)
def test_different_answers(answer, gold, pool):
    assert grade(answer, gold, pool).value == 0.0


@pytest.mark.parametrize(
    "text, expected",
    [
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> so 2", None),
        (r"<think>\boxed{1}", None),
        (r"<think>a</think><answer>\boxed{3}</answer>", "3"),
        ("<think>a</think><answer> 3 </answer>", "3"),
        ("<think>a</think><answer>3</answer><answer>4</answer>", "4"),
        ("<think>a</think><answer> </answer>", None),
        (r"\boxed{1} \boxed{2", None),
        (r"\boxed 7", None),
        (r"\boxed{}", None),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\fbox{5}", "5"),
        ("2 + 2 = 4\n#### 4", "4"),
        ("the answer is 4", None),
        ("", None),
    ],
)
def test_extract(text, expected):
    assert extract(text) == expected


def test_a_drawing_of_hashes_is_an_answer():
    text = "<think>a</think><answer>#####\n#.####</answer>"
    assert extract(text, hashes=False) == "#####\n#.####"
    assert extract(text) is None


def test_an_endless_box_is_no_box():
    assert last_boxed("\\boxed{" + "1" * 10_000_000) is None


@pytest.mark.parametrize("gold", ["", "  ", "$$", "x" * 2000, r"\boxed{}"])
def test_unreadable_gold(gold):
    assert math_accuracy(r"\boxed{1}", gold).status == rewards.BAD_GOLD


def test_gold_that_needs_algebra_and_has_none(pool):
    assert grade("1", r"\frac{", pool).status == rewards.BAD_GOLD
    assert grade("9**9**9**9", "1+x", pool).status == "parse_fail"


def test_a_gold_that_hangs_is_bad_and_an_answer_that_hangs_is_wrong():
    with Pool(1, timeout=1.5) as short:
        short.map([Call("r1.rewards.equivalence:compare", ("x+1", "1+x"))])
        assert grade(TOWER, "x+1", short) == (0.0, "timeout")
        assert grade("x+1", TOWER, short) == (0.0, rewards.BAD_GOLD)
        assert grade("x+1", "1+x", short) == (1.0, "correct")


def data_rows(name):
    root = Path(os.environ.get("R1_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not (root / name).is_file():
        pytest.skip(f"{root / name} is not on this machine")
    return [json.loads(line) for line in (root / name).read_text().splitlines()]


@pytest.mark.parametrize(
    "name, solution, gold",
    [("gsm8k_test.jsonl", "answer", "answer"), ("math500.jsonl", "solution", "answer")],
)
def test_gold_solutions_are_right_and_perturbed_ones_wrong(name, solution, gold, pool):
    rows = data_rows(name)
    right = [math_accuracy(row[solution], row[gold]) for row in rows]
    assert sum(r == (1.0, "correct") for r in right) >= 0.99 * len(rows)
    wrong = []
    for row in rows[:: max(1, len(rows) // 250)]:
        answer = extract(row[solution])
        digit = next((i for i in reversed(range(len(answer))) if answer[i].isdigit()), None)
        if digit is not None:
            other = str((int(answer[digit]) + 1) % 10)
            wrong.append(grade(answer[:digit] + other + answer[digit + 1 :], row[gold], pool))
    assert len(wrong) > 100
    assert [r for r in wrong if r.value] == []


def test_workers_keep_order_and_survive_hangs_and_crashes():
    calls = [Call("math:sqrt", (4,)), HANG, Call("os:_exit", (3,)), Call("math:sqrt", (-1,)),
             Call("os:abort", ()), Call("math:sqrt", (9,))]  # fmt: skip
    with Pool(2, timeout=1.0) as pool:
        start = time.monotonic()
        values = pool.map(calls)
        assert time.monotonic() - start < 15
        assert [v.value for v in values] == [2.0, None, None, None, None, 3.0]
        assert [str(v.error).split(":")[0] for v in values] == [
            "None", "timeout", "crashed", "error", "crashed", "None",
        ]  # fmt: skip
        assert "exit status 3" in values[2].error
        assert "math domain" in values[3].error


def test_arguments_that_are_no_json_and_large_ones():
    with Pool(1, timeout=10.0) as pool:
        large = "x" * 3_000_000
        bad, size, back = pool.map(
            [
                Call("builtins:len", ({1},)),
                Call("builtins:len", (large,)),
                Call("builtins:str", (large,)),
            ]
        )
        assert bad.error.startswith("error") and "set" in bad.error
        assert size.value == len(large)
        assert back.error.startswith("crashed: a reply of")


def test_prints_do_not_corrupt_replies():
    with Pool(1, timeout=10.0) as pool:
        assert pool.map([Call("builtins:print", ("noise",)), Call("math:sqrt", (4,))]) == [
            (None, None),
            (2.0, None),
        ]


def test_memory_is_capped():
    with Pool(1, timeout=20.0) as pool:
        outcome = pool.map([Call("builtins:bytes", (1 << 36,))])[0]
        assert "MemoryError" in outcome.error


def test_close_leaves_no_process_behind():
    pool = Pool(2, timeout=60.0)
    pool.map([Call("math:sqrt", (4,))] * 4)
    running = pool.submit(HANG)
    time.sleep(0.2)
    pids = pool.pids
    assert pids
    start = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - start < 10
    assert running.result().error.startswith("crashed")
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(HANG)


def test_a_dropped_pool_closes_itself():
    pool = Pool(1)
    pool.map([Call("math:sqrt", (4,))])
    (pid,) = pool.pids
    del pool
    assert not Path(f"/proc/{pid}").exists()


def test_pool_from_several_threads():
    with Pool(2, timeout=20.0) as pool:
        results = {}

        def work(number):
            calls = [Call("math:sqrt", (number**2 + i - i,)) for i in range(20)]
            results[number] = [outcome.value for outcome in pool.map(calls)]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == {number: [float(number)] * 20 for number in range(4)}


def test_a_worker_killed_from_outside_is_replaced():
    with Pool(1, timeout=20.0) as pool:
        pool.map([Call("math:sqrt", (4,))])
        os.kill(pool.pids[0], 9)
        time.sleep(0.2)
        assert pool.map([Call("math:sqrt", (4,))])[0].value == 2.0


def test_a_target_that_cannot_be_loaded_is_an_installation_fault():
    with Pool(1) as pool, pytest.raises(workers.WorkerStartError, match="no_such_module"):
        pool.map([Call("no_such_module:f", ())])


def test_weighted_sum_and_breakdown():
    with rewards.Scorer({"accuracy": 1.0, "format": 0.3}) as scorer:
        good = scorer.score(prompt("4"), completion("<think>a</think><answer>4</answer>"))
        assert good.total == pytest.approx(1.3)
        assert good.breakdown == {"accuracy": 1.0, "format": 1.0}
        wrong = scorer.score(prompt("4"), completion("<think>a</think><answer>5</answer>"))
        assert (wrong.total, wrong.breakdown["accuracy"]) == (pytest.approx(0.3), 0.0)
        cut = scorer.score(prompt("4"), completion("<think>a</think><answer>4</answer>", "length"))
        assert (cut.breakdown["format"], cut.status["format"]) == (0.0, "cut off")
        assert not scorer.score(prompt(""), completion("x")).valid


def test_rewards_that_raise_or_hang_count_zero_and_say_so(monkeypatch):
    def broken(prompt, completion):
        raise KeyError("lost")

    monkeypatch.setitem(rewards._REWARDS, "broken", broken)
    monkeypatch.setitem(rewards._REWARDS, "hanging", lambda prompt, completion: HANG)
    with rewards.Scorer({"broken": 1.0, "hanging": 1.0, "format": 1.0}, timeout=0.5) as scorer:
        score = scorer.score(prompt("4"), completion("<think>a</think><answer>4</answer>"))
    assert score.total == 1.0
    assert score.status["broken"] == "error: KeyError: 'lost'"
    assert score.status["hanging"] == "timeout"
    assert score.failed == ["broken", "hanging"]


def test_a_reward_by_import_path(tmp_path, monkeypatch):
    (tmp_path / "brevity_reward.py").write_text(
        "def brevity(question, gold, text):\n    return 1 / len(text)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with rewards.Scorer({"brevity_reward:brevity": 2.0}, workers=1) as scorer:
        found = scorer.score(prompt("4"), completion("four"))
    assert (found.total, found.breakdown) == (0.5, {"brevity_reward:brevity": 0.25})


def test_a_reward_that_returns_no_number_counts_zero_and_says_so(tmp_path, monkeypatch):
    (tmp_path / "odd_reward.py").write_text(
        "def odd(question, gold, text):\n"
        "    return {'none': None, 'text': '1', 'list': [1], 'pair': [1, 2], 'set': {1}}[text]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    texts = ["none", "text", "list", "pair", "set"]
    with rewards.Scorer({"odd_reward:odd": 1.0}, workers=1) as scorer:
        found = scorer.score_all([(prompt("4"), completion(text)) for text in texts])
    assert [(one.total, one.failed) for one in found] == [(0.0, ["odd_reward:odd"])] * 5
    assert "a number is needed, the reward returned None" in found[0].status["odd_reward:odd"]
    assert "set is not JSON serializable" in found[4].status["odd_reward:odd"]


def test_unknown_reward_names_the_nearest():
    with pytest.raises(ValueError, match=r"'acuracy'.*'accuracy'"):
        rewards.Scorer({"acuracy": 1.0})
    with pytest.raises(ValueError, match="taken"):
        rewards.register("format", lambda prompt, completion: 0.0)
