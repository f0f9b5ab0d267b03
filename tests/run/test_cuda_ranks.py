"""Cuda engines of several ranks, each in a thread with a device of its own, against the same model on one rank."""

from dataclasses import replace

import numpy as np
import pytest

from tests.batches import Sequences
from tests.engines import build_engine
from tests.interpreter_device import InterpreterDevice, fake_compile
from tests.thread_ranks import run_ranks
from tests.tiny_models import save_tiny_model
from trtllm_cli.build.backends import cuda as cuda_lowering
from trtllm_cli.build.backends import cuda_collectives
from trtllm_cli.convert.pipeline import ConvertOptions, convert
from trtllm_cli.run.backends import cuda as cuda_runner
from trtllm_cli.run.backends.cuda import CudaRunner
from trtllm_cli.run.communicator import SingleRank
from trtllm_cli.run.executor import Executor
from trtllm_cli.run.request import SamplingParams
from trtllm_cli.run.step_inputs import InputBuilder
from trtllm_cli.run.worker import follow

STEPS = [{0: [1, 2, 3, 4, 5], 1: [9, 8]}, {1: [3], 0: [4]}]
# Steps of parts of prompts; and of how many sequences, the first ones, anybody wants logits.
PARTS = [({0: [1, 2, 3]}, 0), ({0: [4, 5], 1: [9, 8, 7]}, 0), ({0: [6, 7], 1: [5]}, 1), ({0: [3]}, 1)]
LIMITS = {"tokens_per_block": 16, "max_num_tokens": 64, "max_seq_len": 64}


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.setattr(cuda_lowering, "compile_kernels", fake_compile)


def build(path, snapshot, *, options=(), **build_options):
    convert(snapshot, path / "ckpt", ConvertOptions(dtype="bfloat16", **dict(options)))
    return build_engine(path / "ckpt", path / "engine", backend="cuda", kernels="auto", **{**LIMITS, **build_options})


def load(engine, comm, **device):
    several = comm.world_size > 1
    runner = CudaRunner(
        engine,
        engine.config.pretrained_config.mapping.ranks[comm.rank],
        InterpreterDevice(comm if several else None, **device),
        comm,
    )
    runner.allocate_kv_cache(64)
    return runner


def logits_of(engine, devices=None, **device):
    """Each rank's logits of each step, of those that have any."""

    def work(comm):
        runner = load(engine, comm, **device)
        if devices is not None:
            devices.append(runner)
        batch = Sequences(block_size=16)
        out = [runner.forward(batch.step(new)) for new in STEPS]
        runner.close()
        return None if out[0] is None else [x.copy() for x in out]

    world = engine.config.pretrained_config.mapping.world_size
    results = [work(SingleRank())] if world == 1 else run_ranks(world, work)
    return [logits for logits in results if logits is not None]


def logits_of_parts(engine, comm, *, every=False):
    """Of each of PARTS the logits that somebody wants, or all."""
    runner, batch = load(engine, comm), Sequences(block_size=16)
    found = []
    for new, wanted in PARTS:
        step = batch.step(new)
        some = step if every else replace(step, logits_indices=step.logits_indices[:wanted])
        found.append(runner.forward(some).copy())
    runner.close()
    return found


def check(got, want, bound=2e-2):
    for one, other in zip(got, want, strict=True):
        assert np.linalg.norm(one - other) / np.linalg.norm(other) < bound


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    path = tmp_path_factory.mktemp("snapshot")
    save_tiny_model(
        path, "qwen2", tie_word_embeddings=True, num_hidden_layers=2
    )  # 8 heads, 4 KV heads, biases, an odd vocabulary
    return path


@pytest.fixture(scope="module")
def one_rank(snapshot, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_lowering, "compile_kernels", fake_compile)
        return logits_of(build(tmp_path_factory.mktemp("one"), snapshot))[0]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_ranks_together_give_what_one_rank_gives(tmp_path, snapshot, one_rank, tp, pp):
    engine = build(tmp_path, snapshot, options={"tp_size": tp, "pp_size": pp})
    runners = []
    last_stage = logits_of(engine, runners)
    assert len(last_stage) == tp
    for logits in last_stage:
        check(logits, one_rank)
        assert all(np.array_equal(one, other) for one, other in zip(logits, last_stage[0], strict=True))
    assert all(runner.has_peers == (tp > 1) for runner in runners)
    assert all(not runner._device.calls for runner in runners)


def test_parts_of_prompts_whose_logits_nobody_wants(tmp_path, snapshot, monkeypatch):
    """Their steps leave the last layer's sums out, and those after them are right."""
    monkeypatch.setattr(cuda_runner, "_MOST_AT_ONCE", 0)  # steps with prompts are as large as they are
    engines = [build(tmp_path / str(tp), snapshot, options={"tp_size": tp}) for tp in (1, 2)]

    want = logits_of_parts(engines[0], SingleRank())
    assert [len(logits) for logits in want] == [0, 0, 1, 1]
    for got in run_ranks(2, lambda comm: logits_of_parts(engines[1], comm)):
        check(got[2:], want[2:])


@pytest.mark.parametrize("tp", [2, 4])
def test_some_rows_go_without_flags(tmp_path, snapshot, one_rank, monkeypatch, tp):
    monkeypatch.setattr(cuda_collectives, "IN_WORDS", 256)  # two rows, as the second step has
    engine = build(tmp_path, snapshot, options={"tp_size": tp})
    runners = []
    check(logits_of(engine, runners)[0], one_rank)
    sums = [step for step in runners[0]._plan["steps"] if step["op"].startswith("all_reduce")]
    assert [most for most, _ in sums[0]["ways"]] == [2, 64, None]
    assert all(not runner._device.calls for runner in runners)


def test_few_logits_are_gathered_in_words(tmp_path, snapshot, one_rank, monkeypatch):
    runners = []
    check(logits_of(build(tmp_path, snapshot, options={"tp_size": 2}), runners)[0], one_rank)
    gather = next(step for step in runners[0]._plan["steps"] if step["op"] == "all_gather")
    assert [len(launches) for _, launches in gather["ways"]] == [1, 3]
    assert all(not runner._device.calls for runner in runners)


def test_what_is_large_goes_through_nccl(tmp_path, snapshot, one_rank, monkeypatch):
    monkeypatch.setattr(cuda_collectives, "ONE_SHOT", 1024)  # four rows: the step with prompts has more
    runners = []
    check(logits_of(build(tmp_path, snapshot, options={"tp_size": 2}), runners)[0], one_rank)
    assert {call for runner in runners for call in runner._device.calls} == {"all_reduce"}


def test_ranks_that_do_not_see_each_others_memory(tmp_path, snapshot, one_rank):
    runners = []
    check(logits_of(build(tmp_path, snapshot, options={"tp_size": 2}), runners, sees_peers=False)[0], one_rank)
    assert not any(runner.has_peers for runner in runners)
    assert {call for runner in runners for call in runner._device.calls} == {"all_reduce", "all_gather"}


@pytest.mark.parametrize("dim", [0, 1])
def test_a_split_embedding(tmp_path, snapshot, one_rank, dim):
    options = {"tp_size": 2, "use_parallel_embedding": True, "embedding_sharding_dim": dim}
    for logits in logits_of(build(tmp_path, snapshot, options=options)):
        check(logits, one_rank)


@pytest.mark.parametrize("qformat", ["fp8_pc_pt", "int8_wo"])
def test_quantized_shards(tmp_path, snapshot, qformat):
    results = [
        logits_of(build(tmp_path / str(tp), snapshot, options={"tp_size": tp, "qformat": qformat}))[0] for tp in (1, 2)
    ]
    check(results[1], results[0], 0.1 if qformat == "fp8_pc_pt" else 2e-2)


FAMILIES = {
    "gpt2": {}, "olmo2": {}, "deepseek_v2": {"moe_ep_size": 2},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(tmp_path, family):
    """Layer norms, norms over all heads, experts divided among the ranks."""
    save_tiny_model(tmp_path / "snapshot", family, num_hidden_layers=2)
    results = [
        logits_of(build(tmp_path / str(tp), tmp_path / "snapshot", options={"tp_size": tp, **options}))[0]
        for tp, options in ((1, {}), (2, FAMILIES[family]))
    ]
    check(results[1], results[0], 3e-2)


class Logits:
    """A runner that does not sample: the executor does."""

    def __init__(self, runner):
        self.forward, self.copy_blocks, self.close = runner.forward, runner.copy_blocks, runner.close


def test_every_rank_samples_the_same_tokens_ahead(tmp_path, snapshot):
    """An executor over two ranks, one step ahead, gives the tokens of one over one rank's logits."""
    requests = [([5, 6, 7], 0.0), ([9, 8, 7, 6, 5, 4], 0.8)]
    engine = build(tmp_path, snapshot, options={"tp_size": 2}, max_batch_size=4)
    limits, vocab_size = engine.config.build_config, engine.config.pretrained_config.vocab_size

    def generate(kind):
        """Rank 0's tokens by request, and each rank's runner."""

        def work(comm):
            loaded = load(engine, comm)
            runner, tokens = kind(loaded), None
            if comm.rank == 0:
                executor = Executor(limits, runner, comm, vocab_size=vocab_size, num_blocks=64)
                for i, (prompt, temperature) in enumerate(requests):
                    executor.add_request(i, prompt, SamplingParams(max_tokens=4, temperature=temperature, seed=7 + i))
                tokens = {i: [] for i in range(len(requests))}
                while executor.has_work:
                    for event in executor.step():
                        tokens[event.request_id].append(event.token_id)
                executor.close()
            else:
                follow(runner, comm, InputBuilder.of(limits), logits_rank=0)
            runner.close()
            return tokens, loaded

        (tokens, leader), (_, follower) = run_ranks(2, work)
        return tokens, leader, follower

    tokens, leader, follower = generate(lambda runner: runner)
    rows = 4 * limits.max_batch_size
    assert leader._last[:rows].equal(follower._last[:rows])
    assert [len(of_one) for of_one in tokens.values()] == [4, 4]
    assert generate(Logits)[0] == tokens
