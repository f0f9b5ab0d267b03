"""Perplexity and divergence against their definitions, in pieces of every size."""

import math

import pytest
import torch

from tests.tiny_configs import config, random_weights
from trtllm_cli.evaluate.program import Program
from trtllm_cli.evaluate.scoring import ProgramScorer, Score, divergence, perplexity
from trtllm_cli.evaluate.text import Window
from trtllm_cli.models import trace_model

VOCAB = 50


class Fixed:
    """Random logits that depend on nothing but the position, in pieces."""

    vocab_size = VOCAB

    def __init__(self, seed, piece, length=200):
        self.rows = torch.randn(length, VOCAB, generator=torch.Generator().manual_seed(seed))
        self.piece = piece

    def logits(self, ids):
        buffer = torch.empty(self.piece, VOCAB)  # one for all pieces, as a runner has it
        for rows in self.rows[: len(ids)].split(self.piece):
            buffer[: len(rows)] = rows
            yield buffer[: len(rows)]


def ids_of(length, seed=0):
    return tuple(torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


WINDOWS = [Window(ids_of(150)), Window(ids_of(70, 1), scored_from=40), Window(ids_of(2, 2))]


def expected(p, q=None):
    nll, kl, agreed, tokens = 0.0, 0.0, 0, 0
    for w in WINDOWS:
        for i in range(w.scored_from, len(w.ids)):
            a = p.rows[i - 1].double().softmax(0)
            b = (q or p).rows[i - 1].double().softmax(0)
            nll -= math.log(a[w.ids[i]])
            kl += float((a * (a / b).log()).sum())
            agreed += int(a.argmax() == b.argmax())
            tokens += 1
    return nll, kl, agreed, tokens


@pytest.mark.parametrize("piece", [1, 7, 64, 100, 200])
def test_perplexity(piece):
    scorer, told = Fixed(0, piece), []
    score = perplexity(scorer, WINDOWS, lambda done, total: told.append((done, total)))
    nll, _, _, tokens = expected(scorer)
    assert score.tokens == tokens == 149 + 30 + 1
    assert score.nll == pytest.approx(nll, rel=1e-9)
    assert score.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-9)
    assert told == [(149, 180), (179, 180), (180, 180)]


@pytest.mark.parametrize(("piece", "other"), [(64, 64), (7, 100), (200, 1)])
def test_divergence(piece, other):
    p, q = Fixed(0, piece), Fixed(1, other)
    found = divergence(p, q, WINDOWS)
    nll, kl, agreed, tokens = expected(p, q)
    assert found.reference == Score(pytest.approx(nll, rel=1e-9), tokens)
    assert found.other.nll == pytest.approx(expected(q)[0], rel=1e-9)
    assert found.mean_kl == pytest.approx(kl / tokens, rel=1e-9)
    assert found.top1_agreement == agreed / tokens
    assert found.perplexity_increase == pytest.approx(found.other.perplexity / found.reference.perplexity - 1)
    same = divergence(p, Fixed(0, other), WINDOWS)
    assert same.mean_kl == 0
    assert same.top1_agreement == 1
    assert same.perplexity_increase == 0


def test_a_score_that_is_no_number_or_huge_is_said_so():
    assert math.isnan(Score(math.nan, 3).perplexity)
    assert Score(1e6, 3).perplexity == math.inf


def test_a_program_is_scored_in_slices():
    c = config("llama")
    graph = trace_model(c, c.mapping.ranks[0])
    program = Program(graph, random_weights(graph).__getitem__)
    ids = [t % c.vocab_size for t in ids_of(60)] * 2
    with torch.inference_mode():
        want = torch.nn.functional.cross_entropy(program(torch.tensor([ids]))[0, :-1], torch.tensor(ids[1:]))
    score = perplexity(ProgramScorer(program), [Window(tuple(ids))])
    assert score.nll / score.tokens == pytest.approx(float(want), rel=1e-5)
