"""An engine's weights to the device: the file is read in pieces by several threads into pinned memory, and copied from
there while the next pieces are read.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from trtllm_cli.machine import available_cores

if TYPE_CHECKING:
    import torch

    from trtllm_cli.run.backends.cuda_device import Device
    from trtllm_cli.tensor_file import TensorFile

_PIECE = 32 << 20  # bytes
_PIECES = 6  # in host memory
_MOST_THREADS = 8


class DeviceWeights:
    """All tensors of a rank file, in device memory as they lie in the file."""

    def __init__(self, device: Device, file: TensorFile, progress: Callable[[], None] = lambda: None) -> None:
        """`progress` is called after each piece of the file."""
        self._file = file
        self._data = device.empty(file.data_bytes, "the weights")
        with device.active():
            _copy(device, file, self._data, progress)

    def address(self, name: str) -> int:
        """Where a tensor's bytes begin."""
        return self._data.data_ptr() + self._file.offset(name)

    def bytes_at(self, name: str) -> torch.Tensor:
        """uint8: from the tensor's first byte to the end of all."""
        return self._data[self._file.offset(name) :]


def _copy(device: Device, file: TensorFile, out: torch.Tensor, progress: Callable[[], None]) -> None:
    """All tensors' bytes to `out`."""
    size = len(out)
    ranges = [(begin, min(begin + _PIECE, size)) for begin in range(0, size, _PIECE)]
    count = min(_PIECES, len(ranges))
    pieces = [device.host(min(_PIECE, size)) for _ in range(count)]
    views = [piece.numpy().data for piece in pieces]
    copied: list[Callable[[], None]] = [lambda: None] * count  # waits until the piece is free again

    def read(i: int) -> None:
        copied[i % count]()
        begin, end = ranges[i]
        file.read_data(begin, views[i % count][: end - begin])

    with ThreadPoolExecutor(max(1, min(_MOST_THREADS, available_cores(), count))) as pool:
        reads = {i: pool.submit(read, i) for i in range(count)}
        for i, (begin, end) in enumerate(ranges):
            reads.pop(i).result()
            out[begin:end].copy_(pieces[i % count][: end - begin], non_blocking=True)
            copied[i % count] = device.record()
            progress()
            if i + count < len(ranges):
                reads[i + count] = pool.submit(read, i + count)
    for wait in copied:
        wait()
