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
        return cls(config.max_batch_size, -(-config.max_seq_len // config.tokens_per_block), config.tokens_per_block)

    def build(self, plan: StepPlan) -> ModelInputs:
        """The step's inputs. The arrays are new ones: they outlive the next call."""
        rows, starts, lengths, wanted = plan.sequences.T
        added, places, blocks = plan.additions.T
        self._tables[added[places == 0]] = 0
        self._tables[added, places] = blocks
        ends = lengths.cumsum(dtype=np.int32)  # in the step
        seq_lens = starts + lengths
        positions = np.arange(len(plan.tokens), dtype=np.int32) + np.repeat(seq_lens - ends, lengths)
        held = self._tables[np.repeat(rows, lengths), positions // self._block_size]
        width = -(-int(seq_lens.max()) // self._block_size)
        return ModelInputs(
            input_ids=plan.tokens,
            positions=positions,
            slot_mapping=held * np.int32(self._block_size) + positions % self._block_size,
            block_tables=self._tables[:, :width].take(rows, axis=0),
            query_start=np.concatenate((_ZERO, ends)),
            seq_lens=seq_lens,
            logits_indices=ends[wanted != 0] - 1,
        )


_ZERO = np.zeros(1, np.int32)
