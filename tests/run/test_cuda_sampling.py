"""Penalties, bans and log probabilities on the device against the numpy sampler, on a whole engine."""

import numpy as np
import pytest
import torch

from tests.engines import build_engine, random_checkpoint
from tests.interpreter_device import InterpreterDevice, fake_compile
from tests.tiny_configs import config
from trtllm_cli.build.backends import cuda, cuda_attention, cuda_tactics
from trtllm_cli.run.backends.cuda import CudaRunner
from trtllm_cli.run.backends.cuda_inputs import MOST_BANNED, count_tokens
from trtllm_cli.run.communicator import SingleRank
from trtllm_cli.run.executor import Executor
from trtllm_cli.run.request import SamplingParams

PENALTIES = SamplingParams(max_tokens=10, repetition_penalty=1.4, frequency_penalty=0.5, temperature=1.0, seed=3, n=2)
REQUESTS = [
    ([5, 6, 7, 6, 5], PENALTIES),
    ([9] * 9, SamplingParams(max_tokens=12, min_tokens=6, stop_token_ids=tuple(range(20, 50)), logprobs=3)),
    ([1, 2], SamplingParams(max_tokens=8, logprobs=20, presence_penalty=-0.7, temperature=2.0, top_k=12, seed=1)),
    ([4, 4, 4], SamplingParams(max_tokens=8, temperature=1.0, seed=9)),
    ([8, 1, 3], SamplingParams(max_tokens=14, repetition_penalty=3.0, presence_penalty=1.0)),
]


class Counting(CudaRunner):
    """Counts the steps that are sampled on the device and on the host."""

    started = forwards = 0

    def start(self, inputs, sampling):
        self.started += 1
        return super().start(inputs, sampling)

    def forward(self, inputs):
        self.forwards += 1
        return super().forward(inputs)


class OnHost(Counting):
    def samples(self, params, num_banned):
        return False


@pytest.fixture
def few_programs(monkeypatch):
    """Linears by torch, and no more programs than need be: what is computed before sampling has tests of its own."""
    monkeypatch.setattr(cuda, "compile_kernels", fake_compile)
    monkeypatch.setattr(cuda_tactics.LinearTactics, "ways", lambda self, shape: [])
    monkeypatch.setattr(cuda_attention, "_DECODE", ((None, 1, 2, 16),))
    monkeypatch.setattr(cuda_attention, "_FEW", 0)


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request, tmp_path):
    """An engine and a device."""
    if request.param == "interpreter":
        request.getfixturevalue("few_programs")
        return build(tmp_path), InterpreterDevice()
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    from trtllm_cli.kernels.cuda.driver import gpu_arch
    from trtllm_cli.run.backends.cuda_device import CudaDevice

    return build(tmp_path, arch=gpu_arch()), CudaDevice()


def build(tmp_path, *, max_seq_len=64, **options):
    c = config("llama", dtype="bfloat16", num_hidden_layers=1, max_position_embeddings=max_seq_len)
    checkpoint = random_checkpoint(tmp_path / "ckpt", c)
    limits = {"tokens_per_block": 4, "max_batch_size": 6, "max_seq_len": max_seq_len, **options}
    return build_engine(checkpoint, tmp_path / "engine", backend="cuda", kernels="auto", **limits)


def generate(machine, kind=Counting, requests=REQUESTS, num_blocks=60, after=None):
    """Tokens and log probabilities by (request, index), and the executor and the runner.

    `after`: a request that is added after so many steps.
    """
    engine, device = machine
    runner = kind(engine, engine.config.pretrained_config.mapping.ranks[0], device, SingleRank())
    runner.allocate_kv_cache(num_blocks)
    executor = Executor(
        engine.config.build_config, runner, SingleRank(), num_blocks=num_blocks, eos_token_ids=[0],
        vocab_size=engine.config.pretrained_config.vocab_size,
    )  # fmt: skip
    for i, request in enumerate(requests):
        executor.add_request(i, *request)
    tokens, logprobs, steps = {}, {}, 0
    while executor.has_work:
        for event in executor.step():
            tokens.setdefault((event.request_id, event.index), []).append(event.token_id)
            logprobs.setdefault((event.request_id, event.index), []).append(event.logprobs)
        steps += 1
        if after is not None and steps == after[0]:
            executor.add_request(len(requests), *after[1:])
    executor.check_integrity()
    runner.close()
    return tokens, logprobs, executor, runner


def assert_same(got, wanted, within=1e-5):
    assert got[0] == wanted[0]
    for key, steps in wanted[1].items():
        for ours, theirs in zip(got[1][key], steps, strict=True):
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                assert [x.token_id for x in ours] == [x.token_id for x in theirs]
                values = ([x.logprob for x in of] for of in (ours, theirs))
                np.testing.assert_allclose(*values, rtol=within, atol=within)


@pytest.mark.slow
def test_tokens_and_log_probabilities_are_those_of_the_host(machine):
    wanted = generate(machine, OnHost)
    assert wanted[3].started == 0
    got = generate(machine)
    assert_same(got, wanted)
    assert len({tuple(got[0][0, i]) for i in range(PENALTIES.n)}) == PENALTIES.n
    assert got[3].forwards == got[2].stats.preemptions == 0
    got = generate(machine, num_blocks=10)
    assert_same(got, wanted, within=1e-2)  # steps of other sizes, by other kernels, round to other bfloat16 numbers
    assert got[3].forwards == 0
    assert got[2].stats.preemptions > 0


@pytest.mark.slow
def test_what_the_device_cannot_serve_is_sampled_on_the_host_meanwhile(machine):
    most = SamplingParams(max_tokens=3, min_tokens=3, stop_token_ids=tuple(range(50, 51 + MOST_BANNED)))
    requests = [REQUESTS[0], REQUESTS[4]]
    wanted = generate(machine, OnHost, requests, after=(4, [3, 2], most))
    got = generate(machine, Counting, requests, after=(4, [3, 2], most))
    assert_same(got, wanted)
    assert got[3].forwards >= 3
    assert got[3].started > 5


def test_plain_steps_pay_nothing(few_programs, tmp_path):
    machine = build(tmp_path), InterpreterDevice()
    plain = [([1, 2], SamplingParams(max_tokens=2)), ([3], SamplingParams(max_tokens=2, temperature=1.0, min_tokens=0))]
    *_, runner = generate(machine, requests=plain)
    assert {name for _, name, _ in runner._programs} <= {"", "plain"}
    *_, runner = generate(machine, requests=[*plain, ([4], SamplingParams(max_tokens=3, ignore_eos=True, logprobs=0))])
    assert {name for _, name, _ in runner._programs} <= {"", "plain", "logprobs"}


def test_bounds(few_programs, tmp_path):
    engine = build(tmp_path)
    runner = CudaRunner(engine, engine.config.pretrained_config.mapping.ranks[0], InterpreterDevice(), SingleRank())
    everything = SamplingParams(
        min_tokens=2, logprobs=20, repetition_penalty=2.0, presence_penalty=-2.0, frequency_penalty=2.0
    )
    assert runner.samples(everything, MOST_BANNED)
    assert not runner.samples(everything, MOST_BANNED + 1)
    runner._plan["most_logprobs"] = 19
    assert not runner.samples(everything, 0)
    runner.close()


@pytest.mark.parametrize(("max_seq_len", "dtype"), [(2**15 - 1, "int16"), (2**15, "int32")])
def test_counts_are_as_wide_as_the_longest_sequence_needs(few_programs, tmp_path, max_seq_len, dtype):
    engine = build(tmp_path, max_seq_len=max_seq_len, max_batch_size=2)
    with engine.tensors(engine.config.pretrained_config.mapping.ranks[0]) as file:
        plan = engine.plan(file)
    assert plan["token_counts"] == dtype
    assert plan["scratch"]["token counts"] == 2 * plan["output_width"] * np.dtype(dtype).itemsize
    machine = engine, InterpreterDevice()
    requests = [([5, 5, 6], SamplingParams(max_tokens=4, repetition_penalty=2.0, frequency_penalty=1.0))]
    got = generate(machine, requests=requests)
    assert_same(got, generate(machine, OnHost, requests))
    prompt, output = [np.array(tokens, np.int32) for tokens in (requests[0][0], got[0][0, 0])]
    wanted = np.empty(plan["output_width"], dtype)
    count_tokens(prompt, output[:-1], wanted)  # the last is counted when another is sampled
    counts = got[3]._tensor("s:token counts", dtype, (2, plan["output_width"]))
    assert np.array_equal(counts[0].numpy(), wanted)


def test_a_row_of_counts():
    for dtype in (np.int16, np.int32):
        counts = np.full(6, 7, dtype)
        count_tokens(np.array([1, 3, 3], np.int32), np.array([3, 2, 2], np.int32), counts)
        in_prompt = np.iinfo(dtype).min
        assert counts.tolist() == [0, in_prompt, 2, in_prompt + 1, 0, 0]
