"""The `tokenizer.json` of a directory, opened with the tokenizers library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trtllm_cli.errors import EngineError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


def open_tokenizer(directory: Path) -> Backend:
    """The tokenizer of a directory, without truncation and padding. Raises EngineError where there is none."""
    from tokenizers import Tokenizer as Backend

    file = directory / "tokenizer.json"
    if not file.is_file():
        if not directory.is_dir():
            raise EngineError(f"no such tokenizer directory: {directory}", where="--tokenizer-dir")
        old = next((n for n in ("tokenizer.model", "vocab.json", "spiece.model") if (directory / n).is_file()), None)
        raise EngineError(
            f"no tokenizer.json in {directory}" + (f", only the older {old}" if old else ""),
            fix="make one with transformers: AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIR)",
        )
    try:
        backend = Backend.from_file(str(file))
        backend.no_truncation()
        backend.no_padding()
    except Exception as e:
        raise EngineError(f"tokenizer.json cannot be read: {e}", where=str(file), fix="copy the file again") from None
    return backend


def largest_id(backend: Backend) -> int:
    """The largest id that the tokenizer can give; -1 for none."""
    size = backend.get_vocab_size(with_added_tokens=True)
    if backend.id_to_token(size - 1) is not None and backend.id_to_token(size) is None:
        return size - 1  # no gaps, by far the most common: `size` different ids, all below `size`
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
