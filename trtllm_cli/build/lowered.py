"""What a backend's lowering hands to the builder: the plan, and how each weight of the engine is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trtllm_cli.tensor_file import TensorInfo

if TYPE_CHECKING:
    import torch

# Told of GPU kernels: what is done with them ("timing kernels"), how many are done, and of how many.
Working = Callable[[str, int, int], None]
# Reads a weight of the graph (its parts stacked) from the checkpoint.
ReadWeight = Callable[[str], "torch.Tensor"]


@dataclass(frozen=True)
class Packing:
    """Engine tensors that are made together, from the weights of one layer; nothing is read until `make` is called."""

    tensors: Mapping[str, TensorInfo]
    make: Callable[[ReadWeight], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Memory:
    """Bytes that a rank takes when it runs."""

    weights: int
    activations: int
    kv_block: int  # one KV cache block over all layers
    kv_blocks_full: int  # blocks for max_batch_size sequences of max_seq_len

    @property
    def kv_full(self) -> int:
        """The KV cache that never has to preempt."""
        return self.kv_block * self.kv_blocks_full


@dataclass(frozen=True)
class Lowered:
    """One rank's program, before its weights are packed."""

    plan: dict[str, Any]  # JSON
    packings: list[Packing]
    memory: Memory
    target: dict[str, str]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every engine tensor."""
        return {name: info for packing in self.packings for name, info in packing.tensors.items()}
