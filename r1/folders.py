"""Model folders: which one a path stands for, and its tokenizer."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def resolve(path: str) -> str:
    """The model folder that a path stands for; a hub id or "toy" as it is.

    Raises: FileNotFoundError for a path that is not there.
    """
    path = os.path.expanduser(path)
    if path.startswith((".", "/")) and not Path(path).exists():
        raise FileNotFoundError(f"model.path names no folder: {path}")
    latest = Path(path) / "checkpoints" / "latest"
    return str(latest.with_name(latest.read_text().strip())) if latest.is_file() else path


def load_tokenizer(
    path: str | os.PathLike[str], *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id.

    A folder whose own settings ask for the generic class gets it: AutoTokenizer goes by the model
    type first and would make the embedded model's a Qwen2 tokenizer, which splits text otherwise.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    settings = Path(path) / "tokenizer_config.json"
    if settings.is_file():
        name = json.loads(settings.read_text()).get("tokenizer_class")
        if name in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            return PreTrainedTokenizerFast.from_pretrained(path)
    return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers draws a bar for every folder, also for one that takes milliseconds."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
