"""Sampling kernels against the numpy sampler: the same tokens for the same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from trtllm_cli.errors import EngineError
from trtllm_cli.kernels.triton import sample as kernels
from trtllm_cli.run import philox, sampler
from trtllm_cli.run.request import SamplingParams

POISON = -77
LLAMA = {"VOCAB": 128256, "ROW_STRIDE": 128256}


@triton.jit
def noise_of_ids(ids_ptr, seeds_ptr, positions_ptr, out_ptr, N: tl.constexpr):
    index = tl.program_id(0) * N + tl.arange(0, N)
    position, key_low, key_high = kernels._seed_words(seeds_ptr, positions_ptr, tl.program_id(0))
    tl.store(out_ptr + index, kernels.gumbel(tl.load(ids_ptr + index), position, key_low, key_high))


@triton.jit
def times_of_words(words_ptr, out_ptr, N: tl.constexpr):
    index = tl.arange(0, N)
    tl.store(out_ptr + index, kernels._exponential(tl.load(words_ptr + index).to(tl.uint32, bitcast=True)))


def seed_words(seeds: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(seeds, np.uint64).view(np.int32).reshape(-1, 2).copy())


class Batch:
    """Samples of rows of logits; `run` launches the kernels, `expected` asks the numpy sampler."""

    def __init__(self, logits: torch.Tensor, params: Sequence[SamplingParams], rows: Sequence[int] | None = None):
        self.logits, self.params = logits, params
        self.n = len(params)
        generator = np.random.default_rng(self.n)
        self.logits_rows = list(range(self.n)) if rows is None else list(rows)
        self.rows = generator.permutation(self.n).tolist()
        self.seeds = [int(x) for x in generator.integers(0, 2**64, self.n, np.uint64)]
        self.positions = generator.integers(0, 5000, self.n).tolist()

    def run(
        self,
        launch: Any,
        *,
        vocab: int,
        chunk: int = 512,
        tile: int = 256,
        capacity: int = 256,
        filtered_tile: int = 512,
    ) -> list[int]:
        device, n = launch.device, self.n

        def of(values: Sequence[float], kind: torch.dtype) -> torch.Tensor:
            return torch.tensor(values, dtype=kind, device=device)

        splits = -(-vocab // chunk)
        counters = of([0] * n, torch.int32)
        partial = torch.full((n, splits, 4), float("nan"), device=device)
        tokens, self.last_tokens = (torch.full((n + 1,), POISON, dtype=torch.int32, device=device) for _ in range(2))
        logits = self.logits.to(device)
        common = [
            logits,
            of(self.logits_rows, torch.int32),
            of(self.rows, torch.int32),
            seed_words(self.seeds).to(device),
            of(self.positions, torch.int32),
            of([p.temperature for p in self.params], torch.float32),
        ]
        shape = {"VOCAB": vocab, "ROW_STRIDE": logits.stride(0), "SPLITS_BLOCK": triton.next_power_of_2(splits)}
        launch(
            kernels.sample, (splits, n), *common, partial, counters, tokens, self.last_tokens,
            CHUNK=chunk, TILE=tile, **shape,
        )  # fmt: skip
        assert counters.tolist() == [0] * n
        filters = [
            of([p.top_k for p in self.params], torch.int32),
            of([p.top_p for p in self.params], torch.float32),
            of([p.min_p for p in self.params], torch.float32),
        ]
        values = torch.full((n, capacity), float("nan"), device=device)
        ids = torch.full((n, capacity), POISON, dtype=torch.int32, device=device)
        launch(
            kernels.sample_filtered, (n,), *common, *filters, partial, values, ids, tokens, self.last_tokens,
            SPLITS=splits, CAPACITY=capacity, TILE=filtered_tile, **shape,
        )  # fmt: skip
        assert tokens[n] == POISON
        return tokens[:n].tolist()

    def expected(self, vocab: int) -> list[int]:
        tokens = []
        for row, params, seed, position in zip(self.logits_rows, self.params, self.seeds, self.positions, strict=True):
            state = sampler.SamplingState(params, seed=seed, vocab_size=vocab)
            state.num_output = position
            logits = self.logits[row : row + 1, :vocab].float().numpy().copy()
            try:
                tokens.append(POISON if row < 0 else sampler.sample(logits, [state])[0][0])
            except EngineError:
                tokens.append(-1)
        return tokens


def random_logits(n: int, vocab: int, *, spread: float = 3.0, seed: int = 0, stride: int | None = None) -> torch.Tensor:
    """[n, vocab], in rows of `stride` whose ends would win, or spoil everything, if they were read."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.full((n, stride or vocab), float("nan"))
    logits[:, :vocab] = spread * torch.randn(n, vocab, generator=generator)
    return logits


def test_words_become_times_to_float32_precision(launch):
    words = np.concatenate([np.arange(2048), 2**32 - 1 - np.arange(2048), 2**31 + np.arange(-2048, 2048)])
    words = np.concatenate([words, np.random.default_rng(0).integers(0, 2**32, 8192)]).astype(np.uint64)
    out = torch.full((len(words),), float("nan"), device=launch.device)
    launch(
        times_of_words, (1,), torch.from_numpy(words.astype(np.uint32).view(np.int32)).to(launch.device), out, N=16384
    )
    error = np.abs(out.cpu().numpy().astype(np.float64) / philox._exponential(words) - 1)
    assert error.max() < 4e-7


def test_noise_is_numpys(launch):
    n, count = 4, 2**15
    seeds, positions = [0, 2**64 - 1, 2**63 + 12345, 7], [0, 2**31 - 1, 77, 1]
    ids = np.random.default_rng(1).integers(0, 300_000, (n, count))
    out = torch.full((n, count), float("nan"), device=launch.device)
    launch(
        noise_of_ids,
        (n,),
        torch.from_numpy(ids.astype(np.int32)).to(launch.device),
        seed_words(seeds).to(launch.device),
        torch.tensor(positions, dtype=torch.int32, device=launch.device),
        out,
        N=count,
    )
    wanted = philox.gumbel(
        np.repeat(np.array(seeds, np.uint64), count),
        np.repeat(np.array(positions, np.uint64), count),
        ids.astype(np.uint64).ravel(),
    )
    assert np.abs(out.cpu().numpy().ravel() - wanted).max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab", "chunk"), [(1000, 512), (1000, 1024), (131, 256), (1537, 512)])
def test_greedy_and_temperature(launch, dtype, vocab, chunk):
    temperatures = [0.0, 1.0, 0.3, 2.5, 1e-6, 0.01, 100.0, 0.7]
    logits = random_logits(len(temperatures), vocab, stride=vocab + 9).to(dtype)
    batch = Batch(logits, [SamplingParams(temperature=t) for t in temperatures])
    assert batch.run(launch, vocab=vocab, chunk=chunk) == batch.expected(vocab)


def test_many_draws_of_one_row(launch):
    n, vocab = 12, 700
    batch = Batch(random_logits(1, vocab), [SamplingParams(temperature=4.0)] * n, rows=[0] * n)
    tokens = batch.run(launch, vocab=vocab)
    assert tokens == batch.expected(vocab)
    assert len(set(tokens)) > n / 2  # the seeds differ, so do the tokens


def test_greedy_takes_the_lowest_of_equals(launch):
    vocab = 1000
    logits = random_logits(4, vocab, spread=0.1)
    for row, ids in enumerate(([999, 5, 600], [130, 129], [513, 512, 511], [256, 900])):
        logits[row, ids] = 7.0
    batch = Batch(logits, [SamplingParams()] * 4)
    assert batch.run(launch, vocab=vocab) == [5, 129, 511, 256]


def test_rows_are_placed_and_padded_samples_leave_everything(launch):
    vocab = 300
    params = [SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=3)] * 3
    batch = Batch(random_logits(3, vocab), params, rows=[2, 0, -1, -1, 2, 1])
    batch.rows = [4, 2, 3, 0, -1, 6]
    tokens = batch.run(launch, vocab=vocab)
    assert tokens == batch.expected(vocab)
    assert batch.last_tokens.tolist() == [POISON, POISON, tokens[1], POISON, tokens[0], POISON, tokens[5]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the infinities, in the interpreter
@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_p=0.5)]
)
def test_logits_that_are_not_finite(launch, params):
    vocab = 700
    logits = random_logits(6, vocab)
    logits[0, 650] = float("nan")
    logits[1, 3] = float("inf")
    logits[2, :] = -float("inf")
    logits[3, :] = float("nan")
    logits[4, 7:] = -float("inf")  # some tokens are impossible: that is no error
    batch = Batch(logits, [params] * 6)
    tokens = batch.run(launch, vocab=vocab)
    assert tokens == batch.expected(vocab)
    assert tokens[:4] == [-1] * 4
    assert 0 <= tokens[4] < 7
    assert [int(batch.last_tokens[row]) for row in batch.rows] == [max(token, 0) for token in tokens]


FILTERS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 5000},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.1},
    {"top_p": 0.999, "min_p": 1e-9},
    {},
]


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [256, 4])  # the list of candidates does, and does not
@pytest.mark.parametrize("spread", [0.02, 2.0, 20.0])
def test_filters(launch, spread, capacity):
    vocab = 1000
    params = [SamplingParams(temperature=t, **f) for f in FILTERS for t in (0.8,)] + [SamplingParams(top_k=3)]
    batch = Batch(random_logits(len(params), vocab, spread=spread, seed=3, stride=1008), params)
    assert batch.run(launch, vocab=vocab, capacity=capacity) == batch.expected(vocab)


@pytest.mark.slow
@pytest.mark.parametrize("filters", [{"top_k": 10}, {"top_p": 0.5}, {"top_k": 30, "top_p": 0.7}, {"top_p": 0.05}])
def test_filters_with_ties(launch, filters):
    n, vocab = 6, 600
    logits = random_logits(1, vocab, spread=1.0, seed=5)
    logits = (logits * 2).round() / 2  # about a dozen values, many tokens each: whole groups are cut
    batch = Batch(logits.bfloat16(), [SamplingParams(temperature=4.0, **filters)] * n, rows=[0] * n)
    tokens = batch.run(launch, vocab=vocab)
    assert tokens == batch.expected(vocab)
    assert len(set(tokens)) > 1


def test_top_p_counts_equals_by_id(launch):
    n, vocab = 6, 256
    batch = Batch(torch.zeros(1, vocab), [SamplingParams(temperature=1.0, top_p=0.125)] * n, rows=[0] * n)
    tokens = batch.run(launch, vocab=vocab)
    assert tokens == batch.expected(vocab)
    assert max(tokens) < 32  # exactly an eighth of them


SAMPLES = {
    "logits_rows_ptr": "*i32", "rows_ptr": "*i32", "seeds_ptr": "*i32", "positions_ptr": "*i32",
    "temperatures_ptr": "*fp32", "partial_ptr": "*fp32", "tokens_ptr": "*i32", "last_tokens_ptr": "*i32",
}  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "chunk", "tile"), [("*fp32", 1024, 1024), ("*fp32", 32768, 4096), ("*bf16", 32768, 4096)]
)
def test_sample_compiles(compile_kernel, dtype, chunk, tile):
    splits_block = triton.next_power_of_2(-(-LLAMA["VOCAB"] // chunk))
    compiled = compile_kernel(
        kernels.sample,
        args={"logits_ptr": dtype, "counters_ptr": "*i32", **SAMPLES},
        constexprs={**LLAMA, "CHUNK": chunk, "TILE": tile, "SPLITS_BLOCK": splits_block, "PDL": True},
        num_warps=4,
    )
    assert compiled.spills == 0
    assert compiled.registers <= 80  # at least 6 programs of 4 warps on an SM
    assert compiled.ptx.count("ld.global.v4") >= 2


def test_sample_filtered_compiles(compile_kernel):
    filters = {
        "top_k_ptr": "*i32",
        "top_p_ptr": "*fp32",
        "min_p_ptr": "*fp32",
        "values_ptr": "*fp32",
        "ids_ptr": "*i32",
    }
    compiled = compile_kernel(
        kernels.sample_filtered,
        args={"logits_ptr": "*fp32", **SAMPLES, **filters},
        constexprs={**LLAMA, "SPLITS": 126, "SPLITS_BLOCK": 128, "CAPACITY": 8192, "TILE": 2048, "PDL": True},
        num_warps=16,
    )
    assert compiled.spills <= 8  # a local of three bytes that nothing uses
    assert ".local." not in compiled.ptx.replace(".local .align", "")
    assert compiled.registers <= 64  # two programs of 16 warps on an SM
    assert "ld.global.v4" in compiled.ptx
