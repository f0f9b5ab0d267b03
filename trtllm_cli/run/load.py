"""Loading one rank's part of an engine, and what ranks other than 0 do with it until rank 0 is done."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread
from typing import TYPE_CHECKING, NoReturn

from trtllm_cli.errors import UsageError, describe_error
from trtllm_cli.run import kv_budget
from trtllm_cli.run.backends import load_runner

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from trtllm_cli.engine import BuildConfig, Engine
    from trtllm_cli.run.backends import Runner
    from trtllm_cli.run.executor import Executor
    from trtllm_cli.run.scheduler import Policy
    from trtllm_cli.run.world import World


@dataclass(frozen=True)
class LoadOptions:
    """How an engine is run. None: as it was built, or what this machine gives."""

    num_threads: int | None = None  # of a rank
    kv_cache_memory: int | str | None = None  # of a rank: bytes, or text such as "2GiB"
    max_num_blocks: int | None = None
    enable_prefix_cache: bool = True
    enable_chunked_prefill: bool = True
    scheduler_policy: Policy = "max_utilization"

    def check(self) -> None:
        """Raises UsageError, naming the flag, for a value out of range."""
        if self.kv_cache_memory is not None:
            kv_budget.parse_bytes(self.kv_cache_memory, "--kv-cache-memory")
        for name, value in (("num_threads", self.num_threads), ("max_num_blocks", self.max_num_blocks)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}, it must be at least 1", where="--" + name.replace("_", "-"))


def load_rank(engine: Engine, world: World, limits: BuildConfig, options: LoadOptions) -> tuple[Runner, int]:
    """This rank's runner, and the blocks of its KV cache: as many as the rank with the least memory can hold.

    Every rank calls it. `limits` are the engine's, or lower ones.
    """
    with world.comm.activity.working("load"):
        rank = world.place(engine)
        runner = load_runner(engine, rank, world.comm, num_threads=options.num_threads, local_ranks=world.local_size)
        try:
            memory, available = options.kv_cache_memory, kv_budget.available_memory()
            own = kv_budget.num_blocks(
                limits,
                runner.bytes_per_block,
                memory=None if memory is None else kv_budget.parse_bytes(memory, "--kv-cache-memory"),
                max_blocks=options.max_num_blocks,
                available=None if available is None else available // world.local_size,
            )
            num_blocks = min(map(int, world.comm.exchange(str(own))))
            runner.allocate_kv_cache(num_blocks)
        except BaseException:
            runner.close()
            raise
    return runner, num_blocks


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
    return runner, executor


def follow_rank(engine: Engine, world: World, options: LoadOptions) -> None:
    """Another rank's whole life: loads, computes what rank 0 schedules, and returns when that is done."""
    from trtllm_cli.run.step_inputs import InputBuilder
    from trtllm_cli.run.worker import follow

    assert world.rank != 0
    limits = engine.config.build_config
    runner, _ = load_rank(engine, world, limits, options)
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
    """Checks this rank's file against its SHA-256 in a thread (hashing releases the GIL).

    Of rank 0 the result is there when every rank's file is right. Another rank ends the world where its own is not.
    """
    done: Future[None] = Future()
    rank = engine.config.pretrained_config.mapping.ranks[world.rank]

    def verify() -> None:
        try:
            engine.verify(rank)
            world.tell_verified()
            done.set_result(None)
        except BaseException as e:
            if world.rank != 0:
                world.fail(*describe_error(e))
            done.set_exception(e)

    Thread(target=verify, name="trtllm-verify", daemon=True).start()
    return done


def _logits_rank(engine: Engine) -> int:
    """The rank that sends rank 0 the logits: the first of the last pipeline stage."""
    mapping = engine.config.pretrained_config.mapping
    return mapping.world_size - mapping.tp_size
