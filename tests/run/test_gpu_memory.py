"""How an engine on a GPU gets its KV cache, and the account of its memory; on GPUs that are made up."""

import json
import threading
from concurrent.futures import Future

import pytest

from tests.engines import build_engine, random_checkpoint
from tests.fake_runner import FakeRunner
from tests.interpreter_device import InterpreterDevice, fake_compile
from tests.run.tiny import byte_level, write_engine
from tests.tiny_configs import config
from trtllm_cli import cli
from trtllm_cli.bench.offline import RuntimeOptions, Session, bench
from trtllm_cli.bench.report import render
from trtllm_cli.bench.workload import NormalLengths, synthetic
from trtllm_cli.build.backends import cuda as cuda_lowering
from trtllm_cli.engine import BuildConfig, Engine
from trtllm_cli.errors import ResourceError, UsageError
from trtllm_cli.run import kv_budget
from trtllm_cli.run.backends import GpuRunner
from trtllm_cli.run.backends.cuda import CudaRunner
from trtllm_cli.run.communicator import SingleRank
from trtllm_cli.run.gpu_memory import RESERVE, GpuMemory, GpuNeeds
from trtllm_cli.run.llm import LLM
from trtllm_cli.run.load import LoadOptions
from trtllm_cli.run.request import SamplingParams
from trtllm_cli.run.scorer import EngineScorer
from trtllm_cli.run.step_loop import StepLoop

GIB = 1 << 30
BLOCK = 1 << 20  # bytes
LIMITS = BuildConfig(
    max_seq_len=4096, max_input_len=4096, max_num_tokens=8192, max_batch_size=2, tokens_per_block=64,
    weight_dtype="bfloat16", kv_cache_dtype="bfloat16",
)  # fmt: skip
NEEDS = GpuNeeds(weights=15 * GIB, activations=2 * GIB, scratch=GIB)


def memory_of(free, needs=NEEDS, total=80 * GIB):
    return GpuMemory("H200", total, free, needs)


def blocks(free=60 * GIB, **options):
    return kv_budget.num_gpu_blocks(LIMITS, BLOCK, memory_of(free), **options)


# --- how many blocks


def test_a_gpus_cache_takes_its_share_of_what_is_free_and_not_only_what_a_full_batch_needs():
    assert LIMITS.max_batch_size * LIMITS.max_seq_len // LIMITS.tokens_per_block == 128
    assert blocks() == int(60 * GIB * 0.9) // BLOCK
    assert blocks(fraction=0.5) == 30 * GIB // BLOCK


def test_the_reserve_stays_free_whatever_the_fraction():
    assert blocks(fraction=1.0) == 59 * GIB // BLOCK
    assert blocks(free=4 * GIB) == 3 * GIB // BLOCK  # nine tenths would leave 0.4 GiB
    assert RESERVE == GIB


def test_the_cap_is_on_all_that_the_engine_takes():
    assert blocks(cap=40 * GIB) == (40 - 18 - 1) * GIB // BLOCK
    assert blocks(cap=79 * GIB) == blocks()  # it is no request for more
    assert blocks(cap=40 * GIB, fraction=0.1) == int(6 * GIB) // BLOCK


def test_the_cache_itself_and_its_blocks_can_be_named():
    assert blocks(memory=8 * GIB) == 8 * GIB // BLOCK
    assert blocks(max_blocks=100) == 100
    assert blocks(memory=64 << 20, max_blocks=100) == 64
    with pytest.raises(ResourceError, match=r"KV cache of 60.0 GiB does not fit: there is room for 59.0 GiB") as e:
        blocks(memory=60 * GIB)
    assert e.value.where == "--kv-cache-memory"
    with pytest.raises(ResourceError, match=r"room for 21.0 GiB \(40.0 GiB less weights 15.0 GiB, activations 2.0 GiB"):
        blocks(memory=30 * GIB, cap=40 * GIB)


@pytest.mark.parametrize(
    ("free", "options", "where", "words"),
    [
        (60 * GIB, {"fraction": 0.001}, "--kv-cache-free-gpu-memory-fraction", "0.001 of the 60.0 GiB free on the GPU"),
        (60 * GIB, {"memory": 20 << 20}, "--kv-cache-memory", "20.0 MiB of memory holds 20 "),
        (60 * GIB, {"max_blocks": 63}, "--max-num-blocks", "the cap of 63 blocks is 63 "),
        (60 * GIB, {"cap": 19 * GIB + (32 << 20)}, "--max-gpu-memory", "19.0 GiB less weights 15.0 GiB"),
        (GIB + (50 << 20), {}, None, "of 1.0 GiB free on the GPU 1.0 GiB is kept free"),
        (GIB // 2, {}, None, "holds 0 "),
    ],
)
def test_a_cache_that_is_too_small_for_one_request(free, options, where, words):
    with pytest.raises(ResourceError, match="one request of max_seq_len 4096 takes 64 blocks .64.0 MiB") as e:
        blocks(free, **options)
    assert e.value.where == where
    assert words in e.value.message
    assert "--max-seq-len" in e.value.fix
    assert "weights 15.0 GiB, activations 2.0 GiB, scratch memory 1.0 GiB" in e.value.fix
    assert where is None or f"give a higher {where}" in e.value.fix


# --- what does not fit at all


def test_an_engine_that_is_larger_than_what_is_free():
    NEEDS.check_free(18 * GIB, 80 * GIB, LIMITS)
    with pytest.raises(ResourceError, match=r"it takes 18.0 GiB before its KV cache .weights 15.0 GiB") as e:
        NEEDS.check_free(16 * GIB, 80 * GIB, LIMITS)
    assert "16.0 GiB of 80.0 GiB is free" in e.value.message
    assert "nvidia-smi" in e.value.fix
    assert "less than --max-num-tokens 8192 and --max-batch-size 2" in e.value.fix
    with pytest.raises(ResourceError) as e:
        NEEDS.check_free(10 * GIB, 12 * GIB, LIMITS)
    assert "--weight-dtype int8 or int4" in e.value.fix
    assert "nvidia-smi" not in e.value.fix  # an empty GPU would not do


def test_a_cap_below_what_the_engine_takes():
    NEEDS.check_cap(20 * GIB, LIMITS)
    with pytest.raises(ResourceError, match=r"a cap of 17.0 GiB leaves no room.* takes 18.0 GiB before it") as e:
        NEEDS.check_cap(17 * GIB, LIMITS)
    assert e.value.where == "--max-gpu-memory"
    assert "give 19457MiB or more" in e.value.fix
    assert "--max-num-tokens 8192" in e.value.fix


# --- options


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"kv_cache_free_gpu_memory_fraction": 0.0}, "--kv-cache-free-gpu-memory-fraction"),
        ({"kv_cache_free_gpu_memory_fraction": 1.1}, "--kv-cache-free-gpu-memory-fraction"),
        ({"kv_cache_free_gpu_memory_fraction": float("nan")}, "--kv-cache-free-gpu-memory-fraction"),
        ({"kv_cache_free_gpu_memory_fraction": 0.5, "kv_cache_memory": "1GiB"}, "--kv-cache-free-gpu-memory-fraction"),
        ({"max_gpu_memory": "lots"}, "--max-gpu-memory"),
    ],
)
def test_options_out_of_range(options, where):
    with pytest.raises(UsageError) as e:
        LoadOptions(**options).check()
    assert e.value.where == where


@pytest.mark.parametrize("option", [{"kv_cache_free_gpu_memory_fraction": 0.5}, {"max_gpu_memory": "40GiB"}])
def test_a_cpu_engine_refuses_what_is_for_gpus(tmp_path, option, capsys):
    engine = write_engine(tmp_path / "engine", byte_level())
    [(name, value)] = option.items()
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UsageError, match=f"{flag} is for engines that run on a GPU"):
        LLM(engine, **option)
    for verb in (["run", "--engine-dir", engine, "hi"], *(["bench", v, "--engine-dir", engine] for v in VERBS)):
        assert cli.call([*map(str, verb), flag, str(value)]) == 2
        err = capsys.readouterr().err
        assert err.count("error: ") == 1
        assert f"{flag} is for engines that run on a GPU, {engine} runs on the CPU" in err


VERBS = ("throughput", "latency")


# --- an engine on a GPU that is played by Triton's interpreter


class RoomyDevice(InterpreterDevice):
    """Counts what is taken, of 8 GiB."""

    def free_memory(self):
        return 8 * GIB - sum(map(len, self._regions)), 10 * GIB


@pytest.fixture
def checkpoint(tmp_path):
    return random_checkpoint(tmp_path / "ckpt", config("llama", dtype="bfloat16"))


@pytest.fixture
def engine(tmp_path, monkeypatch, checkpoint):
    """A cuda engine, loaded onto the interpreter wherever it is."""
    monkeypatch.setattr(cuda_lowering, "compile_kernels", fake_compile)
    engine = build_engine(checkpoint, tmp_path / "engine", backend="cuda", tokens_per_block=16, kernels="auto")

    def load(engine, rank, comm, **_):
        return CudaRunner(engine, rank, RoomyDevice(), SingleRank())

    for place in ("load", "scorer"):
        monkeypatch.setattr(f"trtllm_cli.run.{place}.load_runner", load)
    return engine


def test_the_account_is_of_all_that_the_runner_takes(engine):
    device = RoomyDevice()
    runner = CudaRunner(engine, engine.config.pretrained_config.mapping.ranks[0], device, SingleRank())
    assert isinstance(runner, GpuRunner)
    assert not isinstance(FakeRunner(), GpuRunner)
    before = runner.gpu_memory()
    assert before.needs.total == sum(map(len, device._regions))
    assert before.needs.weights == runner._file.data_bytes
    runner.allocate_kv_cache(7)
    after = runner.gpu_memory()
    assert after.kv_cache == 7 * runner.bytes_per_block == before.free - after.free
    assert after.other == 2 * GIB  # that were not free before
    assert after.reserve == RESERVE
    runner.close()


def test_an_engine_that_does_not_fit_takes_nothing(engine):
    class Full(InterpreterDevice):
        def free_memory(self):
            return 1000, GIB

    device = Full()
    with pytest.raises(ResourceError, match="does not fit on the GPU.* 1000 B of 1.0 GiB is free"):
        CudaRunner(engine, engine.config.pretrained_config.mapping.ranks[0], device, SingleRank())
    assert not device._regions


def test_the_report_says_where_the_memory_goes(engine):
    options = RuntimeOptions(max_num_blocks=10, kv_cache_free_gpu_memory_fraction=0.5)
    with Session.open(engine.path, options) as session:
        samples = synthetic(1, NormalLengths(3), NormalLengths(2), 96)
        report, _ = bench(session, samples, command="latency", source="made up", warmup=0)
        memory = report.engine.gpu_memory
        assert (memory.kv_cache_blocks, memory.kv_cache_tokens) == (10, 160)
        assert memory.kv_cache == 10 * session.runner.bytes_per_block
    parts = ("weights", "activations", "scratch", "kv_cache", "other", "reserve", "free")
    assert sum(getattr(memory, part) for part in parts) == memory.total == 10 * GIB
    assert json.loads(report.model_dump_json())["engine"]["gpu_memory"]["reserve"] == RESERVE
    from rich.console import Console

    console = Console(width=120)
    with console.capture() as capture:
        for table in render(report):
            console.print(table)
    text = capture.get()
    assert "GPU MEMORY" in text
    assert "10 blocks, 160 tokens" in text
    assert "Triton's interpreter, 10.0 GiB" in text


def test_the_default_cache_of_an_llm_and_its_cap(engine):
    cap = 2 << 30
    with LLM(engine.path, max_gpu_memory=cap, max_num_blocks=9) as llm:
        assert llm.num_blocks == 9
        assert llm.gpu_memory.kv_cache == llm.kv_cache_bytes
    with pytest.raises(ResourceError, match="a cap of 100.0 MiB leaves no room for a KV cache"):
        LLM(engine.path, max_gpu_memory="100MiB")
    with pytest.raises(ResourceError, match="the cap of 1 blocks is 1"):
        LLM(engine.path, max_num_blocks=1)


def test_limits_that_are_asked_past(engine):
    with Session.open(engine.path, RuntimeOptions(max_num_blocks=9)) as session:
        samples = synthetic(1, NormalLengths(3), NormalLengths(70), 96)
        with pytest.raises(Exception, match="max_seq_len is 64"):
            bench(session, samples, command="latency", source="made up")
    with pytest.raises(UsageError, match="built for 1 to 8") as e:
        Session.open(engine.path, RuntimeOptions(max_batch_size=9))
    assert "rebuild the engine with --max-batch-size 9" in e.value.fix
    with LLM(engine.path, max_num_blocks=9) as llm, pytest.raises(Exception, match="max_seq_len is 64") as e:
        llm.generate([1, 2, 3], SamplingParams(max_tokens=70))
    assert "rebuild the engine with --max-seq-len 73" in e.value.fix


def test_evaluating_needs_a_cache_for_one_sequence(engine):
    scorer = EngineScorer.open(engine)
    assert scorer._runner.gpu_memory().kv_cache == 4 * scorer._runner.bytes_per_block
    scorer.close()


def test_inspect_says_what_was_compiled_and_what_it_takes(engine, capsys):
    assert cli.call(["inspect", str(engine.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["target"]["arch"] == "sm_90a"
    assert found["target"]["triton"]
    assert found["steps"]["linear"] > 0
    assert found["next_command"].startswith(f"trtllm run --engine-dir {engine.path} ")
    assert found["gpu_memory"]["kv_cache_of_max_seq_len"] == 64 * found["gpu_memory"]["kv_cache_per_token"]
    linears = [k for k in found["kernels"] if k["kernel"].startswith("linear.")]
    assert linears
    assert {"registers", "shared", "num_warps", "constants"} <= linears[0].keys()
    assert all(k["launches"] > 0 for k in found["kernels"])


def test_a_dry_run_needs_no_gpu(engine, checkpoint, capsys):
    build = ["build", "--checkpoint-dir", str(checkpoint), "--dry-run", "--backend", "cuda", "--max-seq-len", "64"]
    assert cli.call([*build, "--arch", "sm_80", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["target"]["arch"] == "sm_80"
    assert plan["build_config"]["max_batch_size"] == 256
    assert plan["memory_bytes"][0]["weights"] > 0


# --- closing


def test_closing_stops_the_check_of_the_file(tmp_path, monkeypatch):
    """Though a step's tokens wait for it, and at once."""
    begun, stopped_at = threading.Event(), threading.Event()

    def verify(self, rank, threads, stopped):
        begun.set()
        while not stopped():
            pass
        stopped_at.set()

    monkeypatch.setattr(Engine, "verify", verify)
    monkeypatch.setattr("trtllm_cli.run.load.load_runner", lambda *a, **k: FakeRunner(300))
    llm = LLM(write_engine(tmp_path / "engine", byte_level()))
    stream = llm.stream("hello", SamplingParams(max_tokens=4, ignore_eos=True))
    assert begun.wait(10)
    while not llm.stats.steps:
        pass
    llm.close()
    assert stopped_at.wait(10)
    with pytest.raises(RuntimeError, match="closed while it generated"):
        next(stream)
    assert not llm._loop._thread.is_alive()
    assert llm._loop.error is None


def test_closing_after_the_check_changes_nothing():
    verified: Future[None] = Future()
    verified.set_result(None)
    closed = []

    class Executor:
        has_work = False

        def close(self):
            closed.append("executor")

    runner = FakeRunner()
    loop = StepLoop(lambda: (runner, Executor()), verified)
    loop.wait_loaded()
    loop.close()
    loop.close()
    assert verified.result() is None
    assert closed == ["executor"]
    assert runner.closed
