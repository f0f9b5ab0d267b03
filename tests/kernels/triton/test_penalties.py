"""Penalties and bans in place, against the numpy sampler's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trtllm_cli.kernels.triton import penalties as kernels
from trtllm_cli.run.request import SamplingParams
from trtllm_cli.run.sampler import SamplingState

PENALTIES = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"presence_penalty": 0.6},
    {"frequency_penalty": -0.4},
    {"repetition_penalty": 1.7, "presence_penalty": -1.5, "frequency_penalty": 0.3},
    {"repetition_penalty": 1.1, "frequency_penalty": 2.0},
]


def counts_of(prompt: list[int], output: list[int], vocab: int, dtype: type) -> np.ndarray:
    counts = np.bincount(np.array(output, np.intp), minlength=vocab).astype(dtype)
    counts[prompt] |= np.iinfo(dtype).min
    return counts


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
@pytest.mark.parametrize("vocab", [1000, 131, 256])
def test_penalties(launch, vocab, dtype):
    generator = np.random.default_rng(vocab)
    n, stride, device = len(PENALTIES), vocab + 9, launch.device
    logits = np.full((n + 1, stride), 7e7, np.float32)
    logits[:, :vocab] = (generator.standard_normal((n + 1, vocab)) * 4).round(1)  # ties, and zeros of both signs
    logits[:, generator.integers(0, vocab, 20)] = -np.inf
    logits[0, 5], logits[1, 6] = np.inf, np.nan
    wanted = logits.copy()
    logits_rows, rows = generator.permutation(n + 1)[:n], generator.permutation(n + 2)[:n]  # the others stay
    counts = np.full((n + 2, stride), 77, dtype)
    last_tokens = generator.integers(0, vocab, n + 2)
    uncounted = np.array([1, 0, 1, 1, 0, 1])
    counted = counts.copy()
    for i, params in enumerate(PENALTIES):
        prompt = generator.integers(0, vocab, 40).tolist()
        output = [5, *prompt[:5], *generator.integers(0, vocab, 30).tolist() * 3] if i != 2 else []
        counts[rows[i], :vocab] = counts_of(prompt, output, vocab, dtype)
        if uncounted[i]:
            output.append(int(last_tokens[rows[i]]))
        counted[rows[i], :vocab] = counts_of(prompt, output, vocab, dtype)
        state = SamplingState(SamplingParams(**params), seed=0, vocab_size=vocab, prompt=prompt)
        for token in output:
            state.accept(token)
        with np.errstate(invalid="ignore"):
            state.adjust(wanted[logits_rows[i], :vocab])

    def of(values, kind):
        return torch.from_numpy(np.array(values, kind)).to(device)

    names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    got, counts = torch.from_numpy(logits.copy()).to(device), torch.from_numpy(counts).to(device)
    launch(
        kernels.penalize, (-(-vocab // 128), n), got, of(logits_rows, np.int32), of(rows, np.int32),
        of(uncounted, np.int32),
        *(of([getattr(SamplingParams(**params), name) for params in PENALTIES], np.float32) for name in names),
        counts, of(last_tokens, np.int32), VOCAB=vocab, ROW_STRIDE=stride, TILE=128,
    )  # fmt: skip
    assert np.array_equal(counts.cpu().numpy(), counted)
    np.testing.assert_allclose(got.cpu().numpy(), wanted, rtol=3e-7, atol=2e-6)  # a multiply and add may be one
    untouched = sorted(set(range(n + 1)) - set(logits_rows.tolist()))
    assert np.array_equal(got.cpu().numpy()[untouched], logits[untouched])


def test_a_count_reaches_what_the_longest_sequence_has(launch):
    vocab, most = 128, 2**15 - 2
    logits = torch.zeros((1, vocab), device=launch.device)
    counts = torch.zeros((1, vocab), dtype=torch.int16, device=launch.device)
    counts[0, 3], counts[0, 4] = most, most - 2**15  # in the output; in the prompt besides
    one, off = (torch.full((1,), x, device=launch.device) for x in (1.0, 0.0))
    zero, last = (torch.full((1,), x, dtype=torch.int32, device=launch.device) for x in (0, 4))
    launch(
        kernels.penalize, (1, 1), logits, zero, zero, zero + 1, one, off, one / 1024, counts, last,
        VOCAB=vocab, ROW_STRIDE=vocab, TILE=128,
    )  # fmt: skip
    assert counts[0, 3:5].tolist() == [most, -1]
    assert logits[0, 3:5].tolist() == [-most / 1024, -(most + 1) / 1024]


def test_bans(launch):
    logits = torch.arange(3 * 50, dtype=torch.float32, device=launch.device).reshape(3, 50)
    wanted = logits.clone()
    banned = [(0, 0), (2, 49), (2, 7), (0, 0)]
    for row, token in banned:
        wanted[row, token] = -float("inf")
    launch(
        kernels.ban, (len(banned),), logits, torch.tensor(banned, dtype=torch.int32, device=launch.device),
        ROW_STRIDE=50, num_warps=1,
    )  # fmt: skip
    assert torch.equal(logits, wanted)


@pytest.mark.parametrize("arch", ["sm_90a", "sm_80"])
@pytest.mark.parametrize("counts", ["*i16", "*i32"])
def test_penalize_compiles(compile_kernel, arch, counts):
    integers = dict.fromkeys(("logits_rows_ptr", "rows_ptr", "uncounted_ptr", "last_tokens_ptr"), "*i32")
    floats = dict.fromkeys(("logits_ptr", "repetition_ptr", "presence_ptr", "frequency_ptr"), "*fp32")
    compiled = compile_kernel(
        kernels.penalize,
        args={**integers, **floats, "counts_ptr": counts},
        constexprs={"VOCAB": 128256, "ROW_STRIDE": 128256, "TILE": 1024, "PDL": arch == "sm_90a"},
        arch=arch,
    )
    assert compiled.spills == 0
    assert compiled.registers <= 64


@pytest.mark.parametrize("arch", ["sm_90a", "sm_80"])
def test_ban_compiles(compile_kernel, arch):
    compiled = compile_kernel(
        kernels.ban,
        args={"logits_ptr": "*fp32", "banned_ptr": "*i32"},
        constexprs={"ROW_STRIDE": 128256, "PDL": arch == "sm_90a"},
        num_warps=1,
        arch=arch,
    )
    assert compiled.spills == 0
