"""safetensors files, read and written one tensor at a time.

The `safetensors` package maps a whole file, and writes one only from tensors that are all in memory. A stage here must
stay within the memory of its largest tensor, so this module reads by offset and streams on the way out. The format:
8 bytes little-endian header length, a JSON header, then the tensors' bytes
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trtllm_cli.errors import ArtifactError

MAX_HEADER = 100_000_000  # bytes, the format's own limit
# Bytes. Kernels read whole cache lines of weights: of 64 bytes on a CPU; on a GPU 128 bytes that lie across two of its
# lines take a fifth longer.
ENGINE_ALIGNMENT = 256

# Our dtype names, safetensors' names, and bytes per element.
_DTYPES: tuple[tuple[str, str, int], ...] = (
    ("float64", "F64", 8), ("float32", "F32", 4), ("float16", "F16", 2), ("bfloat16", "BF16", 2),
    ("float8_e4m3fn", "F8_E4M3", 1), ("float8_e5m2", "F8_E5M2", 1),
    ("int64", "I64", 8), ("int32", "I32", 4), ("int16", "I16", 2), ("int8", "I8", 1),
    ("uint64", "U64", 8), ("uint32", "U32", 4), ("uint16", "U16", 2), ("uint8", "U8", 1), ("bool", "BOOL", 1),
)  # fmt: skip
ITEMSIZE = {name: size for name, _, size in _DTYPES}
_TO_FILE = {name: code for name, code, _ in _DTYPES}
_FROM_FILE = {code: name for name, code, _ in _DTYPES}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's dtype (torch's name for it, such as "bfloat16") and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


class TensorFile:
    """A safetensors file open for reading; every header field is checked before it is used.

    Raises `error` (an ArtifactError) with the file's name when anything about it is wrong.
    """

    def __init__(self, path: Path, error: type[ArtifactError] = ArtifactError) -> None:
        self.path = path
        self._error = error
        try:
            self._file = path.open("rb", buffering=0)
        except FileNotFoundError:
            raise error(f"{path.name} is missing", where=str(path)) from None
        except OSError as e:
            raise error(f"{path.name} cannot be read: {e.strerror}", where=str(path)) from None
        self._map: mmap.mmap | None = None
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file. Views from `view` stay valid as long as they are referenced."""
        self._file.close()

    def _damaged(self, why: str) -> ArtifactError:
        return self._error(f"{self.path.name} is damaged: {why}", where=str(self.path), fix=self._error.remake)

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        head = self._file.read(8)
        if len(head) < 8:
            raise self._damaged(f"it has {size} bytes, too few for a safetensors file")
        length = int.from_bytes(head, "little")
        if length > MAX_HEADER or 8 + length > size:
            raise self._damaged(f"its header says {length} bytes, the file has {size} (truncated?)")
        try:
            header = json.loads(self._file.read(length))
        except (ValueError, RecursionError) as e:
            raise self._damaged(f"its header is not valid JSON ({e})") from None
        if not isinstance(header, dict):
            raise self._damaged("its header is not a JSON object")
        metadata = header.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._damaged("its metadata is not a map of strings")
        self.metadata: dict[str, str] = metadata
        self.tensors: dict[str, TensorInfo] = {}
        self._offsets: dict[str, int] = {}
        self._data_size = size - 8 - length
        self._data_start = 8 + length
        for name, entry in header.items():
            self._add(name, entry)
        self._check_layout()

    def _add(self, name: str, entry: Any) -> None:
        try:
            dtype, shape, (start, end) = _FROM_FILE[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise self._damaged(f"the header's entry of tensor `{name}` is malformed") from None
        numbers = (*shape, start, end)
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
            raise self._damaged(f"tensor `{name}` has a negative or non-integer size")
        info = TensorInfo(dtype, shape)
        if end - start != info.nbytes:
            raise self._damaged(f"tensor `{name}` is {list(shape)} {dtype}, but takes {end - start} bytes")
        if end > self._data_size:
            raise self._damaged(f"tensor `{name}` ends at byte {end} of {self._data_size} (truncated?)")
        self.tensors[name] = info
        self._offsets[name] = start

    def _check_layout(self) -> None:
        """No two tensors may share bytes."""
        position, last = 0, ""
        for name in sorted(self.tensors, key=lambda n: (self._offsets[n], self.tensors[n].nbytes)):
            if self._offsets[name] < position:
                raise self._damaged(f"tensors `{last}` and `{name}` overlap")
            position, last = self._offsets[name] + self.tensors[name].nbytes, name

    def header_bytes(self) -> bytes:
        """Everything before the first tensor, as it is in the file."""
        return os.pread(self._file.fileno(), self._data_start, 0)

    @property
    def data_bytes(self) -> int:
        """From the first tensor's beginning to the end of the last."""
        return max((self._offsets[name] + info.nbytes for name, info in self.tensors.items()), default=0)

    def offset(self, name: str) -> int:
        """Where a tensor begins, from the first one on."""
        return self._offsets[name]

    def read(self, name: str) -> bytearray:
        """The tensor's bytes, row-major, copied."""
        out = bytearray(self.tensors[name].nbytes)
        self.read_into(name, 0, memoryview(out))
        return out

    def read_into(self, name: str, offset: int, out: memoryview) -> None:
        """Fills `out` with the tensor's bytes, from byte `offset` of it."""
        assert offset + len(out) <= self.tensors[name].nbytes, f"{name}: read past its end"
        self._fill(out, self._offsets[name] + offset, f"tensor `{name}`")

    def read_data(self, offset: int, out: memoryview) -> None:
        """Fills `out` with the tensors' bytes as they lie in the file, from byte `offset` behind the header."""
        self._fill(out, offset, "it")

    def _fill(self, out: memoryview, offset: int, what: str) -> None:
        view, position = out, self._data_start + offset
        while view:
            n = os.preadv(self._file.fileno(), [view], position)
            if n == 0:
                raise self._damaged(f"{what} is cut short")
            view, position = view[n:], position + n

    def view(self, name: str) -> memoryview:
        """The tensor's bytes in the mapped file: no copy, read-only, paged in when touched."""
        if self._map is None:
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        start = self._data_start + self._offsets[name]
        return memoryview(self._map)[start : start + self.tensors[name].nbytes]


class TensorFileWriter:
    """Writes a safetensors file whose tensors are all announced first and then given, whole or in pieces, in any order.

    With `alignment`, each tensor starts at a multiple of that many bytes: padding is declared as a `uint8` tensor named
    `__pad.N` where it is needed, since the format has no holes. `written` are tensors that an earlier writer of the
    same file has finished: it is opened again, and must have the same header. Threads may write, each its own tensors.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, str],
        *,
        alignment: int = 8,
        written: Collection[str] = (),
    ) -> None:
        self.path = path
        self.tensors = dict(tensors)
        self._names = list(tensors)
        # bytes not written yet
        self._pending = {name: 0 if name in written else info.nbytes for name, info in tensors.items()}
        self._begun = dict.fromkeys(tensors, 0)  # bytes from each one's beginning on that are there
        self._unfinished = 0  # the first tensor that is not known to be complete
        self._offsets: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        position = 0
        for name, info in self.tensors.items():
            if gap := -position % alignment if alignment > 8 else 0:
                pad = f"__pad.{len(header)}"
                header[pad] = {"dtype": "U8", "shape": [gap], "data_offsets": [position, position + gap]}
                position += gap
            end = position + info.nbytes
            header[name] = {"dtype": _TO_FILE[info.dtype], "shape": list(info.shape), "data_offsets": [position, end]}
            self._offsets[name], position = position, end
        blob = json.dumps(header, separators=(",", ":")).encode()
        blob += b" " * (-(8 + len(blob)) % alignment)
        self._data_start = 8 + len(blob)
        self.size = self._data_start + position  # of the file
        start = len(blob).to_bytes(8, "little") + blob
        if written:
            self._file = _reopen(path, start, self.size)
        else:
            self._file = path.open("w+b", buffering=0)
            self._file.write(start)
            self._file.truncate(self.size)

    def write(self, name: str, data: bytes | bytearray | memoryview) -> None:
        """Writes one announced tensor's bytes. Each is written exactly once."""
        view = memoryview(data).cast("B")
        info = self.tensors[name]
        assert len(view) == info.nbytes, f"{name}: {len(view)} bytes given, {info.nbytes} announced"
        self.write_at(name, 0, view)

    def write_at(self, name: str, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Writes a piece of a tensor, from byte `offset` of it. Pieces do not overlap."""
        view = memoryview(data).cast("B")
        size = len(view)
        self._check(name, offset, size)
        position = self._data_start + self._offsets[name] + offset
        while view:
            n = os.pwrite(self._file.fileno(), view, position)
            view, position = view[n:], position + n
        self._count(name, offset, size)

    def leave_zeros(self, name: str, offset: int, size: int) -> None:
        """Counts a piece as written that stays zeros, as the file is made."""
        self._check(name, offset, size)
        self._count(name, offset, size)

    def _count(self, name: str, offset: int, size: int) -> None:
        if offset == self._begun[name]:
            self._begun[name] += size
        self._pending[name] -= size

    def _check(self, name: str, offset: int, size: int) -> None:
        assert size <= self._pending[name], f"{name}: more bytes given than announced"
        assert offset + size <= self.tensors[name].nbytes, f"{name}: written past its end"

    def finished_bytes(self) -> int:
        """How much of the file's beginning is as it will be, as far as known. For one thread."""
        while self._unfinished < len(self._names):
            name = self._names[self._unfinished]
            begun = self._begun[name]  # before asking for what is pending: a thread may write the last piece now
            if self._pending[name]:
                return self._data_start + self._offsets[name] + begun
            self._unfinished += 1
        return self.size

    def read_back(self, position: int, out: memoryview) -> int:
        """Fills `out` with the file's bytes as they are now, from `position` of the file; how many there were."""
        return os.preadv(self._file.fileno(), [out], position)

    def begin_flush(self, start: int, stop: int) -> None:
        """Has the system write bytes start..stop of the file to the disk now, and does not wait for it.

        What is on the disk already may leave memory: that is how the advice is meant.
        """
        os.posix_fadvise(self._file.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)

    def flush(self) -> None:
        """What was written so far is on the disk afterwards."""
        os.fdatasync(self._file.fileno())

    def close(self) -> None:
        """Flushes to disk and closes. Every announced tensor must have been written."""
        missing = [name for name, left in self._pending.items() if left]
        if not missing:
            os.fsync(self._file.fileno())
        self._file.close()
        assert not missing, f"never written: {missing[:5]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def _reopen(path: Path, start: bytes, size: int) -> FileIO:
    """A file that an interrupted run left, to go on with. Raises ArtifactError if it does not begin with `start`."""
    try:
        file = path.open("r+b", buffering=0)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is gone", fix="start over: pass --no-resume") from None
    if os.fstat(file.fileno()).st_size != size or file.read(len(start)) != start:
        file.close()
        raise ArtifactError(f"{path} is not what the interrupted run wrote", fix="start over: pass --no-resume")
    return file


def is_padding(name: str) -> bool:
    """Whether a tensor of this name is only the writer's padding."""
    return name.startswith("__pad.")


def total_bytes(tensors: Iterable[TensorInfo]) -> int:
    """Bytes of all the tensors together."""
    return sum(t.nbytes for t in tensors)
