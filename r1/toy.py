"""The embedded model: a character tokenizer and a corpus that makes a weak but teachable base.

The task is reasoning-gym's `chain_sum`: sums of one-digit terms. The corpus shows single steps
(all of them right) and worked solutions in the styles of STYLES. Only `careful` solves every
problem in the wanted format, and it is rare: what is left for RL is to find it and to prefer it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Container, Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from r1.config import Toy

SENTENCE = "State the final answer to the following arithmetic problem: "
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
EOS, PAD, UNK = "<|eos|>", "<|pad|>", "<|unk|>"

FACT_SHARE = 0.3
# how a solution is written, and how often
STYLES = {"careful": 0.16, "no_carry": 0.18, "drop_last": 0.28, "untagged": 0.20, "guess": 0.18}
# what choosing the careful style costs before anything is computed
CAREFUL_NATS = -math.log(STYLES["careful"])


class Example(NamedTuple):
    """One training sequence: `loss` marks the tokens that are predicted (never the first)."""

    tokens: tuple[int, ...]
    loss: tuple[bool, ...]


def build_tokenizer(template: str = "{question}") -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, and one for each constant piece of a prompt.

    Args:
        template: prompt template with one "{question}"; the text before and after it becomes one
            token each, so that a long system prompt costs the toy two positions.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    if template.count("{question}") != 1:
        raise ValueError(f"template must hold {{question}} once, got {template!r}")
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocab = {token: i for i, token in enumerate([PAD, EOS, UNK, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=UNK))
    tokenizer.decoder = decoders.Fuse()
    pieces = [piece for piece in template.split("{question}") if len(piece) > 1]
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False) for text in (*TAGS, SENTENCE, *pieces)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, unk_token=UNK,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def model_config(toy: Toy, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """The Qwen2 configuration of the embedded model, tied, with the tokenizer's special tokens."""
    from transformers import Qwen2Config

    return Qwen2Config(
        # a multiple of 8 keeps the head's rows aligned
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=toy.hidden, num_hidden_layers=toy.layers, num_attention_heads=toy.heads,
        num_key_value_heads=toy.heads, intermediate_size=toy.intermediate,
        max_position_embeddings=toy.max_positions, initializer_range=toy.initializer_range,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def build_model(
    toy: Toy, template: str, dtype: torch.dtype, attention: str, seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A new embedded model and its tokenizer; the global generator is left as it was."""
    import torch
    from transformers import GenerationConfig, Qwen2ForCausalLM

    tokenizer = build_tokenizer(template)
    config = model_config(toy, tokenizer)
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = Qwen2ForCausalLM(config).to(dtype)
    module.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True
    )
    return module, tokenizer


def expression(rng: random.Random, min_terms: int, max_terms: int) -> str:
    """A sum of one-digit terms, drawn as reasoning-gym draws it."""
    parts = [str(rng.randint(0, 9))]
    for _ in range(rng.randint(min_terms, max_terms) - 1):
        parts += [rng.choice("+-"), str(rng.randint(0, 9))]
    return " ".join(parts)


def question(expression: str) -> str:
    """The question as reasoning-gym words it."""
    return f"{SENTENCE}{expression} ="


def _digitwise(total: int, op: str, term: int) -> int:
    """A sum whose carry into the tens is forgotten."""
    if total < 0:
        return total + term if op == "+" else total - term
    ones = total % 10 + (term if op == "+" else -term)
    return total - total % 10 + ones % 10


def _right(total: int, op: str, term: int) -> int:
    return total + term if op == "+" else total - term


def solution(expression: str, style: str, rng: random.Random | None = None) -> str:
    """A worked solution in one of STYLES, without the end-of-sequence token."""
    first, *rest = expression.split(" ")
    terms = list(zip(rest[::2], map(int, rest[1::2]), strict=True))
    if style == "drop_last":
        terms = terms[:-1]
    step = _digitwise if style == "no_carry" else _right
    total, steps = int(first), []
    for op, term in terms:
        result = step(total, op, term)
        steps.append(f"{total}{op}{term}={result}")
        total = result
    if style == "guess":
        assert rng is not None
        steps, total = [], total + rng.randint(-3, 3)
    if style == "untagged":
        return ";".join(steps)
    return f"<think>{';'.join(steps)}</think><answer>{total}</answer>"


def corpus(
    tokenizer: PreTrainedTokenizerFast,
    render: Callable[[str], str],
    *,
    exclude: Container[str] = frozenset(),
    seed: int = 0,
    length: int = 48,
    min_terms: int = 2,
    max_terms: int = 4,
) -> Iterator[Example]:
    """An endless stream of training sequences, the same for the same seed.

    Args:
        tokenizer: from build_tokenizer.
        render: question to prompt text: the chat template that RL will use.
        exclude: questions that must not appear: those of the held-out splits.
        length: tokens of a sequence of single steps; solutions are as long as they are.
    """
    rng = random.Random(seed)
    styles, weights = list(STYLES), list(STYLES.values())
    encode = _encoder(tokenizer)
    while True:
        if rng.random() < FACT_SHARE:
            tokens = _facts(rng, encode, length, max_terms)
            yield Example(tokens, (False, *[True] * (len(tokens) - 1)))
            continue
        text = expression(rng, min_terms, max_terms)
        if question(text) in exclude:
            continue
        style = rng.choices(styles, weights)[0]
        prompt = encode(render(question(text)))
        answer = (*encode(solution(text, style, rng)), tokenizer.eos_token_id)
        yield Example(prompt + answer, (False,) * len(prompt) + (True,) * len(answer))


def careful_example(
    tokenizer: PreTrainedTokenizerFast, render: Callable[[str], str], text: str
) -> Example:
    """The careful solution of a question: its loss, less CAREFUL_NATS, says what the base knows.

    Raises: ValueError when `text` is not a chain_sum question of one-digit terms.
    """
    if not (text.startswith(SENTENCE) and text.endswith(" =")):
        raise ValueError(f"not a chain_sum question: {text!r}")
    prompt = tuple(tokenizer.encode(render(text)))
    answer = solution(text[len(SENTENCE) : -2], "careful")
    tokens = (*tokenizer.encode(answer), tokenizer.eos_token_id)
    return Example(prompt + tokens, (False,) * len(prompt) + (True,) * len(tokens))


def _encoder(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], tuple[int, ...]]:
    encode = tokenizer.backend_tokenizer.encode
    return lambda text: tuple(encode(text, add_special_tokens=False).ids)


def _facts(rng, encode, length, max_terms) -> tuple[int, ...]:
    text = ""
    while len(text) < length:
        total = rng.randint(-9 * (max_terms - 2), 9 * (max_terms - 1))
        op, term = rng.choice("+-"), rng.randint(0, 9)
        text += f"{total}{op}{term}={_right(total, op, term)};"
    return encode(text[:length])
