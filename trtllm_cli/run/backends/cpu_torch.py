"""The cpu backend where there was no C++ compiler: the graph's nodes as torch calls.

Linears use torch's packed kernels for int8 and int4; everything else is `kernels.reference`. It is the slow twin of
cpu.py: the same engine format, the same numbers within rounding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trtllm_cli.graph import Graph, Node
from trtllm_cli.kernels import reference
from trtllm_cli.kernels.linear_format import ROLES, FormatName, LinearFormat
from trtllm_cli.kernels.torch_linear import TorchLinear

if TYPE_CHECKING:
    from trtllm_cli.engine import Engine
    from trtllm_cli.mapping import Rank
    from trtllm_cli.run.communicator import Communicator
    from trtllm_cli.run.model_inputs import ModelInputs
    from trtllm_cli.tensor_file import TensorFile


class TorchRunner:
    """One rank's graph, computed by torch."""

    def __init__(self, engine: Engine, rank: Rank, comm: Communicator, *, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._limits = engine.config.build_config
        with engine.tensors(rank) as file:
            plan = engine.plan(file)
            self._graph = Graph.from_json(json.loads(file.metadata["graph"]))
            self._vocab_size: int = plan["vocab_size"]
            self._program = _Program(self._graph, file, plan["formats"], self._limits.tokens_per_block, comm)

    @property
    def num_threads(self) -> int:
        """Threads that compute."""
        return torch.get_num_threads()

    @property
    def bytes_per_block(self) -> int:
        """See Runner."""
        per_token = sum(a["num_kv_heads"] * (a["head_dim"] + reference.v_head_dim(a)) for a in self._attention())
        return per_token * self._limits.tokens_per_block * self._cache_dtype.itemsize

    @property
    def _cache_dtype(self) -> torch.dtype:
        name = self._limits.kv_cache_dtype
        return torch.float8_e4m3fn if name == "fp8" else cast("torch.dtype", getattr(torch, name))

    def _attention(self) -> list[dict[str, Any]]:
        return [n.attrs for n in self._graph.nodes if n.op in ("attention", "paged_attention")]

    def allocate_kv_cache(self, num_blocks: int) -> None:
        """See Runner."""
        for a in self._attention():
            rows = (num_blocks * self._limits.tokens_per_block, a["num_kv_heads"])
            k, v = (
                torch.zeros((*rows, width), dtype=self._cache_dtype)
                for width in (a["head_dim"], reference.v_head_dim(a))
            )
            self._program.caches[a["layer"]] = (k, v)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See Runner."""
        size = self._limits.tokens_per_block
        for cache in (half for both in self._program.caches.values() for half in both):
            blocks = cache.unflatten(0, (-1, size))
            for source, destination in pairs:
                blocks[destination] = blocks[source]

    @torch.inference_mode()
    def forward(self, inputs: ModelInputs) -> npt.NDArray[np.float32] | None:
        """See Runner."""
        outputs = self._program.step({k: torch.from_numpy(v) for k, v in vars(inputs).items()})
        return outputs[0][:, : self._vocab_size].numpy() if outputs else None

    def close(self) -> None:
        """See Runner."""


class _Program(reference.Reference):
    """The reference interpreter with the engine's weights and torch's fast linears."""

    def __init__(
        self, graph: Graph, file: TensorFile, formats: dict[str, dict[str, Any]], block_size: int, comm: Communicator
    ) -> None:
        self.graph, self.block_size = graph, block_size
        self.comm = _TorchCollectives(comm)
        self.activity = comm.activity
        self.caches: dict[int, tuple[Tensor, Tensor]] = {}
        self.tables: dict[str, Tensor] = {}
        self.weights = {}
        self.linears = {name: _members(file, name, **fmt) for name, fmt in formats.items()}
        for node in graph.nodes:
            for name in node.inputs.values():
                stored = f"{name}.rows" if node.op == "embedding" else name
                if name in graph.weights and stored in file.tensors:
                    weight = _tensor(file, stored)
                    self.weights[name] = weight if node.op == "embedding" else _numbers(weight)

    def compute(self, node: Node, values: Mapping[str, Tensor]) -> list[Tensor]:
        """A linear by its packed weight, any other node by the reference."""
        self.activity.progress += 1
        if node.op not in ("linear", "expert_linear"):
            return [_numbers(t) for t in super().compute(node, values)]
        members, x = self.linears[node.inputs["weight"]], values[node.inputs["x"]]
        bias = values[node.inputs["bias"]] if "bias" in node.inputs else None
        if node.op == "expert_linear":
            return [_by_expert(members, x, values[node.inputs["ids"]], bias, node.attrs.get("first_expert", 0))]
        y = members[0](x)
        return [y if bias is None else y + bias]


def _by_expert(
    members: Sequence[TorchLinear], x: Tensor, ids: Tensor, bias: Tensor | None, first_expert: int
) -> Tensor:
    """functional.expert_linear."""
    top_k = ids.shape[1]
    parts = x.unflatten(-1, (-1, members[0].in_features)).expand(-1, top_k, -1)  # [num_tokens, top_k, in]
    out = x.new_zeros(*ids.shape, members[0].out_features)
    for expert, chosen in reference.own_choices(ids, first_expert, len(members)):
        y = members[expert](parts[chosen])
        out[chosen] = y if bias is None else y + bias[expert]
    return out.flatten(-2)


def _members(
    file: TensorFile, weight: str, name: FormatName, group_size: int | None, has_zero: bool, in_features: int
) -> list[TorchLinear]:
    """A linear's weight from the engine, or those of each expert."""
    stored = {role: weight + ("" if role == "weight" else f".{role}") + f".{name}" for role in ROLES}
    parts = {role: _tensor(file, key) for role, key in stored.items() if key in file.tensors}
    fmt = LinearFormat(name, group_size, has_zero)
    if parts["weight"].ndim == 2:
        return [TorchLinear(fmt, parts, in_features)]
    experts = range(len(parts["weight"]))
    return [TorchLinear(fmt, {role: t[i] for role, t in parts.items()}, in_features) for i in experts]


def _numbers(tensor: Tensor) -> Tensor:
    """Computed in float32; indices stay what they are."""
    return tensor.float() if tensor.is_floating_point() else tensor


class _TorchCollectives:
    """The communicator's numpy arrays as torch tensors."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm

    def all_reduce(self, x: Tensor, group: Sequence[int]) -> Tensor:
        """The sum over the group."""
        x = x.clone()
        self._comm.all_reduce(x.numpy(), group)
        return x

    def all_gather(self, x: Tensor, group: Sequence[int]) -> Tensor:
        """Side by side along the last dimension."""
        return torch.from_numpy(self._comm.all_gather(x.contiguous().numpy(), group))

    def send(self, x: Tensor, to: int) -> None:
        """Hands `x` on."""
        self._comm.send(x.contiguous().numpy(), to)

    def recv(self, shape: Sequence[int], source: int) -> Tensor:
        """What `source` sent."""
        out = torch.empty(tuple(shape))
        self._comm.recv(out.numpy(), source)
        return out


def _tensor(file: TensorFile, name: str) -> Tensor:
    info = file.tensors[name]
    return torch.frombuffer(file.read(name), dtype=getattr(torch, info.dtype)).view(info.shape)
