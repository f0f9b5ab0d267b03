"""The steps around the paged KV cache, and how that lies in memory; see library.py.

The cache of a layer is `num_blocks * kv_bytes_per_block(...)` bytes of zeros, block after block. A block has, per KV
head, the keys transposed `[head_dim, block_size]` and then the values `[block_size, v_head_dim]`, with all dimensions
rounded up to 16. int8 and fp8 (E4M3) hold k and v divided by `kv_scale`, float32 [2], k's and then v's; None: by 1.
"""

from __future__ import annotations

import ctypes
from typing import Literal

from trtllm_cli.kernels.cpu.library import ROWS, TILE, Op, Rows, TlStep, make_step

CacheDType = Literal["float32", "bfloat16", "int8", "fp8"]
RopeLayout = Literal["neox", "gptj"]

_CACHE_TYPES: dict[CacheDType, int] = {"float32": 0, "bfloat16": 1, "int8": 2, "fp8": 3}  # cache.h's
_CACHE_BYTES: dict[CacheDType, int] = {"float32": 4, "bfloat16": 2, "int8": 1, "fp8": 1}
_LAYOUTS: dict[RopeLayout, int] = {"neox": 0, "gptj": 1}


def rope_append_step(
    qkv: int,
    q_out: int,
    cache: int,
    table: int | None = None,
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
    kv_scale: int | None = None,
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
        0, num_heads, num_kv_heads, head_dim, block_size, _CACHE_TYPES[cache_dtype], rotary_dim, _LAYOUTS[layout],
        qkv_stride or width,
    )  # fmt: skip
    return make_step(Op.ROPE_APPEND, ints, (eps,), (qkv, q_out, cache, table, q_norm, k_norm, kv_scale))


def rope_step(
    x: int,
    out: int,
    table: int,
    *,
    num_heads: int,
    head_dim: int,
    rotary_dim: int | None = None,
    layout: RopeLayout = "neox",
) -> TlStep:
    """out = x [num_tokens, num_heads * head_dim], each head rotated as in `rope_append_step`. `out` may be `x`."""
    ints = (0, num_heads * head_dim, num_heads, rotary_dim or head_dim, _LAYOUTS[layout])
    return make_step(Op.ROPE, ints, (), (x, out, table))


def kv_append_step(
    k: int,
    v: int,
    cache: int,
    *,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    cache_dtype: CacheDType,
    v_head_dim: int | None = None,
    kv_scale: int | None = None,
) -> TlStep:
    """Writes k [num_tokens, num_kv_heads * head_dim] and v [.., num_kv_heads * v_head_dim] to `cache` at slot_mapping.

    v_head_dim is head_dim by default.
    """
    v_dim = v_head_dim or head_dim
    width = num_kv_heads * (head_dim + v_dim)
    ints = (0, width, num_kv_heads, head_dim, block_size, _CACHE_TYPES[cache_dtype], v_dim)
    return make_step(Op.KV_APPEND, ints, (), (k, v, cache, kv_scale))


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
    v_head_dim: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: int | None = None,
    kv_scale: int | None = None,
    rows: Rows = "num_tokens",
) -> TlStep:
    """out [rows, num_heads * v_head_dim]: causal attention of q over each sequence's part of the layer's cache.

    With `rows` "num_logits" q is of the tokens that logits_indices name.

    Scores are multiplied by `scale`, and with `softcap` become `softcap * tanh(score / softcap)`. With `window`, a
    token sees itself and the `window - 1` before it. `sinks`, float32 [num_heads], are scores of one more key whose
    value is zero.
    """
    assert num_heads % num_kv_heads == 0
    ints = (
        ROWS[rows], num_heads, num_kv_heads, head_dim, block_size, _CACHE_TYPES[cache_dtype], window or 0,
        v_head_dim or head_dim,
    )  # fmt: skip
    return make_step(Op.PAGED_ATTENTION, ints, (scale, softcap or 0.0), (q, out, cache, sinks, kv_scale))


def kv_bytes_per_block(
    num_kv_heads: int, head_dim: int, block_size: int, dtype: CacheDType, v_head_dim: int | None = None
) -> int:
    """Bytes that one block of one layer's KV cache takes, keys and values together."""
    width = _round_up(head_dim) + _round_up(v_head_dim or head_dim)
    return num_kv_heads * width * _round_up(block_size) * _CACHE_BYTES[dtype]


def copy_block(cache: int, bytes_per_block: int, source: int, destination: int) -> None:
    """Copies one whole block of one layer's cache."""
    ctypes.memmove(cache + destination * bytes_per_block, cache + source * bytes_per_block, bytes_per_block)


def _round_up(n: int) -> int:
    return -(-n // TILE) * TILE
