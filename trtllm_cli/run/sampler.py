"""From logits to tokens, in numpy.

Order of the steps, as transformers has them: penalties, temperature, top-k, top-p, min-p, draw. The draw is Gumbel-max:
the token of the largest logit / temperature + noise, where the noise is a function of the sequence's seed, the output
position and the token id. So a seed gives the same text whatever else is in the batch, and however it was scheduled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trtllm_cli.errors import EngineError
from trtllm_cli.run.philox import GROUP, group_bounds, gumbel
from trtllm_cli.run.request import Logprob

if TYPE_CHECKING:
    from trtllm_cli.run.request import SamplingParams

FloatArray = npt.NDArray[np.floating[Any]]
IdArray = npt.NDArray[np.intp]

# Below this a draw is the argmax but for ties, and 1 / temperature stops being useful; vLLM draws the same line.
GREEDY_TEMPERATURE = 1e-5


class SamplingState:
    """What sampling keeps of one sequence."""

    __slots__ = ("banned", "counts", "greedy", "min_tokens", "num_output", "params", "plain", "seed", "seen")

    def __init__(
        self,
        params: SamplingParams,
        *,
        seed: int,
        vocab_size: int,
        prompt: Sequence[int] = (),
        stops: Sequence[int] = (),
    ) -> None:
        self.params = params
        self.seed = seed % 2**64
        self.num_output = 0  # the output position of the next token
        self.greedy = params.temperature < GREEDY_TEMPERATURE
        self.min_tokens = params.min_tokens
        self.banned = np.array(stops, np.intp)  # until there are min_tokens
        self.seen: npt.NDArray[np.bool_] | None = None  # [vocab]: in prompt or output
        self.counts: npt.NDArray[np.float32] | None = None  # [vocab]: occurrences in the output
        if params.repetition_penalty != 1.0:
            self.seen = np.zeros(vocab_size, np.bool_)
            self.seen[np.array(prompt, np.intp)] = True
        if params.presence_penalty or params.frequency_penalty:
            self.counts = np.zeros(vocab_size, np.float32)
        self.plain = (  # argmax of the logits as they come is all that it takes
            self.greedy
            and self.seen is None
            and self.counts is None
            and params.logprobs is None
            and not (self.min_tokens and len(self.banned))
        )

    def accept(self, token_id: int) -> None:
        """Notes the token that was chosen."""
        self.num_output += 1
        if self.seen is not None:
            self.seen[token_id] = True
        if self.counts is not None:
            self.counts[token_id] += 1

    def adjust(self, logits: FloatArray) -> None:
        """Applies penalties and bans to the sequence's logits [vocab], in place."""
        if self.seen is not None:
            ids = np.flatnonzero(self.seen)
            values = logits[ids]
            penalty = np.float32(self.params.repetition_penalty)
            logits[ids] = np.where(values > 0, values / penalty, values * penalty)
        if self.counts is not None:
            ids = np.flatnonzero(self.counts)
            presence, frequency = np.float32(self.params.presence_penalty), np.float32(self.params.frequency_penalty)
            logits[ids] -= presence + frequency * self.counts[ids]
        if self.num_output < self.min_tokens:
            logits[self.banned] = -np.inf


def sample(
    logits: npt.NDArray[np.float32], states: Sequence[SamplingState]
) -> tuple[list[int], list[list[Logprob] | None]]:
    """The next token of each row of `logits` [n, vocab], which are overwritten, and logprobs where they are wanted."""
    assert len(logits) == len(states)
    for row, state in zip(logits, states, strict=True):
        if not state.plain:
            state.adjust(row)
    tokens: list[int] = logits.argmax(axis=1).tolist()
    best = logits[np.arange(len(tokens)), tokens]  # a NaN, where there is one: argmax finds it
    if not np.isfinite(best).all():
        raise not_finite()
    drawn = [i for i, state in enumerate(states) if not state.greedy]
    if drawn:
        for i, token in zip(drawn, _draw([(logits[i], best[i], states[i]) for i in drawn]), strict=True):
            tokens[i] = token
    logprobs = [
        None if state.params.logprobs is None else _logprobs(logits[i], best[i], tokens[i], state.params.logprobs)
        for i, state in enumerate(states)
    ]
    return tokens, logprobs


def not_finite() -> EngineError:
    """The error for logits that no token can be sampled from."""
    return EngineError(
        "the model's logits are not finite",
        fix="rebuild the engine with --weight-dtype float32 to see whether rounding is to blame",
    )


def _draw(rows: list[tuple[FloatArray, np.float32, SamplingState]]) -> list[int]:
    """Gumbel-max over the survivors of each row's filters; the noise of all rows is computed at once."""
    scaled = [(logits - best) * np.float32(1 / state.params.temperature) for logits, best, state in rows]  # at most 0
    states = [state for _, _, state in rows]
    survivors = [filter_tokens(x, state.params) for x, state in zip(scaled, states, strict=True)]
    many = [i for i, ids in enumerate(survivors) if ids is None or len(ids) > _MANY]
    if many:
        ruled = _contenders([scaled[i] for i in many], [survivors[i] for i in many], [states[i] for i in many])
        for i, ids in zip(many, ruled, strict=True):
            survivors[i] = ids
    rows_left = [ids for ids in survivors if ids is not None]
    scores = _scores(scaled, rows_left, states)
    return [int(ids[score.argmax()]) for ids, score in zip(rows_left, scores, strict=True)]


_MANY = 1024  # tokens, from which on it pays to rule most out before computing their noise


def _scores(scaled: list[FloatArray], ids: list[IdArray], states: list[SamplingState]) -> list[npt.NDArray[np.float64]]:
    """For each row, logit / temperature + noise of the tokens `ids`."""
    counts = [len(row) for row in ids]
    seeds, positions = _counters(states)
    noise = gumbel(np.repeat(seeds, counts), np.repeat(positions, counts), np.concatenate(ids).astype(np.uint64))
    ends = np.cumsum(counts)[:-1]
    return [x[row] + part for x, row, part in zip(scaled, ids, np.split(noise, ends), strict=True)]


def _contenders(
    scaled: list[FloatArray], survivors: list[IdArray | None], states: list[SamplingState]
) -> list[IdArray]:
    """For each row, the survivors that would beat the likely tokens if they had their group's largest noise."""
    near = [np.flatnonzero(x >= _NEAR)[:_MANY] for x in scaled]
    vocab_size = len(scaled[0])
    bounds = group_bounds(*_counters(states), -(-vocab_size // GROUP))
    contenders = []
    for x, ids, score, bound in zip(scaled, survivors, _scores(scaled, near, states), bounds, strict=True):
        floor = np.repeat((score.max() - _ROUNDING - bound).astype(np.float32), GROUP)[:vocab_size]
        contenders.append(np.flatnonzero(x >= floor) if ids is None else ids[x[ids] >= floor[ids]])
    return contenders


def _counters(states: list[SamplingState]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    seeds = np.array([state.seed for state in states], np.uint64)
    return seeds, np.array([state.num_output for state in states], np.uint64)


_NEAR = -2.0
_ROUNDING = 1e-3  # far more than float32 loses in the comparison


def filter_tokens(scaled: FloatArray, params: SamplingParams) -> IdArray | None:
    """The ids, ascending, that survive top-k, then top-p, then min-p; None where there is no filter.

    `scaled` [vocab] is logit / temperature, shifted so that the largest is 0. As in transformers and vLLM: tokens tied
    with the k-th stay; top-p keeps the fewest most likely tokens that together have at least `top_p` of what top-k
    left (equals by id); min-p keeps those at least `min_p` times as likely as the most likely.
    """
    ids: IdArray | None = None  # None: all
    if 0 < params.top_k < len(scaled):
        ids = _top_k(scaled, params.top_k)
    if params.top_p < 1:
        ids = _top_p(scaled, params.top_p) if ids is None else ids[_top_p(scaled[ids], params.top_p)]
    if params.min_p > 0:
        floor = np.log(params.min_p)
        ids = np.flatnonzero(scaled >= floor) if ids is None else ids[scaled[ids] >= floor]
    return ids


_CUTS = (-4.0, -8.0, -16.0)  # first looks: few tokens are near the best, and only those need sorting


def _top_k(scaled: FloatArray, k: int) -> IdArray:
    for cut in _CUTS:
        ids = np.flatnonzero(scaled >= cut)
        if len(ids) >= k:
            break
    else:
        ids = np.arange(len(scaled))
    values = scaled[ids]
    kth = np.partition(values, len(ids) - k)[len(ids) - k]
    return ids[values >= kth]


def _top_p(scaled: FloatArray, p: float) -> IdArray:
    weights = np.exp(scaled)
    wanted = p * weights.sum(dtype=np.float64)
    for cut in _CUTS:
        ids = np.flatnonzero(scaled >= cut)
        if weights[ids].sum(dtype=np.float64) >= wanted:
            break
    else:
        ids = np.arange(len(scaled))
    order = ids[np.argsort(-scaled[ids], kind="stable")]
    count = int(np.searchsorted(np.cumsum(weights[order], dtype=np.float64), wanted)) + 1
    return np.sort(order[:count])


def _logprobs(logits: FloatArray, best: np.float32, token: int, count: int) -> list[Logprob]:
    """The chosen token's log probability, then those of the `count` most likely (equals by id)."""
    shifted = logits - best
    log_total = np.log(np.exp(shifted).sum(dtype=np.float64))
    top: list[int] = []
    if count:
        near = _top_k(shifted, min(count, len(shifted)))
        top = near[np.argsort(-shifted[near], kind="stable")][:count].tolist()
    return [Logprob(i, float(shifted[i] - log_total)) for i in (token, *top)]
