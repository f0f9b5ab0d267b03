"""GGUF files, read by offset: metadata, and each tensor dequantized in blocks of rows.

The `gguf` package's own reader maps the file and makes an array object of every string in the vocabulary; this one
reads only what it is asked for, and checks each size in the header before it believes it. The dequantizers are the
package's. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from trtllm_cli.errors import SnapshotError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    import torch

BLOCK_ELEMENTS = 1 << 22  # of a tensor, dequantized at once: 16 MiB of float32
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_DIMS = 4


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies, its shape in torch's order (the file has it reversed), and how it is quantized."""

    shape: tuple[int, ...]
    kind: int  # gguf.GGMLQuantizationType
    offset: int
    row_bytes: int

    @property
    def rows(self) -> int:
        """The product of all dimensions but the last."""
        return math.prod(self.shape[:-1])


class GgufFile:
    """A GGUF file open for reading. Raises SnapshotError when anything about its header is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
        except OSError as e:
            raise SnapshotError(f"{path.name} cannot be read: {e.strerror}", where=str(path)) from None
        self._size = os.fstat(self._file.fileno()).st_size
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            self._read_header(self._file)
        except BaseException as e:
            self._file.close()
            if isinstance(e, struct.error | ValueError | OverflowError | MemoryError | RecursionError):
                raise self._damaged(str(e)) from None
            raise

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop, float32 unless the tensor is stored as float16; of a vector its numbers."""
        import torch

        tensor = self.tensors[name]
        if len(tensor.shape) < 2:
            return self._rows(name, tensor, 0, 1).flatten()[start:stop]
        step = max(1, BLOCK_ELEMENTS // tensor.shape[-1])
        blocks = [self._rows(name, tensor, i, min(stop, i + step)) for i in range(start, stop, step)]
        return torch.cat(blocks) if len(blocks) != 1 else blocks[0]

    def parts(self, name: str, start: int, stop: int) -> dict[str, torch.Tensor]:
        """Rows start..stop of a tensor whose kind is one of gguf_blocks.LAYERS, as our groups."""
        from gguf import GGMLQuantizationType

        from trtllm_cli.convert.gguf_blocks import unpack

        tensor = self.tensors[name]
        raw = self._pread(tensor.offset + start * tensor.row_bytes, (stop - start) * tensor.row_bytes, name)
        return unpack(raw, stop - start, GGMLQuantizationType(tensor.kind))

    def _rows(self, name: str, tensor: GgufTensor, start: int, stop: int) -> torch.Tensor:
        import torch

        raw = self._pread(tensor.offset + start * tensor.row_bytes, (stop - start) * tensor.row_bytes, name)
        return torch.from_numpy(_dequantize(raw, stop - start, tensor.kind)).reshape(stop - start, tensor.shape[-1])

    def _pread(self, position: int, size: int, name: str) -> bytearray:
        out = bytearray(size)
        view = memoryview(out)
        while view:
            n = os.preadv(self._file.fileno(), [view], position)
            if n == 0:
                raise self._damaged(f"tensor `{name}` is cut short")
            view, position = view[n:], position + n
        return out

    def _damaged(self, why: str) -> SnapshotError:
        return SnapshotError(
            f"{self.path.name} is damaged or no GGUF file: {why}", where=str(self.path), fix="fetch the file again"
        )

    def _read_header(self, f: BinaryIO) -> None:
        if f.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        (version,) = struct.unpack("<I", f.read(4))
        if version not in (2, 3):
            raise UnsupportedError(
                f"GGUF version {version} is not supported", where=str(self.path), fix="versions 2 and 3 are"
            )
        tensor_count, field_count = struct.unpack("<QQ", f.read(16))
        self._check_count(tensor_count, 24)
        self._check_count(field_count, 12)
        for _ in range(field_count):
            key = self._string(f)
            if key in self.metadata:
                raise ValueError(f"the field `{key}` is there twice")
            (kind,) = struct.unpack("<I", f.read(4))
            self.metadata[key] = self._value(f, kind)
        entries = [self._tensor_entry(f) for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError("general.alignment is no power of two")
        start = -(-f.tell() // alignment) * alignment
        for name, shape, kind, offset in entries:
            self._add(name, shape, kind, start + offset)

    def _check_count(self, count: int, least_bytes: int) -> None:
        """A count may not promise more than the file has bytes for."""
        if count * least_bytes > self._size:
            raise ValueError(f"its header promises {count} entries, more than it can hold (truncated?)")

    def _string(self, f: BinaryIO) -> str:
        (length,) = struct.unpack("<Q", f.read(8))
        self._check_count(length, 1)
        data = f.read(length)
        if len(data) != length:
            raise ValueError("its header is cut short")
        return data.decode("utf-8")

    def _value(self, f: BinaryIO, kind: int) -> Any:
        if kind == _STRING:
            return self._string(f)
        if kind == _ARRAY:
            item, count = struct.unpack("<IQ", f.read(12))
            if item == _STRING:
                self._check_count(count, 8)
                return [self._string(f) for _ in range(count)]
            code = _scalar(item)
            self._check_count(count, struct.calcsize(code))
            return list(struct.unpack(f"<{count}{code}", f.read(count * struct.calcsize(code))))
        code = _scalar(kind)
        return struct.unpack(f"<{code}", f.read(struct.calcsize(code)))[0]

    def _tensor_entry(self, f: BinaryIO) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string(f)
        (dims,) = struct.unpack("<I", f.read(4))
        if not 1 <= dims <= _MAX_DIMS:
            raise ValueError(f"tensor `{name}` has {dims} dimensions")
        shape = struct.unpack(f"<{dims}Q", f.read(8 * dims))
        kind, offset = struct.unpack("<IQ", f.read(12))
        return name, tuple(reversed(shape)), kind, offset

    def _add(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> None:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if name in self.tensors:
            raise ValueError(f"tensor `{name}` is there twice")
        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise UnsupportedError(
                f"tensor `{name}` has the unknown type {kind}", where=str(self.path), fix="update the gguf package"
            ) from None
        if not all(shape) or shape[-1] % block:
            raise ValueError(f"tensor `{name}` of shape {list(shape)} is empty or not in whole blocks of {block}")
        row_bytes = shape[-1] // block * block_bytes
        if offset + math.prod(shape[:-1]) * row_bytes > self._size:
            raise ValueError(f"tensor `{name}` ends past the end of the file (truncated?)")
        self.tensors[name] = GgufTensor(shape, kind, offset, row_bytes)


def _scalar(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a metadata field has the unknown type {kind}")
    return _SCALARS[kind]


def _dequantize(raw: bytearray, rows: int, kind: int) -> np.ndarray[Any, Any]:
    """`raw` as float16 if it is that, else as float32, [rows, ...]."""
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize

    quantization = GGMLQuantizationType(kind)
    if quantization == GGMLQuantizationType.F16:
        return np.frombuffer(raw, dtype=np.float16)
    if quantization == GGMLQuantizationType.F32:
        return np.frombuffer(raw, dtype=np.float32)
    try:
        with np.errstate(all="ignore"):  # what comes of damaged bytes is checked later, by whoever uses it
            return dequantize(np.frombuffer(raw, dtype=np.uint8).reshape(rows, -1), quantization)
    except NotImplementedError:
        raise UnsupportedError(f"GGUF's {quantization.name} cannot be dequantized") from None
