"""Accuracy: 1 when the final answer equals the gold answer, else 0."""

from r1.rewards.math_text import (
    MAX_ANSWER_CHARS,
    equal_fast,
    extract,
    gold_answer,
    normalise,
)
from r1.rewards.result import BAD_GOLD, Result
from r1.rewards.workers import Call, Outcome, Pool
from r1.types import Completion, Prompt

COMPARE = "r1.rewards.equivalence:compare"
GYM_SCORE = "r1.tasks.gym_score:score"
GYM_CORRECT = "r1.tasks.gym_score:correct"


def math_accuracy(completion: str, gold: str) -> Result | Call:
    r"""Grades a completion at once where no algebra is needed, else returns the call that does.

    The answer is the last \boxed{} after the reasoning (DeepSeek-R1, section 2.2.2). Statuses:
    "correct", "wrong", "no_answer", "too_long", "bad_gold"; from the call also "parse_fail",
    "timeout", "crashed: ..." and "error: ...".
    """
    gold = gold_answer(gold)
    if len(gold) > MAX_ANSWER_CHARS or not (gold := normalise(gold)):
        return Result(0.0, BAD_GOLD)
    answer = extract(completion)
    if answer is None:
        return Result(0.0, "no_answer")
    if len(answer) > MAX_ANSWER_CHARS:
        return Result(0.0, "too_long")
    answer = normalise(answer)
    equal = equal_fast(gold, answer)
    if equal is not None:
        return Result(float(equal), "correct" if equal else "wrong")
    return Call(COMPARE, (gold, answer))


def gym_score(prompt: Prompt, completion: Completion) -> Result | Call:
    """The score_answer of the reasoning_gym dataset the prompt came from, partial credit too."""
    source = prompt.meta["gym"]
    answer = extract(completion.text, hashes=False)
    if answer is None:
        return Result(0.0, "no_answer")
    call = (source["dataset"], source["params"], source["seed"], source["index"], answer)
    return Call(GYM_SCORE, call)


def gym_accuracy(prompt: Prompt, completion: Completion) -> Result | Call:
    """1 where `gym_score` is full, else 0: partial credit rewards listing many answers."""
    call = gym_score(prompt, completion)
    return call._replace(target=GYM_CORRECT) if isinstance(call, Call) else call


def accuracy(prompt: Prompt, completion: Completion) -> Result | Call:
    """Accuracy by the rule of the task the prompt came from."""
    if "gym" in prompt.meta:
        return gym_accuracy(prompt, completion)
    return math_accuracy(completion.text, prompt.answer)


def settle(call: Call, outcome: Outcome, pool: Pool) -> Result:
    """The result of a call; a gold answer that cannot even be compared with 0 is "bad_gold"."""
    if outcome.error is None:
        match outcome.value:
            case int() | float() as value:
                return Result(float(value))
            case [int() | float() as value, str(status)]:
                return Result(float(value), status)
        return Result(0.0, f"error: a number is needed, the reward returned {outcome.value!r:.80}")
    if call.target == COMPARE:
        easy = pool.submit(Call(COMPARE, (call.args[0], "0"))).result()
        if easy.error is not None:
            return Result(0.0, BAD_GOLD)
    return Result(0.0, outcome.error)
