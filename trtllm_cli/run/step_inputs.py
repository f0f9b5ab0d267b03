"""A step's plan as the arrays that the graph's inputs name; every rank makes its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from trtllm_cli.run.model_inputs import ModelInputs

if TYPE_CHECKING:
    from trtllm_cli.engine import BuildConfig
    from trtllm_cli.run.step_plan import StepPlan


class InputBuilder:
    """Keeps a block table row for each running sequence, so that a plan tells only of the blocks that are new."""

    def __init__(self, max_batch_size: int, max_blocks: int, block_size: int) -> None:
        self._tables = np.zeros((max_batch_size, max_blocks), np.int32)
        self._block_size = block_size

    @classmethod
    def of(cls, config: BuildConfig) -> InputBuilder:
        """For an engine's limits."""
        return cls(config.max_batch_size, config.blocks_per_sequence, config.tokens_per_block)

    def build(self, plan: StepPlan) -> ModelInputs:
        """The step's inputs. The arrays are new ones: they outlive the next call."""
        rows, starts, lengths, wanted = plan.sequences.T
        if len(plan.additions):
            added, places, blocks = plan.additions.T
            self._tables[added[places == 0]] = 0
            self._tables[added, places] = blocks
        seq_lens = starts + lengths
        if len(plan.tokens) == len(rows):  # a token each: what follows gives the same, and takes longer
            query_start = np.arange(len(rows) + 1, dtype=np.int32)
            positions = starts.copy()
        else:
            query_start = np.concatenate((_ZERO, lengths.cumsum(dtype=np.int32)))
            shifts = np.repeat(starts - query_start[:-1], lengths)  # from a token's place in the step to its position
            positions = np.arange(len(plan.tokens), dtype=np.int32) + shifts
            rows = np.repeat(rows, lengths)
        size = self._block_size
        places = positions // size
        held = self._tables.take(rows * self._tables.shape[1] + places)
        width = -(-int(np.maximum.reduce(seq_lens)) // size)
        ends = query_start[1:] if np.count_nonzero(wanted) == len(wanted) else query_start[1:][wanted != 0]
        return ModelInputs(
            input_ids=plan.tokens,
            positions=positions,
            slot_mapping=(held - places) * size + positions,
            block_tables=self._tables[:, :width].take(plan.sequences[:, 0], axis=0),
            query_start=query_start,
            seq_lens=seq_lens,
            logits_indices=ends - 1,
        )


_ZERO = np.zeros(1, np.int32)
