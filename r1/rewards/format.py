"""Format: 1 when the completion is <think>...</think> <answer>...</answer> and nothing else."""

from r1.chat import parse
from r1.rewards.result import Result
from r1.types import Completion, Prompt


def format_reward(prompt: Prompt, completion: Completion) -> Result:
    """1 for a well-formed completion that also stopped by itself (DeepSeek-R1, section 2.2.2)."""
    parsed = parse(completion.text)
    if parsed.ok and completion.finish != "stop":
        return Result(0.0, "cut off")
    return Result(float(parsed.ok), parsed.reason)
