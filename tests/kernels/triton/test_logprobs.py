"""Log probabilities against the numpy sampler's: the same tokens in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton

from tests.kernels.triton.test_sample import seed_words
from trtllm_cli.kernels.triton import logprobs as kernels
from trtllm_cli.kernels.triton import sample as sampling
from trtllm_cli.run.request import SamplingParams
from trtllm_cli.run.sampler import SamplingState, sample

MOST = 20
NO_ID = 2**31 - 1


def run(launch: Any, logits: np.ndarray, rows: Sequence[int], asked: dict[int, int], *, chunk: int, stride: int):
    """Samples greedily of `rows` of the logits, and for the samples `asked` for so many likely tokens.

    What the kernels gave, of each sample a list of (token, log probability).
    """
    vocab, n, device = logits.shape[1], len(rows), launch.device
    x = torch.full((len(logits), stride), float("nan"), device=device)
    x[:, :vocab] = torch.from_numpy(logits).to(device)

    def of(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    splits = -(-vocab // 256)
    shape = {"VOCAB": vocab, "ROW_STRIDE": stride}
    partial, tokens = torch.full((n, splits, 4), float("nan"), device=device), of([0] * n)
    launch(
        sampling.sample, (splits, n), x, of(rows), of(range(n)), seed_words([0] * n).to(device), of([0] * n),
        torch.zeros(n, device=device), partial, of([0] * n), tokens, of([0] * n), CHUNK=256, TILE=256,
        SPLITS_BLOCK=triton.next_power_of_2(splits), **shape,
    )  # fmt: skip
    chunks, k = -(-vocab // chunk), len(asked)
    ids, values = of([-7] * ((k + 1) * (1 + MOST))), torch.full(((k + 1) * (1 + MOST),), 7.0, device=device)
    args = [x, of(rows), of(list(asked)), of(list(asked.values())), partial, splits, of([-7] * (k * chunks * MOST)),
            torch.full((k * chunks,), float("nan"), device=device)]  # fmt: skip
    shape |= {"SPLITS_BLOCK": triton.next_power_of_2(splits), "MOST": MOST}
    launch(kernels.likely_of_chunks, (chunks, k), *args, CHUNK=chunk, **shape)
    launch(
        kernels.logprobs, (k,), *args, tokens, ids, values, CHUNKS=chunks,
        CHUNKS_BLOCK=triton.next_power_of_2(chunks), MOST_BLOCK=32, **shape,
    )  # fmt: skip
    ids, values = ids.cpu().numpy().reshape(k + 1, -1), values.cpu().numpy().reshape(k + 1, -1)
    for i, number in enumerate([*asked.values(), -1]):
        assert (ids[i, 1 + number :] == -7).all()  # no more is written than is asked for
        assert (values[i, 1 + number :] == 7).all()
    return [list(zip(ids[i, : 1 + m], values[i, : 1 + m], strict=True)) for i, m in enumerate(asked.values())]


def assert_as_sampler(got: list, logits: np.ndarray, rows: Sequence[int], asked: dict[int, int]) -> None:
    for (i, number), entries in zip(asked.items(), got, strict=True):
        state = SamplingState(SamplingParams(logprobs=number), seed=0, vocab_size=logits.shape[1])
        _, [wanted] = sample(logits[rows[i] : rows[i] + 1].copy(), [state])
        assert wanted is not None
        entries = [entry for entry in entries if entry[0] != NO_ID]
        assert [token for token, _ in entries] == [x.token_id for x in wanted]
        np.testing.assert_allclose([x for _, x in entries], [x.logprob for x in wanted], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(("vocab", "chunk"), [(1000, 256), (1000, 1024), (131, 128), (513, 256)])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_logprobs(launch, vocab, chunk, spread):
    logits = np.random.default_rng(1).standard_normal((4, vocab)).astype(np.float32) * np.float32(spread)
    rows, asked = [3, 0, 0, 2, 1], {4: 20, 1: 0, 3: 5, 2: 1}
    got = run(launch, logits, rows, asked, chunk=chunk, stride=vocab + 9)
    assert_as_sampler(got, logits, rows, asked)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the infinities, in the interpreter
def test_ties_are_ranked_by_id(launch):
    vocab = 600
    generator = np.random.default_rng(2)
    logits = generator.integers(-2, 3, (5, vocab)).astype(np.float32)
    logits[1] = -0.0
    logits[1, generator.integers(0, vocab, 300)] = 0.0
    logits[2], logits[2, [500, 3, 250]] = -np.inf, [2.0, 1.0, 1.0]  # less than are asked for are possible
    logits[3], logits[3, [7, 300]] = -np.inf, 0.0
    logits[4] = generator.standard_normal(vocab) * 1e-9
    logits[4, 599] = 100.0  # before which all others are the same
    rows, asked = list(range(5)), dict.fromkeys(range(5), 20)
    got = run(launch, logits, rows, asked, chunk=256, stride=vocab)
    assert_as_sampler(got, logits, rows, asked)


def test_a_vocabulary_of_less_than_is_asked_for(launch):
    logits = np.random.default_rng(3).standard_normal((1, 12)).astype(np.float32)
    [entries] = got = run(launch, logits, [0], {0: 20}, chunk=128, stride=12)
    assert [token for token, _ in entries[13:]] == [NO_ID] * 8
    assert_as_sampler(got, logits, [0], {0: 20})


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_logits_that_are_not_finite_do_no_harm(launch):
    logits = np.zeros((3, 300), np.float32)
    logits[0, 7], logits[1, 7], logits[2] = np.nan, np.inf, -np.inf
    run(launch, logits, [0, 1, 2], {0: 20, 1: 20, 2: 20}, chunk=128, stride=300)


SHAPE = {"ROW_STRIDE": 128256, "VOCAB": 128256, "SPLITS_BLOCK": 128, "MOST": MOST}
ARGS = {
    "logits_ptr": "*fp32", "logits_rows_ptr": "*i32", "samples_ptr": "*i32", "numbers_ptr": "*i32",
    "partial_ptr": "*fp32", "splits": "i32", "likely_ptr": "*i32", "weights_ptr": "*fp32",
}  # fmt: skip


@pytest.mark.parametrize("arch", ["sm_90a", "sm_80"])
def test_likely_of_chunks_compiles(compile_kernel, arch):
    constants = {**SHAPE, "CHUNK": 4096, "PDL": arch == "sm_90a"}
    compiled = compile_kernel(kernels.likely_of_chunks, args=ARGS, constexprs=constants, num_warps=8, arch=arch)
    assert compiled.spills == 0
    assert compiled.registers <= 80


@pytest.mark.parametrize("arch", ["sm_90a", "sm_80"])
def test_logprobs_compiles(compile_kernel, arch):
    constants = {**SHAPE, "CHUNKS": 32, "CHUNKS_BLOCK": 32, "MOST_BLOCK": 32, "PDL": arch == "sm_90a"}
    more = {"tokens_ptr": "*i32", "out_ids_ptr": "*i32", "out_logprobs_ptr": "*fp32"}
    compiled = compile_kernel(kernels.logprobs, args={**ARGS, **more}, constexprs=constants, num_warps=8, arch=arch)
    assert compiled.spills == 0
