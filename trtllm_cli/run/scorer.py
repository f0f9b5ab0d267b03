"""An engine as something that predicts every token of a sequence, for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np
import torch

from trtllm_cli.engine import Engine
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.run.backends import Runner, load_runner
from trtllm_cli.run.communicator import SingleRank
from trtllm_cli.run.load import LoadOptions, cache_blocks
from trtllm_cli.run.model_inputs import ModelInputs


class EngineScorer:
    """evaluate.scoring.Scorer of an engine's runner: one sequence at a time, in chunks that a step can hold."""

    def __init__(self, engine: Engine, runner: Runner) -> None:
        self._runner, limits = runner, engine.config.build_config
        self._vocab_size = engine.config.pretrained_config.vocab_size
        # A step computes logits for at most max_batch_size rows.
        self._chunk = min(limits.max_num_tokens, limits.max_batch_size)
        self._block_size, self._max_seq_len = limits.tokens_per_block, limits.max_seq_len

    @classmethod
    def open(cls, engine: Engine, num_threads: int | None = None) -> Self:
        """Checks the engine's files and loads it. Raises UnsupportedError for one of several ranks."""
        mapping = engine.config.pretrained_config.mapping
        if mapping.world_size > 1:
            raise UnsupportedError(
                f"this engine is split over {mapping.world_size} ranks; engines of one rank can be evaluated",
                where=str(engine.path),
                fix="evaluate the checkpoint that it was built from, or build one of a single rank",
            )
        (rank,) = mapping.ranks
        engine.verify(rank)
        runner = load_runner(engine, rank, SingleRank(), num_threads=num_threads)
        try:
            limits = engine.config.build_config
            one = limits.blocks_per_sequence
            runner.allocate_kv_cache(cache_blocks(runner, limits, LoadOptions(max_num_blocks=one)))
            return cls(engine, runner)
        except BaseException:
            runner.close()
            raise

    @property
    def vocab_size(self) -> int:
        """See Scorer."""
        return self._vocab_size

    def logits(self, ids: Sequence[int]) -> Iterator[torch.Tensor]:
        """See Scorer; at most max_seq_len tokens."""
        assert len(ids) <= self._max_seq_len
        tokens = np.array(ids, np.int32)
        for start in range(0, len(tokens), self._chunk):
            logits = self._runner.forward(self._inputs(tokens[start : start + self._chunk], start))
            assert logits is not None
            yield torch.from_numpy(logits[:, : self._vocab_size])

    def close(self) -> None:
        """Frees threads and memory."""
        self._runner.close()

    def _inputs(self, tokens: np.ndarray[tuple[int], np.dtype[np.int32]], start: int) -> ModelInputs:
        """A step of the only sequence, whose tokens lie in the cache in order."""
        count, end = len(tokens), start + len(tokens)
        positions = np.arange(start, end, dtype=np.int32)
        return ModelInputs(
            input_ids=tokens,
            positions=positions,
            slot_mapping=positions,
            block_tables=np.arange(-(-end // self._block_size), dtype=np.int32)[None],
            query_start=np.array([0, count], np.int32),
            seq_lens=np.array([end], np.int32),
            logits_indices=np.arange(count, dtype=np.int32),
        )
