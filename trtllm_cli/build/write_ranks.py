"""The rank files of an engine: each rank's weights packed and written one at a time, several ranks side by side."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trtllm_cli.artifact import os_errors, tree_sha256
from trtllm_cli.build.lowered import Lowered
from trtllm_cli.engine import RankFile, program_digest
from trtllm_cli.graph import Graph
from trtllm_cli.machine import available_cores, torch_threads
from trtllm_cli.models.tensors import read_weight
from trtllm_cli.tensor_file import ENGINE_ALIGNMENT, TensorFile, TensorFileWriter, total_bytes

if TYPE_CHECKING:
    import torch

    from trtllm_cli.checkpoint import Checkpoint
    from trtllm_cli.mapping import Rank


class Progress(Protocol):
    """Told how far the packing of weights is, all ranks together; from their threads, one call at a time."""

    def __call__(self, done: int, total: int) -> None:
        """`done` bytes of `total`."""


def write_ranks(
    checkpoint: Checkpoint,
    ranks: Sequence[tuple[Rank, Graph, Lowered]],
    directory: Path,
    workers: int,
    progress: Progress | None,
) -> list[RankFile]:
    """Every rank's file in `directory`, `workers` of them at once; the same bytes for any number.

    The first error, or an interrupt, ends them all.
    """
    import torch

    shared = _Shared(progress, sum(total_bytes(lowered.tensors.values()) for _, _, lowered in ranks))
    workers = min(workers, len(ranks))
    futures: list[Future[RankFile]] = []
    # Torch's threads are divided among the workers: more of them than cores only wait for each other.
    threads = max(1, torch.get_num_threads() // workers)
    hashers = max(1, available_cores() // workers)
    with torch_threads(threads), ThreadPoolExecutor(workers, thread_name_prefix="trtllm-build") as pool:
        try:
            for rank, graph, lowered in ranks:
                path = directory / f"rank{rank.rank}.engine"
                futures.append(pool.submit(_write_rank, checkpoint, rank, graph, lowered, path, hashers, shared))
            shared.begun.set()
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            shared.halted.set()
            shared.begun.set()
            pool.shutdown(wait=True, cancel_futures=True)
    errors = [e for future in futures if not future.cancelled() and (e := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, _HaltedError):
            raise error
    return [future.result() for future in futures]


class _HaltedError(Exception):
    """A rank is not finished because another one failed, or the user interrupted."""


class _Shared:
    """What the ranks' threads have in common: how far they are together, and whether to go on."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self._lock = threading.Lock()
        self.halted = threading.Event()
        # An interrupt while the pool starts a thread leaves one that it does not wait for: none writes before.
        self.begun = threading.Event()

    def add(self, nbytes: int) -> None:
        """Another `nbytes` are written."""
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(self._done, self._total)


def _write_rank(
    checkpoint: Checkpoint, rank: Rank, graph: Graph, lowered: Lowered, path: Path, hashers: int, shared: _Shared
) -> RankFile:
    """A rank's file, in a thread of its own; its digest in `hashers` more."""
    shared.begun.wait()
    if shared.halted.is_set():
        raise _HaltedError
    try:
        _pack(checkpoint, rank, graph, lowered, path, shared)
        return _rank_file(path, hashers, shared)
    except BaseException:
        shared.halted.set()  # here, before this thread goes on to the next rank
        raise


def _pack(checkpoint: Checkpoint, rank: Rank, graph: Graph, lowered: Lowered, path: Path, shared: _Shared) -> None:
    """Packs and writes a rank's weights. Raises _HaltedError once another rank has failed."""
    metadata = {"plan": json.dumps(lowered.plan), "graph": json.dumps(graph.to_json())}
    with (
        os_errors(path),
        checkpoint.tensors(rank) as source,
        TensorFileWriter(path, lowered.tensors, metadata, alignment=ENGINE_ALIGNMENT) as out,
    ):

        def read(name: str) -> torch.Tensor:
            return read_weight(source, graph.weights[name])

        for packing in lowered.packings:
            if shared.halted.is_set():
                raise _HaltedError
            nbytes = 0
            for name, tensor in packing.make(read).items():
                info = packing.tensors[name]
                assert tuple(tensor.shape) == info.shape, f"{name}: {tuple(tensor.shape)}, announced {info.shape}"
                out.write(name, memoryview(_bytes(tensor)))
                nbytes += info.nbytes
            shared.add(nbytes)


def _rank_file(path: Path, threads: int, shared: _Shared) -> RankFile:
    """What config.json records of a rank's file. Raises _HaltedError once another rank has failed."""
    with TensorFile(path) as file:
        program = program_digest(file)
    tree = tree_sha256(path, threads, shared.halted.is_set)
    if tree is None:
        raise _HaltedError
    return RankFile(name=path.name, size=path.stat().st_size, tree_sha256=tree, program_sha256=program)


def _bytes(tensor: torch.Tensor) -> Any:
    """The tensor's memory as something that memoryview takes."""
    import torch

    return tensor.contiguous().flatten().view(torch.uint8).numpy()
