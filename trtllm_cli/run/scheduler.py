"""In-flight batching: which sequences take part in the next step, and with how many tokens.

Each step has one budget of tokens. Sequences that decode get theirs first; what is left goes to prompts, a chunk each:
of running sequences, then of waiting ones, in order of arrival. When blocks run out, the newest sequence is preempted:
it gives up its blocks, keeps its tokens, and waits to be prefilled again. A sequence that could not run alone is never
accepted (`Executor.add_request`), so the oldest can always go on, and every sequence ends.

A pipeline of several stages has as many steps under way. Then a step takes its share of the sequences and of the
prompts' tokens, and leaves the others for the steps that follow it. Every stage computes the steps in order, so blocks
may be freed, shared and handed on as soon as a step that uses them is scheduled.

So it is with a runner that samples, which has one step under way while the next is scheduled. Sequences then go on
before their token is known (`Sequence.num_unknown`). One that is preempted then gets its token while it waits: the step
under way ends before another is scheduled. One that turns out to have ended gives up its blocks and its row at once,
although a step under way still computes with them. Whoever gets them is in a later step, brings the tokens of its
prompt along, and refers to the row only after a step that sampled for itself.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from trtllm_cli.run.block_manager import BlockManager
from trtllm_cli.run.sequence import Sequence, State

Policy = Literal["max_utilization", "guaranteed_no_evict"]


MIN_CHUNK = 64  # tokens of a prompt below which a stage takes as long for fewer


@dataclass(slots=True)
class Batch:
    """One step's sequences: those that decode, then those that prefill."""

    sequences: list[Sequence] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)  # tokens of each in this step
    wanted: list[bool] = field(default_factory=list)  # whether that is all it has: its next token is sampled
    copies: list[tuple[int, int]] = field(default_factory=list)  # blocks to copy before, in order
    num_decode: int = 0

    @property
    def complete(self) -> list[Sequence]:
        """The sequences whose next token is sampled."""
        if self.num_decode == len(self.sequences):
            return self.sequences
        return [seq for seq, wanted in zip(self.sequences, self.wanted, strict=True) if wanted]

    def add(self, seq: Sequence, length: int) -> None:
        """Puts the next `length` tokens of `seq` into the step."""
        self.sequences.append(seq)
        self.lengths.append(length)
        self.wanted.append(length == seq.num_remaining)


class Scheduler:
    """Moves sequences between waiting and running.

    `max_utilization` admits what fits now and preempts later if it must; `guaranteed_no_evict` admits a sequence only
    when all that run would fit at their longest. Both as TensorRT-LLM has them. Without chunked prefill a prompt is
    computed in one step; only a preempted sequence that has outgrown a step is still prefilled in chunks.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_batch_size: int,
        max_num_tokens: int,
        enable_chunked_prefill: bool = True,
        policy: Policy = "max_utilization",
        num_stages: int = 1,
    ) -> None:
        """`num_stages`: pipeline stages, and so steps under way."""
        self.blocks = blocks
        self.max_batch_size = max_batch_size
        self.max_num_tokens = max_num_tokens
        self.enable_chunked_prefill = enable_chunked_prefill
        self.policy = policy
        self.num_stages = num_stages
        self.waiting: deque[Sequence] = deque()  # by priority
        self.running: list[Sequence] = []  # by priority
        self.num_preemptions = 0
        self.num_prefix_hits = 0  # tokens
        self._rows = list(range(max_batch_size - 1, -1, -1))  # free rows of the batch's arrays
        self._copies: list[tuple[int, int]] = []

    def add(self, seq: Sequence) -> None:
        """Puts a new sequence at the end of the queue."""
        self.waiting.append(seq)

    def schedule(self) -> Batch:
        """The next step; empty when there is nothing to do but wait for those under way.

        A step that is not started (`advance`) may be forgotten, and another one scheduled in its place.
        """
        batch = Batch()
        self._schedule_decodes(batch)
        budget = min(self.max_num_tokens - batch.num_decode, self._share_of_prompts())
        if batch.num_decode < len(self.running):
            for seq in self.running:
                if budget and seq.num_remaining > 1:
                    budget -= self._schedule_chunk(batch, seq, budget)
        self._schedule_waiting(batch, budget)
        batch.copies = self._copies
        return batch

    def advance(self, batch: Batch) -> None:
        """Notes that the step is under way: later ones may count on what it puts into the cache."""
        self._copies = []
        size = self.blocks.block_size
        for seq, length in zip(batch.sequences, batch.lengths, strict=True):
            seq.num_computed += length
            if (seq.num_registered + 1) * size <= seq.num_computed:
                self.blocks.register(seq)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Starts `child`, which has the tokens of its just prefilled parent.

        It shares the parent's blocks if it can run at once; otherwise it waits, and is prefilled by itself.
        """
        partial = parent.num_computed % self.blocks.block_size != 0
        if len(self.running) < self.max_batch_size and self._fits_worst_case(child) and (
            not partial or self.blocks.num_available
        ):  # fmt: skip
            copy = self.blocks.fork(parent, child)
            if copy:
                self._copies.append(copy)
            self._run(child)
        else:
            self._wait(child)

    def remove(self, seq: Sequence) -> None:
        """Takes a sequence out for good, wherever it is."""
        if seq.state is State.WAITING:
            self.waiting.remove(seq)
        else:
            self.running.remove(seq)
            self._leave(seq)
        seq.state = State.FINISHED

    def check_integrity(self) -> None:
        """Asserts that queues, rows and blocks agree."""
        assert sorted(self.running, key=lambda s: s.priority) == self.running
        assert sorted(self.waiting, key=lambda s: s.priority) == list(self.waiting)
        assert all(s.state is State.RUNNING for s in self.running)
        assert all(s.state is State.WAITING and not s.blocks for s in self.waiting)
        assert not any(s.num_unknown for s in self.waiting)
        for seq in self.running:
            assert min(seq.token_ids[: seq.num_known]) >= 0
            assert seq.token_ids[seq.num_known :] == [-(seq.row + 1)] * seq.num_unknown
        assert sorted(self._rows + [s.row for s in self.running]) == list(range(self.max_batch_size))
        self.blocks.check_integrity(self.running)

    def _schedule_decodes(self, batch: Batch) -> None:
        """Adds the sequences with one token to compute, oldest first, so that none is preempted that is added."""
        share = -(-len(self.running) // self.num_stages)
        for seq in self.running:  # of which the last may go meanwhile
            if len(batch.sequences) == share:
                break
            if len(seq.token_ids) - seq.num_computed == 1 and (self.blocks.grow(seq) or self._make_room(seq)):
                batch.sequences.append(seq)
        batch.num_decode = len(batch.sequences)
        batch.lengths, batch.wanted = [1] * batch.num_decode, [True] * batch.num_decode

    def _make_room(self, seq: Sequence) -> bool:
        """Whether the sequence has a block for its next token, which newer ones give up if need be, or it itself."""
        while not self.blocks.grow(seq):
            if self.running[-1].is_pending:  # it will give up its blocks when its token is there
                return False
            if self._preempt_newest() is seq:
                return False
        return True

    def _share_of_prompts(self) -> int:
        """Tokens of prompts that a step takes, so that every stage has some to compute."""
        if self.num_stages == 1 or not self.enable_chunked_prefill:
            return self.max_num_tokens
        enough, total = self.num_stages * self.max_num_tokens, 0
        for seq in itertools.chain(self.running, self.waiting):
            total += seq.num_remaining if seq.num_remaining > 1 else 0
            if total >= enough:
                break
        return max(-(-total // self.num_stages), MIN_CHUNK)

    def _schedule_chunk(self, batch: Batch, seq: Sequence, budget: int) -> int:
        length = min(seq.num_remaining, budget)
        batch.add(seq, length)
        return length

    def _schedule_waiting(self, batch: Batch, budget: int) -> None:
        while self.waiting and budget and len(self.running) < self.max_batch_size:
            seq = self.waiting[0]
            if seq.num_unknown:  # preempted just now
                return
            if not self.enable_chunked_prefill and not self._fits_step(seq, budget):
                return
            # One more block for each that runs: else the newcomer would be preempted at once, again and again.
            spare = len(self.running) if self.policy == "max_utilization" else 0
            if not self._fits_worst_case(seq) or not self.blocks.admit(seq, spare=spare):
                assert self.running, "a sequence that cannot run alone was accepted"
                return
            self.waiting.popleft()
            self._run(seq)
            self.num_prefix_hits += seq.num_computed
            if seq.request.cached_tokens is None:
                seq.request.cached_tokens = seq.num_computed
            budget -= self._schedule_chunk(batch, seq, budget)

    def _fits_step(self, seq: Sequence, budget: int) -> bool:
        """Whether the step has room for all of the sequence, or none ever will."""
        length = len(seq.token_ids) - self.blocks.match_length(seq.token_ids)
        return length <= budget or length > self.max_num_tokens

    def _fits_worst_case(self, seq: Sequence) -> bool:
        if self.policy == "max_utilization":
            return True
        return sum(map(self._worst_case, self.running)) + self._worst_case(seq) <= self.blocks.num_blocks

    def _worst_case(self, seq: Sequence) -> int:
        return self.blocks.blocks_for(seq.request.max_len - 1)  # the last token is never computed

    def _preempt_newest(self) -> Sequence:
        seq = self.running.pop()
        self._leave(seq)
        self._wait(seq)
        self.num_preemptions += 1
        return seq

    def _run(self, seq: Sequence) -> None:
        seq.state = State.RUNNING
        seq.row, seq.num_row_blocks = self._rows.pop(), 0
        insort(self.running, seq, key=lambda s: s.priority)

    def _wait(self, seq: Sequence) -> None:
        """Queues a sequence that is older than most that wait."""
        seq.state = State.WAITING
        position = 0
        while position < len(self.waiting) and self.waiting[position].priority < seq.priority:
            position += 1
        self.waiting.insert(position, seq)

    def _leave(self, seq: Sequence) -> None:
        """Frees a running sequence's row and blocks."""
        if self._copies:
            self._copies = [(source, to) for source, to in self._copies if to not in seq.blocks]
        self.blocks.register(seq)  # what has become known since its last step began
        self.blocks.release(seq)
        self._rows.append(seq.row)
        seq.row = -1
