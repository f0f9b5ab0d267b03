"""Lowering for the cuda backend: the graph's nodes as launches of kernels that are compiled ahead of time.

cuda_program.py says what a plan is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from trtllm_cli.build.backends.cuda_attention import AttentionLaunches
from trtllm_cli.build.backends.cuda_experts import ExpertLaunches
from trtllm_cli.build.backends.cuda_norms_between import NormsBetween
from trtllm_cli.build.backends.cuda_sampling import MOST_LOGPROBS, SamplingLaunches
from trtllm_cli.build.backends.cuda_tactics import LinearTactics
from trtllm_cli.build.lowered import Lowered, Memory, Working
from trtllm_cli.engine import KERNELS
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.functional import NUM_LOGITS, NUM_TOKENS
from trtllm_cli.graph import Graph
from trtllm_cli.kernels.cuda.compiler import compile_kernels, triton_version
from trtllm_cli.kernels.cuda.kernel import ARCHITECTURES, SHARED_MEMORY, CompiledKernel, KernelSource, launches_of
from trtllm_cli.tensor_file import TensorInfo, total_bytes

if TYPE_CHECKING:
    from trtllm_cli.engine import BuildConfig
    from trtllm_cli.model_config import ModelConfig

_ALIGNMENT = 256  # bytes: where a cubin begins in the tensor that holds all


class CudaGraphLowering(NormsBetween, ExpertLaunches, AttentionLaunches, SamplingLaunches):
    """Each node as launches."""

    def lower(self, working: Working | None = None) -> None:
        """Fills the steps and the packings."""
        self.check()
        self.prepare()
        self.choose_tactics(working)
        for node in self.graph.nodes:
            self.lower_node(node)
        self.add_sampling()
        self.add_copies()

    def check(self) -> None:
        """Raises UnsupportedError for what the backend cannot do."""
        for node in self.graph.nodes:
            if not hasattr(self, f"_{node.op}"):
                raise UnsupportedError(
                    f"the cuda backend has no `{node.op}` yet",
                    fix="build for the CPU: --backend cpu, or convert with one rank",
                )
        size = self.build_config.tokens_per_block
        if size & (size - 1):
            raise UnsupportedError(
                f"tokens_per_block is {size}; on a GPU it must be a power of two",
                where="--tokens-per-block",
                fix="give 64",
            )
        if self.build_config.kv_cache_dtype == "float32":
            raise UnsupportedError(
                "there is no float32 KV cache on a GPU", where="--kv-cache-dtype", fix="give bfloat16 or fp8"
            )
        if ARCHITECTURES[self.arch] < (8, 9) and self._has_fp8():
            raise UnsupportedError(
                f"{self.arch} has no FP8", where="--arch",
                fix="build for sm_89 or newer, or convert again without FP8 weights and KV cache",
            )  # fmt: skip

    def _has_fp8(self) -> bool:
        """Whether a kernel reads or writes FP8."""
        experts = [self.graph.weights[n.inputs["weight"]] for n in self.graph.nodes if n.op == "expert_linear"]
        kinds = {t.dtype for t in self.graph.tensors.values()} | {w.dtype for w in experts}
        return "float8_e4m3fn" in kinds or self.build_config.kv_cache_dtype == "fp8"


def lower(
    graph: Graph,
    config: ModelConfig,
    build_config: BuildConfig,
    arch: str,
    rank: int = 0,
    tactics: LinearTactics | None = None,
    working: Working | None = None,
) -> Lowered:
    """The plan of one rank, its kernels compiled for `arch`, such as "sm_90a".

    `tactics` are shared by the ranks of a build; without them those that ship are taken. Raises UnsupportedError for a
    graph with an op that there is no kernel for, ResourceError where there is no compiler.
    """
    tactics = tactics or LinearTactics(arch)
    lowering = CudaGraphLowering(
        graph, build_config, arch=arch, rank=rank, vocab_size=config.vocab_size, tactics=tactics
    )
    lowering.lower(working)
    compiled = compile_kernels(list(lowering.kernels), arch, working and partial(working, "compiling kernels"))
    for kernel in compiled.values():
        if kernel.shared > SHARED_MEMORY[arch]:
            raise UnsupportedError(
                f"`{kernel.entry}` takes {kernel.shared} bytes of shared memory for this model, {arch} has "
                f"{SHARED_MEMORY[arch]}",
                where="--arch",
                fix="build for another architecture, and report this: the lowering should not have asked for it",
            )
    table, blob = _image(lowering.kernels, compiled)
    lowering.add(KERNELS, TensorInfo("uint8", (len(blob),)), lambda _: torch.frombuffer(blob, dtype=torch.uint8))
    sizes = {NUM_TOKENS: build_config.max_num_tokens, NUM_LOGITS: build_config.max_batch_size}
    memory = Memory(
        weights=total_bytes(t for p in lowering.packings for t in p.tensors.values()),
        activations=lowering.buffers.elements(sizes) + sum(lowering.scratch.values()) + sum(lowering.exchange.values()),
        kv_block=sum(k + v for k, v in lowering.kv),
        kv_blocks_full=build_config.blocks_per_sequence * build_config.max_batch_size,
    )
    plan: dict[str, Any] = {
        "kernels": table,
        "vocab_size": config.vocab_size,
        "kv_layers": len(lowering.kv),
        "kv": [list(pair) for pair in lowering.kv],
        "copy": lowering.copy,
        "buffers": [{"rows": b.rows, "bytes": b.width} for b in lowering.buffers.buffers],
        "scratch": lowering.scratch,
        "exchange": lowering.exchange,
        "peers": lowering.peers,
        "steps": lowering.steps,
        "splits": lowering.splits,
        "fixed_tactics": tactics.fixed,
        "sampling": lowering.sampling,
        "token_counts": lowering.count_dtype,
        "most_logprobs": MOST_LOGPROBS,
        "output": lowering.ref(graph.outputs[0]) if graph.outputs else None,
        "output_width": lowering.width(graph.outputs[0]) if graph.outputs else 0,
    }
    names = [compiled[source].names for source in lowering.kernels]
    for launch in launches_of(plan):
        if "kernel" in launch and isinstance(launch["args"], dict):  # a launch may be in several ways
            launch["args"] = [launch["args"][name] for name in names[launch["kernel"]]]
    target = {"arch": arch, "triton": triton_version() or ""}
    notes: dict[str, Any] = {"linear_tactics": tactics.to_json()} if tactics.chosen else {}
    if in_bfloat16 := lowering.in_bfloat16():
        notes["in_bfloat16"] = in_bfloat16
    return Lowered(plan, lowering.packings, memory, target, notes)


def _image(
    sources: Iterable[KernelSource], compiled: Mapping[KernelSource, CompiledKernel]
) -> tuple[list[dict[str, Any]], bytearray]:
    """The kernels' table, and their cubins one after another."""
    table, blob = [], bytearray()
    for source in sources:
        kernel = compiled[source]
        blob += bytes(-len(blob) % _ALIGNMENT)
        place = {"offset": len(blob), "size": len(kernel.cubin)}
        table.append({**kernel.to_json(), "source": source.to_json(), **place})
        blob += kernel.cubin
    return table, blob
