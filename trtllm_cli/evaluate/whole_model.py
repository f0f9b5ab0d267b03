"""The program of a checkpoint on disk, its ranks put back together."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from trtllm_cli.checkpoint import Checkpoint
from trtllm_cli.errors import UnsupportedError
from trtllm_cli.evaluate.program import Program
from trtllm_cli.graph import Graph, Shard, Weight
from trtllm_cli.mapping import Mapping, Rank
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models import trace_model
from trtllm_cli.models.tensors import check_tensors, read_weight
from trtllm_cli.tensor_file import TensorFile

_DIM: dict[Shard, int] = {"rows": 0, "columns": 1, "expert_rows": 1, "expert_columns": 2}
_OF_EXPERTS = ("experts", "expert_halves", "expert_rows", "expert_columns")


def program_of(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Program:
    """The model of a checkpoint, of any number of ranks. Raises CheckpointError for tensors that do not fit."""
    with ExitStack() as stack:
        files = [stack.enter_context(checkpoint.tensors(rank)) for rank in checkpoint.config.mapping.ranks]
        whole = WholeModel(checkpoint.config, files)
        return Program(whole.graph, whole.tensor, dtype, device)


class WholeModel:
    """The tensors of the ranks' files, joined as the ranks' graphs say that they were split.

    `graph` is the model's on one rank. Files stay open as long as `tensor` is called.
    """

    def __init__(self, config: ModelConfig, files: list[TensorFile]) -> None:
        self._config, self._files = config, files
        self.graph = trace_model(*_alone(config))
        self._homes: dict[str, tuple[Rank, str]] = {}  # whole name -> the first rank of its stage, and its name there
        self._shards: list[dict[str, Weight]] = []
        for rank, file in zip(config.mapping.ranks, files, strict=True):
            graph = trace_model(config, rank)
            check_tensors(graph, file)
            self._shards.append(graph.weights)
            for name in graph.weights:
                self._homes.setdefault(rank.whole_name(name, config.num_hidden_layers), (rank, name))

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name` of the whole model. Raises UnsupportedError where ranks hold different scalars."""
        first, local = self._homes[name]
        parts = [read_weight(self._files[r], self._shards[r][local]) for r in first.tp_group]
        whole = join(name, parts, self._shards[first.rank][local].shard, self._config)
        return whole[: self.graph.weights[name].shape[0]]  # without the rows that pad the vocabulary


def join(name: str, parts: list[torch.Tensor], shard: Shard | None, config: ModelConfig) -> torch.Tensor:
    """One tensor of what the ranks of a stage hold of it."""
    moe_ep = config.mapping.moe_ep
    if moe_ep > 1 and shard in _OF_EXPERTS:  # those that hold the same experts are moe_ep apart
        one = config.model_copy(update={"mapping": Mapping.of(config.mapping.moe_tp)})
        return torch.cat([join(name, parts[i::moe_ep], shard, one) for i in range(moe_ep)])
    if len(parts) == 1:
        return parts[0]
    if shard in (None, "experts"):
        return _same(name, parts)
    if shard == "qkv":
        return _qkv(config, parts)
    if shard == "expert_halves":
        ups, gates = zip(*(part.chunk(2, dim=1) for part in parts), strict=True)
        return torch.cat([*ups, *gates], dim=1)
    if name.endswith(".perm"):  # each rank counts its own inputs from 0
        parts = [part + r * len(part) for r, part in enumerate(parts)]
    return torch.cat(parts, _DIM[shard])


def whole_graph(config: ModelConfig) -> Graph:
    """The graph of the model on one rank, whatever ranks the checkpoint has."""
    return trace_model(*_alone(config))


def _alone(config: ModelConfig) -> tuple[ModelConfig, Rank]:
    alone = config.model_copy(update={"mapping": Mapping()})
    return alone, alone.mapping.ranks[0]


def _same(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    if any(not torch.equal(part, parts[0]) for part in parts):
        raise UnsupportedError(
            f"the ranks have different `{name}`, so they cannot be put together as one model",
            where="rank files of the checkpoint",
            fix="evaluate a checkpoint of one rank: convert again without --tp-size",
        )
    return parts[0]


def _qkv(config: ModelConfig, parts: list[torch.Tensor]) -> torch.Tensor:
    """q's, k's and v's heads of all ranks; neighbouring ranks may hold the same KV head."""
    size, kv = config.head_size, config.kv_heads_per_rank * config.head_size
    q = config.heads_per_rank * size
    repeats = max(1, len(parts) // config.num_key_value_heads)
    pieces = [part.split([q, kv, kv]) for part in parts]
    return torch.cat([*(p[0] for p in pieces), *(p[1] for p in pieces[::repeats]), *(p[2] for p in pieces[::repeats])])
