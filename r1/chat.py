"""Prompt templates and the <think> / <answer> format of completions.

`r1_zero` is the template of DeepSeek-R1 (arXiv:2501.12948v1, Table 1), its wording kept because a
base model's behaviour depends on it; `compact` is a short one for small models.
"""

import re
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

SLOT = "{question}"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

_FORMAT = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)


class Parsed(NamedTuple):
    """A completion taken apart; `reason` says what is wrong when `ok` is false."""

    think: str
    answer: str
    ok: bool
    reason: str


def load_template(name: str) -> str:
    """The text of a template: the name of a shipped one, or the path of a text file.

    Raises:
        ValueError: when there is no such template, or it does not hold {question} exactly once.
    """
    shipped = files("r1") / "templates"
    resource = shipped / f"{name}.txt"
    if name and Path(name).name == name and resource.is_file():
        text = resource.read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        known = sorted(entry.name.removesuffix(".txt") for entry in shipped.iterdir())
        raise ValueError(f"no template {name!r}: neither a file nor one of {', '.join(known)}")
    if text.count(SLOT) != 1:
        raise ValueError(
            f"template {name!r} must hold {SLOT} once, has it {text.count(SLOT)} times"
        )
    return text.removesuffix("\n")


def render(template: str, question: str) -> str:
    """The prompt: the template with the question in its slot, whatever the question holds."""
    before, _, after = template.partition(SLOT)
    return f"{before}{question}{after}"


def parse(completion: str) -> Parsed:
    """Takes `<think>...</think> <answer>...</answer>` apart.

    The format holds when each tag occurs once, in this order, both parts are more than white
    space, and nothing but white space stands before, between or after them. Parse completions
    only, never prompts: a question may hold tags of its own.
    """
    for tag in TAGS:
        count = completion.count(tag)
        if count != 1:
            return Parsed("", "", False, f"{tag} occurs {count} times" if count else f"no {tag}")
    match = _FORMAT.fullmatch(completion)
    if match is None:
        return Parsed("", "", False, "tags out of order, or text outside of them")
    think, answer = match.group(1).strip(), match.group(2).strip()
    if not think or not answer:
        return Parsed(think, answer, False, "empty <think>" if not think else "empty <answer>")
    return Parsed(think, answer, True, "ok")
