"""Sampling on the GPU: from the logits to tokens, and to what the next step embeds."""

from __future__ import annotations

from typing import Any

import triton

from trtllm_cli.build.backends.cuda_program import CudaLowering, Launch

NUM_SAMPLES = "num_samples"
_CAPACITY = 8192  # tokens near the best that a filter looks at before it reads the whole row
# By how many samples there are, token ids of a program, and at a time: one sample alone is spread over the machine.
_CHUNKS = ((8, 1024, 1024), (64, 8192, 4096), (None, 32768, 4096))


class SamplingLaunches(CudaLowering):
    """Launches of kernels/triton/sample.py."""

    def add_sampling(self) -> None:
        """The plan's part: by the number of samples, what samples, and what draws again where there are filters."""
        self.sampling: dict[str, Any] = {}
        if not self.graph.outputs:
            return
        ways = []
        for most, chunk, tile in _CHUNKS:
            vocab = self.width(self.graph.outputs[0])
            splits = -(-vocab // chunk)
            samples = self.build_config.max_batch_size if most is None else most
            common = {
                "logits_ptr": ("*fp32", self.ref(self.graph.outputs[0])), "logits_rows_ptr": ("*i32", "i:logits_rows"),
                "rows_ptr": ("*i32", "i:rows"), "seeds_ptr": ("*i32", "i:seeds"),
                "positions_ptr": ("*i32", "i:output_positions"), "temperatures_ptr": ("*fp32", "i:temperatures"),
                "partial_ptr": ("*fp32", self.room("sampling partial", samples * splits * 16)),
                "tokens_ptr": ("*i32", self.room("tokens", self.build_config.max_batch_size * 4)),
                "last_tokens_ptr": ("*i32", "last"),
            }  # fmt: skip
            counters = ("*i32", self.room("sampling counters", samples * 4))
            plain = self.launch(
                "sample", "sample", [splits, [NUM_SAMPLES, 1]], {**common, "counters_ptr": counters}, num_warps=4,
                VOCAB=vocab, ROW_STRIDE=vocab, CHUNK=chunk, TILE=tile, SPLITS_BLOCK=triton.next_power_of_2(splits),
            )  # fmt: skip
            listed = self.build_config.max_batch_size * _CAPACITY * 4
            filters = {
                "top_k_ptr": ("*i32", "i:top_k"), "top_p_ptr": ("*fp32", "i:top_p"), "min_p_ptr": ("*fp32", "i:min_p"),
                "values_ptr": ("*fp32", self.room("sampling values", listed)),
                "ids_ptr": ("*i32", self.room("sampling ids", listed)),
            }  # fmt: skip
            filtered = self.launch(
                "sample", "sample_filtered", [[NUM_SAMPLES, 1]], {**common, **filters}, num_warps=16, VOCAB=vocab,
                ROW_STRIDE=vocab, SPLITS=splits, SPLITS_BLOCK=triton.next_power_of_2(splits), CAPACITY=_CAPACITY,
                TILE=2048,
            )  # fmt: skip
            ways.append((most, plain, filtered))
        self.sampling = {"plain": self._picked(ways, 1), "filtered": self._picked(ways, 2)}

    def _picked(self, ways: list[tuple[int | None, Launch, Launch]], index: int) -> dict[str, Any]:
        return {"op": "sample", "by": NUM_SAMPLES, "ways": [[way[0], [way[index]]] for way in ways]}
