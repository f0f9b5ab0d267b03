"""A step's inputs on their way to the device: packed into host memory, uploaded by one copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    from trtllm_cli.engine import BuildConfig
    from trtllm_cli.run.backends.cuda_device import Device
    from trtllm_cli.run.model_inputs import IntArray, ModelInputs
    from trtllm_cli.run.sampling_inputs import SamplingInputs

_ALIGNMENT = 64  # elements: 256 bytes
_PADDED_SLOT = -1
MOST_BANNED = 32  # token ids of a request that min_tokens bans on the device


class Layout:
    """Where each input begins, in elements of four bytes."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.offsets: dict[str, int] = {}
        position = 0
        for name, size in sizes.items():
            self.offsets[name] = position
            position += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.size = position
        self.sizes = sizes


class InputLayout(Layout):
    """Of what every step has. Block tables come last, and only as many rows as there are."""

    def __init__(self, limits: BuildConfig, *, mixed: bool) -> None:
        tokens = limits.max_num_tokens if mixed else limits.max_batch_size
        seqs = limits.max_batch_size
        self.max_blocks = limits.blocks_per_sequence
        self.mixed = mixed
        super().__init__({
            "query_start": seqs + 1, "seq_lens": seqs, "logits_indices": seqs, "logits_seqs": seqs, "logits_lens": seqs,
            "first_prompt": 1, "logits_rows": seqs, "rows": seqs, "seeds": 2 * seqs, "output_positions": seqs,
            "temperatures": seqs, "top_k": seqs, "top_p": seqs, "min_p": seqs, "step": 1,
            "input_ids": tokens, "positions": tokens, "slot_mapping": tokens, "block_tables": seqs * self.max_blocks,
        })  # fmt: skip


class SpecialLayout(Layout):
    """Of penalties, bans and log probabilities. Bans come last, and only as many as there are."""

    def __init__(self, limits: BuildConfig) -> None:
        names = (
            "penalized_logits", "penalized_rows", "uncounted", "repetition_penalties", "presence_penalties",
            "frequency_penalties", "logprob_samples", "num_logprobs",
        )  # fmt: skip
        seqs = limits.max_batch_size
        super().__init__({**dict.fromkeys(names, seqs), "banned": seqs * MOST_BANNED * 2})


def ragged(inputs: ModelInputs) -> tuple[int, bool]:
    """Of a step's sequences: how many come from the first one on that has several tokens, at least the last one; and
    whether any has one token alone.
    """
    several = np.diff(inputs.query_start) > 1
    return inputs.num_seqs - int(several[:-1].argmax()) if several[:-1].any() else 1, not several.all()


class _Slot:
    """Host memory for one step's inputs, and the device memory that every step of its kind reads."""

    def __init__(self, device: Device, layout: Layout, on_device: torch.Tensor) -> None:
        import torch

        self._pinned = device.host(layout.size * 4).view(torch.int32)
        self._on_device = on_device
        array: npt.NDArray[np.int32] = self._pinned.numpy()
        self._views = {
            name: array[start : start + layout.sizes[name]] for name, start in layout.offsets.items()
        }  # fmt: skip

    def _upload(self, end: int) -> None:
        self._on_device[:end].copy_(self._pinned[:end], non_blocking=True)


class InputSlot(_Slot):
    """Of what every step has."""

    def __init__(self, device: Device, layout: InputLayout, on_device: torch.Tensor) -> None:
        super().__init__(device, layout, on_device)
        self._layout = layout

    def fill(
        self, inputs: ModelInputs, num_tokens: int, num_seqs: int, num_logits: int, first_prompt: int, step: int
    ) -> None:
        """Writes a step's arrays, padded to these counts, its first prompt and its number."""
        views, tokens, seqs = self._views, inputs.num_tokens, inputs.num_seqs
        for name, count, pad in (
            ("input_ids", num_tokens, 0), ("positions", num_tokens, 0), ("slot_mapping", num_tokens, _PADDED_SLOT),
            ("seq_lens", num_seqs, 0), ("query_start", num_seqs + 1, tokens), ("logits_indices", num_logits, 0),
        ):  # fmt: skip
            values = getattr(inputs, name)
            views[name][: len(values)] = values
            views[name][len(values) : count] = pad
        if self._layout.mixed:  # of each row its sequence, and how many tokens of that it sees
            indices = views["logits_indices"][:num_logits]
            views["logits_seqs"][:num_logits] = inputs.query_start.searchsorted(indices, side="right") - 1
            views["logits_lens"][:num_logits] = inputs.positions[indices] + 1
            views["first_prompt"][0] = first_prompt
        views["step"][0] = step
        tables = views["block_tables"].reshape(-1, self._layout.max_blocks)
        tables[:seqs, : inputs.block_tables.shape[1]] = inputs.block_tables

    def fill_sampling(self, sampling: SamplingInputs) -> None:
        """Writes a step's sampling arrays."""
        n = len(sampling.rows)
        v = self._views
        v["logits_rows"][:n], v["rows"][:n] = sampling.logits_rows, sampling.rows
        v["seeds"][: 2 * n] = np.ascontiguousarray(sampling.seeds).view(np.int32)
        v["output_positions"][:n], v["top_k"][:n] = sampling.positions, sampling.top_k
        for name in ("temperatures", "top_p", "min_p"):
            v[name][:n].view(np.float32)[:] = getattr(sampling, name)

    def upload(self, num_seqs: int) -> None:
        """Enqueues the copy."""
        self._upload(self._layout.offsets["block_tables"] + num_seqs * self._layout.max_blocks)


class SpecialSlot(_Slot):
    """Of penalties, bans and log probabilities."""

    def __init__(self, device: Device, layout: SpecialLayout, on_device: torch.Tensor) -> None:
        super().__init__(device, layout, on_device)
        self._banned = layout.offsets["banned"]

    def upload(self, sampling: SamplingInputs) -> None:
        """Writes a step's arrays and enqueues the copy."""
        v, rows = self._views, sampling.rows[sampling.penalized]
        uncounted = ~np.isin(rows, sampling.histories[:, 0])
        logits = sampling.logits_rows[sampling.penalized]
        for name, values in (("penalized_logits", logits), ("penalized_rows", rows), ("uncounted", uncounted)):
            v[name][: len(rows)] = values
        for name in ("repetition_penalties", "presence_penalties", "frequency_penalties"):
            v[name][: len(rows)].view(np.float32)[:] = getattr(sampling, name)
        for name, values in zip(("logprob_samples", "num_logprobs"), sampling.logprobs.T, strict=True):
            v[name][: len(values)] = values
        v["banned"][: sampling.banned.size] = sampling.banned.reshape(-1)
        self._upload(self._banned + sampling.banned.size)


def count_tokens(prompt: IntArray, output: IntArray, counts: npt.NDArray[Any]) -> None:
    """Writes a sequence's row of the device's token counts; see kernels/triton/penalties.py."""
    counts[:] = np.bincount(output, minlength=len(counts))
    counts[prompt] |= np.iinfo(counts.dtype).min
