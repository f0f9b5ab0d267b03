"""Reads a SentencePiece `tokenizer.model`: just the few protobuf fields that a BPE tokenizer needs.

The schema is sentencepiece_model.proto of https://github.com/google/sentencepiece.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtllm_cli.artifact import read_json
from trtllm_cli.convert.tokenizer_build import (
    CONTROL,
    NORMAL,
    USER_DEFINED,
    Vocabulary,
    sentencepiece_bpe,
    write_tokenizer,
)
from trtllm_cli.errors import SnapshotError, UnsupportedError

_BPE = 2  # TrainerSpec.ModelType


@dataclass(frozen=True)
class SentencePieceModel:
    """The pieces by id, and how text is prepared."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    special: dict[str, int]
    prefix_space: bool


def convert_sentencepiece(model: Path, config: Path, directory: Path) -> None:
    """Writes `directory`/tokenizer.json for a BPE SentencePiece model; BOS and EOS as tokenizer_config.json says."""
    settings = read_json(config, SnapshotError) if config.is_file() else {}
    parsed = read_model(model)
    tokens, types, special = list(parsed.tokens), list(parsed.types), dict(parsed.special)
    _add_later_tokens(tokens, types, settings)
    ids = {token: i for i, token in enumerate(tokens)}
    for role in ("bos", "eos", "unk", "pad"):
        value = settings.get(f"{role}_token")
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text in ids:
            special[role] = ids[text]
    add_bos = settings.get("add_bos_token", True) is True
    vocabulary = Vocabulary(tokens, types, special, add_bos, settings.get("add_eos_token") is True)
    scores = parsed.scores + [float("-inf")] * (len(tokens) - len(parsed.scores))
    tokenizer = sentencepiece_bpe(vocabulary, scores, prefix_space=parsed.prefix_space)
    write_tokenizer(directory, tokenizer, vocabulary, max_length=None, template=None)


def _add_later_tokens(tokens: list[str], types: list[int], settings: dict[str, Any]) -> None:
    """Tokens that tokenizer_config.json adds behind the model's own."""
    later = settings.get("added_tokens_decoder")
    ids = {int(key): entry for key, entry in later.items() if key.isdecimal()} if isinstance(later, dict) else {}
    while isinstance(entry := ids.get(len(tokens)), dict) and isinstance(entry.get("content"), str):
        tokens.append(entry["content"])
        types.append(CONTROL if entry.get("special") else USER_DEFINED)


def read_model(path: Path) -> SentencePieceModel:
    """Parses the file. Raises SnapshotError when it is damaged, UnsupportedError when it is not a BPE model."""
    try:
        return _parse(path)
    except (IndexError, ValueError, struct.error, UnicodeDecodeError):
        raise SnapshotError(
            f"{path.name} is no SentencePiece model, or is damaged", where=str(path), fix="fetch the file again"
        ) from None


def _parse(path: Path) -> SentencePieceModel:
    tokens, scores, types = [], [], []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(path.read_bytes()):
        if number == 1:
            piece = dict(_fields(value))
            tokens.append(piece[1].decode("utf-8"))
            scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
            types.append(piece.get(3, NORMAL))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not tokens:
        raise ValueError("no pieces")
    if trainer.get(3, 1) != _BPE:
        raise UnsupportedError(
            "the SentencePiece model is not BPE",
            where=str(path),
            fix="make a tokenizer.json with transformers: AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIR)",
        )
    # default ids of TrainerSpec; -1, written as an unsigned number, means none
    defaults = {"unk": (40, 0), "bos": (41, 1), "eos": (42, 2), "pad": (43, 1 << 63)}
    special = {role: trainer.get(number, default) for role, (number, default) in defaults.items()}
    special = {role: i for role, i in special.items() if i < len(tokens)}
    return SentencePieceModel(tokens, scores, types, special, bool(normalizer.get(3, 1)))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The (field number, value) pairs of a protobuf message: integers, or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        match key & 7:
            case 0:
                value, at = _varint(data, at)
                yield key >> 3, value
            case 2:
                size, at = _varint(data, at)
                if at + size > len(data):
                    raise ValueError("cut short")
                yield key >> 3, data[at : at + size]
                at += size
            case 5:
                yield key >> 3, data[at : at + 4]
                at += 4
            case 1:
                yield key >> 3, data[at : at + 8]
                at += 8
            case _:
                raise ValueError("unknown wire type")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("varint too long")
