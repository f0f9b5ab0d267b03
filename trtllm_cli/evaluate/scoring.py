"""How well a model predicts text, and how far two models' predictions are apart; a slice of rows at a time.

Perplexity is exp of the mean negative log-likelihood of a token. The divergence of `other` from `reference` is
KL(reference || other) of their distributions over the vocabulary, in nats, as llama.cpp's `--kl-divergence` has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from trtllm_cli.evaluate.program import Program
from trtllm_cli.evaluate.text import Window

ROWS = 64  # tokens whose distributions are in memory at once, in float64


class Scorer(Protocol):
    """Something that predicts tokens."""

    @property
    def vocab_size(self) -> int:
        """Width of its logits."""
        ...

    def logits(self, ids: Sequence[int]) -> Iterator[torch.Tensor]:
        """float32 logits [rows, vocab_size] of the tokens of a sequence, in order, in pieces of any size.

        A piece may be overwritten when the next is asked for.
        """
        ...


class Progress(Protocol):
    """Told how far a measurement is."""

    def __call__(self, done: int, total: int) -> None:
        """`done` tokens of `total`."""


@dataclass(frozen=True)
class Score:
    """What a model makes of a text."""

    nll: float  # nats, over all tokens
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp of the mean; infinity where that is too large for a float."""
        mean = self.nll / self.tokens
        return math.exp(mean) if mean < 700 else math.inf if mean == mean else math.nan


@dataclass(frozen=True)
class Divergence:
    """What two models make of the same text."""

    reference: Score
    other: Score
    kl: float  # nats, over all tokens
    agreed: int  # tokens for which both have the same first choice

    @property
    def mean_kl(self) -> float:
        """Nats a token."""
        return self.kl / self.reference.tokens

    @property
    def top1_agreement(self) -> float:
        """Share of tokens, 0 to 1."""
        return self.agreed / self.reference.tokens

    @property
    def perplexity_increase(self) -> float:
        """0.1: the other's perplexity is a tenth larger."""
        return self.other.perplexity / self.reference.perplexity - 1


class ProgramScorer:
    """A Program as a Scorer."""

    def __init__(self, program: Program) -> None:
        self._program = program

    @property
    def vocab_size(self) -> int:
        """See Scorer."""
        return self._program.vocab_size

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Iterator[torch.Tensor]:
        """See Scorer."""
        hidden = self._program.hidden(torch.tensor([ids]))
        for rows in hidden[0].split(ROWS):
            yield self._program.head(rows)


def perplexity(scorer: Scorer, windows: Sequence[Window], progress: Progress | None = None) -> Score:
    """The score of the windows' tokens."""
    tally = Tally()
    for window in windows:
        for rows, targets in predicted(scorer.logits(window.ids), window):
            tally.add(rows, targets)
        if progress:
            progress(tally.tokens, total_scored(windows))
    return tally.score


def divergence(
    reference: Scorer, other: Scorer, windows: Sequence[Window], progress: Progress | None = None
) -> Divergence:
    """Both scores, and how far the predictions are apart. The two have the same vocabulary."""
    assert reference.vocab_size == other.vocab_size
    tally = PairTally()
    for window in windows:
        pieces = zip(
            predicted(reference.logits(window.ids), window),
            predicted(other.logits(window.ids), window),
            strict=True,
        )
        for (wanted, targets), (got, _) in pieces:
            tally.add(wanted, got, targets)
        if progress:
            progress(tally.reference.tokens, total_scored(windows))
    return tally.divergence


def total_scored(windows: Iterable[Window]) -> int:
    """Tokens that count."""
    return sum(window.num_scored for window in windows)


def predicted(pieces: Iterable[torch.Tensor], window: Window) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The rows that predict the window's scored tokens, and these tokens, ROWS at a time."""
    ids = torch.tensor(window.ids)
    start, stop = window.scored_from - 1, len(ids) - 1  # row i predicts token i + 1
    for position, rows in _regrouped(pieces):
        first, last = max(start - position, 0), min(stop - position, len(rows))
        if first < last:
            yield rows[first:last], ids[position + first + 1 : position + last + 1].to(rows.device)


def _regrouped(pieces: Iterable[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
    """The same rows in pieces of ROWS, each with the place of its first."""
    position, held = 0, None
    for piece in pieces:
        rows = piece if held is None else torch.cat([held, piece])
        while len(rows) >= ROWS:
            yield position, rows[:ROWS]
            position, rows = position + ROWS, rows[ROWS:]
        held = rows.clone() if len(rows) else None
    if held is not None:
        yield position, held


class Tally:
    """Sums over tokens, in float64."""

    def __init__(self) -> None:
        self.nll, self.tokens = 0.0, 0

    def add(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Counts the `targets` [rows] that `logits` [rows, vocab] predict; the log-probabilities, float64."""
        log_p = logits.double().log_softmax(-1)
        self.nll -= float(log_p.gather(1, targets.long().unsqueeze(1)).sum())
        self.tokens += len(targets)
        return log_p

    @property
    def score(self) -> Score:
        """So far."""
        return Score(self.nll, self.tokens)


class PairTally:
    """Sums over the tokens of two models."""

    def __init__(self) -> None:
        self.reference, self.other = Tally(), Tally()
        self._kl, self._agreed = 0.0, 0

    def add(self, wanted: torch.Tensor, got: torch.Tensor, targets: torch.Tensor) -> None:
        """Counts the reference's and the other's logits for the same tokens."""
        log_p, log_q = self.reference.add(wanted, targets), self.other.add(got.to(wanted.device), targets)
        self._kl += float((log_p.exp() * (log_p - log_q)).sum())
        self._agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())

    @property
    def divergence(self) -> Divergence:
        """So far."""
        return Divergence(self.reference.score, self.other.score, self._kl, self._agreed)
