"""What convert needs of a source: an HF-style config, and tensors that come one at a time, in pieces."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trtllm_cli.errors import SnapshotError
from trtllm_cli.tensor_file import TensorInfo

if TYPE_CHECKING:
    import torch


class Reader(Protocol):
    """A snapshot directory or a GGUF file, under Hugging Face's names."""

    path: Path
    config_path: Path  # what error messages about the config name
    config: dict[str, Any]  # as config.json has it
    tensors: dict[str, TensorInfo]

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor as blocks of its rows, in order; a small or plainly stored one is a single block."""

    def write_tokenizer(self, directory: Path) -> list[str]:
        """Writes the tokenizer's files into `directory`, which exists; their names, none where there is none."""

    def default_dtype(self) -> str:
        """The dtype that "auto" stands for."""

    def close(self) -> None:
        """Closes the files."""


def open_reader(source: Path) -> Reader:
    """The reader for a snapshot directory, a .gguf file or a directory with just one. Raises SnapshotError."""
    from trtllm_cli.artifact import detect
    from trtllm_cli.errors import ArtifactError

    if source.is_dir() and not (source / "config.json").is_file() and len(ggufs := list(source.glob("*.gguf"))) == 1:
        source = ggufs[0]
    try:
        kind = detect(source)
    except ArtifactError as e:
        raise SnapshotError(e.message, where=e.where, fix=e.fix) from None
    if kind == "gguf":
        from trtllm_cli.convert.gguf_reader import GgufReader

        return GgufReader(source)
    if kind == "snapshot":
        from trtllm_cli.convert.hf_reader import HfReader

        return HfReader(source)
    raise SnapshotError(
        f"{source} is a{'n' if kind == 'engine' else ''} {kind}, not a snapshot",
        where=str(source),
        fix="give the Hugging Face directory or the .gguf file it was made from",
    )


class RenamedReader:
    """A reader under other names: those that a family's table has, where its publishers write several."""

    def __init__(self, reader: Reader, renames: Sequence[tuple[str, str]]) -> None:
        self._reader = reader
        self.path, self.config_path, self.config = reader.path, reader.config_path, reader.config
        self._names = {_rename(name, renames): name for name in reader.tensors}
        self.tensors = {name: reader.tensors[theirs] for name, theirs in self._names.items()}
        if len(self._names) != len(reader.tensors):
            raise SnapshotError("two tensors stand for the same one", where=str(reader.path))

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """See Reader."""
        return self._reader.blocks(self._names[name])

    def write_tokenizer(self, directory: Path) -> list[str]:
        """See Reader."""
        return self._reader.write_tokenizer(directory)

    def default_dtype(self) -> str:
        """See Reader."""
        return self._reader.default_dtype()

    def close(self) -> None:
        """See Reader."""
        self._reader.close()


def _rename(name: str, renames: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name
