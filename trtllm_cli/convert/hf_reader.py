"""Hugging Face snapshots: config.json, and weights in safetensors or .bin files, whole or sharded by an index."""

from __future__ import annotations

import io
import math
import pickle
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trtllm_cli.artifact import read_json
from trtllm_cli.convert.reader import Reader
from trtllm_cli.convert.tokenizer_files import copy_tokenizer
from trtllm_cli.errors import SnapshotError, UnsupportedError
from trtllm_cli.tensor_file import ITEMSIZE, TensorFile, TensorInfo

if TYPE_CHECKING:
    import torch

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_DTYPES = ("float32", "float16", "bfloat16")


class _WeightFile(Protocol):
    tensors: dict[str, TensorInfo]

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor: ...

    def close(self) -> None: ...


class HfReader(Reader):
    """A snapshot directory. Opening it checks that every weight file is there and whole, and reads no weights."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_path = path / "config.json"
        self.config = read_json(self.config_path, SnapshotError)
        self._files: dict[str, _WeightFile] = {}
        self._file_of: dict[str, str] = {}
        try:
            self._open_weights()
        except BaseException:
            self.close()
            raise
        self.tensors = {name: self._files[file].tensors[name] for name, file in self._file_of.items()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See Reader."""
        return self._files[self._file_of[name]].rows(name, start, stop)

    def write_tokenizer(self, directory: Path) -> list[str]:
        """Copies the snapshot's tokenizer and generation settings."""
        return copy_tokenizer(self.path, directory, self.config)

    def default_dtype(self) -> str:
        """The config's dtype (`torch_dtype` of old), or else the dtype that most of the weights have."""
        dtypes = [info.dtype for info in self.tensors.values()]
        return named_dtype(self.config, self.config_path) or max(set(dtypes), key=dtypes.count)

    def close(self) -> None:
        """Closes the weight files."""
        for file in self._files.values():
            file.close()

    def _open_weights(self) -> None:
        for single in _SINGLE:
            index = self.path / f"{single}.index.json"
            if index.is_file():
                self._open_sharded(index)
                return
            if (self.path / single).is_file():
                self._open_file(single)
                self._file_of = dict.fromkeys(self._files[single].tensors, single)
                return
        raise SnapshotError(
            f"no weights in {self.path}: none of {', '.join(_SINGLE)}, nor an index of shards",
            where=str(self.path),
            fix="fetch the snapshot again: trtllm download",
        )

    def _open_sharded(self, index: Path) -> None:
        weight_map = read_json(index, SnapshotError).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise SnapshotError("the index has no weight_map", where=str(index), fix="fetch the file again")
        for name, file in weight_map.items():
            _check_file_name(file, index)
            if file not in self._files:
                self._open_file(file)
            if name not in self._files[file].tensors:
                raise SnapshotError(
                    f"tensor `{name}` is not in {file}, where the index says it is",
                    where=str(index),
                    fix="fetch the snapshot again",
                )
            self._file_of[name] = file
        for file, opened in self._files.items():
            if strays := [name for name in opened.tensors if self._file_of.get(name) != file]:
                raise SnapshotError(
                    f"{file} holds `{strays[0]}`, which the index does not place there", where=str(index)
                )

    def _open_file(self, name: str) -> None:
        path = self.path / name
        kind = _SafetensorsFile if path.suffix == ".safetensors" else _BinFile
        self._files[name] = kind(path)


def named_dtype(config: dict[str, Any], path: Path) -> str | None:
    """The dtype that a config names, if any. Raises UnsupportedError for one that a checkpoint cannot have."""
    named = config.get("dtype") or config.get("torch_dtype")
    if named is None:
        return None
    if not isinstance(named, str) or (dtype := named.removeprefix("torch.")) not in _DTYPES:
        raise UnsupportedError(f"the snapshot's dtype is {named!r}", where=str(path), fix="pass --dtype bfloat16")
    return dtype


def _check_file_name(file: Any, index: Path) -> None:
    if not isinstance(file, str) or file != Path(file).name or not file.endswith((".safetensors", ".bin")):
        raise SnapshotError(
            f"the index names the file {file!r}: it must be the plain name of a .safetensors or .bin file",
            where=str(index),
            fix="do not use this snapshot, or fetch it from its publisher again",
        )


class _SafetensorsFile:
    """Read by offset: no more memory than the rows, and none of it address space of a mapped file."""

    def __init__(self, path: Path) -> None:
        self._file = TensorFile(path, SnapshotError)
        self.tensors = self._file.tensors

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        import torch

        info = self.tensors[name]
        dtype, width = getattr(torch, info.dtype), info.shape[-1:] if len(info.shape) > 1 else ()
        row_bytes = math.prod(width) * ITEMSIZE[info.dtype]
        out = torch.empty((stop - start, *width), dtype=dtype)
        self._file.read_into(name, start * row_bytes, out.flatten().view(torch.uint8).numpy().data)
        return out

    def close(self) -> None:
        self._file.close()


class _BinFile:
    """A pickle of tensors, read by torch's restricted unpickler, mapped instead of loaded where its format allows."""

    def __init__(self, path: Path) -> None:
        import torch

        self._tensors: dict[str, torch.Tensor] = {}
        try:
            with warnings.catch_warnings(action="ignore"):  # what is wrong is raised, below
                # The format before torch 1.6 is no zip archive, and cannot be mapped.
                if _is_zip(path):
                    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                else:
                    with _WithinFile(path) as f:
                        loaded = torch.load(f, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise SnapshotError(f"{path.name} is missing", where=str(path)) from None
        except pickle.UnpicklingError as e:
            why = str(e).split("\n", 1)[0]
            raise SnapshotError(
                f"{path.name} is no plain table of tensors, and was not loaded: {why}",
                where=str(path),
                fix="use the model's safetensors files; a .bin file that needs more may run code",
            ) from None
        except Exception as e:  # a damaged pickle makes torch's unpickler raise anything at all
            raise SnapshotError(
                f"{path.name} is damaged: {str(e).splitlines()[0] if str(e) else type(e).__name__}",
                where=str(path),
                fix="fetch the file again",
            ) from None
        if not isinstance(loaded, dict) or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in loaded.items()
        ):
            raise SnapshotError(f"{path.name} is no table of named tensors", where=str(path))
        self._tensors = loaded
        self.tensors = {
            name: TensorInfo(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in loaded.items()
        }

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensor = self._tensors[name].detach()
        if tensor.dim() > 2:
            tensor = tensor.flatten(0, -2)
        return tensor.reshape(-1)[start:stop] if tensor.dim() < 2 else tensor[start:stop].contiguous()

    def close(self) -> None:
        self._tensors.clear()


class _WithinFile(io.BufferedReader):
    """A file whose reads are no longer than what is left of it: a damaged length must not become a huge buffer."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.open("rb", buffering=0))
        self._size = path.stat().st_size

    def read(self, size: int | None = -1) -> bytes:
        """At most `size` bytes."""
        left = max(0, self._size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left))


def _is_zip(path: Path) -> bool:
    with path.open("rb") as f:
        return f.read(4) == b"PK\x03\x04"
