"""Checkpoints and engines of tiny models, and the logits of an engine's runner, for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.batches import Sequences
from tests.tiny_configs import random_weights
from trtllm_cli.build.builder import BuildOptions, build
from trtllm_cli.checkpoint import write_config
from trtllm_cli.engine import Engine
from trtllm_cli.graph import Graph
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models import trace_model
from trtllm_cli.run.backends import load_runner
from trtllm_cli.run.communicator import SingleRank
from trtllm_cli.run.model_inputs import ModelInputs
from trtllm_cli.tensor_file import TensorFileWriter, TensorInfo


def save_checkpoint(path: Path, config: ModelConfig, graph: Graph, weights: dict[str, torch.Tensor]) -> Path:
    """A one-rank checkpoint of these weights, cast to what the graph says."""
    path.mkdir()
    infos = {name: TensorInfo(w.dtype, w.shape) for name, w in graph.weights.items()}
    with TensorFileWriter(path / "rank0.safetensors", infos, {}) as out:
        for name, info in infos.items():
            data = weights[name].to(getattr(torch, info.dtype)).contiguous().flatten().view(torch.uint8)
            out.write(name, memoryview(data.numpy()))
    write_config(path, config)
    return path


def random_checkpoint(path: Path, config: ModelConfig) -> Path:
    """A one-rank checkpoint of random weights."""
    graph = trace_model(config, config.mapping.ranks[0])
    return save_checkpoint(path, config, graph, random_weights(graph))


def build_engine(checkpoint: Path, output: Path, **options: object) -> Engine:
    """An engine for short sequences."""
    limits: dict[str, object] = {
        "max_seq_len": 64, "max_num_tokens": 64, "max_batch_size": 8, "tokens_per_block": 4, "kernels": "native",
    }  # fmt: skip
    build(checkpoint, output, BuildOptions(**{**limits, **options}))  # type: ignore[arg-type]
    return Engine.open(output)


# Ragged on purpose: a prefill, a chunk beside a decode, decodes out of order.
STEPS = [
    {0: [1, 2, 3, 4, 5, 6, 7], 1: [9, 8]},
    {0: [11], 1: [5, 4, 3, 2, 1, 7]},
    {1: [3], 0: [4]},
    {2: [6] * 9, 1: [2]},
]


def runner_logits(engine: Engine, steps: list[dict[int, list[int]]] = STEPS, num_threads: int = 2) -> list[np.ndarray]:
    """The logits of each step, by the engine's own runner."""
    runner = load_runner(
        engine, engine.config.pretrained_config.mapping.ranks[0], SingleRank(), num_threads=num_threads
    )
    try:
        runner.allocate_kv_cache(64)
        batch = Sequences(block_size=engine.config.build_config.tokens_per_block)
        out = []
        for new in steps:
            logits = runner.forward(batch.step(new))
            assert logits is not None
            out.append(logits.copy())
        return out
    finally:
        runner.close()


def logits_of(path: Path, token_ids: list[int]) -> np.ndarray:
    """The logits after every token of a sequence, by the engine's runner, a few tokens a step."""
    engine = Engine.open(path)
    size, count = engine.config.build_config.tokens_per_block, len(token_ids)
    blocks = -(-count // size)
    runner = load_runner(engine, engine.config.pretrained_config.mapping.ranks[0], SingleRank())
    runner.allocate_kv_cache(blocks)
    rows = []
    arange = np.arange(count, dtype=np.int32)
    for start in range(0, count, 8):  # max_batch_size rows of logits a step
        part = arange[start : start + 8]
        inputs = ModelInputs(
            input_ids=np.array(token_ids, dtype=np.int32)[part],
            positions=part,
            slot_mapping=part,
            block_tables=np.arange(blocks, dtype=np.int32)[None],
            query_start=np.array([0, len(part)], dtype=np.int32),
            seq_lens=np.array([part[-1] + 1], dtype=np.int32),
            logits_indices=np.arange(len(part), dtype=np.int32),
        )
        logits = runner.forward(inputs)
        assert logits is not None
        rows.append(logits.copy())
    runner.close()
    return np.concatenate(rows)
