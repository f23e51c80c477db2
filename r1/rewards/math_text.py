"""The final answer in a completion, and equality of answers where no algebra is needed."""

import re
from fractions import Fraction

MAX_ANSWER_CHARS = 1000
"""A longer answer is not compared."""

_NUMBER = re.compile(r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+")
_MIXED = re.compile(r"(\d+)\\frac\{(\d+)\}\{(\d+)\}")
_FRACTION = re.compile(r"\\frac\{(-?\d+)\}\{(-?\d+)\}|(\d+)/(\d+)")
_SHORT_FRACTION = re.compile(r"\\frac(\d)(\d)(?!\d)")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=[\d}])\\(?:text|mathrm|mbox)\{[^{}]*\}(?:\^(?:\d|\{\d\}))?$")
_POWER = re.compile(r"\\(?:text|mathrm|mbox)\{[^{}]*\}\^\{?(\d)\}?$")
_BASED = re.compile(r"([0-9A-Z]+)_\{?(\d+)\}?")
_SPACING = re.compile(r"\\[!,;: ]|\\q?quad\b|~|\s+")
_WORDS = re.compile(r"[^\W\d_]{3,}(?:[ '-][^\W\d_]+)*")


def answer_part(completion: str) -> str:
    """What follows the reasoning: the last <answer> block after the last </think>.

    A completion without tags is all answer; one that never closes its <think> has none.
    """
    _, closed, rest = completion.rpartition("</think>")
    if not closed and "<think>" in rest:
        return ""
    _, opened, inside = rest.rpartition("<answer>")
    return inside.partition("</answer>")[0] if opened else rest


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, braces balanced; None without one or unclosed.

    One that goes on for 100 times MAX_ANSWER_CHARS counts as unclosed.
    """
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    opening = re.compile(r"\\f?box(?:ed)?\s*\{").match(text, start)
    if opening is None:
        return None
    depth, position = 1, opening.end()
    end = min(len(text), position + 100 * MAX_ANSWER_CHARS)
    while position < end:
        character = text[position]
        if character == "\\":
            position += 2
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[opening.end() : position]
        position += 1
    return None


def extract(completion: str, *, hashes: bool = True) -> str | None:
    r"""The final answer: the last box, else GSM8K's "#### x", else the whole <answer> block.

    Without `hashes` a "####" is text like any other, as in the drawings of grid puzzles.
    None when there is none; a box that is not closed is none.
    """
    part = answer_part(completion)
    if "\\boxed" in part or "\\fbox" in part:
        boxed = last_boxed(part)
        return boxed.strip() or None if boxed is not None else None
    if hashes and "####" in part:
        return part.rpartition("####")[2].strip() or None
    if "<answer>" in completion.rpartition("</think>")[2]:
        return part.strip() or None
    return None


def gold_answer(gold: str) -> str:
    r"""The answer in a gold text: its last box, what follows its "####", or all of it."""
    boxed = last_boxed(gold)
    if boxed is not None:
        return boxed.strip()
    return gold.rpartition("####")[2].strip()


def normalise(text: str) -> str:
    """The same answer with one spelling of delimiters, spaces, fractions and degrees."""
    text = text.strip().replace("\u2212", "-")
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        inner = text[len(opening) : len(text) - len(closing)]
        wrapped = text.startswith(opening) and text.endswith(closing)
        if wrapped and len(text) >= len(opening) + len(closing) and opening not in inner:
            text = inner.strip()
            break
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"\\(?:left|right)(?![a-z])", "", text)
    text = re.sub(r"\^(?:\\circ|\{\\circ\})|\u00b0|\\\$|^\$", "", text)
    text = _SPACING.sub(" ", text).strip()
    text = _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text)
    return text.rstrip(".").strip()


def equal_fast(gold: str, answer: str) -> bool | None:
    """Whether two normalised answers are equal, or None when that takes algebra.

    Numbers are compared as exact rationals; only against a fraction without finite decimals is a
    decimal accepted within a relative 1e-6. Words are compared without case.
    """
    if gold.replace(" ", "") == answer.replace(" ", ""):
        return True
    based = _BASED.fullmatch(answer.replace(" ", ""))
    if based or "_" in answer:
        # math-verify drops the base of 10_2 and would call it equal to 10 and to 10_3.
        gold_based = _BASED.fullmatch(gold.replace(" ", ""))
        if based and gold_based:
            return based.groups() == gold_based.groups()
        if "_" not in gold:
            return False
    powers = [match.group(1) for text in (gold, answer) if (match := _POWER.search(text))]
    if len(set(powers)) == 2:
        return False
    gold_number, answer_number = _number(gold), _number(answer)
    if gold_number is not None and answer_number is not None:
        if gold_number == answer_number:
            return True
        if ("%" in gold) != ("%" in answer):
            return None
        return not (_finite(gold_number) and _finite(answer_number)) and _close(
            gold_number, answer_number, decimal="." in gold or "." in answer
        )
    gold_words, answer_words = _words(gold), _words(answer)
    if gold_words is not None:
        # As algebra a word is a product of letters, equal to all its anagrams.
        return gold_words == answer_words
    return None


def _number(text: str) -> Fraction | None:
    text = _UNIT.sub("", text.replace(" ", "")).removesuffix("\\%").removesuffix("%")
    sign = -1 if text.startswith("-") else 1
    text = text.lstrip("+-") if text[:2] not in ("--", "+-", "-+", "++") else text
    if len(text) > MAX_ANSWER_CHARS:
        return None
    if _NUMBER.fullmatch(text):
        return sign * Fraction(text.replace(",", "").removesuffix("."))
    if mixed := _MIXED.fullmatch(text):
        whole, top, bottom = map(int, mixed.groups())
        return sign * (whole + Fraction(top, bottom)) if bottom else None
    if fraction := _FRACTION.fullmatch(text):
        top, bottom = (int(part) for part in fraction.groups() if part is not None)
        return sign * Fraction(top, bottom) if bottom else None
    return None


def _finite(number: Fraction) -> bool:
    rest = number.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _close(left: Fraction, right: Fraction, decimal: bool) -> bool:
    return decimal and abs(left - right) <= Fraction(1, 10**6) * max(abs(left), abs(right))


def _words(text: str) -> str | None:
    unwrapped = _TEXT.sub(r"\1", text).strip()
    choice = re.fullmatch(r"\(?([A-Za-z])\)?", unwrapped)
    if choice and (unwrapped != text or unwrapped.startswith("(")):
        return choice.group(1).casefold()
    if choice:
        return unwrapped.casefold() if unwrapped.isupper() else None
    return unwrapped.casefold() if _WORDS.fullmatch(unwrapped) else None
