"""What a runner that samples needs to know of each token that a step gives, as arrays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trtllm_cli.run.sampler import GREEDY_TEMPERATURE

if TYPE_CHECKING:
    from trtllm_cli.run.model_inputs import IntArray
    from trtllm_cli.run.sequence import Request, Sequence
    from trtllm_cli.run.step_plan import StepPlan

_NO_NUMBERS = np.empty(0, np.float32)
_NO_IDS = np.empty(0, np.int32)
_NO_PAIRS = np.empty((0, 2), np.int32)
_NO_HISTORIES = np.empty((0, 3), np.int32)


@dataclass(frozen=True)
class SamplingInputs:
    """One entry for each token to sample, C-contiguous. The names are those of SamplingParams, and so are the meanings.

    Several entries may name the same logits: those of a prompt with n answers.

    What few requests ask for has arrays of its own, empty where nobody does. Penalties come first, then bans, and then
    tokens are sampled. For penalties the runner counts each row's tokens: those of its history, which is given once,
    and from then on every token that it samples for the row, until a history is given again.
    """

    logits_rows: IntArray  # [n]: which of the step's logits
    rows: IntArray  # [n]: the sequence's row of the batch, each at most once
    seeds: npt.NDArray[np.uint64]  # [n]
    positions: IntArray  # [n]: of the token in the output: with the seed and the token's id, what noise depends on
    temperatures: npt.NDArray[np.float32]  # [n]: 0 is greedy
    top_k: IntArray  # [n]: 0 is off
    top_p: npt.NDArray[np.float32]  # [n]: 1 is off
    min_p: npt.NDArray[np.float32]  # [n]: 0 is off

    penalized: IntArray = field(default_factory=lambda: _NO_IDS)  # [p]: entries, of those with the same logits one
    repetition_penalties: npt.NDArray[np.float32] = field(default_factory=lambda: _NO_NUMBERS)  # [p]
    presence_penalties: npt.NDArray[np.float32] = field(default_factory=lambda: _NO_NUMBERS)  # [p]
    frequency_penalties: npt.NDArray[np.float32] = field(default_factory=lambda: _NO_NUMBERS)  # [p]
    histories: IntArray = field(default_factory=lambda: _NO_HISTORIES)  # [h, 3]: row, tokens of prompt, and in all
    history_tokens: IntArray = field(default_factory=lambda: _NO_IDS)  # of each history its tokens, end to end
    banned: IntArray = field(default_factory=lambda: _NO_PAIRS)  # [b, 2]: which of the step's logits, token
    logprobs: IntArray = field(default_factory=lambda: _NO_PAIRS)  # [l, 2]: entry, how many of the most likely tokens

    def message(self) -> IntArray:
        """All of it as one array, for other ranks: how long each array is, then they."""
        arrays = [getattr(self, name) for name in _FIELDS]
        counts = np.array([len(array) for array in arrays], np.int32)
        return np.concatenate([counts, *(array.reshape(-1).view(np.int32) for array in arrays)])

    @classmethod
    def of_message(cls, message: IntArray) -> SamplingInputs:
        """What `message` was made from."""
        parts: dict[str, Any] = {}
        start = len(_FIELDS)
        for count, (name, (dtype, columns)) in zip(message[:start].tolist(), _FIELDS.items(), strict=True):
            end = start + count * columns * np.dtype(dtype).itemsize // 4
            part: Any = message[start:end].view(dtype)
            parts[name] = part.reshape(-1, columns) if columns > 1 else part
            start = end
        assert start == len(message), f"a message of {len(message)} numbers says that it has {start}"
        return cls(**parts)


# How each array is sent: its dtype, and its columns.
_FIELDS: dict[str, tuple[type, int]] = {
    **dict.fromkeys(("logits_rows", "rows", "positions", "top_k", "penalized", "history_tokens"), (np.int32, 1)),
    "seeds": (np.uint64, 1),
    **dict.fromkeys(("temperatures", "top_p", "min_p"), (np.float32, 1)),
    **dict.fromkeys(("repetition_penalties", "presence_penalties", "frequency_penalties"), (np.float32, 1)),
    **dict.fromkeys(("banned", "logprobs"), (np.int32, 2)),
    "histories": (np.int32, 3),
}


class SamplingTable:
    """Keeps of each running sequence what does not change, by its row: a step's entries are taken from arrays."""

    def __init__(self, max_batch_size: int) -> None:
        self._num_prompt = np.zeros(max_batch_size, np.int32)
        self._seeds = np.zeros(max_batch_size, np.uint64)
        self._temperatures = np.zeros(max_batch_size, np.float32)
        self._top_k = np.zeros(max_batch_size, np.int32)
        self._top_p = np.zeros(max_batch_size, np.float32)
        self._min_p = np.zeros(max_batch_size, np.float32)
        self._penalties = np.zeros((3, max_batch_size), np.float32)  # repetition, presence, frequency
        self._is_counted = np.zeros(max_batch_size, np.bool_)  # the runner has had the row's history
        self._min_tokens = np.zeros(max_batch_size, np.int32)  # 0 where no token would be banned
        self._stops: list[list[int]] = [[] for _ in range(max_batch_size)]
        self._logprobs = np.full(max_batch_size, -1, np.int32)  # -1: none
        self._special: set[int] = set()  # rows that ask for any of these, or did before they were free

    def join(self, sequences: list[Sequence]) -> None:
        """Writes the rows of those that no plan has told of since they were given theirs.

        Where the runner has sampled for the row already, as for a fork, it is written.
        """
        for seq in sequences:
            if not seq.num_row_blocks and not seq.num_unknown:
                self._write(seq.row, seq.request, seq.index)

    def sampled_elsewhere(self, sequences: list[Sequence]) -> None:
        """Notes that the runner does not see these sequences' next token."""
        for seq in sequences:
            self._is_counted[seq.row] = False

    def build(self, plan: StepPlan, sequences: list[Sequence], logits_rows: list[int] | None) -> SamplingInputs:
        """The entries of a step that samples for `sequences`. The arrays are new ones.

        `logits_rows`: which of the step's logits each samples from; None where they are theirs, one for each. Where it
        is given, some may have been forked just now.
        """
        rows, starts, lengths, wanted = plan.sequences.T
        seq_lens = starts + lengths
        if logits_rows is None and len(sequences) == len(rows):
            return self._take(sequences, np.arange(len(rows), dtype=np.int32), rows.copy(), seq_lens)
        rows, seq_lens = rows[wanted != 0], seq_lens[wanted != 0]
        if logits_rows is None:
            return self._take(sequences, np.arange(len(rows), dtype=np.int32), rows, seq_lens)
        self.join(sequences)
        rows = np.array([seq.row for seq in sequences], np.int32)
        return self._take(sequences, np.array(logits_rows, np.int32), rows, seq_lens[logits_rows])

    def _write(self, row: int, request: Request, index: int) -> None:
        params = request.params
        self._num_prompt[row] = request.num_prompt
        self._seeds[row] = (request.seed + index) % 2**64
        self._temperatures[row] = params.temperature if params.temperature >= GREEDY_TEMPERATURE else 0
        self._top_k[row] = min(params.top_k, _INT32_MAX)  # more than any vocabulary has
        self._top_p[row] = params.top_p
        self._min_p[row] = params.min_p
        penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
        min_tokens = params.min_tokens if request.stops else 0
        self._penalties[:, row] = penalties
        self._is_counted[row] = False
        self._min_tokens[row] = min_tokens
        self._stops[row] = sorted(request.stops)
        self._logprobs[row] = -1 if params.logprobs is None else params.logprobs
        if penalties != _NO_PENALTIES or min_tokens or params.logprobs is not None:
            self._special.add(row)
        else:
            self._special.discard(row)

    def _take(
        self, sequences: list[Sequence], logits_rows: IntArray, rows: IntArray, seq_lens: IntArray
    ) -> SamplingInputs:
        index = rows.astype(np.intp)  # once, not in each take
        positions = seq_lens - self._num_prompt.take(index)
        more = self._take_special(sequences, logits_rows, index, positions) if self._special else {}
        return SamplingInputs(
            logits_rows=logits_rows,
            rows=rows,
            seeds=self._seeds.take(index),
            positions=positions,
            temperatures=self._temperatures.take(index),
            top_k=self._top_k.take(index),
            top_p=self._top_p.take(index),
            min_p=self._min_p.take(index),
            **more,
        )

    def _take_special(
        self, sequences: list[Sequence], logits_rows: IntArray, index: npt.NDArray[np.intp], positions: IntArray
    ) -> dict[str, Any]:
        """The arrays of what few requests ask for."""
        penalties = self._penalties.take(index, axis=1)
        penalized = np.flatnonzero((penalties.T != _NO_PENALTIES).any(axis=1))
        new = [sequences[i] for i in penalized[~self._is_counted[index[penalized]]]]
        self._is_counted[index[penalized]] = True
        assert not any(seq.num_unknown for seq in new)
        histories = [(seq.row, seq.request.num_prompt, len(seq.token_ids)) for seq in new]
        penalized = penalized[np.unique(logits_rows[penalized], return_index=True)[1]]
        banning = np.flatnonzero(positions < self._min_tokens.take(index)).tolist()
        banned = [(logits_rows[i], token) for i in banning for token in self._stops[index[i]]]
        logprobs = self._logprobs.take(index)
        wanted = np.flatnonzero(logprobs >= 0)
        repetition, presence, frequency = penalties.take(penalized, axis=1)
        return {
            "penalized": penalized.astype(np.int32),
            "repetition_penalties": repetition,
            "presence_penalties": presence,
            "frequency_penalties": frequency,
            "histories": np.array(histories, np.int32).reshape(-1, 3),
            "history_tokens": np.array([token for seq in new for token in seq.token_ids], np.int32),
            "banned": np.array(banned, np.int32).reshape(-1, 2),
            "logprobs": np.stack((wanted, logprobs[wanted]), axis=1).astype(np.int32),
        }


_NO_PENALTIES = (1.0, 0.0, 0.0)
_INT32_MAX = 2**31 - 1
