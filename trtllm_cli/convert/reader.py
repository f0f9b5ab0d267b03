"""What convert needs of a source: an HF-style config, and weights that come in blocks of rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trtllm_cli.convert.source_weight import PlainWeight, RenamedWeight, SourceWeight
from trtllm_cli.errors import SnapshotError
from trtllm_cli.quant_config import KvCacheQuantAlgo
from trtllm_cli.tensor_file import TensorInfo

if TYPE_CHECKING:
    import torch


class Reader(Protocol):
    """A snapshot directory or a GGUF file, under Hugging Face's names."""

    path: Path
    config_path: Path  # what error messages about the config name
    config: dict[str, Any]  # as config.json has it
    tensors: dict[str, TensorInfo]  # as they are stored
    quant_method: str | None = None  # what quantized the source; None: it is plain
    kv_cache: KvCacheQuantAlgo | None = None  # how the source says that the KV cache is stored
    kv_scales: Mapping[int, tuple[float, float]] = {}  # of each layer: what a step of the cached k, and v, is worth

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of a stored tensor, [n, width]; of a vector its numbers. See source_weight.py."""

    @property
    def weights(self) -> Mapping[str, tuple[int, ...]]:
        """The weights that the tensors stand for, and the shapes that they have as plain numbers."""
        return {name: info.shape for name, info in self.tensors.items()}

    def weight(self, name: str) -> SourceWeight:
        """One of `weights`."""
        return PlainWeight(self, name)

    def tensors_of(self, name: str) -> tuple[str, ...]:
        """The tensors that a weight is stored in."""
        return (name,)

    def write_tokenizer(self, directory: Path) -> list[str]:
        """Writes the tokenizer's files into `directory`, which exists; their names, none where there is none."""

    def default_dtype(self) -> str:
        """The dtype that "auto" stands for."""

    def close(self) -> None:
        """Closes the files."""


def open_reader(source: Path) -> Reader:
    """The reader for a snapshot directory, a .gguf file or a directory with just one, under its family's names.

    Raises SnapshotError, UnsupportedError.
    """
    from trtllm_cli.convert.families import family_of

    reader = _open_stored(source)
    try:
        renames = family_of(reader.config, reader.config_path).renames
        return RenamedReader(reader, renames) if renames else reader
    except BaseException:
        reader.close()
        raise


def _open_stored(source: Path) -> Reader:
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

        return _unpacking(HfReader(source))
    raise SnapshotError(
        f"{source} is a{'n' if kind == 'engine' else ''} {kind}, not a snapshot",
        where=str(source),
        fix="give the Hugging Face directory or the .gguf file it was made from",
    )


def _unpacking(reader: Reader) -> Reader:
    """The reader itself, or what unpacks the weights of a snapshot that is quantized already."""
    from trtllm_cli.convert.prequantized import find_scheme
    from trtllm_cli.convert.prequantized.mxfp4 import Mxfp4Reader, is_mxfp4
    from trtllm_cli.convert.prequantized.reader import QuantizedReader

    try:
        found = find_scheme(reader.path, reader.config)
        if found:
            return QuantizedReader(reader, *found)
        return Mxfp4Reader(reader) if is_mxfp4(reader.config) else reader
    except BaseException:
        reader.close()
        raise


class RenamedReader(Reader):
    """A reader under other names: those that a family's table has, where its publishers write several."""

    def __init__(self, reader: Reader, renames: Sequence[tuple[str, str]]) -> None:
        self._reader = reader
        self.path, self.config_path, self.config = reader.path, reader.config_path, reader.config
        self.quant_method, self.kv_cache, self.kv_scales = reader.quant_method, reader.kv_cache, reader.kv_scales
        self._renames = renames
        self._names = {_rename(name, renames): name for name in reader.tensors}
        self._weights = {_rename(name, renames): name for name in reader.weights}
        self.tensors = {name: reader.tensors[theirs] for name, theirs in self._names.items()}
        if len(self._names) != len(reader.tensors):
            raise SnapshotError("two tensors stand for the same one", where=str(reader.path))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See Reader."""
        return self._reader.rows(self._names[name], start, stop)

    @property
    def weights(self) -> Mapping[str, tuple[int, ...]]:
        """See Reader."""
        shapes = self._reader.weights
        return {name: shapes[theirs] for name, theirs in self._weights.items()}

    def weight(self, name: str) -> SourceWeight:
        """See Reader."""
        return RenamedWeight(self._reader.weight(self._weights[name]), name)

    def tensors_of(self, name: str) -> tuple[str, ...]:
        """See Reader."""
        return tuple(_rename(n, self._renames) for n in self._reader.tensors_of(self._weights[name]))

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
