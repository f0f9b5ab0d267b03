"""The cuda backend's plans, computed in Triton's interpreter, against the reference on the same weights."""

import numpy as np
import pytest
import torch

from tests.batches import Sequences, as_torch
from tests.engines import build_engine, save_checkpoint
from tests.interpreter_device import InterpreterDevice, fake_compile
from tests.tiny_configs import VARIANTS, config, random_weights
from trtllm_cli.build.backends import cuda as cuda_lowering
from trtllm_cli.kernels.reference import Reference
from trtllm_cli.models import trace_model
from trtllm_cli.run.backends.cuda import CudaRunner

STEPS = [{0: [1, 2, 3, 4, 5, 6, 7], 1: [9, 8]}, {0: [11], 1: [5, 4, 3]}, {1: [3], 0: [4]}]


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    monkeypatch.setattr(cuda_lowering, "compile_kernels", fake_compile)


def logits_of(engine, steps=STEPS, device=None):
    runner = CudaRunner(engine, engine.config.pretrained_config.mapping.ranks[0], device or InterpreterDevice())
    runner.allocate_kv_cache(64)
    batch = Sequences(block_size=engine.config.build_config.tokens_per_block)
    out = [runner.forward(batch.step(new)).copy() for new in steps]
    runner.close()
    return out


def expected_logits(graph, weights, steps=STEPS, block_size=16):
    program = Reference(graph, weights, num_slots=64 * block_size, block_size=block_size)
    batch = Sequences(block_size=block_size)
    return [program.step(as_torch(batch.step(new)))[0].numpy() for new in steps]


def build_tiny(tmp_path, variant, **options):
    c = config(variant, dtype="bfloat16")
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
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < 1e-2
