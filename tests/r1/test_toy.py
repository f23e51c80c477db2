"""The toy corpus: right and wrong where it means to be, and never a held-out question."""

import itertools
import random
import re

import pytest

from r1 import toy

TEMPLATE = "User: {question}\nAssistant: "


def render(question):
    return TEMPLATE.format(question=question)


@pytest.fixture(scope="module")
def tokenizer():
    return toy.build_tokenizer(TEMPLATE)


def take(tokenizer, count, **options):
    return list(itertools.islice(toy.corpus(tokenizer, render, **options), count))


def value(expression):
    first, *rest = expression.split()
    pairs = zip(rest[::2], rest[1::2], strict=True)
    return int(first) + sum(int(term) if op == "+" else -int(term) for op, term in pairs)


def test_tokenizer_round_trips_and_spends_one_token_on_constant_text(tokenizer):
    prompt = render(toy.question("1 + 2"))
    tokens = tokenizer.encode(prompt)
    # before, sentence, "1 + 2 =", after
    assert len(tokens) == 1 + 1 + 7 + 1
    text = "".join(map(chr, range(32, 127))) + "\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokens) == prompt
    assert [len(tokenizer.encode(tag)) for tag in toy.TAGS] == [1] * 4
    decoded = tokenizer.decode(
        [*tokenizer.encode("<think>"), tokenizer.eos_token_id], skip_special_tokens=True
    )
    assert decoded == "<think>"


def test_template_without_a_question_is_refused():
    with pytest.raises(ValueError, match="question"):
        toy.build_tokenizer("no place for it")


def test_questions_are_worded_and_distributed_like_reasoning_gym():
    reasoning_gym = pytest.importorskip("reasoning_gym", reason="compares with this package")
    dataset = reasoning_gym.create_dataset(
        "chain_sum", seed=0, size=300, min_terms=2, max_terms=4, min_digits=1, max_digits=1
    )
    theirs = [entry["metadata"]["expression"] for entry in dataset]
    assert [entry["question"] for entry in dataset] == [toy.question(e) for e in theirs]
    assert [entry["answer"] for entry in dataset] == [str(value(e)) for e in theirs]
    rng = random.Random(0)
    ours = [toy.expression(rng, 2, 4) for _ in range(300)]
    shape = re.compile(r"\d( [+-] \d){1,3}")
    assert all(shape.fullmatch(e) for e in [*theirs, *ours])
    mean_length = [sum(map(len, side)) / 300 for side in (theirs, ours)]
    assert abs(mean_length[0] - mean_length[1]) < 0.6


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("careful", "<think>3-9=-6;-6+8=2;2+9=11</think><answer>11</answer>"),
        ("drop_last", "<think>3-9=-6;-6+8=2</think><answer>2</answer>"),
        ("untagged", "3-9=-6;-6+8=2;2+9=11"),
    ],
)
def test_styles(style, text):
    assert toy.solution("3 - 9 + 8 + 9", style) == text


def test_no_carry_forgets_the_tens():
    assert toy.solution("7 + 8", "no_carry") == "<think>7+8=5</think><answer>5</answer>"
    assert toy.solution("3 + 4", "no_carry") == toy.solution("3 + 4", "careful")


def test_careful_solutions_are_right_and_guesses_mostly_are_not():
    rng = random.Random(1)
    expressions = [toy.expression(rng, 2, 4) for _ in range(500)]
    right = {
        style: sum(
            f"<answer>{value(e)}</answer>" in toy.solution(e, style, rng) for e in expressions
        )
        / 500
        for style in toy.STYLES
    }
    assert right["careful"] == 1
    assert right["untagged"] == 0
    assert 0.05 < right["guess"] < 0.25
    assert 0.3 < right["no_carry"] < 0.6
    assert right["drop_last"] < 0.2


def test_facts_are_right(tokenizer):
    facts = [e for e in take(tokenizer, 300) if all(e.loss[1:])]
    assert 60 < len(facts) < 120
    for example in facts:
        # the last one may be cut
        for fact in tokenizer.decode(example.tokens).split(";")[:-1]:
            total, op, term, result = re.fullmatch(r"(-?\d+)([+-])(\d)=(-?\d+)", fact).groups()
            assert int(result) == int(total) + (int(term) if op == "+" else -int(term))


def test_corpus_repeats_by_seed_and_leaves_excluded_questions_out(tokenizer):
    plain = take(tokenizer, 400, seed=5)
    assert plain == take(tokenizer, 400, seed=5) != take(tokenizer, 400, seed=6)

    def questions(examples):
        texts = (tokenizer.decode(e.tokens) for e in examples)
        return {t[len("User: ") : t.index("\n")] for t in texts if t.startswith("User: ")}

    exclude = set(sorted(questions(plain))[:100])
    assert not questions(take(tokenizer, 2000, seed=5, exclude=exclude)) & exclude


def test_loss_covers_the_solution_and_its_end_only(tokenizer):
    solutions = [e for e in take(tokenizer, 50) if not all(e.loss[1:])]
    for example in solutions:
        prompt = [t for t, counted in zip(example.tokens, example.loss, strict=True) if not counted]
        assert tokenizer.decode(prompt).endswith("\nAssistant: ")
        assert example.loss == tuple(i >= len(prompt) for i in range(len(example.tokens)))
        assert example.tokens[-1] == tokenizer.eos_token_id


def test_careful_example(tokenizer):
    example = toy.careful_example(tokenizer, render, toy.question("8 + 7"))
    answer = [t for t, counted in zip(example.tokens, example.loss, strict=True) if counted]
    assert tokenizer.decode(answer[:-1]) == "<think>8+7=15</think><answer>15</answer>"
    assert answer[-1] == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="not a chain_sum question"):
        toy.careful_example(tokenizer, render, "What is love?")
