import json

import pytest

from r1 import config, rewards, tasks
from r1.types import Completion

SMALL = [
    "task.params={min_terms=2,max_terms=3,min_digits=1,max_digits=1}",
    "task.train.size=300",
    "task.select.size=40",
    "task.eval.size=40",
]


def build(*overrides):
    pytest.importorskip("reasoning_gym")
    return tasks.build(config.load(None, ["run.name=x", "model.path=toy", *overrides]).task)


def build_file(path, *overrides):
    return build("task.name=jsonl", f"task.path={path}", *overrides)


def questions(task, split):
    prompts = task.prompts(split, task.size(split))
    return {tasks.question_key(prompt.question) for prompt in prompts}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def assert_disjoint(task):
    train, select, held = (questions(task, split) for split in tasks.SPLITS)
    assert train and select and held
    assert not train & select and not train & held and not select & held


def test_gym_splits_are_disjoint_whatever_the_seeds():
    assert_disjoint(build(*SMALL))
    assert_disjoint(build(*SMALL, "task.train.seed=5", "task.select.seed=5", "task.eval.seed=5"))


def test_gym_prompts_repeat_and_do_not_depend_on_the_order_of_calls():
    first, second = build(*SMALL), build(*SMALL)
    late = second.prompts("train", 10, 100)
    assert first.prompts("train", 110)[100:] == late
    assert len({prompt.id for prompt in first.prompts("train", 300)}) == 300
    assert len(questions(first, "eval")) == 40
    other = build(*SMALL, "task.train.seed=9")
    assert other.prompts("train", 10) != first.prompts("train", 10)
    assert other.fingerprint != first.fingerprint == second.fingerprint


def test_gym_answers_are_scored_by_their_dataset():
    task = build(*SMALL)
    prompts = task.prompts("eval", 8)

    def completion(answer):
        return Completion((1,), (0.0,), "stop", 0, f"<think>.</think><answer>{answer}</answer>")

    with rewards.Scorer({"accuracy": 1.0, "gym_score": 1.0}) as scorer:
        right = scorer.score_all(
            [(p, completion(f"+{p.answer}.0".replace("+-", "-"))) for p in prompts]
        )
        wrong = scorer.score_all([(p, completion(f"{p.answer} or 99999")) for p in prompts])
        none = scorer.score(prompts[0], Completion((1,), (0.0,), "stop", 0, prompts[0].answer))
    assert [score.total for score in right] == [2.0] * 8
    assert [score.breakdown["accuracy"] for score in wrong] == [0.0] * 8
    # reasoning_gym gives part of the credit for naming the answer among others
    assert all(0 < score.breakdown["gym_score"] < 1 for score in wrong)
    assert none.status["accuracy"] == "no_answer"


@pytest.mark.parametrize(
    "override, words",
    [
        ("task.dataset=chain_sm", ["'chain_sm'", "'chain_sum'"]),
        ("task.params.min_term=2", ["min_term", "'min_terms'"]),
        ("task.params.seed=2", ["task.train.seed"]),
        ("task.params.min_terms=-2", ["chain_sum refuses", "min_terms must be positive"]),
    ],
)
def test_gym_mistakes(override, words):
    with pytest.raises(ValueError) as caught:
        build(override)
    for word in words:
        assert word in str(caught.value)


def test_gym_split_that_cannot_be_filled():
    task = build("task.params={min_terms=2,max_terms=2,min_digits=1,max_digits=1}")
    with pytest.raises(ValueError, match=r"task\.eval\.size: chain_sum gave \d+ different"):
        task.prompts("eval", 256)


def test_range_of_a_split():
    task = build(*SMALL)
    with pytest.raises(ValueError, match="prompts 39 to 41 asked of split 'eval' of 40"):
        task.prompts("eval", 2, 39)
    with pytest.raises(ValueError, match="split must be one of"):
        task.prompts("test", 1)


ROWS = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(300)]


def test_jsonl_from_one_file(tmp_path):
    task = build_file(write(tmp_path / "sums.jsonl", [*ROWS, ROWS[0]]))
    assert_disjoint(task)
    assert sum(task.size(split) for split in tasks.SPLITS) == 300
    assert task.dropped == 1
    prompt = task.prompts("train", 1)[0]
    number = int(prompt.id.split(":")[1])
    assert (prompt.question, prompt.answer) == tuple(ROWS[number - 1].values())
    assert prompt.task == "sums"


def test_jsonl_with_held_out_file(tmp_path):
    held = [{"question": row["question"].upper(), "answer": row["answer"]} for row in ROWS[:50]]
    path = write(tmp_path / "train.jsonl", ROWS)
    task = build_file(path, f"task.eval_path={write(tmp_path / 'test.jsonl', held)}")
    assert_disjoint(task)
    assert task.size("eval") == 50 and task.dropped == 50
    assert task.size("train") + task.size("select") == 250


def test_jsonl_fields_sizes_and_fingerprint(tmp_path):
    rows = [{"q": row["question"], "a": 2 * i} for i, row in enumerate(ROWS)]
    path = write(tmp_path / "x.jsonl", rows)
    fields = ["task.question_field=q", "task.answer_field=a", "task.train.size=20"]
    task = build_file(path, *fields)
    assert task.size("train") == 20
    assert task.describe().startswith("task x: 20 train (2")
    assert "more left out by task.train.size)" in task.describe()
    before = task.fingerprint
    assert build_file(path, *fields).fingerprint == before
    first = int(task.prompts("train", 1)[0].id.split(":")[1]) - 1
    rows[first]["a"] = -1
    assert build_file(write(path, rows), *fields).fingerprint != before


def test_jsonl_bad_lines_are_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        b'{"question": "a", "answer": "b"}\n\n{"question": "a"\n{"question": "a"}\n[1]\n\xff\n'
        b'{"question": "a", "answer": []}\n{"question": " ", "answer": "b"}\n'
    )
    with pytest.raises(ValueError, match=r"6 bad lines in .*bad\.jsonl") as caught:
        build_file(path)
    for text in ("bad.jsonl:3: not JSON", "bad.jsonl:4: no field 'answer'", "bad.jsonl:5: a JSON",
                 "bad.jsonl:6: not JSON", "bad.jsonl:7: field 'answer' is list"):  # fmt: skip
        assert text in str(caught.value)


def test_jsonl_with_half_a_character_is_named(tmp_path):
    path = write(tmp_path / "cut.jsonl", [{"question": "cut \ud83d", "answer": "b"}])
    with pytest.raises(ValueError, match=r"cut\.jsonl:1: field 'question' holds half of a"):
        build_file(path)


def test_jsonl_without_prompts_or_file(tmp_path):
    with pytest.raises(ValueError, match="no prompt for split"):
        build_file(write(tmp_path / "one.jsonl", ROWS[:1]))
    with pytest.raises(FileNotFoundError, match="absent"):
        build_file(tmp_path / "absent.jsonl")


def test_split_depends_on_the_text_alone():
    assert tasks.split_of("What is  1?", 0.2) == tasks.split_of("what IS 1? ", 0.2)
    counts = {split: 0 for split in tasks.SPLITS}
    for i in range(5000):
        counts[tasks.split_of(f"question {i}", 0.2)] += 1
    assert abs(counts["eval"] - 500) < 100 and abs(counts["select"] - 500) < 100
