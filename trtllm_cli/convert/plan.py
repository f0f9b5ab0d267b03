"""Which tensors of a source make which tensors of each rank: decided, and checked, before anything is read.

The model's own graph says what a rank needs. Every tensor of the source has to be used and every one of the ranks made.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fnmatch import fnmatch

from trtllm_cli.convert.families.family import Family, Source
from trtllm_cli.convert.reader import Reader
from trtllm_cli.errors import SnapshotError, UnsupportedError
from trtllm_cli.graph import Weight
from trtllm_cli.mapping import Mapping, Rank
from trtllm_cli.model_config import ModelConfig
from trtllm_cli.models import trace_model
from trtllm_cli.quant_config import QuantConfig
from trtllm_cli.tensor_file import TensorInfo

EMBEDDING, HEAD = "transformer.vocab_embedding.weight", "lm_head.weight"
_FLOATS = ("float64", "float32", "float16", "bfloat16")
KV_SCALES = "kv_cache_scaling_factor"
# A quantized weight's companions: made with it, named like it.
_COMPANION = re.compile(
    r"\.(per_channel_scale|weights_scaling_factor(_2)?|zero|activation_scaling_factor|prequant_scaling_factor)$"
)
_LAYER = re.compile(r"(?<=transformer\.layers\.)\d+(?=\.)")


@dataclass(frozen=True)
class Job:
    """One whole weight: what it is made of, and what each rank of a stage takes of it."""

    name: str  # in the whole model
    source: Source
    shape: tuple[int, ...]  # of the whole
    parts: dict[Rank, dict[str, Weight]]  # by the name in the rank's file; several where it is quantized


@dataclass(frozen=True)
class Stage:
    """The ranks of one pipeline stage, and their jobs in the order of the model."""

    ranks: tuple[Rank, ...]
    jobs: tuple[Job, ...]

    def tensors(self, rank: Rank) -> dict[str, TensorInfo]:
        """What the rank's file holds."""
        return {n: TensorInfo(w.dtype, w.shape) for job in self.jobs for n, w in job.parts[rank].items()}


def make_plan(reader: Reader, family: Family, config: ModelConfig, *, tied: bool) -> list[Stage]:
    """The jobs of every stage. Raises SnapshotError for a tensor that is missing, left over or of the wrong shape."""
    whole = whole_weights(config)
    sources = {name: source_of(family, name, config, tied=tied) for name in whole}
    for name, weight in whole.items():
        _check_sources(reader, sources[name], weight, name, config)
    _check_leftovers(reader, family, {name for source in sources.values() for name in source.names}, tied=tied)
    return [_stage(config, pp_rank, whole, sources) for pp_rank in range(config.mapping.pp_size)]


def whole_weights(config: ModelConfig) -> dict[str, Weight]:
    """The weights of the model on a single rank, not quantized."""
    alone = config.model_copy(update={"mapping": Mapping(), "quantization": QuantConfig()})
    return trace_model(alone, alone.mapping.ranks[0]).weights


def _weight_of(name: str) -> str:
    """The weight that a tensor of a checkpoint is made with; the cache's scales go with those of k and v."""
    return _COMPANION.sub(".weight", name).replace(f".{KV_SCALES}", ".qkv.weight")


def source_of(family: Family, name: str, config: ModelConfig, *, tied: bool) -> Source:
    """What makes the weight `name` of the whole model."""
    if name == HEAD and tied:
        return Source((family.embedding,))
    found = _LAYER.search(name)
    layer = int(found[0]) if found else None
    moe = None if layer is None else config.moe_of(layer)
    return family.source(_LAYER.sub("{i}", name), layer, moe.num_experts if moe else 0)


def _stage(config: ModelConfig, pp_rank: int, whole: dict[str, Weight], sources: dict[str, Source]) -> Stage:
    ranks = tuple(rank for rank in config.mapping.ranks if rank.pp_rank == pp_rank)
    first = ranks[0].layers(config.num_hidden_layers).start
    parts: dict[str, dict[Rank, dict[str, Weight]]] = {}
    for rank in ranks:
        for name, weight in trace_model(config, rank).weights.items():
            # TensorRT-LLM numbers the layers of each stage from 0.
            whole_name = _LAYER.sub(lambda m: str(int(m[0]) + first), _weight_of(name))
            parts.setdefault(whole_name, {}).setdefault(rank, {})[name] = weight
    return Stage(ranks, tuple(Job(name, sources[name], whole[name].shape, parts[name]) for name in parts))


def _check_sources(reader: Reader, source: Source, weight: Weight, ours: str, config: ModelConfig) -> None:
    for name, expected in zip(source.names, source_shapes(source, weight.shape, config), strict=True):
        info = reader.tensors.get(name)
        if info is None:
            raise SnapshotError(
                f"tensor `{name}` is missing from the snapshot (it makes {ours})",
                where=str(reader.path),
                fix="fetch the snapshot again, and see that its config.json belongs to its weights",
            )
        if info.shape not in expected:
            raise SnapshotError(
                f"tensor `{name}` is {list(info.shape)}, but by the config it should be {list(expected[0])}",
                where=str(reader.path),
                fix="fetch the snapshot again, and see that its config.json belongs to its weights",
            )
        if info.dtype not in _FLOATS:
            raise UnsupportedError(
                f"tensor `{name}` is {info.dtype}: snapshots that are quantized already are not supported",
                where=str(reader.path),
                fix="convert the unquantized model",
            )


def source_shapes(source: Source, shape: tuple[int, ...], config: ModelConfig) -> list[tuple[tuple[int, ...], ...]]:
    """The shapes that each of a source's tensors may have, to make a weight of this shape."""
    rows, rest = math.prod(shape[:-1]) if len(shape) > 1 else shape[0], shape[1:] if len(shape) < 3 else shape[2:]
    count = len(source.names)
    if source.transposed:
        return [((*shape[:-2], shape[-1], shape[-2]),)]
    if source.heights is not None:
        heights = source.heights(config) * (count // len(source.heights(config)))
    elif source.rows is None and count == 3 and len(shape) < 3:  # q, k, v
        kv = config.num_key_value_heads * config.head_size
        heights = (config.num_attention_heads * config.head_size, kv, kv)
    else:
        heights = (rows // count,) * count
    if count == 1 and len(shape) > 2:
        return [(shape, (rows, *rest))]
    return [((height, *rest),) for height in heights]


def _check_leftovers(reader: Reader, family: Family, used: set[str], *, tied: bool) -> None:
    left = [
        name
        for name in reader.tensors
        if name not in used
        and not any(fnmatch(name, pattern) for pattern in family.leftovers)
        and not (tied and name == family.head)
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
    pairs = zip(reader.blocks(family.head), reader.blocks(family.embedding), strict=False)
    if head.shape != embedding.shape or not all(torch.equal(a, b) for a, b in pairs):
        raise UnsupportedError(
            f"tie_word_embeddings is true, but {family.head} is not the embedding",
            where=str(reader.path),
            fix="if the head is meant, set tie_word_embeddings to false in config.json",
        )
