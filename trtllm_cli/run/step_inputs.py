"""A batch of sequences, as the arrays of one step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trtllm_cli.run.model_inputs import ModelInputs

if TYPE_CHECKING:
    from trtllm_cli.run.scheduler import Batch


class InputBuilder:
    """Keeps a block table row for each running sequence, so that a step writes only the blocks that are new."""

    def __init__(self, max_batch_size: int, max_blocks: int, block_size: int) -> None:
        self._tables = np.zeros((max_batch_size, max_blocks), np.int32)
        self._block_size = block_size

    def build(self, batch: Batch) -> ModelInputs:
        """The step's inputs. The arrays are new ones: they outlive the next call."""
        input_ids: list[int] = []
        positions: list[int] = []
        seq_lens: list[int] = []
        wanted: list[int] = []  # the last token of each sequence that has no more to compute
        for seq, length in zip(batch.sequences, batch.lengths, strict=True):
            start, end = seq.num_computed, seq.num_computed + length
            if seq.num_row_blocks < len(seq.blocks):
                self._write_row(seq.row, seq.num_row_blocks, seq.blocks)
                seq.num_row_blocks = len(seq.blocks)
            if length == 1:
                input_ids.append(seq.token_ids[start])
                positions.append(start)
            else:
                input_ids += seq.token_ids[start:end]
                positions += range(start, end)
            seq_lens.append(end)
            if end == len(seq.token_ids):
                wanted.append(len(input_ids) - 1)
        rows = np.array([seq.row for seq in batch.sequences], np.int32)
        lengths = np.array(batch.lengths, np.int32)
        where = np.array(positions, np.int32)
        blocks = self._tables[np.repeat(rows, lengths), where // self._block_size]
        width = -(-max(seq_lens) // self._block_size)
        return ModelInputs(
            input_ids=np.array(input_ids, np.int32),
            positions=where,
            slot_mapping=blocks * np.int32(self._block_size) + where % self._block_size,
            block_tables=self._tables[:, :width].take(rows, axis=0),
            query_start=np.concatenate((_ZERO, lengths.cumsum(dtype=np.int32))),
            seq_lens=np.array(seq_lens, np.int32),
            logits_indices=np.array(wanted, np.int32),
        )

    def _write_row(self, row: int, start: int, blocks: list[int]) -> None:
        if start == 0:
            self._tables[row] = 0
        self._tables[row, start : len(blocks)] = blocks[start:]


_ZERO = np.zeros(1, np.int32)
