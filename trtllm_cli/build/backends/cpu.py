"""Lowering for the cpu backend: to our C++ kernels, or to torch where there is no compiler or torch is faster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trtllm_cli.build.backends.cpu_native import NativeLowering
from trtllm_cli.build.backends.cpu_torch import TorchLowering
from trtllm_cli.build.lowered import Lowered, Memory
from trtllm_cli.build.tactics import faster, time_linears
from trtllm_cli.graph import Graph
from trtllm_cli.kernels.cpu import compiler
from trtllm_cli.kernels.cpu.attention_steps import kv_bytes_per_block
from trtllm_cli.tensor_file import total_bytes

if TYPE_CHECKING:
    from trtllm_cli.engine import BuildConfig
    from trtllm_cli.model_config import ModelConfig


def lower(graph: Graph, config: ModelConfig, build_config: BuildConfig, *, kernels: str = "auto") -> Lowered:
    """The plan of one rank. `kernels` is "native", "torch", or "auto": the faster by timing, torch without a compiler.

    Raises ResourceError when native is asked for and there is no compiler, UnsupportedError for a graph with an op that
    the native kernels do not have.
    """
    notes: dict[str, Any] = {}
    if kernels == "auto":
        kernels, notes = _choose(graph, build_config)
    lowering = NativeLowering(graph, build_config) if kernels == "native" else TorchLowering(graph, build_config)
    lowering.lower()
    if any(node.attrs.get("quant") == "fp4" for node in graph.nodes):
        notes["fp4"] = "no 4-bit float kernels on CPUs: stored as bfloat16"
    attention = [n for n in graph.nodes if n.op in ("paged_attention", "attention")]
    kv_block = sum(
        kv_bytes_per_block(
            n.attrs["num_kv_heads"],
            n.attrs["head_dim"],
            build_config.tokens_per_block,
            build_config.kv_cache_dtype,
            n.attrs.get("v_head_dim"),
        )
        for n in attention
    )
    memory = Memory(
        weights=total_bytes(t for p in lowering.packings for t in p.tensors.values()),
        activations=lowering.activation_bytes(),
        kv_block=kv_block,
        kv_blocks_full=build_config.blocks_per_sequence * build_config.max_batch_size,
    )
    plan = {"kernels": kernels, "vocab_size": config.vocab_size, "kv_layers": len(attention), **lowering.plan()}
    return Lowered(plan, lowering.packings, memory, lowering.target(), notes)


def _choose(graph: Graph, build_config: BuildConfig) -> tuple[str, dict[str, Any]]:
    """ "native" or "torch", and the times that say why."""
    if compiler.find_compiler() is None:
        return "torch", {"kernels": "torch: no C++ compiler was found"}
    lowering = NativeLowering(graph, build_config)
    if lowering.unsupported():
        return "torch", {"kernels": f"torch: there is no native {lowering.unsupported()}"}
    image = compiler.compile_library(compiler.host_features())
    times = time_linears(graph, image, lowering.format_of)
    return faster(times), {"kernels": "the faster in linears_ms", "linears_ms": times}
