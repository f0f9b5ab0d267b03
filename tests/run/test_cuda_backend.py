"""The cuda backend's plans, computed in Triton's interpreter, against the reference on the same weights."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.batches import Sequences, as_torch
from tests.engines import build_engine, save_checkpoint
from tests.interpreter_device import InterpreterDevice, fake_compile
from tests.tiny_configs import VARIANTS, config, random_weights
from trtllm_cli.build.backends import cuda as cuda_lowering
from trtllm_cli.build.backends import cuda_attention
from trtllm_cli.errors import DeviceError, EngineError, ResourceError, UnsupportedError
from trtllm_cli.kernels.reference import Reference
from trtllm_cli.models import trace_model
from trtllm_cli.run.backends import cuda as cuda_runner
from trtllm_cli.run.backends.cuda import CudaRunner
from trtllm_cli.run.backends.cuda_device import device_errors
from trtllm_cli.run.communicator import SingleRank
from trtllm_cli.run.sampling_inputs import SamplingInputs

STEPS = [{0: [1, 2, 3, 4, 5, 6, 7], 1: [9, 8]}, {0: [11], 1: [5, 4, 3]}, {1: [3], 0: [4]}]


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.setattr(cuda_lowering, "compile_kernels", fake_compile)


def logits_of(engine, steps=STEPS, device=None):
    runner = CudaRunner(
        engine, engine.config.pretrained_config.mapping.ranks[0], device or InterpreterDevice(), SingleRank()
    )
    runner.allocate_kv_cache(64)
    batch = Sequences(block_size=engine.config.build_config.tokens_per_block)
    out = [runner.forward(batch.step(new)).copy() for new in steps]
    runner.close()
    return out


def expected_logits(graph, weights, steps=STEPS, block_size=16):
    program = Reference(graph, weights, num_slots=64 * block_size, block_size=block_size)
    batch = Sequences(block_size=block_size)
    return [program.step(as_torch(batch.step(new)))[0].numpy() for new in steps]


def build_tiny(tmp_path, variant, fields=None, **options):
    c = config(variant, dtype="bfloat16", **(fields or {}))
    graph = trace_model(c, c.mapping.ranks[0])
    weights = {name: w.bfloat16().float() for name, w in random_weights(graph).items()}
    ckpt = save_checkpoint(tmp_path / "ckpt", c, graph, weights)
    engine = build_engine(
        ckpt,
        tmp_path / "engine",
        backend="cuda",
        **{"tokens_per_block": 16, "max_num_tokens": 64, "kernels": "auto", **options},
    )
    return engine, graph, weights


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_references(tmp_path, variant):
    engine, graph, weights = build_tiny(tmp_path, variant)
    for got, want in zip(logits_of(engine), expected_logits(graph, weights), strict=True):
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < 2e-2


@pytest.mark.parametrize("kv", ["bfloat16", "fp8"])
def test_prompts_by_specialized_warps(tmp_path, kv):
    """Whole prompts, and one that goes on beside a sequence of one token, whose first part is in the cache."""
    heads = {"head_size": 64, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    engine, graph, weights = build_tiny(tmp_path, "llama", heads, kv_cache_dtype=kv, arch="sm_90a")
    with engine.tensors(engine.config.pretrained_config.mapping.ranks[0]) as file:
        entries = [kernel["entry"] for kernel in engine.plan(file)["kernels"]]
    assert "prompt_attention" in entries
    assert "prefill_attention" not in entries
    steps = [
        {0: [1, 2, 3, 4, 5, 6, 7], 1: [*range(9, 39)]}, {0: [11], 1: [5, 4, 3, *range(20)], 2: [8, 7]}, {1: [3], 0: [4]}
    ]  # fmt: skip
    limit = 2e-2 if kv == "bfloat16" else 0.1  # the reference keeps keys and values as they are
    for got, want in zip(logits_of(engine, steps), expected_logits(graph, weights, steps), strict=True):
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < limit


def test_steps_whose_attention_shares_no_cache_have_one_graph_however_long_it_is(tmp_path, monkeypatch):
    """Of up to 8 sequences: captured again for each length they would hold up requests for nothing."""
    monkeypatch.setattr(cuda_attention, "_SHARE", 1)
    heads = {"head_size": 32, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    engine, _, _ = build_tiny(tmp_path, "llama", heads, arch="sm_90a")
    rank = engine.config.pretrained_config.mapping.ranks[0]
    with engine.tensors(rank) as file:
        about = engine.plan(file)["splits"]
    assert (about["above"], about["sequences"]) == (8, 64)
    runner = CudaRunner(engine, rank, InterpreterDevice(), SingleRank())
    lens = np.full(9, 10 * about["tokens"], np.int32)
    splits = [runner._splits(SimpleNamespace(num_seqs=n, seq_lens=lens[:n])) for n in (1, 8, 9)]
    runner.close()
    assert splits == [1, 1, 8]


@pytest.mark.parametrize("kv", ["bfloat16", "fp8"])
@pytest.mark.parametrize("joined", [False, True])
def test_a_cache_that_is_read_ahead_is_shared_out_where_it_is_long(tmp_path, monkeypatch, kv, joined):
    """Among two programs from 33 tokens on; in steps with prompts too. In others they may rotate and append."""
    monkeypatch.setattr(cuda_attention, "_DECODE", ((16, 1, 4, 64), (None, 1, 4, 64)))
    monkeypatch.setattr(cuda_attention, "_AHEAD", dict.fromkeys((16, None), ((1, 0, 2), (1, 0, 2))))
    monkeypatch.setattr(cuda_attention, "_SHARE", 32)
    if not joined:
        monkeypatch.setattr(cuda_attention, "_ROPE_AHEAD", 0)
    heads = {"head_size": 32, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    engine, graph, weights = build_tiny(tmp_path, "llama", heads, kv_cache_dtype=kv, arch="sm_90a")
    rank = engine.config.pretrained_config.mapping.ranks[0]
    with engine.tensors(rank) as file:
        plan = engine.plan(file)
    assert plan["splits"] == {"tokens": 32, "most": 8, "above": 0, "sequences": 64}
    first = [next(s for s in plan["steps"] if s["op"] == op)["ways"][0] for op in ("rope_append", "paged_attention")]
    assert [most for most, _ in first] == ([16, 16] if joined else [64, 16])
    whens = [[launch.get("when", "") for launch in launches] for _, launches in first]
    assert ("decode" in whens[1]) == joined
    assert not joined or whens[0] == ["mixed"]
    runner = CudaRunner(engine, rank, InterpreterDevice(), SingleRank())
    runner.allocate_kv_cache(64)
    batch, long = Sequences(block_size=16), [i % 40 for i in range(30)]
    steps = [{0: [7, 3]}, {0: [1], 1: long}, {0: [2], 1: [4]}, {1: long}, {1: [5], 0: [9], 2: [3, 6]}, {1: [8], 0: [5]}]
    found, splits = [], []
    for step in steps:
        runner._graphs.clear()
        found.append(runner.forward(batch.step(step)).copy())
        splits += [key[-1] for key in runner._graphs]
    runner.close()
    assert splits == [1, 1, 1, 2, 2, 2]
    limit = 2e-2 if kv == "bfloat16" else 0.1  # the reference keeps keys and values as they are
    for got, want in zip(found, expected_logits(graph, weights, steps), strict=True):
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < limit


def test_the_last_layers_tail_is_of_the_rows_whose_logits_are_wanted(tmp_path):
    engine, _, _ = build_tiny(tmp_path, "llama")
    with engine.tensors(engine.config.pretrained_config.mapping.ranks[0]) as file:
        plan = engine.plan(file)
    steps = plan["steps"]
    gathers = [i for i, step in enumerate(steps) if step["op"] == "gather_last"]
    assert len(gathers) == 2  # queries and the residual
    for i in gathers:  # steps without prompts have nothing to gather
        assert {launch["when"] for _, launches in steps[i]["ways"] for launch in launches} == {"mixed"}
    assert "prefill_attention" not in {step["op"] for step in steps[gathers[-1] :]}
    linears = [step for step in steps if step["op"].startswith("linear")]
    assert [step["by"] for step in linears[-5:]] == ["num_tokens"] + 4 * ["num_logits"]


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_references_on_a_gpu(tmp_path, monkeypatch, variant):
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    from trtllm_cli.kernels.cuda.compiler import compile_kernels
    from trtllm_cli.kernels.cuda.driver import gpu_arch
    from trtllm_cli.run.backends.cuda_device import CudaDevice

    monkeypatch.setattr(cuda_lowering, "compile_kernels", compile_kernels)
    engine, graph, weights = build_tiny(tmp_path, variant, arch=gpu_arch())
    for got, want in zip(logits_of(engine, device=CudaDevice()), expected_logits(graph, weights), strict=True):
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < 2e-2


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered\nmore"), DeviceError),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), ResourceError),
        (RuntimeError("shapes do not match"), RuntimeError),
    ],
)
def test_what_torch_says_of_a_failing_gpu(raised, expected):
    with pytest.raises(expected) as caught, device_errors():
        raise raised
    if expected is DeviceError:
        assert str(caught.value).startswith("the GPU failed while it computed: CUDA error: an illegal memory access")
        assert "more" not in caught.value.message


def test_tokens_are_sampled_where_they_are_computed(tmp_path):
    """Steps with sampling, the next one fed from the device, give the tokens of the logits that `forward` gives."""
    engine, _, _ = build_tiny(tmp_path, "llama")
    prompt, runners = [5, 6, 7], []
    for _ in range(2):
        runner = CudaRunner(engine, engine.config.pretrained_config.mapping.ranks[0], InterpreterDevice(), SingleRank())
        runner.allocate_kv_cache(64)
        runners.append(runner)
    known, ahead = (Sequences(block_size=16) for _ in range(2))
    token = None
    for step in range(3):
        logits = runners[0].forward(known.step({0: prompt if step == 0 else [token]}))
        token = int(logits[0].argmax())
        inputs = ahead.step({0: prompt if step == 0 else [0]})
        if step:
            inputs = dataclasses.replace(inputs, input_ids=np.array([-1], np.int32))  # batch row 0's token
        one = np.zeros(1, np.int32)
        floats = np.ones(1, np.float32)
        sampling = SamplingInputs(one, one, np.zeros(1, np.uint64), one + step, floats * 0, one, floats, floats * 0)
        assert int(runners[1].start(inputs, sampling).tokens()[0]) == token
    for runner in runners:
        runner.close()


def test_a_step_is_computed_once_whether_its_graph_is_there_or_not(tmp_path):
    engine, _, _ = build_tiny(tmp_path, "llama")
    device = InterpreterDevice()
    counts = []

    def capture(enqueue):
        counts.append(device.launches)
        return enqueue

    device.capture = capture
    logits_of(engine, [{0: [1, 2, 3]}, {0: [4]}, {0: [5]}], device)
    prompt, token = counts
    assert 0 < token - prompt == device.launches - token


def test_kernels_of_decode_steps_have_all_memory_shared(tmp_path):
    """Of steps with prompts as little as they need."""
    engine, _, _ = build_tiny(tmp_path, "llama", fixed_tactics=True)  # else the first load times kernels too
    device, seen = InterpreterDevice(), []
    prepare = device.prepare
    device.prepare = lambda kernel, *args: seen.append(kernel["all_shared"]) or prepare(kernel, *args)
    for step, expected in (({0: [1, 2, 3]}, {False}), ({0: [4]}, {True})):
        seen.clear()
        logits_of(engine, [step], device)
        assert set(seen) == expected


def test_blocks_are_copied_in_every_layer(tmp_path):
    engine, _, _ = build_tiny(tmp_path, "llama")
    device = InterpreterDevice()
    runner = CudaRunner(engine, engine.config.pretrained_config.mapping.ranks[0], device, SingleRank())
    runner.allocate_kv_cache(8)
    parts, start = [], 0
    for size in (size for pair in runner._plan["kv"] for size in pair):
        parts.append(runner._kv[start : start + 8 * size].view(8, size))
        start += 8 * size
    runner._kv.random_()
    before = [part.clone() for part in parts]
    runner.copy_blocks([(1, 4), (1, 6), (3, 0)])
    for part, old in zip(parts, before, strict=True):
        for source, destination in ((1, 4), (1, 6), (3, 0)):
            old[destination] = old[source]
        assert torch.equal(part, old)
    assert device.launches == 1
    runner.close()


def test_blocks_that_cannot_be_copied_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_attention, "_COPIED_AT_ONCE", 4096)
    with pytest.raises(UnsupportedError, match="bytes of keys or values in a layer") as e:
        build_tiny(tmp_path, "llama")
    assert e.value.where == "--tokens-per-block"


def test_an_engine_that_fails_to_load_leaves_no_file_open(tmp_path, monkeypatch):
    engine, _, _ = build_tiny(tmp_path, "llama")
    files = []

    class Full(InterpreterDevice):
        def empty(self, nbytes, what):
            raise ResourceError(f"no room for {what}")

    tensors = type(engine).tensors
    monkeypatch.setattr(type(engine), "tensors", lambda *args: files.append(tensors(*args)) or files[-1])
    with pytest.raises(ResourceError, match="no room for the weights"):
        logits_of(engine, device=Full())
    assert files[0]._file.closed


def test_an_engine_for_another_gpu_is_refused(tmp_path, monkeypatch):
    engine, _, _ = build_tiny(tmp_path, "llama")

    class Other(InterpreterDevice):
        def __init__(self, index):
            super().__init__()
            self.driver = SimpleNamespace(arch="sm_80", name="NVIDIA A100")

    monkeypatch.setattr(cuda_runner, "CudaDevice", Other)
    with pytest.raises(EngineError, match="compiled for sm_90a, this GPU .NVIDIA A100. needs sm_80") as caught:
        cuda_runner.load(engine, engine.config.pretrained_config.mapping.ranks[0], SingleRank())
    assert "--arch sm_80" in caught.value.fix
