"""The rank files of a plan: stage by stage, several weights side by side, going on where an interrupted run stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from trtllm_cli.convert.follow import Follower
from trtllm_cli.convert.jobs import run_job
from trtllm_cli.tensor_file import TensorFileWriter, total_bytes

if TYPE_CHECKING:
    from trtllm_cli.convert.decide import Decided
    from trtllm_cli.convert.plan import Job, Stage
    from trtllm_cli.convert.reader import Reader
    from trtllm_cli.convert.resume import State
    from trtllm_cli.mapping import Rank

# Called with the weight just written, bytes written so far, and bytes in all.
Progress = Callable[[str, int, int], None]


def write_ranks(
    reader: Reader,
    decided: Decided,
    stages: Sequence[Stage],
    state: State,
    workers: int,
    progress: Progress | None,
) -> dict[str, str]:
    """Writes what `state` does not have yet, and says so to it; the SHA-256 of each file.

    `workers` weights are worked on at once. Raises SnapshotError, UnsupportedError for numbers.
    """
    total = sum(stage_bytes(stage) for stage in stages)
    done = 0
    for stage in stages:
        names = {rank: file_name(rank) for rank in stage.ranks}
        if all(name in state.ranks for name in names.values()):
            done += stage_bytes(stage)
            continue
        with ExitStack() as stack:
            writers = {
                rank: stack.enter_context(
                    TensorFileWriter(
                        state.directory / name, stage.tensors(rank), {}, written=_written(stage, rank, state)
                    )
                )
                for rank, name in names.items()
            }
            follower = stack.enter_context(Follower(list(writers.values())))
            todo = [job for job in stage.jobs if job.name not in state.weights]
            done += stage_bytes(stage) - sum(job.nbytes for job in todo)
            for job in _run(todo, reader, decided, writers, workers):
                done += job.nbytes
                follower.wake()
                state.add(job.name, writers.values())
                if progress is not None:
                    progress(job.name, done, total)
            digests = follower.digests()
        state.finish(dict(zip(names.values(), digests, strict=True)))
    return state.ranks


def file_name(rank: Rank) -> str:
    """The rank's file in the checkpoint."""
    return f"rank{rank.rank}.safetensors"


def stage_bytes(stage: Stage) -> int:
    """Bytes of all tensors of a stage's ranks."""
    return sum(total_bytes(stage.tensors(rank).values()) for rank in stage.ranks)


def _written(stage: Stage, rank: Rank, state: State) -> set[str]:
    return {name for job in stage.jobs if job.name in state.weights for name in job.parts[rank]}


@dataclass
class _Halt:
    """From which job on, in the model's order, nothing more is to be done."""

    first: float = math.inf

    def stops(self, index: int) -> bool:
        return index >= self.first


def _run(
    jobs: Sequence[Job], reader: Reader, decided: Decided, writers: Mapping[Rank, TensorFileWriter], workers: int
) -> Iterator[Job]:
    """Runs the jobs, each in one of `workers` threads; those that are done, as they are.

    One that fails ends all after it, and the first error in the model's order is raised, as with one worker.
    """
    halt = _Halt()
    with ThreadPoolExecutor(workers, thread_name_prefix="trtllm-convert") as pool:
        futures: dict[Future[None], int] = {}
        try:
            for i, job in enumerate(jobs):
                stops = partial(halt.stops, i)
                futures[pool.submit(run_job, job, reader, decided.config, decided.quantized, writers, stops)] = i
            for future in as_completed(futures):
                if future.exception() is not None:
                    halt.first = min(halt.first, futures[future])
                elif halt.first == math.inf:
                    yield jobs[futures[future]]
        finally:
            halt.first = -1
            pool.shutdown(wait=True, cancel_futures=True)
    for future in futures:
        if (error := future.exception()) is not None:
            raise error
