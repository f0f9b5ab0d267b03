"""A Runner whose logits are a hash of each sequence's tokens, read back through the block tables.

Its "KV cache" keeps the token and position written to each slot. A wrong block table, a lost or stale block, or a slot
written twice therefore gives a wrong token. `expected_tokens` is what a correct executor generates greedily.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from trtllm_cli.run.model_inputs import ModelInputs
from trtllm_cli.run.request import Logprob, SamplingParams
from trtllm_cli.run.sampler import SamplingState, sample
from trtllm_cli.run.sampling_inputs import SamplingInputs

EMPTY = -1


def hash_logits(tokens: Sequence[int] | npt.NDArray[np.int32], vocab_size: int) -> npt.NDArray[np.float32]:
    """The logits [vocab_size] after `tokens`; normally distributed, so that no two are likely to tie."""
    digest = hashlib.blake2b(np.asarray(tokens, np.int32).tobytes(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).standard_normal(vocab_size, np.float32) * 4


def expected_tokens(
    prompt: Sequence[int], num_tokens: int, vocab_size: int, stops: Sequence[int] = (), min_tokens: int = 0
) -> list[int]:
    """What greedy decoding gives for `prompt`, one token at a time, ending after a token of `stops`."""
    tokens = list(prompt)
    for position in range(num_tokens):
        logits = hash_logits(tokens, vocab_size)
        if position < min_tokens:
            logits[list(stops)] = -np.inf
        tokens.append(int(logits.argmax()))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


class FakeRunner:
    """Implements `trtllm_cli.run.backends.Runner`, and checks every step's inputs.

    `has_logits` False makes it an earlier pipeline stage. `steps` keeps the inputs of every forward.
    """

    def __init__(self, vocab_size: int = 64, tokens_per_block: int = 4, *, has_logits: bool = True) -> None:
        self.vocab_size = vocab_size
        self.tokens_per_block = tokens_per_block
        self.has_logits = has_logits
        self.num_blocks = 0
        self.steps: list[ModelInputs] = []
        self.copies: list[tuple[int, int]] = []
        self.closed = False

    @property
    def bytes_per_block(self) -> int:
        return 8 * self.tokens_per_block

    def allocate_kv_cache(self, num_blocks: int) -> None:
        assert not self.num_blocks, "the cache is allocated once"
        self.num_blocks = num_blocks
        self.tokens = np.full((num_blocks, self.tokens_per_block), EMPTY, np.int32)
        self.positions = np.full((num_blocks, self.tokens_per_block), EMPTY, np.int32)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        assert len({destination for _, destination in pairs}) == len(pairs), "a block is copied over twice"
        for source, destination in pairs:
            assert source != destination
            self.tokens[destination] = self.tokens[source]
            self.positions[destination] = self.positions[source]
            self.copies.append((source, destination))

    def forward(self, inputs: ModelInputs) -> npt.NDArray[np.float32] | None:
        self._check(inputs)
        self.steps.append(inputs)
        self.tokens.reshape(-1)[inputs.slot_mapping] = inputs.input_ids
        self.positions.reshape(-1)[inputs.slot_mapping] = inputs.positions
        if not self.has_logits:
            return None
        logits = np.empty((len(inputs.logits_indices), self.vocab_size), np.float32)
        for row, index in enumerate(inputs.logits_indices):
            seq = int(np.searchsorted(inputs.query_start, index, side="right")) - 1
            logits[row] = hash_logits(self._history(inputs, seq, int(inputs.positions[index]) + 1), self.vocab_size)
        return logits

    def close(self) -> None:
        self.closed = True

    def _history(self, inputs: ModelInputs, seq: int, length: int) -> npt.NDArray[np.int32]:
        blocks = inputs.block_tables[seq, : -(-length // self.tokens_per_block)]
        positions = self.positions[blocks].reshape(-1)[:length]
        assert np.array_equal(positions, np.arange(length)), f"sequence {seq} reads positions {positions}"
        return self.tokens[blocks].reshape(-1)[:length]

    def _check(self, inputs: ModelInputs) -> None:
        for array in vars(inputs).values():
            assert array.dtype == np.int32
            assert array.flags.c_contiguous
        num_tokens, num_seqs = inputs.num_tokens, inputs.num_seqs
        assert num_tokens > 0
        assert len(inputs.positions) == len(inputs.slot_mapping) == num_tokens
        assert len(np.unique(inputs.slot_mapping)) == num_tokens, "a slot is written twice"
        assert inputs.query_start[0] == 0
        assert inputs.query_start[-1] == num_tokens
        assert len(inputs.query_start) == num_seqs + 1
        assert (np.diff(inputs.query_start) > 0).all()
        assert inputs.block_tables.shape[0] == num_seqs
        assert inputs.block_tables.min() >= 0
        assert inputs.block_tables.max() < self.num_blocks
        assert (inputs.input_ids >= 0).all()
        assert (inputs.input_ids < self.vocab_size).all()
        assert (np.diff(inputs.logits_indices) > 0).all()
        for seq in range(num_seqs):
            start, end = int(inputs.query_start[seq]), int(inputs.query_start[seq + 1])
            positions = inputs.positions[start:end]
            assert positions[-1] + 1 == inputs.seq_lens[seq]
            assert np.array_equal(positions, np.arange(positions[0], positions[0] + end - start))
            size = self.tokens_per_block
            slots = inputs.block_tables[seq, positions // size] * size + positions % size
            assert np.array_equal(slots, inputs.slot_mapping[start:end])


class FakeSamplingRunner(FakeRunner):
    """Implements `trtllm_cli.run.backends.SamplingRunner`: a device that computes as late as it may.

    What it is told waits in `queue` until the tokens are asked for, or a forward comes. It keeps each row's last token
    itself, and forgets those of rows that the step before did not sample for. It keeps the tokens of rows whose history
    it had, and checks that they are those in the cache. `num_started` counts started steps.
    """

    MOST_LOGPROBS, MOST_BANNED = 3, 2

    def __init__(self, vocab_size: int = 64, tokens_per_block: int = 4, *, max_batch_size: int = 4) -> None:
        super().__init__(vocab_size, tokens_per_block)
        self.last_tokens = np.full(max_batch_size, EMPTY, np.int32)
        self.queue: deque[Callable[[], None]] = deque()
        self.under_way: deque[FakePendingTokens] = deque()
        self.num_started = self.num_forwards = 0
        self.sampled: list[int] = []
        self.histories: dict[int, tuple[list[int], list[int]]] = {}  # of a row: prompt, output

    def samples(self, params: SamplingParams, num_banned: int) -> bool:
        assert params.min_tokens or not num_banned
        return (params.logprobs or 0) <= self.MOST_LOGPROBS and num_banned <= self.MOST_BANNED

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        assert not {source for source, _ in pairs} & {destination for _, destination in pairs}, "their order matters"
        self.queue.append(lambda: FakeRunner.copy_blocks(self, pairs))

    def start(self, inputs: ModelInputs, sampling: SamplingInputs) -> FakePendingTokens:
        assert len(self.under_way) < 2, "more steps are under way than there may be"
        pending = FakePendingTokens(self)
        self.under_way.append(pending)
        self.num_started += 1
        kept = [(a, a.copy()) for a in (*vars(inputs).values(), *vars(sampling).values())]

        def compute() -> None:
            assert all(np.array_equal(array, copy) for array, copy in kept), "inputs changed after the start"
            pending.result, pending.likely = self._compute(inputs, sampling)

        self.queue.append(compute)
        return pending

    def forward(self, inputs: ModelInputs) -> npt.NDArray[np.float32] | None:
        assert not self.under_way, "forward is called while a step is under way"
        self.num_forwards += 1
        while self.queue:
            self.queue.popleft()()
        self.last_tokens[:] = EMPTY
        return super().forward(inputs)

    def _compute(
        self, inputs: ModelInputs, sampling: SamplingInputs
    ) -> tuple[npt.NDArray[np.int32], list[list[Logprob] | None]]:
        ids = inputs.input_ids.copy()
        unknown = ids < 0
        ids[unknown] = self.last_tokens[-1 - ids[unknown]]
        logits = FakeRunner.forward(self, replace(inputs, input_ids=ids))
        assert logits is not None
        self._check_sampling(sampling, len(logits))
        self._penalize(inputs, sampling, logits)
        for row, token in sampling.banned:
            logits[row, token] = -np.inf
        states = []
        wanted = dict(sampling.logprobs.tolist())
        for entry, (temperature, top_k, top_p, min_p, seed, position) in enumerate(zip(
            sampling.temperatures, sampling.top_k, sampling.top_p, sampling.min_p, sampling.seeds, sampling.positions,
            strict=True,
        )):  # fmt: skip
            params = SamplingParams(
                temperature=float(temperature), top_k=int(top_k), top_p=float(top_p), min_p=float(min_p),
                logprobs=wanted.get(entry),
            )  # fmt: skip
            states.append(SamplingState(params, seed=int(seed), vocab_size=self.vocab_size))
            states[-1].num_output = int(position)
        tokens = np.full(len(states), EMPTY, np.int32)
        likely: list[list[Logprob] | None] = [None] * len(states)
        chosen = logits[sampling.logits_rows]
        for i, state in enumerate(states):
            if np.isfinite(chosen[i].max()):
                [tokens[i]], [likely[i]] = sample(chosen[i : i + 1], [state])
        self.last_tokens[:] = EMPTY
        self.last_tokens[sampling.rows] = tokens
        self.sampled += tokens.tolist()
        for row, token in zip(sampling.rows.tolist(), tokens.tolist(), strict=True):
            if row in self.histories:
                self.histories[row][1].append(token)
        return tokens, likely

    def _penalize(self, inputs: ModelInputs, sampling: SamplingInputs, logits: npt.NDArray[np.float32]) -> None:
        """Changes logits in place, once each, whatever number of entries share them."""
        start = 0
        for row, prompt, length in sampling.histories.tolist():
            tokens = sampling.history_tokens[start : start + length].tolist()
            self.histories[row] = tokens[:prompt], tokens[prompt:]
            start += length
        assert start == len(sampling.history_tokens)
        logits_rows = sampling.logits_rows[sampling.penalized]
        assert len(np.unique(logits_rows)) == len(logits_rows), "logits are penalized twice"
        for i, entry in enumerate(sampling.penalized):
            prompt, output = self.histories[int(sampling.rows[entry])]
            seq = int(np.searchsorted(inputs.query_start, inputs.logits_indices[logits_rows[i]], side="right")) - 1
            assert prompt + output == self._history(inputs, seq, int(inputs.seq_lens[seq])).tolist()
            assert len(output) == sampling.positions[entry]
            params = SamplingParams(
                repetition_penalty=float(sampling.repetition_penalties[i]),
                presence_penalty=float(sampling.presence_penalties[i]),
                frequency_penalty=float(sampling.frequency_penalties[i]),
            )
            state = SamplingState(params, seed=0, vocab_size=self.vocab_size, prompt=prompt)
            for token in output:
                state.accept(token)
            state.adjust(logits[logits_rows[i]])

    def _check_sampling(self, sampling: SamplingInputs, num_logits: int) -> None:
        arrays = vars(sampling)
        floats = ("temperatures", "top_p", "min_p", "repetition_penalties", "presence_penalties", "frequency_penalties")
        wanted = {"seeds": np.uint64, **dict.fromkeys(floats, np.float32)}
        for name, array in arrays.items():
            assert array.dtype == wanted.get(name, np.int32), name
            assert array.flags.c_contiguous, name
            if name.endswith("penalties"):
                assert len(array) == len(sampling.penalized), name
            elif name not in ("penalized", "histories", "history_tokens", "banned", "logprobs"):
                assert len(array) == len(sampling.rows), name
        assert len(np.unique(sampling.rows)) == len(sampling.rows), "two tokens for one row"
        assert set(sampling.logits_rows.tolist()) == set(range(num_logits))
        assert (sampling.rows >= 0).all()
        assert (sampling.positions >= 0).all()


class FakePendingTokens:
    """Implements `trtllm_cli.run.backends.PendingTokens`."""

    def __init__(self, runner: FakeSamplingRunner) -> None:
        self.runner = runner
        self.result: npt.NDArray[np.int32] | None = None
        self.likely: list[list[Logprob] | None] = []

    def tokens(self) -> npt.NDArray[np.int32]:
        assert self.runner.under_way.popleft() is self, "asked out of order, or twice"
        while self.result is None:
            self.runner.queue.popleft()()
        return self.result

    def logprobs(self) -> list[list[Logprob] | None]:
        assert self.result is not None, "asked before the tokens"
        return self.likely
