"""A checkpoint's tensors as a traced graph wants them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtllm_cli.errors import CheckpointError
from trtllm_cli.graph import Graph, Weight
from trtllm_cli.tensor_file import TensorFile

if TYPE_CHECKING:
    import torch

KV_SCALES = "kv_cache_scaling_factor"  # of an attention layer: k's and v's, float32 [2]
_FLOATS = {"float32", "float16", "bfloat16"}  # read as each other


def check_tensors(graph: Graph, file: TensorFile) -> None:
    """Raises CheckpointError unless the file holds just the tensors that the traced graph needs, as it needs them."""
    for weight in graph.weights.values():
        (name,) = weight.parts
        found = file.tensors.get(name)
        if found is None:
            raise CheckpointError(f"tensor `{name}` is missing", where=str(file.path), fix="convert again")
        alike = found.dtype == weight.dtype or {found.dtype, weight.dtype} <= _FLOATS
        if found.shape not in (weight.shape, _shared(name)) or not alike:
            raise CheckpointError(
                f"tensor `{name}` is {found.dtype} {list(found.shape)}, "
                f"the config makes it {weight.dtype} {list(weight.shape)}",
                where=str(file.path),
                fix="convert again",
            )
    needed = {part for weight in graph.weights.values() for part in weight.parts}
    if leftover := sorted(file.tensors.keys() - needed - _optional(graph)):
        raise CheckpointError(
            f"tensor `{leftover[0]}` is not part of the model"
            + (f" (nor are {len(leftover) - 1} others)" if len(leftover) > 1 else ""),
            where=str(file.path),
            fix="the config does not describe these weights; convert again",
        )


def _shared(name: str) -> tuple[int, ...] | None:
    """The shape of a tensor whose numbers may be one for all: TensorRT-LLM has one scale for keys and values."""
    return (1,) if name.endswith(f".{KV_SCALES}") else None


def _optional(graph: Graph) -> set[str]:
    """Tensors that other tools write although they say nothing new: the head of a tied model."""
    tied = "lm_head.weight" not in graph.weights and "transformer.vocab_embedding.weight" in graph.weights
    return {"lm_head.weight"} if tied else set()


def read_weight(file: TensorFile, weight: Weight) -> torch.Tensor:
    """A weight of the graph, in its dtype: its parts from the checkpoint, stacked."""
    import torch

    parts = []
    for part in weight.parts:
        info, data = file.tensors[part], file.read(part)
        dtype = getattr(torch, info.dtype)
        tensor = torch.frombuffer(data, dtype=dtype).view(info.shape) if data else torch.empty(info.shape, dtype=dtype)
        tensor = tensor.expand(weight.shape) if info.shape == _shared(part) else tensor
        parts.append(tensor.to(getattr(torch, weight.dtype)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
