"""Rotary position embedding: the angle of every position, for every scaling type that transformers has for Llama.

Follows transformers' `modeling_rope_utils`: linear and dynamic NTK (u/emozilla), YaRN (arXiv 2309.00071), LongRoPE
(arXiv 2402.13753) and Llama 3.1's scaling.
"""

from __future__ import annotations

import math
from typing import TypeVar

import torch

from trtllm_cli.kernels.rope_spec import RopeSpec
from trtllm_cli.model_config import RopeScaling

T = TypeVar("T")


def cos_sin_table(spec: RopeSpec, num_positions: int) -> torch.Tensor:
    """float32 [num_positions, dim]: the cosines of dim / 2 angles, then their sines, scaled by the attention factor."""
    positions = torch.arange(num_positions, dtype=torch.float32)
    factor = _attention_factor(spec)
    kind = spec.scaling.rope_type if spec.scaling else None
    if kind in ("dynamic", "longrope"):
        limit = spec.max_prompt_len
        assert limit is not None
        angles = torch.outer(positions, _inv_freq(spec, 1))
        if kind == "longrope" and num_positions > limit:
            angles[limit:] = torch.outer(positions[limit:], _inv_freq(spec, limit + 1))
        elif kind == "dynamic":
            for p in range(limit, num_positions):
                angles[p] = p * _inv_freq(spec, p + 1)
    else:
        angles = torch.outer(positions, _inv_freq(spec, 1))
    return torch.cat([angles.cos() * factor, angles.sin() * factor], dim=1)


def _inv_freq(spec: RopeSpec, seq_len: int) -> torch.Tensor:
    """float32 [dim / 2]: angle per position, when the sequence has `seq_len` tokens."""
    exponents = torch.arange(0, spec.dim, 2, dtype=torch.int64).float() / spec.dim
    plain = 1.0 / (spec.base**exponents)
    s = spec.scaling
    if s is None:
        return plain
    match s.rope_type:
        case "linear":
            return plain / _need(s.factor, "factor")
        case "dynamic":
            limit, factor = spec.max_prompt_len, _need(s.factor, "factor")
            assert limit is not None
            ratio = max(seq_len, limit) / limit
            base = spec.base * ((factor * ratio) - (factor - 1)) ** (spec.dim / (spec.dim - 2))
            return 1.0 / (base**exponents)
        case "longrope":
            limit = spec.max_prompt_len
            assert limit is not None
            factors = s.long_factor if seq_len > limit else s.short_factor
            return 1.0 / (torch.tensor(_need(factors, "short_factor and long_factor")) * spec.base**exponents)
        case "llama3":
            return _llama3(s, plain)
        case "yarn":
            return _yarn(spec, s)


def _llama3(s: RopeScaling, plain: torch.Tensor) -> torch.Tensor:
    factor, original = _need(s.factor, "factor"), _need(s.original_max_position_embeddings, "original_max_position...")
    low, high = _need(s.low_freq_factor, "low_freq_factor"), _need(s.high_freq_factor, "high_freq_factor")
    wavelength = 2 * math.pi / plain
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * plain / factor + smooth * plain
    scaled = torch.where(wavelength > original / low, plain / factor, plain)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(between, blended, scaled)


def _yarn(spec: RopeSpec, s: RopeScaling) -> torch.Tensor:
    factor = _need(s.factor, "factor")
    original = s.original_max_position_embeddings or spec.max_position_embeddings
    frequencies = spec.base ** (torch.arange(0, spec.dim, 2).float() / spec.dim)

    def dim_of(rotations: float) -> float:
        return (spec.dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(spec.base))

    low, high = dim_of(s.beta_fast or 32.0), dim_of(s.beta_slow or 1.0)
    if s.truncate is None or s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.dim - 1)
    ramp = (torch.arange(spec.dim // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    extrapolate = 1 - ramp.clamp(0, 1)
    return (1 / (factor * frequencies)) * (1 - extrapolate) + (1 / frequencies) * extrapolate


def _attention_factor(spec: RopeSpec) -> float:
    """What cosines and sines are multiplied by, so that attention's temperature follows the context's length."""
    s = spec.scaling
    if s is None or s.rope_type not in ("yarn", "longrope"):
        return 1.0
    if s.attention_factor is not None:
        return s.attention_factor
    original = s.original_max_position_embeddings or spec.max_position_embeddings
    factor = s.factor or spec.max_position_embeddings / original
    if s.rope_type == "longrope":
        return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if s.mscale and s.mscale_all_dim:
        return mscale(s.mscale) / mscale(s.mscale_all_dim)
    return mscale(1.0)


def _need(value: T | None, field: str) -> T:
    assert value is not None, f"rotary_scaling has no {field}: convert should have refused it"
    return value
