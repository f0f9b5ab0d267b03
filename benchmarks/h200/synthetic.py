"""An engine of a named shape whose weights are made on the device: for measuring steps without files of gigabytes.

The plan and the kernels are what `trtllm build` writes; only the numbers are random, drawn so that activations stay
finite. Needs a GPU, or with `plan_only` none.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtllm_cli.build.backends.cuda import CudaGraphLowering, lower
from trtllm_cli.build.backends.cuda_linears import LinearShape
from trtllm_cli.build.backends.cuda_tactics import LinearTactics
from trtllm_cli.build.builder import BuildOptions, resolve
from trtllm_cli.build.lowered import Lowered
from trtllm_cli.build.passes import CUDA_PASSES, run_passes
from trtllm_cli.build.passes.quantize_kv_cache import quantize_kv_cache
from trtllm_cli.engine import KERNELS, BuildConfig
from trtllm_cli.graph import Graph
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models import trace_model
from trtllm_cli.run.communicator import SingleRank
from trtllm_cli.run.model_inputs import ModelInputs
from trtllm_cli.run.sampling_inputs import SamplingInputs
from trtllm_cli.tensor_file import ENGINE_ALIGNMENT, TensorFile, TensorFileWriter

LLAMA = {
    "architecture": "LlamaForCausalLM", "dtype": "bfloat16", "hidden_act": "silu", "norm_epsilon": 1e-5,
    "position_embedding_type": "rope_gpt_neox", "rotary_base": 500000.0, "max_position_embeddings": 131072,
    "vocab_size": 128256,
}  # fmt: skip
SHAPES = {
    "8b": {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336,
    },
    "1b": {
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_size": 64, "intermediate_size": 8192, "share_embedding_table": True,
    },
    "70b": {
        "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "intermediate_size": 28672,
    },
}  # fmt: skip
FORMATS = {
    "bf16": {}, "fp8": {"quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}},
    "fp8_pc_pt": {"quantization": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN", "exclude_modules": ["lm_head"]}},
    "int4": {"quantization": {"quant_algo": "W4A16_AWQ", "group_size": 128, "exclude_modules": ["lm_head"]}},
    "int8": {"quantization": {"quant_algo": "W8A16", "exclude_modules": ["lm_head"]}},
}  # fmt: skip


@dataclass
class FakeEngine:
    """What the runner asks of an engine."""

    config: object
    path: Path

    def tensors(self, rank):  # noqa: ARG002
        return TensorFile(self.path)

    def plan(self, file):
        import json

        return json.loads(file.metadata["plan"])


@dataclass
class FakeConfig:
    build_config: BuildConfig


def config_of(shape: str, fmt: str, layers: int | None = None, tp: int = 1) -> ModelConfig:
    """The model, on `tp` ranks."""
    fields = {**LLAMA, **SHAPES[shape], **FORMATS[fmt], "mapping": {"world_size": tp, "tp_size": tp}}
    if layers:
        fields["num_hidden_layers"] = layers
    return ModelConfig.model_validate(fields)


def graph_of(config: ModelConfig, rank: int, build_config: BuildConfig) -> Graph:
    """A rank's graph as it is lowered."""
    traced = trace_model(config, config.mapping.ranks[rank])
    kv = build_config.kv_cache_dtype if build_config.kv_cache_dtype in ("int8", "fp8") else None
    return run_passes(quantize_kv_cache(traced, kv), CUDA_PASSES)


def _traced(config: ModelConfig, rank: int, options: dict[str, Any]) -> tuple[ModelConfig, BuildConfig, Graph]:
    build_config = resolve(config, BuildOptions(backend="cuda", **options), [])
    return config, build_config, graph_of(config, rank, build_config)


def plan_of(
    shape: str, fmt: str, *, layers: int | None = None, arch: str = "sm_90a", tp: int = 1, rank: int = 0,
    tactics: LinearTactics | None = None, **options,
) -> tuple[Lowered, BuildConfig]:  # fmt: skip
    """A rank's lowered plan, its kernels compiled."""
    config, build_config, graph = _traced(config_of(shape, fmt, layers, tp), rank, options)
    return lower(graph, config, build_config, arch, rank=rank, tactics=tactics), build_config


def linears_of(shape: str, fmt: str, *, tp: int = 1, **options) -> list[LinearShape]:
    """The distinct linears of a model's rank, in the order of a layer, as kernels for few tokens compute them."""
    config, build_config, graph = _traced(config_of(shape, fmt, layers=1, tp=tp), 0, options)
    lowering = CudaGraphLowering(graph, build_config, vocab_size=config.vocab_size)
    lowering.prepare()
    return list(dict.fromkeys(lowering.linear_shapes()))


def runner_of(
    shape: str, fmt: str, *, num_blocks: int, layers: int | None = None, comm=None,
    tactics: LinearTactics | None = None, **options,
):  # fmt: skip
    """A runner with random weights on this machine's GPU, or this rank's on its own."""
    import json

    from trtllm_cli.run.backends.cuda import CudaRunner
    from trtllm_cli.run.backends.cuda_device import CudaDevice

    comm = comm or SingleRank()
    rank = config_of(shape, fmt, layers, comm.world_size).mapping.ranks[comm.rank]
    lowered, build_config = plan_of(
        shape, fmt, layers=layers, tp=comm.world_size, rank=comm.rank, tactics=tactics, **options
    )
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "rank0.engine")
        with TensorFileWriter(
            path, lowered.tensors, {"plan": json.dumps(lowered.plan)}, alignment=ENGINE_ALIGNMENT
        ) as out:
            for packing in lowered.packings:
                small = all(t.nbytes < 1 << 26 for t in packing.tensors.values()) and (
                    KERNELS in packing.tensors or any(name.startswith(("rope.", "ones.")) for name in packing.tensors)
                )
                made = packing.make(lambda _: None) if small else {}
                for name, info in packing.tensors.items():
                    if small:
                        out.write(name, memoryview(made[name].contiguous().flatten().view(torch.uint8).numpy()))
                    else:
                        out.leave_zeros(name, 0, info.nbytes)
        device = CudaDevice(comm.rank)
        device.is_checked = False  # the weights are zeros until they are filled
        runner = CudaRunner(FakeEngine(FakeConfig(build_config), path), rank, device, comm)
        _fill(runner, lowered)
    runner.choose_algorithms()
    runner.allocate_kv_cache(num_blocks)
    _fill_cache(runner._kv, options.get("kv_cache_dtype"))
    torch.cuda.synchronize()
    return runner, build_config


def _fill(runner, lowered: Lowered) -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    pool = torch.randn(1 << 26, device="cuda", generator=generator)
    for name, info in lowered.tensors.items():
        if name == KERNELS or name.startswith(("rope.", "ones.")):
            continue
        dtype = getattr(torch, info.dtype)
        out = runner._weights.bytes_at(name)[: info.nbytes].view(dtype)
        if info.dtype == "float32":
            out.fill_(2.0**-9 if "activation" not in name else 2.0**-5)
        elif info.dtype in ("uint8", "int8"):
            out.view(torch.uint8).random_(0, 255, generator=generator)
        elif len(info.shape) == 1:
            out.fill_(1.0)
        else:
            std = 0.02 if info.dtype == "bfloat16" else 10.0
            for i in range(0, len(out), len(pool)):
                part = out[i : i + len(pool)]
                part.copy_((pool[: len(part)] * std).to(dtype))


def _fill_cache(cache: torch.Tensor, kind: str | None) -> None:
    """Random keys and values: zeros take less power to read and multiply, and power is what holds a chip under load."""
    dtype = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}.get(kind or "", torch.bfloat16)
    numbers = torch.randn(1 << 26, device=cache.device) * (1 if dtype == torch.bfloat16 else 40)
    some = numbers.clamp(-127, 127).to(dtype).view(torch.uint8)
    for part in cache.split(len(some)):
        part.copy_(some[: len(part)])


def decode_inputs(config: BuildConfig, batch: int, context: int, *, known: bool = True) -> ModelInputs:
    """One token of each of `batch` sequences with `context` tokens in the cache before it."""
    size = config.tokens_per_block
    blocks = -(-(context + 1) // size)
    tables = np.arange(batch * blocks, dtype=np.int32).reshape(batch, blocks)
    ids = np.arange(batch, dtype=np.int32) % 1000 if known else -(np.arange(batch, dtype=np.int32) + 1)
    positions = np.full(batch, context, np.int32)
    return ModelInputs(
        input_ids=ids, positions=positions, slot_mapping=tables[:, context // size] * size + context % size,
        block_tables=tables, query_start=np.arange(batch + 1, dtype=np.int32), seq_lens=positions + 1,
        logits_indices=np.arange(batch, dtype=np.int32),
    )  # fmt: skip


def prefill_inputs(config: BuildConfig, lengths: list[int]) -> ModelInputs:
    """Whole prompts of these lengths."""
    size = config.tokens_per_block
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    blocks = -(-max(lengths) // size)
    tables = np.arange(len(lengths) * blocks, dtype=np.int32).reshape(len(lengths), blocks)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    seqs = np.repeat(np.arange(len(lengths)), lengths)
    return ModelInputs(
        input_ids=(positions * 7 + seqs.astype(np.int32)) % 30000, positions=positions,
        slot_mapping=(tables[seqs, positions // size] * size + positions % size).astype(np.int32),
        block_tables=tables, query_start=starts, seq_lens=np.array(lengths, np.int32),
        logits_indices=starts[1:] - 1,
    )  # fmt: skip


def greedy(count: int) -> SamplingInputs:
    """Greedy sampling for each of the step's logits."""
    rows = np.arange(count, dtype=np.int32)
    zeros = np.zeros(count, np.int32)
    return SamplingInputs(
        logits_rows=rows, rows=rows, seeds=np.zeros(count, np.uint64), positions=zeros,
        temperatures=np.zeros(count, np.float32), top_k=zeros, top_p=np.ones(count, np.float32),
        min_p=np.zeros(count, np.float32),
    )  # fmt: skip
