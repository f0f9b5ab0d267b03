"""Sampling on the GPU: from the logits to tokens, and to what the next step embeds."""

from __future__ import annotations

from typing import Any

import torch
import triton

from trtllm_cli.build.backends.cuda_program import TYPES, CudaLowering, Dim, Launch

NUM_SAMPLES = "num_samples"
NUM_PENALIZED = "num_penalized"
NUM_BANNED = "num_banned"
NUM_LOGPROBS = "num_logprobs"
MOST_LOGPROBS = 20  # of the most likely tokens: as many as a request may ask for
_CAPACITY = 8192  # tokens near the best that a filter looks at before it reads the whole row
# By how many samples there are, token ids of a program, and at a time: one sample alone is spread over the machine.
_CHUNKS = ((8, 1024, 1024), (64, 8192, 4096), (None, 32768, 4096))
_LIKELY_CHUNK = 4096  # token ids of which a program finds the most likely
_PENALTY_TILE = 1024  # token ids of a program


class SamplingLaunches(CudaLowering):
    """Launches of kernels/triton/sample.py, penalties.py and logprobs.py."""

    def add_sampling(self) -> None:
        """The plan's part: what samples, what draws again where there are filters, and what gives log probabilities, by
        the number of samples; and what changes logits before. A step launches only those that its samples ask for.
        """
        self.sampling: dict[str, Any] = {}
        if not self.graph.outputs:
            return
        ways = []
        vocab, stride = self.vocab_size, self.width(self.graph.outputs[0])
        for most, chunk, tile in _CHUNKS:
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
                VOCAB=vocab, ROW_STRIDE=stride, CHUNK=chunk, TILE=tile, SPLITS_BLOCK=triton.next_power_of_2(splits),
            )  # fmt: skip
            listed = self.build_config.max_batch_size * _CAPACITY * 4
            filters = {
                "top_k_ptr": ("*i32", "i:top_k"), "top_p_ptr": ("*fp32", "i:top_p"), "min_p_ptr": ("*fp32", "i:min_p"),
                "values_ptr": ("*fp32", self.room("sampling values", listed)),
                "ids_ptr": ("*i32", self.room("sampling ids", listed)),
            }  # fmt: skip
            filtered = self.launch(
                "sample", "sample_filtered", [[NUM_SAMPLES, 1]], {**common, **filters}, num_warps=16, VOCAB=vocab,
                ROW_STRIDE=stride, SPLITS=splits, SPLITS_BLOCK=triton.next_power_of_2(splits), CAPACITY=_CAPACITY,
                TILE=2048,
            )  # fmt: skip
            ways.append((most, [plain], [filtered], self._logprobs(common, splits)))
        self.sampling = {
            "penalties": self._alone("penalize", NUM_PENALIZED, self._penalties()),
            "bans": self._alone("ban", NUM_BANNED, self._bans()),
            "plain": self._picked(ways, 1),
            "filtered": self._picked(ways, 2),
            "logprobs": self._picked(ways, 3),
        }

    @property
    def count_dtype(self) -> str:
        """What holds how often a token is in a sequence, and a bit; see kernels/triton/penalties.py."""
        return "int16" if self.build_config.max_seq_len < 1 << 15 else "int32"

    def _penalties(self) -> Launch:
        logits = self.graph.outputs[0]
        vocab, stride, dtype = self.vocab_size, self.width(logits), self.count_dtype
        room = self.build_config.max_batch_size * stride * getattr(torch, dtype).itemsize
        args = {
            "logits_ptr": ("*fp32", self.ref(logits)), "logits_rows_ptr": ("*i32", "x:penalized_logits"),
            "rows_ptr": ("*i32", "x:penalized_rows"), "uncounted_ptr": ("*i32", "x:uncounted"),
            "repetition_ptr": ("*fp32", "x:repetition_penalties"), "presence_ptr": ("*fp32", "x:presence_penalties"),
            "frequency_ptr": ("*fp32", "x:frequency_penalties"), "last_tokens_ptr": ("*i32", "last"),
            "counts_ptr": (TYPES[dtype], self.room("token counts", room)),
        }  # fmt: skip
        grid: list[Dim] = [-(-vocab // _PENALTY_TILE), [NUM_PENALIZED, 1]]
        return self.launch("penalties", "penalize", grid, args, VOCAB=vocab, ROW_STRIDE=stride, TILE=_PENALTY_TILE)

    def _bans(self) -> Launch:
        logits = self.graph.outputs[0]
        args = {"logits_ptr": ("*fp32", self.ref(logits)), "banned_ptr": ("*i32", "x:banned")}
        return self.launch("penalties", "ban", [[NUM_BANNED, 1]], args, num_warps=1, ROW_STRIDE=self.width(logits))

    def _logprobs(self, sample: dict[str, tuple[str, Any]], splits: int) -> list[Launch]:
        """After `sample` with these arguments, in which so many programs shared a row."""
        vocab, most_samples = self.vocab_size, self.build_config.max_batch_size
        chunks = -(-vocab // _LIKELY_CHUNK)
        args = {
            **{name: sample[name] for name in ("logits_ptr", "logits_rows_ptr", "partial_ptr")},
            "splits": ("i32", splits),
            "samples_ptr": ("*i32", "x:logprob_samples"), "numbers_ptr": ("*i32", "x:num_logprobs"),
            "likely_ptr": ("*i32", self.room("likely tokens", most_samples * chunks * MOST_LOGPROBS * 4)),
            "weights_ptr": ("*fp32", self.room("likely weights", most_samples * chunks * 4)),
        }  # fmt: skip
        room = most_samples * (1 + MOST_LOGPROBS) * 4
        out = {
            "tokens_ptr": sample["tokens_ptr"],
            "out_ids_ptr": ("*i32", self.room("logprob ids", room)),
            "out_logprobs_ptr": ("*fp32", self.room("logprobs", room)),
        }
        shape = {
            "VOCAB": vocab, "ROW_STRIDE": self.width(self.graph.outputs[0]), "MOST": MOST_LOGPROBS,
            "SPLITS_BLOCK": triton.next_power_of_2(-(-vocab // min(chunk for _, chunk, _ in _CHUNKS))),
        }  # fmt: skip
        likely = self.launch(
            "logprobs", "likely_of_chunks", [chunks, [NUM_LOGPROBS, 1]], args, num_warps=8, CHUNK=_LIKELY_CHUNK, **shape
        )
        last = self.launch(
            "logprobs", "logprobs", [[NUM_LOGPROBS, 1]], {**args, **out}, num_warps=8, CHUNKS=chunks,
            CHUNKS_BLOCK=triton.next_power_of_2(chunks), MOST_BLOCK=triton.next_power_of_2(MOST_LOGPROBS), **shape,
        )  # fmt: skip
        return [likely, last]

    def _picked(self, ways: list[tuple[Any, ...]], index: int) -> dict[str, Any]:
        return {"op": "sample", "by": NUM_SAMPLES, "ways": [[way[0], way[index]] for way in ways]}

    def _alone(self, op: str, by: str, launch: Launch) -> dict[str, Any]:
        return {"op": op, "by": by, "ways": [[None, [launch]]]}
