"""Equality of two mathematical answers by math-verify; runs in a worker only, since it can hang."""

import logging

from math_verify import LatexExtractionConfig, parse, verify

logging.getLogger("math_verify").setLevel(logging.CRITICAL)

# Only the LaTeX grammar: the other extractor evaluates its input as Python.
_CONFIG = (LatexExtractionConfig(),)


def _parse(text: str) -> list:
    return parse(
        f"${text}$",
        extraction_config=_CONFIG,
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )


def compare(gold: str, answer: str) -> tuple[float, str]:
    """The reward and "correct", "wrong", "parse_fail" (the answer) or "bad_gold"."""
    gold_forms = _parse(gold)
    if not gold_forms:
        return 0.0, "bad_gold"
    answer_forms = _parse(answer)
    if not answer_forms:
        return 0.0, "parse_fail"
    equal = verify(gold_forms, answer_forms, timeout_seconds=None)
    return float(equal), "correct" if equal else "wrong"
