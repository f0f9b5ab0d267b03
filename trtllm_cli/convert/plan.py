"""Which weights of a source make which tensors of each rank: decided, and checked, before anything is read.

The model's own graph says what a rank needs. Every tensor of the source has to be used and every one of the ranks made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from trtllm_cli.convert.families.family import Family, Source
from trtllm_cli.convert.quantized_source import Merged
from trtllm_cli.convert.reader import Reader
from trtllm_cli.convert.stack import row_layout
from trtllm_cli.errors import SnapshotError, UnsupportedError
from trtllm_cli.graph import Weight
from trtllm_cli.mapping import Mapping as Ranks
from trtllm_cli.mapping import Rank
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models import trace_model
from trtllm_cli.models.tensors import KV_SCALES
from trtllm_cli.quant_config import QuantConfig
from trtllm_cli.tensor_file import TensorInfo

HEAD = "lm_head.weight"
_FLOATS = ("float64", "float32", "float16", "bfloat16")
# A quantized weight's companions: made with it, named like it.
_COMPANION = re.compile(
    r"\.(per_channel_scale|weights_scaling_factor(_2)?|zero|perm|prequant_scaling_factor|activation_scaling_factor)$"
)
_LAYER = re.compile(r"(?<=transformer\.layers\.)\d+(?=\.)")
_BLOCK = 1 << 22  # elements of the embedding and the head, compared at once


@dataclass(frozen=True)
class Job:
    """One whole weight: what it is made of, and what each rank of a stage takes of it.

    A quantized weight has several parts, by the last part of their names: `wholes` as one rank would hold them, `parts`
    as each rank does, by the name in its file.
    """

    name: str  # in the whole model
    source: Source | None  # None: made of no weight of the source
    weight: Weight  # of the whole model, plain
    wholes: dict[str, Weight]
    parts: dict[Rank, dict[str, Weight]]
    merged: Merged | None = None  # taken as the source has quantized it

    @property
    def module(self) -> str:
        """The layer that the weight belongs to."""
        return self.name.rpartition(".")[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all ranks' parts."""
        return sum(TensorInfo(w.dtype, w.shape).nbytes for parts in self.parts.values() for w in parts.values())


@dataclass(frozen=True)
class Stage:
    """The ranks of one pipeline stage, and their jobs in the order of the model."""

    ranks: tuple[Rank, ...]
    jobs: tuple[Job, ...]

    def tensors(self, rank: Rank) -> dict[str, TensorInfo]:
        """What the rank's file holds."""
        return {n: TensorInfo(w.dtype, w.shape) for job in self.jobs for n, w in job.parts[rank].items()}


def make_plan(
    reader: Reader, family: Family, config: ModelConfig, *, tied: bool, kept: Mapping[str, Merged]
) -> list[Stage]:
    """The jobs of every stage; `kept` are the modules that stay quantized as the source has them.

    Raises SnapshotError for a tensor that is missing, left over or of the wrong shape, UnsupportedError for a layer
    that ranks cannot share.
    """
    sources = sources_of(reader, family, config, tied=tied)
    used = {tensor for source in sources.values() for name in source.names for tensor in reader.tensors_of(name)}
    _check_leftovers(reader, family, used, config.num_hidden_layers, tied=tied)
    return [_stage(config, pp_rank, sources, kept) for pp_rank in range(config.mapping.pp_size)]


def sources_of(reader: Reader, family: Family, config: ModelConfig, *, tied: bool) -> dict[str, Source]:
    """What each weight of the whole model is made of. Raises SnapshotError for one that is missing or misshapen."""
    whole = whole_weights(config)
    sources = {name: source_of(family, name, config, tied=tied) for name in whole}
    shapes = reader.weights
    for name, weight in whole.items():
        _check_sources(reader, shapes, sources[name], weight, name, config)
    return sources


def whole_weights(config: ModelConfig, quantization: QuantConfig | None = None) -> dict[str, Weight]:
    """The weights of the model on a single rank, not quantized, or quantized so."""
    alone = config.model_copy(update={"mapping": Ranks(), "quantization": quantization or QuantConfig()})
    return trace_model(alone, alone.mapping.ranks[0]).weights


def source_of(family: Family, name: str, config: ModelConfig, *, tied: bool) -> Source:
    """What makes the weight `name` of the whole model."""
    if name == HEAD and tied:
        return Source((family.embedding,))
    layer = _LAYER.search(name)
    return family.source(_LAYER.sub("{i}", name), int(layer[0]) if layer else None, config)


def _stage(config: ModelConfig, pp_rank: int, sources: Mapping[str, Source], kept: Mapping[str, Merged]) -> Stage:
    ranks = tuple(rank for rank in config.mapping.ranks if rank.pp_rank == pp_rank)
    first = ranks[0].layers(config.num_hidden_layers).start
    plain, stored = whole_weights(config), whole_weights(config, config.quantization)
    parts: dict[str, dict[Rank, dict[str, Weight]]] = {}
    wholes: dict[str, dict[str, Weight]] = {}
    for rank in ranks:
        for name, weight in trace_model(config, rank).weights.items():
            # TensorRT-LLM numbers the layers of each stage from 0.
            part_name = _LAYER.sub(lambda m: str(int(m[0]) + first), name)
            whole_name = _COMPANION.sub(".weight", part_name)
            parts.setdefault(whole_name, {}).setdefault(rank, {})[name] = weight
            wholes.setdefault(whole_name, {})[part_of(name)] = stored[part_name]
            _check_columns(part_name, weight, stored[part_name], config)
    jobs = [
        Job(
            name, sources.get(name), plain[name] if name in plain else stored[name],
            wholes[name], parts[name], kept.get(name.removesuffix(".weight")),
        )
        for name in parts
    ]  # fmt: skip
    assert all(job.source is not None or part_of(job.name) == KV_SCALES for job in jobs)
    return Stage(ranks, tuple(jobs))


def part_of(name: str) -> str:
    """The last part of a tensor's name."""
    return name.rpartition(".")[2]


def _check_columns(name: str, weight: Weight, whole: Weight, config: ModelConfig) -> None:
    """Blocks of inputs that share a scale must not lie across ranks."""
    of_experts = weight.shard == "expert_columns"
    if weight.shard != "columns" and not of_experts:
        return
    axis, ranks = (2, config.mapping.moe_tp) if of_experts else (1, config.mapping.tp_size)
    if weight.shape[axis] * ranks != whole.shape[axis]:
        flag = "--moe-tp-size" if config.mapping.moe_ep > 1 and of_experts else "--tp-size"
        raise UnsupportedError(
            f"{name.rpartition('.')[0]}: inputs that share a scale would lie on two of {ranks} ranks",
            where=flag,
            fix=f"use a smaller {flag}, or another --qformat",
        )


def _check_sources(
    reader: Reader,
    shapes: Mapping[str, tuple[int, ...]],
    source: Source,
    weight: Weight,
    ours: str,
    config: ModelConfig,
) -> None:
    for name, expected in zip(source.names, source_shapes(source, weight, config), strict=True):
        shape = shapes.get(name)
        if shape is None:
            raise SnapshotError(
                f"tensor `{name}` is missing from the snapshot (it makes {ours})",
                where=str(reader.path),
                fix="fetch the snapshot again, and see that its config.json belongs to its weights",
            )
        if shape not in expected:
            raise SnapshotError(
                f"tensor `{name}` is {list(shape)}, but by the config it should be {list(expected[0])}",
                where=str(reader.path),
                fix="fetch the snapshot again, and see that its config.json belongs to its weights",
            )
        if (dtype := reader.weight(name).dtype) not in _FLOATS:
            raise UnsupportedError(
                f"tensor `{name}` is {dtype}, but its config.json does not say how it is quantized",
                where=str(reader.path),
                fix="convert the unquantized model, or add the publisher's quantization_config to config.json",
            )


def source_shapes(source: Source, weight: Weight, config: ModelConfig) -> list[tuple[tuple[int, ...], ...]]:
    """The shapes that each of a source's tensors may have, to make this weight."""
    (rows, rest), count, shape = row_layout(weight), len(source.names), weight.shape
    if source.transposed:
        return [((*shape[:-2], shape[-1], shape[-2]),)]
    if source.heights is not None:
        heights = source.heights(config) * (count // len(source.heights(config)))
    elif source.rows is None and weight.shard == "qkv" and count == 3:
        kv = config.num_key_value_heads * config.head_size
        heights = (config.num_attention_heads * config.head_size, kv, kv)
    else:
        heights = (rows // count,) * count
    if count == 1 and (len(shape) > 2 or (len(shape) == 2 and not rest)):
        return [(shape, (heights[0], *rest))]
    if count == 1 and len(shape) == 1 and not shape[0] % config.head_size:
        return [(shape, (shape[0] // config.head_size, config.head_size))]  # a vector of heads, Cohere's a matrix
    return [((height, *rest),) for height in heights]


def _check_leftovers(reader: Reader, family: Family, used: set[str], num_layers: int, *, tied: bool) -> None:
    left = [
        name
        for name in reader.tensors
        if name not in used and not family.is_left_out(name, num_layers) and not (tied and name == family.head)
    ]
    if left:
        more = f", and {len(left) - 3} more" if len(left) > 3 else ""
        raise SnapshotError(
            f"{family.architecture} has no place for {', '.join(f'`{n}`' for n in left[:3])}{more}",
            where=str(reader.path),
            fix="see that the snapshot's config.json belongs to its weights",
        )
    if tied and family.head in reader.tensors:
        _check_tied(reader, family)


def _check_tied(reader: Reader, family: Family) -> None:
    """A head that is stored although it is tied must be the embedding."""
    import torch

    head, embedding = reader.tensors[family.head], reader.tensors[family.embedding]
    rows, step = head.shape[0], max(1, _BLOCK // head.shape[-1])
    blocks = [(i, min(rows, i + step)) for i in range(0, rows, step)]
    if head.shape != embedding.shape or not all(
        torch.equal(reader.rows(family.head, *block), reader.rows(family.embedding, *block)) for block in blocks
    ):
        raise UnsupportedError(
            f"tie_word_embeddings is true, but {family.head} is not the embedding",
            where=str(reader.path),
            fix="if the head is meant, set tie_word_embeddings to false in config.json",
        )
