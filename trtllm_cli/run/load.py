"""Loading one rank's part of an engine, and what ranks other than 0 do with it until rank 0 is done."""

from __future__ import annotations

import gc
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread
from typing import TYPE_CHECKING, NoReturn

from trtllm_cli.errors import UsageError, describe_error
from trtllm_cli.machine import default_threads
from trtllm_cli.run import kv_budget
from trtllm_cli.run.backends import GpuRunner, load_runner
from trtllm_cli.run.gpu_memory import GpuNeeds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from trtllm_cli.engine import BuildConfig, Engine
    from trtllm_cli.mapping import Rank
    from trtllm_cli.run.backends import Runner
    from trtllm_cli.run.executor import Executor
    from trtllm_cli.run.gpu_memory import GpuMemory
    from trtllm_cli.run.scheduler import Policy
    from trtllm_cli.run.world import World

_FRACTION, _MAX_GPU_MEMORY = "--kv-cache-free-gpu-memory-fraction", "--max-gpu-memory"


@dataclass(frozen=True)
class LoadOptions:
    """How an engine is run. None: as it was built, or what this machine gives."""

    num_threads: int | None = None  # of a rank
    kv_cache_memory: int | str | None = None  # of a rank: bytes, or text such as "2GiB"
    max_num_blocks: int | None = None
    enable_prefix_cache: bool = True
    enable_chunked_prefill: bool = True
    scheduler_policy: Policy = "max_utilization"
    kv_cache_free_gpu_memory_fraction: float | None = None  # of what is free once all but the KV cache is on the GPU
    max_gpu_memory: int | str | None = None  # for everything that the engine takes on the GPU

    def check(self) -> None:
        """Raises UsageError, naming the flag, for a value out of range."""
        _bytes(self.kv_cache_memory, "--kv-cache-memory")
        _bytes(self.max_gpu_memory, _MAX_GPU_MEMORY)
        for name, value in (("num_threads", self.num_threads), ("max_num_blocks", self.max_num_blocks)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}, it must be at least 1", where="--" + name.replace("_", "-"))
        fraction = self.kv_cache_free_gpu_memory_fraction
        if fraction is not None and not 0 < fraction <= 1:
            raise UsageError(
                f"{fraction:g} is no share of the memory that is free",
                where=_FRACTION,
                fix="give a number above 0, and at most 1, such as 0.9",
            )
        if fraction is not None and self.kv_cache_memory is not None:
            raise UsageError(
                f"--kv-cache-memory and {_FRACTION} both say how large the KV cache is",
                where=_FRACTION,
                fix="leave one of them out",
            )

    def check_for(self, engine: Engine) -> None:
        """Raises UsageError for a flag that is not for the engine's backend."""
        if engine.config.backend == "cpu":
            given = ((_FRACTION, self.kv_cache_free_gpu_memory_fraction), (_MAX_GPU_MEMORY, self.max_gpu_memory))
            for flag, value in given:
                if value is not None:
                    raise UsageError(
                        f"{flag} is for engines that run on a GPU, {engine.path} runs on the CPU",
                        where=flag,
                        fix="leave it out (--kv-cache-memory sets a KV cache's size anywhere), or build an engine with "
                        "--backend cuda",
                    )

    @property
    def kv_cache_bytes(self) -> int | None:
        """kv_cache_memory as a number."""
        return _bytes(self.kv_cache_memory, "--kv-cache-memory")

    @property
    def max_gpu_bytes(self) -> int | None:
        """max_gpu_memory as a number."""
        return _bytes(self.max_gpu_memory, _MAX_GPU_MEMORY)


def _bytes(value: int | str | None, where: str) -> int | None:
    return None if value is None else kv_budget.parse_bytes(value, where)


def load_rank(engine: Engine, world: World, limits: BuildConfig, options: LoadOptions) -> tuple[Runner, int]:
    """This rank's runner, and the blocks of its KV cache: as many as the rank with the least memory can hold.

    Every rank calls it. `limits` are the engine's, or lower ones.
    """
    options.check_for(engine)
    with world.comm.activity.working("load"):
        rank = world.place(engine)
        if options.max_gpu_bytes is not None:
            _check_cap(engine, rank, options.max_gpu_bytes)
        runner = load_runner(engine, rank, world.comm, num_threads=options.num_threads, local_ranks=world.local_size)
        try:
            own = cache_blocks(runner, limits, options, world.local_size)
            num_blocks = min(map(int, world.comm.exchange(str(own))))
            runner.allocate_kv_cache(num_blocks)
        except BaseException:
            runner.close()
            raise
    return runner, num_blocks


def cache_blocks(runner: Runner, limits: BuildConfig, options: LoadOptions, local_ranks: int = 1) -> int:
    """The blocks that this rank's memory holds: a GPU's, or its share of this machine's among `local_ranks`."""
    if isinstance(runner, GpuRunner):
        return kv_budget.num_gpu_blocks(
            limits,
            runner.bytes_per_block,
            runner.gpu_memory(),
            fraction=options.kv_cache_free_gpu_memory_fraction,
            memory=options.kv_cache_bytes,
            cap=options.max_gpu_bytes,
            max_blocks=options.max_num_blocks,
        )
    available = kv_budget.available_memory()
    return kv_budget.num_blocks(
        limits,
        runner.bytes_per_block,
        memory=options.kv_cache_bytes,
        max_blocks=options.max_num_blocks,
        available=None if available is None else available // local_ranks,
    )


def gpu_memory(runner: Runner) -> GpuMemory | None:
    """Where the memory of the runner's GPU goes; None of one that has none."""
    return runner.gpu_memory() if isinstance(runner, GpuRunner) else None


def gpu_notes(runner: Runner) -> list[str]:
    """What users are to know of the runner on its GPU."""
    return runner.notes if isinstance(runner, GpuRunner) else []


def _check_cap(engine: Engine, rank: Rank, cap: int) -> None:
    """Before anything is on the GPU that may be more than it should be."""
    limits = engine.config.build_config
    with engine.tensors(rank) as file:
        GpuNeeds.of(engine.plan(file), file.data_bytes, limits).check_cap(cap, limits)


def load_executor(
    engine: Engine,
    world: World,
    limits: BuildConfig,
    options: LoadOptions,
    eos_token_ids: Callable[[], Iterable[int]] = tuple,
) -> tuple[Runner, Executor]:
    """Rank 0's: its runner, and the executor that leads all ranks. `eos_token_ids` is asked when it has loaded."""
    from trtllm_cli.run.executor import Executor

    runner, num_blocks = load_rank(engine, world, limits, options)
    config = engine.config.pretrained_config
    try:
        executor = Executor(
            limits,
            runner,
            world.comm,
            vocab_size=config.vocab_size,
            num_blocks=num_blocks,
            eos_token_ids=eos_token_ids(),
            enable_prefix_cache=options.enable_prefix_cache,
            enable_chunked_prefill=options.enable_chunked_prefill,
            policy=options.scheduler_policy,
            num_stages=config.mapping.pp_size,
            logits_rank=_logits_rank(engine),
        )
    except BaseException:
        runner.close()
        raise
    leave_out_of_collection()
    return runner, executor


def leave_out_of_collection() -> None:
    """Takes what is alive now out of Python's garbage collection, until `gc.unfreeze`.

    A full collection of all that was imported and loaded takes 0.1 to 0.2 s, for which every request waits.
    """
    gc.collect(1)
    gc.freeze()


def follow_rank(engine: Engine, world: World, options: LoadOptions) -> None:
    """Another rank's whole life: loads, computes what rank 0 schedules, and returns when that is done."""
    from trtllm_cli.run.step_inputs import InputBuilder
    from trtllm_cli.run.worker import follow

    assert world.rank != 0
    limits = engine.config.build_config
    runner, _ = load_rank(engine, world, limits, options)
    leave_out_of_collection()
    try:
        verify_aside(engine, world)
        follow(runner, world.comm, InputBuilder.of(limits), _logits_rank(engine))
    finally:
        runner.close()


def serve_rank(engine: Engine, world: World, options: LoadOptions) -> NoReturn:
    """`follow_rank`, as the rest of this process's life."""
    try:
        follow_rank(engine, world, options)
    except Exception as e:
        world.fail(*describe_error(e))
    world.leave()
    raise SystemExit(0)


def verify_aside(engine: Engine, world: World) -> Future[None]:
    """Checks this rank's file against its digest, aside, in as many threads as the rank may have.

    Of rank 0 the result is there when every rank's file is right. Another rank ends the world where its own is not.
    Cancelling the result stops the threads; none of them keeps the process alive.
    """
    done: Future[None] = Future()
    rank = engine.config.pretrained_config.mapping.ranks[world.rank]

    def verify() -> None:
        try:
            engine.verify(rank, default_threads(world.local_size), done.cancelled)
            if done.cancelled():
                return
            world.tell_verified()
            _settle(done, None)
        except BaseException as e:
            if world.rank != 0:
                world.fail(*describe_error(e))
            _settle(done, e)

    Thread(target=verify, name="trtllm-verify", daemon=True).start()
    return done


def _settle(done: Future[None], error: BaseException | None) -> None:
    """Gives the future its end, unless it was cancelled meanwhile."""
    if done.set_running_or_notify_cancel():
        done.set_result(None) if error is None else done.set_exception(error)


def _logits_rank(engine: Engine) -> int:
    """The rank that sends rank 0 the logits: the first of the last pipeline stage."""
    mapping = engine.config.pretrained_config.mapping
    return mapping.world_size - mapping.tp_size
