"""The tokenizer that a checkpoint carries: tokenizer.json and the small files that say how it is used."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtllm_cli.artifact import read_json, write_json
from trtllm_cli.errors import SnapshotError, UnsupportedError

_COPIED = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_MORE_TEMPLATES = "additional_chat_templates"
_OTHER_KINDS = ("vocab.json", "tekken.json", "spiece.model", "vocab.txt", "tokenizer.bin")


def copy_tokenizer(source: Path, directory: Path, config: Mapping[str, Any]) -> list[str]:
    """Copies what `source` has into `directory`; the names written, none where it has no tokenizer at all.

    A SentencePiece tokenizer.model without a tokenizer.json is converted. Raises UnsupportedError for other kinds.
    """
    if (source / "tokenizer.json").is_file():
        read_json(source / "tokenizer.json", SnapshotError)
        shutil.copyfile(source / "tokenizer.json", directory / "tokenizer.json")
    elif (source / "tokenizer.model").is_file():
        from trtllm_cli.convert.sentencepiece import convert_sentencepiece

        convert_sentencepiece(source / "tokenizer.model", source / "tokenizer_config.json", directory)
    elif other := next((name for name in _OTHER_KINDS if (source / name).is_file()), None):
        raise UnsupportedError(
            f"the snapshot's tokenizer is {other}, without a tokenizer.json",
            where=str(source),
            fix="make one with transformers: AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIR)",
        )
    else:
        return []
    for name in _COPIED:
        if (source / name).is_file():
            if name.endswith(".json"):
                read_json(source / name, SnapshotError)
            shutil.copyfile(source / name, directory / name)
    if (source / _MORE_TEMPLATES).is_dir():
        (directory / _MORE_TEMPLATES).mkdir()
        for template in sorted((source / _MORE_TEMPLATES).glob("*.jinja")):
            shutil.copyfile(template, directory / _MORE_TEMPLATES / template.name)
    if not (directory / "generation_config.json").is_file():
        write_generation_config(directory, config)
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def check_tokenizer(directory: Path, vocab_size: int, source: Path) -> None:
    """Raises SnapshotError unless the tokenizer can be read, and a model of `vocab_size` has all its tokens."""
    from tokenizers import Tokenizer

    where = str(source / "tokenizer.json" if source.is_dir() else source)
    try:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as e:  # the library raises nothing more specific
        raise SnapshotError(f"the tokenizer cannot be read: {e}", where=where, fix=SnapshotError.remake) from None
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise SnapshotError(
            f"wrong tokenizer: its token ids go up to {largest}, the model has only {vocab_size} tokens",
            where=where,
            fix="put the model's own tokenizer there, or remove it to convert without one",
        )


def write_generation_config(directory: Path, config: Mapping[str, Any]) -> None:
    """The token ids that begin, end and pad a text, as generation_config.json has them; nothing where none is known."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    if known := {name: config[name] for name in names if config.get(name) is not None}:
        write_json(directory / "generation_config.json", known)
