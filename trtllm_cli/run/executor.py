"""The in-flight batching executor. `Executor.step` tells the story.

A runner that gives logits computes a step, and numpy samples its tokens. A runner that samples is kept one step ahead:
while it computes a step, the next one is scheduled and enqueued, with stand-ins for the tokens that are not known yet
(`Sequence.expect_token`). Where a sequence then turns out to have ended, what the step under way gives for it is
dropped. A step with a request that the runner cannot sample for is not run ahead: it begins when all tokens are known,
and ends before the next one begins.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from trtllm_cli.errors import RequestError
from trtllm_cli.run.backends import GpuRunner, SamplingRunner
from trtllm_cli.run.block_manager import BlockManager
from trtllm_cli.run.request import FinishReason, Logprob, SamplingParams, TokenEvent
from trtllm_cli.run.sampler import SamplingState, not_finite, sample
from trtllm_cli.run.sampling_inputs import SamplingTable
from trtllm_cli.run.scheduler import Policy, Scheduler
from trtllm_cli.run.sequence import Request, Sequence, State
from trtllm_cli.run.step_inputs import InputBuilder
from trtllm_cli.run.step_plan import END, StepPlan, plan_step
from trtllm_cli.run.worker import compute, start

if TYPE_CHECKING:
    import numpy.typing as npt

    from trtllm_cli.engine import BuildConfig
    from trtllm_cli.run.backends import PendingTokens, Runner
    from trtllm_cli.run.communicator import Communicator
    from trtllm_cli.run.sampling_inputs import SamplingInputs
    from trtllm_cli.run.scheduler import Batch

DEFAULT_MAX_TOKENS = 128


@dataclass(frozen=True)
class _UnderWay:
    """A step that has been started."""

    plan: StepPlan
    wanted: list[Sequence]  # whose next token it gives
    logits: npt.NDArray[np.float32] | None = None  # where rank 0 itself computes them; valid until the next step
    pending: PendingTokens | None = None  # instead of logits, from a runner that samples: those of `wanted`


@dataclass
class ExecutorStats:
    """Counts since the start, and what is so now."""

    steps: int = 0
    prefill_tokens: int = 0  # computed; what was preempted counts again
    decode_tokens: int = 0
    prefix_hit_tokens: int = 0  # not computed: found in the prefix cache
    preemptions: int = 0
    num_running: int = 0  # sequences, now
    num_waiting: int = 0
    blocks_used: int = 0  # held by sequences, now
    blocks_peak: int = 0
    blocks_total: int = 0


class Executor:
    """Serves requests with one engine. On rank 0; the other ranks run `worker.follow`.

    Not thread-safe: one thread calls it. The runners' KV caches have `num_blocks` blocks already.
    """

    def __init__(
        self,
        config: BuildConfig,
        runner: Runner,
        comm: Communicator,
        *,
        vocab_size: int,
        num_blocks: int,
        eos_token_ids: Iterable[int] = (),
        enable_prefix_cache: bool = True,
        enable_chunked_prefill: bool = True,
        policy: Policy = "max_utilization",
        num_stages: int = 1,
        logits_rank: int = 0,
    ) -> None:
        """`num_stages`: pipeline stages; `logits_rank`: the first rank of the last of them."""
        self.config = config
        self.vocab_size = vocab_size
        self._runner = runner
        self._comm = comm
        self._logits_rank = logits_rank
        self._eos = frozenset(token for token in eos_token_ids if token < vocab_size)
        self._blocks = BlockManager(num_blocks, config.tokens_per_block, enable_prefix_cache=enable_prefix_cache)
        self._scheduler = Scheduler(
            self._blocks,
            max_batch_size=config.max_batch_size,
            max_num_tokens=config.max_num_tokens,
            enable_chunked_prefill=enable_chunked_prefill,
            policy=policy,
            num_stages=num_stages,
        )
        self._inputs = InputBuilder.of(config)
        self._sampling_runner: SamplingRunner | None = None
        if num_stages == 1 and isinstance(runner, SamplingRunner):
            self._sampling_runner = runner
        self._has_gpu = isinstance(runner, GpuRunner)
        self._sampling_table = SamplingTable(config.max_batch_size)
        self._most_under_way = 2 if self._sampling_runner else num_stages
        self._under_way: deque[_UnderWay] = deque()  # the oldest first
        self._requests: dict[int, Request] = {}
        self._unforked: set[Request] = set()  # that want several sequences and have one
        self._sampled_here: set[Request] = set()  # for which the runner does not sample
        self._ended: dict[int, Request] = {}  # since the last step began, for late questions
        self._news: list[TokenEvent] = []  # of cancelled sequences, for the next step to tell
        self._num_requests = 0
        self._is_broken = False  # a step has failed: what the other ranks wait for is not known
        self._stats = ExecutorStats(blocks_total=num_blocks)

    def add_request(self, request_id: int, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Queues a request. Raises RequestError, with the limit and how to raise it, for one that can never be served.

        An explicit `max_tokens` that does not fit is an error; the default is cut to what is left.
        """
        assert request_id not in self._requests, f"request {request_id} is there already"
        self._check_prompt(prompt_token_ids)
        self._check_ids(params.stop_token_ids, "stop_token_ids")
        eos = frozenset() if params.ignore_eos else self._eos
        request = Request(
            id=request_id,
            order=self._num_requests,
            params=params,
            num_prompt=len(prompt_token_ids),
            max_len=len(prompt_token_ids) + self._max_tokens(len(prompt_token_ids), params),
            seed=params.seed if params.seed is not None else int.from_bytes(os.urandom(8)) >> 1,
            eos=eos,
            stops=eos.union(params.stop_token_ids),
        )
        self._num_requests += 1
        self._requests[request_id] = request
        if params.n > 1:
            self._unforked.add(request)
        if self._sampling_runner is not None and not _samples(self._sampling_runner, request):
            self._sampled_here.add(request)
        self._scheduler.add(self._new_sequence(request, list(prompt_token_ids)))

    def cancel(self, request_id: int) -> None:
        """Ends a request's sequences; the next step tells so. Does nothing for one that has ended."""
        request = self._requests.get(request_id)
        if request is None:
            return
        ended = {seq.index for seq in request.sequences if seq.state is State.FINISHED}
        for seq in request.sequences:
            if seq.state is not State.FINISHED:
                self._scheduler.remove(seq)
        for index in range(request.params.n):
            if index not in ended:
                self._news.append(TokenEvent(request_id, index, None, finish_reason="cancelled"))
        self._forget(request)

    def finish(
        self, request_id: int, index: int, reason: FinishReason = "stop", stop_reason: int | str | None = None
    ) -> None:
        """Ends one sequence, for a reason that the caller found, such as a stop string. No event tells of it.

        Does nothing where the sequence has ended already.
        """
        del reason, stop_reason  # the caller's own to report
        request = self._requests.get(request_id)
        if request is not None and index < len(request.sequences):
            seq = request.sequences[index]
            if seq.state is not State.FINISHED:
                self._end(seq)

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to tell."""
        return bool(self._scheduler.running or self._scheduler.waiting or self._news or self._under_way)

    @property
    def stats(self) -> ExecutorStats:
        """The executor's counts, kept up to date by reading them."""
        stats = self._stats
        stats.preemptions = self._scheduler.num_preemptions
        stats.prefix_hit_tokens = self._scheduler.num_prefix_hits
        stats.num_running, stats.num_waiting = len(self._scheduler.running), len(self._scheduler.waiting)
        stats.blocks_used = self._blocks.num_held
        return stats

    def cached_tokens(self, request_id: int) -> int:
        """Prompt tokens that the prefix cache had; 0 before the first token. Known until the step after the last."""
        return self._find(request_id).cached_tokens or 0

    def seed(self, request_id: int) -> int:
        """The request's seed, drawn or given. Known until the step after the last."""
        return self._find(request_id).seed

    def step(self) -> list[TokenEvent]:
        """Starts steps until every stage has one, and ends the oldest: at most one new token for each of its sequences.

        In a world of one stage that is one step, and with a runner that samples the step after it is started too.
        """
        with self._comm.activity.working("step"):
            try:
                return self._step()
            except BaseException:
                self._is_broken = True
                raise

    def _step(self) -> list[TokenEvent]:
        self._ended.clear()
        events, self._news = self._news, []
        self._start_steps()
        if self._under_way:
            oldest = self._under_way.popleft()
            if oldest.pending is not None:
                sequences, tokens = oldest.wanted, oldest.pending.tokens().tolist()
                logprobs = oldest.pending.logprobs()
            else:
                sequences, logits = self._fork_logits(oldest.wanted, self._receive(oldest))
                tokens, logprobs = self._sample(sequences, logits)
            events += self._postprocess(sequences, tokens, logprobs)
        return events

    def check_integrity(self) -> None:
        """Asserts that no block or row is lost or used twice."""
        self._scheduler.check_integrity()
        assert self.has_work or self._blocks.num_held == 0

    def close(self) -> None:
        """Tells the other ranks to stop, when they have done what is under way.

        After a step that failed they cannot be told so: they end with this process (`World.fail`).
        """
        if self._is_broken:
            return
        while self._under_way:
            step = self._under_way.popleft()
            if step.pending is None:
                self._receive(step)
        self._comm.broadcast(END)
        self._comm.activity.released = True

    def _start_steps(self) -> None:
        """Starts as many steps as may be under way, or as can be without knowing the tokens of those that are."""
        while len(self._under_way) < self._most_under_way:
            batch = self._scheduler.schedule()
            if not batch.sequences:
                return
            if self._sampling_runner is None:
                self._under_way.append(self._start(batch))
            elif not self._is_sampled_here(batch):
                self._under_way.append(self._start_sampling(self._sampling_runner, batch))
            else:
                if not self._under_way:  # else the batch is forgotten: what is under way ends first
                    self._under_way.append(self._start(batch))
                    self._sampling_table.sampled_elsewhere(batch.complete)
                return

    def _start(self, batch: Batch) -> _UnderWay:
        """Computes rank 0's part of a step, once the others have theirs."""
        plan = self._plan(batch)
        self._tell(plan)
        return _UnderWay(plan, batch.complete, logits=compute(self._runner, self._inputs, plan))

    def _tell(self, plan: StepPlan, sampling: SamplingInputs | None = None) -> None:
        """Sends a step to the other ranks, where there are any."""
        if self._comm.world_size == 1:
            return
        self._comm.broadcast(plan.message(sampling))
        if self._has_gpu:  # which this rank soon waits for, and which waits for the others'
            self._comm.flush()

    def _start_sampling(self, runner: SamplingRunner, batch: Batch) -> _UnderWay:
        """Enqueues a step and the sampling of its tokens."""
        plan = self._plan(batch)
        sequences, logits_rows = self._fork(batch.complete)
        if logits_rows is not None:  # a child that has to wait is prefilled by itself, and then sampled
            at_once = [i for i, seq in enumerate(sequences) if seq.state is State.RUNNING]
            sequences, logits_rows = [sequences[i] for i in at_once], [logits_rows[i] for i in at_once]
        sampling = self._sampling_table.build(plan, sequences, logits_rows)
        self._tell(plan, sampling)
        pending = start(runner, self._inputs, plan, sampling)
        for seq in sequences:
            seq.expect_token()
        return _UnderWay(plan, sequences, pending=pending)

    def _plan(self, batch: Batch) -> StepPlan:
        """Notes that the batch is under way."""
        self._count(batch)
        if self._sampling_runner is not None:
            self._sampling_table.join(batch.sequences)
        plan = plan_step(batch)
        self._scheduler.advance(batch)
        self._comm.activity.stage = plan.stage
        return plan

    def _is_sampled_here(self, batch: Batch) -> bool:
        """Whether the step gives a token that the runner does not sample."""
        return bool(self._sampled_here) and any(seq.request in self._sampled_here for seq in batch.complete)

    def _receive(self, step: _UnderWay) -> npt.NDArray[np.float32]:
        """The step's logits [num_logits, vocab], wherever they are computed."""
        if self._logits_rank == 0:
            assert step.logits is not None
            return step.logits
        logits = np.empty((step.plan.num_logits, self.vocab_size), np.float32)
        self._comm.recv(logits, source=self._logits_rank)
        return logits

    def _fork_logits(
        self, complete: list[Sequence], logits: npt.NDArray[np.float32]
    ) -> tuple[list[Sequence], npt.NDArray[np.float32]]:
        """The sequences to sample for, with their logits.

        Sequences that were ended while the step was under way are left out.
        """
        if any(seq.state is State.FINISHED for seq in complete):
            alive = [row for row, seq in enumerate(complete) if seq.state is not State.FINISHED]
            complete, logits = [complete[row] for row in alive], logits[alive]
        sequences, rows = self._fork(complete)
        return sequences, logits if rows is None else logits[rows]

    def _fork(self, complete: list[Sequence]) -> tuple[list[Sequence], list[int] | None]:
        """A new prompt's logits serve all its n sequences: these, and for each which of the logits are its own.

        None where each sequence has logits of its own.
        """
        if not self._unforked or not any(seq.request in self._unforked for seq in complete):
            return complete, None
        sequences: list[Sequence] = []
        rows: list[int] = []
        for row, seq in enumerate(complete):
            family = [seq]
            while len(seq.request.sequences) < seq.request.params.n:
                child = self._new_sequence(seq.request, list(seq.token_ids))
                self._scheduler.fork(seq, child)
                family.append(child)
            self._unforked.discard(seq.request)
            sequences += family
            rows += [row] * len(family)
        return sequences, rows

    def _sample(
        self, sequences: list[Sequence], logits: npt.NDArray[np.float32]
    ) -> tuple[list[int], list[list[Logprob] | None]]:
        return sample(logits, [self._sampling_state(seq) for seq in sequences])

    def _sampling_state(self, seq: Sequence) -> SamplingState:
        """The sequence's state, with all its tokens noted."""
        request = seq.request
        if seq.sampling is None:
            seq.sampling = SamplingState(
                request.params,
                seed=request.seed + seq.index,
                vocab_size=self.vocab_size,
                prompt=seq.token_ids[: request.num_prompt],
                stops=sorted(request.stops),
            )
        for token in seq.token_ids[request.num_prompt + seq.sampling.num_output :]:
            seq.sampling.accept(token)
        return seq.sampling

    def _postprocess(
        self, sequences: list[Sequence], tokens: list[int], logprobs: list[list[Logprob] | None]
    ) -> list[TokenEvent]:
        """Gives each sequence its token and ends those that are done. Drops what is for one that has ended."""
        events = []
        for seq, token, entry in zip(sequences, tokens, logprobs, strict=True):
            if seq.state is State.FINISHED:
                continue
            if token < 0:
                raise not_finite()
            request = seq.request
            seq.receive_token(token)
            event = TokenEvent(request.id, seq.index, token, entry)
            if token in request.stops:
                event.finish_reason = "stop"
                event.stop_reason = None if token in request.eos else token
            elif len(seq.token_ids) == request.max_len:
                event.finish_reason = "length"
            if event.finish_reason:
                self._end(seq)
            events.append(event)
        return events

    def _new_sequence(self, request: Request, token_ids: list[int]) -> Sequence:
        seq = Sequence(request, len(request.sequences), token_ids)
        request.sequences.append(seq)
        return seq

    def _end(self, seq: Sequence) -> None:
        self._scheduler.remove(seq)
        request = seq.request
        if len(request.sequences) == request.params.n and all(s.state is State.FINISHED for s in request.sequences):
            self._forget(request)

    def _forget(self, request: Request) -> None:
        self._ended[request.id] = self._requests.pop(request.id)
        self._unforked.discard(request)
        self._sampled_here.discard(request)

    def _find(self, request_id: int) -> Request:
        return self._requests[request_id] if request_id in self._requests else self._ended[request_id]

    def _count(self, batch: Batch) -> None:
        stats = self._stats
        stats.steps += 1
        stats.decode_tokens += batch.num_decode
        stats.prefill_tokens += sum(batch.lengths) - batch.num_decode
        stats.blocks_peak = max(stats.blocks_peak, self._blocks.num_held)

    def _check_prompt(self, token_ids: list[int]) -> None:
        length, config = len(token_ids), self.config
        if length == 0:
            raise RequestError("the prompt is empty", where="prompt", fix="give at least one token")
        self._check_ids(token_ids, "prompt")
        if length > config.max_input_len:
            raise RequestError(
                f"the prompt has {length} tokens, this engine's max_input_len is {config.max_input_len}",
                where="prompt",
                fix=f"shorten the prompt, or rebuild the engine with --max-input-len {length}",
            )
        if length >= config.max_seq_len:
            raise RequestError(
                f"the prompt's {length} tokens leave no room for output: "
                f"this engine's max_seq_len is {config.max_seq_len}",
                where="prompt",
                fix=f"shorten the prompt, or rebuild the engine with --max-seq-len {length + DEFAULT_MAX_TOKENS}",
            )
        if length > self._cache_len:
            raise self._cache_error(length, length)
        if not self._scheduler.enable_chunked_prefill and length > config.max_num_tokens:
            raise RequestError(
                f"the prompt has {length} tokens, more than one step's max_num_tokens of {config.max_num_tokens}, "
                "and chunked prefill is off",
                where="prompt",
                fix=f"enable chunked prefill, or rebuild the engine with --max-num-tokens {length}",
            )

    def _check_ids(self, token_ids: Collection[int], where: str) -> None:
        # Of long prompts, at C's speed: requests wait here before the first of them begins.
        extremes = (min(token_ids, default=0), max(token_ids, default=0))
        wrong = next((token for token in extremes if not 0 <= token < self.vocab_size), None)
        if wrong is not None:
            raise RequestError(
                f"token id {wrong} is outside the model's vocabulary of {self.vocab_size}",
                where=where,
                fix="use the tokenizer that came with the engine",
            )

    def _max_tokens(self, length: int, params: SamplingParams) -> int:
        """Output tokens at which a sequence of a prompt of `length` tokens ends."""
        limit = self.config.max_seq_len
        left = min(limit, self._cache_len + 1) - length
        wanted = params.max_tokens if params.max_tokens is not None else params.min_tokens
        if length + wanted > limit:
            name = "max_tokens" if params.max_tokens is not None else "min_tokens"
            raise RequestError(
                f"a prompt of {length} tokens and {name} {wanted} make {length + wanted}, "
                f"this engine's max_seq_len is {limit}",
                where=name,
                fix=f"ask for at most {limit - length}, or rebuild the engine with --max-seq-len {length + wanted}",
            )
        if wanted > left:
            raise self._cache_error(length, length + wanted - 1)
        return params.max_tokens or min(max(DEFAULT_MAX_TOKENS, params.min_tokens), left)

    @property
    def _cache_len(self) -> int:
        """Tokens that the whole KV cache holds."""
        return self._blocks.num_blocks * self.config.tokens_per_block

    def _cache_error(self, length: int, total: int) -> RequestError:
        return RequestError(
            f"a prompt of {length} tokens needs {total} tokens of KV cache with its output, "
            f"the whole cache holds {self._cache_len} ({self._blocks.num_blocks} blocks of "
            f"{self.config.tokens_per_block})",
            where="prompt",
            fix="give the KV cache more memory, ask for fewer tokens, or shorten the prompt",
        )


def _samples(runner: SamplingRunner, request: Request) -> bool:
    """Whether the runner samples for the request."""
    return runner.samples(request.params, len(request.stops) if request.params.min_tokens else 0)
