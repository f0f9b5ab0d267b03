"""What becomes of weights that the source has quantized: kept as they are where that is exact, else made plain.

Weights that one of ours is stacked of (q, k and v) keep their numbers if all are quantized alike. Scales of a whole
weight, which ours has only one of, are brought to the largest: TensorRT-LLM and vLLM do the same.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trtllm_cli.quant_config import KvCacheQuantAlgo, LayerQuant, QuantConfig

if TYPE_CHECKING:
    import torch

    from trtllm_cli.convert.families.family import Source
    from trtllm_cli.convert.source_weight import SourceWeight
    from trtllm_cli.graph import Weight
    from trtllm_cli.model_config import ModelConfig

# One number for a weight, and the part that is rounded again when another number takes its place.
_REQUANTIZED = {
    ("FP8", "weights_scaling_factor"): "weight",
    ("W8A8_SQ_PER_TENSOR_PLUGIN", "weights_scaling_factor"): "weight",
    ("W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN", "weights_scaling_factor"): "weight",
    ("NVFP4", "weights_scaling_factor_2"): "weights_scaling_factor",
}
_LARGEST = "activation_scaling_factor"  # needs no rounding: the largest holds the others' range
_NUMBER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


@dataclass(frozen=True)
class Merged:
    """Weights that are quantized alike, as one."""

    layer: LayerQuant
    fixed: dict[str, torch.Tensor]
    # part -> weight's index -> what its numbers are multiplied by, so that the scale fits all
    factors: dict[str, dict[int, float]] = field(default_factory=dict)


def merge(weights: Sequence[SourceWeight], source: Source, weight: Weight, config: ModelConfig) -> Merged | str:
    """The weights that `source` stacks to ours, quantized as they are, or why that cannot be."""
    layer = weights[0].layer
    for each in weights:
        if each.why_plain:
            return each.why_plain
        if each.layer != layer or each.layer is None:
            return "its parts are not quantized alike"
    assert layer is not None
    if source.plus or source.transposed:
        return "its numbers are not stored as this model needs them"
    if any(set(each.fixed) != set(weights[0].fixed) or set(each.parts) != set(weights[0].parts) for each in weights):
        return "its parts are not quantized alike"
    fixed: dict[str, torch.Tensor] = {}
    factors: dict[str, dict[int, float]] = {}
    for part in weights[0].fixed:
        merged = _merge_fixed(part, [each.fixed[part] for each in weights], layer, _experts(weight), factors)
        if merged is None:
            return f"its parts differ in {part}"
        fixed[part] = merged
    if weight.shard == "columns" and "perm" in fixed and not _stays_in_ranks(fixed["perm"], config.mapping.tp_size):
        return "the order of its inputs (act_order) crosses ranks"
    return Merged(layer, fixed, factors)


def _experts(weight: Weight) -> int | None:
    return weight.shape[0] if len(weight.shape) > 2 else None


def _merge_fixed(
    part: str, values: list[torch.Tensor], layer: LayerQuant, experts: int | None, factors: dict[str, dict[int, float]]
) -> torch.Tensor | None:
    """One value for all; of experts [experts, 1], one for each. None where they cannot be brought together."""
    import torch

    if values[0].numel() != 1:
        same = all(torch.equal(value, values[0]) for value in values)
        return values[0] if same and (experts is None or len(values) == 1) else None
    count = experts if experts is not None and len(values) > 1 else 1
    groups = torch.stack([value.float().reshape(()) for value in values]).reshape(count, -1)
    largest = groups.amax(dim=1)
    if bool((groups != largest[:, None]).any()):
        rounded = _REQUANTIZED.get((layer.quant_algo, part))
        if rounded is not None and bool((largest > 0).all()):
            ratios = (groups / largest[:, None]).flatten().tolist()
            factors[rounded] = {i: ratio for i, ratio in enumerate(ratios) if ratio != 1.0}
        elif part != _LARGEST:
            return None
    return largest if experts is None else largest.expand(experts).reshape(experts, 1).contiguous()


def _stays_in_ranks(perm: torch.Tensor, tp_size: int) -> bool:
    import torch

    width = len(perm) // tp_size
    return bool((perm // width == torch.arange(len(perm)) // width).all())


def config_of(
    kept: Mapping[str, LayerQuant], modules: Collection[str], kv_cache: KvCacheQuantAlgo | None
) -> QuantConfig:
    """The checkpoint's `quantization`, of the linears `modules` of which `kept` are quantized so."""
    layers = {layer.model_dump_json(): layer for layer in kept.values()}
    if not layers:
        return QuantConfig(kv_cache_quant_algo=kv_cache)
    if len(layers) > 1:
        return QuantConfig(quant_algo="MIXED_PRECISION", quantized_layers=dict(kept), kv_cache_quant_algo=kv_cache)
    (layer,) = layers.values()
    excluded = patterns([module for module in modules if module not in kept], modules)
    return QuantConfig.model_validate(
        {**dict(layer), "exclude_modules": excluded or None, "kv_cache_quant_algo": kv_cache}
    )


def patterns(some: Collection[str], among: Collection[str]) -> list[str]:
    """Names, with `*` for the number of the layer where `some` has every layer's that `among` has."""
    alike: dict[str, set[str]] = {}
    for name in among:
        alike.setdefault(_NUMBER.sub("*", name), set()).add(name)
    out: dict[str, None] = {}
    for name in some:
        pattern = _NUMBER.sub("*", name)
        out[pattern if alike[pattern] <= set(some) else name] = None
    return list(out)
