"""The steps around the paged KV cache, and how that lies in memory; see library.py.

The cache of a layer is `num_blocks * kv_bytes_per_block(...)` bytes of zeros, block after block. A block has, per KV
head, the keys transposed `[head_dim, block_size]` and then the values `[block_size, head_dim]`, with both dimensions
rounded up to 16.
"""

from __future__ import annotations

import ctypes
from typing import Literal

from trtllm_cli.kernels.cpu.library import FORMATS, TILE, Op, TlStep, make_step

CacheDType = Literal["float32", "bfloat16"]
RopeLayout = Literal["neox", "gptj"]

_LAYOUTS: dict[RopeLayout, int] = {"neox": 0, "gptj": 1}


def rope_append_step(
    qkv: int,
    q_out: int,
    cache: int,
    table: int | None,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    cache_dtype: CacheDType,
    rotary_dim: int | None = None,
    layout: RopeLayout = "neox",
    q_norm: int | None = None,
    k_norm: int | None = None,
    eps: float = 0.0,
    qkv_stride: int | None = None,
) -> TlStep:
    """Normalizes (where there is a weight) and rotates q and k, and writes k and v to the layer's cache.

    qkv is [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]; q goes to q_out [num_tokens, num_heads * head_dim],
    k and v to `cache` at slot_mapping. `table` is kernels.rope.cos_sin_table's, float32 [max_positions, rotary_dim]
    indexed by positions; None rotates nothing. Elements of a head past `rotary_dim` (default head_dim) pass through.
    q_norm and k_norm are float32 [head_dim].
    """
    assert head_dim <= 1024, "rope.cpp's kMaxHeadDim"
    rotary_dim = 0 if table is None else rotary_dim or head_dim
    width = (num_heads + 2 * num_kv_heads) * head_dim
    ints = (
        0, num_heads, num_kv_heads, head_dim, block_size, FORMATS[cache_dtype], rotary_dim, _LAYOUTS[layout],
        qkv_stride or width,
    )  # fmt: skip
    return make_step(Op.ROPE_APPEND, ints, (eps,), (qkv, q_out, cache, table, q_norm, k_norm))


def paged_attention_step(
    q: int,
    out: int,
    cache: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    cache_dtype: CacheDType,
    scale: float,
    window: int | None = None,
) -> TlStep:
    """out [num_tokens, num_heads * head_dim]: causal attention of q over each sequence's part of the layer's cache.

    Scores are multiplied by `scale`. With `window`, a token sees itself and the `window - 1` before it.
    """
    assert num_heads % num_kv_heads == 0
    ints = (0, num_heads, num_kv_heads, head_dim, block_size, FORMATS[cache_dtype], window or 0)
    return make_step(Op.PAGED_ATTENTION, ints, (scale,), (q, out, cache))


def kv_bytes_per_block(num_kv_heads: int, head_dim: int, block_size: int, dtype: CacheDType) -> int:
    """Bytes that one block of one layer's KV cache takes, keys and values together."""
    elements = 2 * num_kv_heads * _round_up(head_dim) * _round_up(block_size)
    return elements * (4 if dtype == "float32" else 2)


def copy_block(cache: int, bytes_per_block: int, source: int, destination: int) -> None:
    """Copies one whole block of one layer's cache."""
    ctypes.memmove(cache + destination * bytes_per_block, cache + source * bytes_per_block, bytes_per_block)


def _round_up(n: int) -> int:
    return -(-n // TILE) * TILE
