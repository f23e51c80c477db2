"""Question and answer pairs from JSON Lines files."""

from pathlib import Path

from r1.config import Task as TaskConfig
from r1.data import fingerprint, read_jsonl
from r1.tasks import SPLITS, SplitName, check_range, question_key, split_of
from r1.types import Prompt


class JsonlTask:
    """Prompts of one file, or of a training and a held-out one.

    With `eval_path` all of that file is the evaluation split, and its questions are taken out of
    the other two. Each question counts once, at its first line; a split larger than its configured
    size is cut. `describe` says how many questions both left out.

    Raises:
        ValueError: on lines that are not JSON objects with text in both fields, naming file and
            line, and on a split without prompts.
    """

    def __init__(self, config: TaskConfig) -> None:
        assert config.path is not None
        self.name = Path(config.path).stem
        self._prompts: dict[SplitName, list[Prompt]] = {split: [] for split in SPLITS}
        seen: set[str] = set()
        if config.eval_path is not None:
            for prompt in _read(Path(config.eval_path), config):
                if question_key(prompt.question) not in seen:
                    seen.add(question_key(prompt.question))
                    self._prompts["eval"].append(prompt)
        # Hashes of questions put them in their splits; with an eval file, "eval" ones train.
        self.dropped = 0
        self._cut: dict[SplitName, int] = {}
        for prompt in _read(Path(config.path), config):
            if question_key(prompt.question) in seen:
                self.dropped += 1
                continue
            seen.add(question_key(prompt.question))
            split = split_of(prompt.question, config.held_out)
            if split == "eval" and config.eval_path is not None:
                split = "train"
            self._prompts[split].append(prompt)
        for split in SPLITS:
            if not self._prompts[split]:
                source = config.eval_path if split == "eval" and config.eval_path else config.path
                raise ValueError(
                    f"task: {source} leaves no prompt for split {split!r}; "
                    f"held_out is {config.held_out}"
                )
            self._cut[split] = max(0, len(self._prompts[split]) - getattr(config, split).size)
            del self._prompts[split][getattr(config, split).size :]
        self.fingerprint = fingerprint(
            "jsonl",
            [[(p.id, p.question, p.answer) for p in self._prompts[split]] for split in SPLITS],
        )

    def size(self, split: SplitName) -> int:
        return len(self._prompts[split])

    def describe(self) -> str:
        parts = [
            f"{len(self._prompts[split])} {split}"
            + (f" ({cut} more left out by task.{split}.size)" if cut else "")
            for split, cut in self._cut.items()
        ]
        repeated = f"; {self.dropped} repeated questions dropped" if self.dropped else ""
        return f"task {self.name}: {', '.join(parts)}{repeated}"

    def prompts(self, split: SplitName, n: int, start: int = 0) -> list[Prompt]:
        check_range(self.name, split, len(self._prompts.get(split, ())), n, start)
        return self._prompts[split][start : start + n]


def _read(path: Path, config: TaskConfig) -> list[Prompt]:
    prompts, faults = [], []
    fields = (config.question_field, config.answer_field)
    for number, row, fault in read_jsonl(path):
        if fault is None:
            fault = next((_fault(row, name) for name in fields if _fault(row, name)), None)
        if fault is not None:
            faults.append(f"{path}:{number}: {fault}")
            continue
        question, answer = (str(row[name]) for name in fields)
        prompts.append(Prompt(f"{path.stem}:{number}", question, answer, path.stem))
    if faults:
        shown = "\n  ".join(faults[:5])
        raise ValueError(f"{len(faults)} bad lines in {path}:\n  {shown}")
    return prompts


def _fault(row: dict, name: str) -> str | None:
    if name not in row:
        return f"no field {name!r}; has {', '.join(map(repr, row))}"
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return f"field {name!r} is {type(value).__name__}, not text or a number"
    try:
        str(value).encode()
    except UnicodeEncodeError:
        return f"field {name!r} holds half of a surrogate pair"
    return None if str(value).strip() else f"field {name!r} is empty"
