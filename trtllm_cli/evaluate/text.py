"""Text as windows of tokens: held-out ones to measure on, and random ones to calibrate with."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_cli.errors import UsageError
from trtllm_cli.evaluate.text_files import CALIBRATION, HELDOUT, load_texts
from trtllm_cli.tokenizer_file import largest_id, open_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["CALIBRATION", "HELDOUT", "Window", "heldout_windows", "load_texts", "load_tokenizer", "windows"]


@dataclass(frozen=True)
class Window:
    """Tokens that are computed together, of which those from `scored_from` on are predicted and counted."""

    ids: tuple[int, ...]
    scored_from: int = 1  # at least 1: nothing predicts the first

    @property
    def num_scored(self) -> int:
        """Tokens that count."""
        return len(self.ids) - self.scored_from


def load_tokenizer(directory: Path | None, vocab_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint or engine. Raises UsageError or EngineError where there is none that fits."""
    if directory is None:
        raise UsageError(
            "there is no tokenizer in it, and text is to be cut into tokens",
            where="--tokenizer-dir",
            fix="give the directory of the model's tokenizer.json: --tokenizer-dir DIR",
        )
    tokenizer = open_tokenizer(directory)
    if (largest := largest_id(tokenizer)) >= vocab_size:
        raise UsageError(
            f"wrong tokenizer: its token ids go up to {largest}, the model has only {vocab_size} tokens",
            where=str(directory / "tokenizer.json"),
            fix="give the model's own: --tokenizer-dir DIR",
        )
    return tokenizer


def windows(texts: Sequence[str], tokenizer: Tokenizer, num: int, length: int, seed: int = 0) -> list[list[int]]:
    """`num` windows of `length` tokens for calibration, drawn without overlap; the same seed draws the same.

    Each begins with what the tokenizer puts before a text (most often a beginning-of-sequence token, or nothing).
    Raises UsageError for texts that are too short.
    """
    prefix = _prefix(tokenizer)
    stream, body = _stream(texts, tokenizer), _body(length, prefix)
    starts = range(0, len(stream) - body + 1, body)
    if len(starts) < num:
        raise _too_short(len(stream), f"{num} windows of {length} tokens", (num * body) - len(stream))
    drawn = sorted(random.Random(seed).sample(starts, num))  # noqa: S311  # not for secrets
    return [prefix + stream[start : start + body] for start in drawn]


def heldout_windows(
    texts: Sequence[str], tokenizer: Tokenizer, num: int, length: int, stride: int | None = None
) -> list[Window]:
    """Windows of `length` tokens to measure on: `num` of all, evenly spread over the texts.

    With a `stride` below `length`, windows overlap and only the last `stride` tokens of each count, so that each is
    predicted from more of its past; by default they lie end to end. Raises UsageError for texts too short for one.
    """
    prefix = _prefix(tokenizer)
    stream, body = _stream(texts, tokenizer), _body(length, prefix)
    step = min(stride or body, body)
    starts = range(0, len(stream) - body + 1, step)
    if not starts:
        raise _too_short(len(stream), f"one window of {length} tokens", body - len(stream))
    count = min(num, len(starts))
    chosen = [starts[i * len(starts) // count] for i in range(count)]
    first = max(1, len(prefix))
    return [
        Window(tuple(prefix + stream[start : start + body]), max(first, length - step) if start else first)
        for start in chosen
    ]


def _prefix(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text."""
    plain, dressed = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    for i in range(len(dressed) - len(plain) + 1):
        if dressed[i : i + len(plain)] == plain:
            return dressed[:i]
    return []


def _stream(texts: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """The tokens of all texts, end to end, a blank line between."""
    encoded = tokenizer.encode_batch(
        ["\n\n" * (i > 0) + text for i, text in enumerate(texts)], add_special_tokens=False
    )
    return [token for one in encoded for token in one.ids]


def _body(length: int, prefix: list[int]) -> int:
    """Tokens of text in a window."""
    least = len(prefix) + 2 - bool(prefix)
    if length < least:
        raise UsageError(
            f"a window of {length} tokens predicts nothing",
            where="--seq-len",
            fix=f"give at least {least}; 512 is usual",
        )
    return length - len(prefix)


def _too_short(found: int, wanted: str, missing: int) -> UsageError:
    return UsageError(
        f"the text has {found} tokens, too few for {wanted} ({missing} more are needed)",
        where="--text",
        fix="give a longer text, or ask for fewer or shorter windows",
    )
