import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtllm_cli.errors import EngineError
from trtllm_cli.run.philox import gumbel
from trtllm_cli.run.request import SamplingParams
from trtllm_cli.run.sampler import SamplingState, filter_tokens, sample


def state_of(vocab_size, *, seed=0, position=0, prompt=(), stops=(), **params):
    state = SamplingState(SamplingParams(**params), seed=seed, vocab_size=vocab_size, prompt=prompt, stops=stops)
    state.num_output = position
    return state


def draw(logits, n, **params):
    """Counts of `n` draws from one row of logits, at successive positions."""
    counts = np.zeros(len(logits), np.int64)
    for start in range(0, n, 500):
        states = [state_of(len(logits), position=i, **params) for i in range(start, min(n, start + 500))]
        tokens, _ = sample(np.tile(np.float32(logits), (len(states), 1)), states)
        np.add.at(counts, tokens, 1)
    return counts


def assert_follows(counts, probabilities):
    """Chi-square at 0.1 %, by Wilson and Hilferty; nothing where there should be nothing."""
    assert (counts[probabilities == 0] == 0).all()
    expected = probabilities * counts.sum()
    usual = expected >= 5
    seen = np.append(counts[usual], counts[~usual].sum())
    wanted = np.append(expected[usual], expected[~usual].sum())
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    freedom = len(seen) - 1
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 3.1, f"chi-square {statistic:.1f} with {freedom} degrees of freedom"


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


LOGITS = np.random.default_rng(0).standard_normal(300) * 1.5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", [1, 2**62])
def test_draws_follow_softmax(temperature, seed):
    assert_follows(draw(LOGITS, 6000, temperature=temperature, seed=seed), softmax(LOGITS / temperature))


def test_draws_from_a_large_vocabulary_follow_softmax():
    logits = np.random.default_rng(1).standard_normal(3000) * 2
    assert_follows(draw(logits, 6000, temperature=1.0), softmax(logits))


def test_draws_follow_the_filtered_softmax():
    kept = plain_filter(LOGITS.astype(np.float32) / np.float32(0.9), k=40, p=0.8, min_p=0.05)
    probabilities = np.zeros(300)
    probabilities[kept] = softmax(LOGITS[kept] / 0.9)
    assert_follows(draw(LOGITS, 6000, temperature=0.9, top_k=40, top_p=0.8, min_p=0.05), probabilities)


def plain_filter(scaled, *, k, p, min_p):
    """The slow twin, with transformers' rules."""
    ids = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    if k:
        ids = [i for i in ids if scaled[i] >= scaled[ids[min(k, len(ids)) - 1]]]
    if p < 1:
        weights = np.exp(np.float32([scaled[i] - scaled[ids[0]] for i in ids]))
        wanted, mass, kept = p * weights.sum(dtype=np.float64), 0.0, []
        for i, weight in zip(ids, weights, strict=True):
            if mass >= wanted:
                break
            kept.append(i)
            mass += float(weight)
        ids = kept
    if min_p:
        ids = [i for i in ids if scaled[i] - scaled[ids[0]] >= math.log(min_p)]
    return sorted(ids)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rng=st.integers(0, 2**32 - 1),
    size=st.integers(1, 400),
    spread=st.sampled_from([0.0, 0.5, 3.0, 20.0]),
    coarse=st.booleans(),
    k=st.sampled_from([0, 1, 2, 7, 50, 1000]),
    p=st.sampled_from([0.01, 0.3, 0.77, 0.96, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)
def test_filters_equal_their_plain_twin(rng, size, spread, coarse, k, p, min_p):
    scaled = (np.random.default_rng(rng).standard_normal(size) * spread).astype(np.float32)
    if coarse:
        scaled = np.round(scaled)  # many ties
    scaled -= scaled.max()
    ids = filter_tokens(scaled, SamplingParams(top_k=k, top_p=p, min_p=min_p))
    kept = list(range(size)) if ids is None else ids.tolist()
    assert kept == plain_filter(scaled, k=k, p=p, min_p=min_p)


@pytest.mark.parametrize("params", [{}, {"min_p": 1e-7}, {"top_k": 4000}, {"top_p": 0.999}])
def test_ruling_tokens_out_early_changes_nothing(params):
    vocab = 5000
    rng = np.random.default_rng(3)
    for position in range(60):
        logits = (rng.standard_normal(vocab) * rng.choice([0.1, 1, 4])).astype(np.float32)
        best = logits.max()
        scaled = (logits - best) * np.float32(1 / 0.7)
        ids = filter_tokens(scaled, SamplingParams(**params))
        ids = np.arange(vocab) if ids is None else ids
        n = len(ids)
        noise = gumbel(np.full(n, 8, np.uint64), np.full(n, position, np.uint64), ids.astype(np.uint64))
        tokens, _ = sample(logits[None].copy(), [state_of(vocab, seed=8, position=position, temperature=0.7, **params)])
        assert tokens == [ids[(scaled[ids] + noise).argmax()]]


def test_a_row_does_not_depend_on_its_batch():
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((12, 2000)).astype(np.float32) * 3
    variants = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.5, "top_k": 20, "logprobs": 3},
        {"repetition_penalty": 1.3, "logprobs": 1},
        {},
        {"temperature": 0.9, "presence_penalty": 0.5, "min_p": 0.1},
    ]

    def states():
        return [state_of(2000, seed=i, position=3 * i, prompt=[i], **variants[i % 6]) for i in range(12)]

    together = sample(logits.copy(), states())
    alone = [sample(logits[i : i + 1].copy(), [s]) for i, s in enumerate(states())]
    assert together == ([t[0] for t, _ in alone], [p[0] for _, p in alone])
    order = rng.permutation(12)
    shuffled = sample(logits[order], [states()[i] for i in order])
    assert shuffled == ([together[0][i] for i in order], [together[1][i] for i in order])


def test_greedy_takes_the_first_of_equals_and_writes_nothing():
    logits = np.float32([[0, 3, 3, 1], [5, 1, 1, 1]])
    logits.flags.writeable = False
    assert sample(logits, [state_of(4), state_of(4, temperature=1e-9)]) == ([1, 0], [None, None])


def test_penalties():
    params = {"repetition_penalty": 1.5, "presence_penalty": 0.25, "frequency_penalty": 0.5}
    state = state_of(5, prompt=[0, 1, 1], **params)
    for token in (2, 2, 3):
        state.accept(token)
    logits = np.float32([3, -3, 3, -3, 3])
    state.adjust(logits)
    np.testing.assert_allclose(logits, [2, -4.5, 2 - 0.25 - 1.0, -4.5 - 0.25 - 0.5, 3], rtol=1e-6)


def test_min_tokens_bans_stops_until_then():
    state = state_of(4, min_tokens=2, stops=[1, 3])
    logits = np.float32([[0, 9, 1, 8]])
    chosen = []
    for _ in range(4):
        [token], _ = sample(logits.copy(), [state])
        state.accept(token)
        chosen.append(token)
    assert chosen == [2, 2, 1, 1]


def test_logprobs_are_of_penalized_logits_before_temperature_and_filters():
    logits = np.float32(np.random.default_rng(2).standard_normal(500) * 4)
    state = state_of(500, prompt=[7], repetition_penalty=2.0, temperature=0.3, top_k=1, logprobs=20)
    penalized = logits.astype(np.float64)
    penalized[7] = penalized[7] / 2 if penalized[7] > 0 else penalized[7] * 2
    expected = np.log(softmax(penalized))
    [token], [entries] = sample(logits[None].copy(), [state])
    assert token == expected.argmax()
    assert entries[0].token_id == token
    assert [e.token_id for e in entries[1:]] == np.argsort(-expected)[:20].tolist()
    np.testing.assert_allclose([e.logprob for e in entries], expected[[e.token_id for e in entries]], atol=1e-5)


def test_no_logprobs_but_the_chosen():
    _, [entries] = sample(np.float32([[0, 0]]), [state_of(2, logprobs=0)])
    assert [(e.token_id, e.logprob) for e in entries] == [(0, pytest.approx(-math.log(2)))]
    _, [entries] = sample(np.float32([[0, 0]]), [state_of(2, logprobs=20)])
    assert [e.token_id for e in entries] == [0, 0, 1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(bad):
    with pytest.raises(EngineError, match="not finite"):
        sample(np.float32([[0, 1], [0, bad]]), [state_of(2), state_of(2)])
