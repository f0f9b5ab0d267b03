"""A Runner whose logits are a hash of each sequence's tokens, read back through the block tables.

Its "KV cache" keeps the token and position written to each slot. A wrong block table, a lost or stale block, or a slot
written twice therefore gives a wrong token. `expected_tokens` is what a correct executor generates greedily.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trtllm_cli.run.model_inputs import ModelInputs

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
