"""Heads of one new token, normed, rotated and appended, for attention that takes them from a linear, in Gluon."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from trtllm_cli.kernels.triton.device import as_stored
from trtllm_cli.kernels.triton.rope_append import cache_offsets


@gluon.jit
def turns_of(angles, columns, HEAD_DIM: gl.constexpr):
    """What a head's columns, and those half a head away, are times: cosines, and sines with their signs."""
    HALF: gl.constexpr = HEAD_DIM // 2
    sin = gl.load(angles + HALF + columns % HALF)
    return gl.load(angles + columns % HALF), gl.where(columns < HALF, -sin, sin)


@gluon.jit
def norms_of(norm_ptr, columns, far_columns, NORM: gl.constexpr):
    """The head norm's weights of columns and of those half a head away."""
    weight, far_weight = 1.0, 1.0
    if NORM:
        weight = gl.load(norm_ptr + columns).to(gl.float32)
        far_weight = gl.load(norm_ptr + far_columns).to(gl.float32)
    return weight, far_weight


@gluon.jit
def rotated(x, far, turns, norms, eps, axis: gl.constexpr, NORM: gl.constexpr):
    """Heads, with their columns along `axis`, normed and rotated, of their columns and those half a head away."""
    x, far = x.to(gl.float32), far.to(gl.float32)
    if NORM:
        factor = gl.rsqrt(gl.sum(x * x, axis, keep_dims=axis > 0) / x.shape[axis] + eps)
        x *= factor * norms[0]
        far *= factor * norms[1]
    return x * turns[0] + far * turns[1]


@gluon.jit
def append(
    key, value, k_scale, v_scale, k_cache_ptr, v_cache_ptr, slot, is_mine, kv_head, columns, value_columns,
    NUM_KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, KV_QUANT: gl.constexpr,
):  # fmt: skip
    """A new token's key and value as the cache holds them; where it is this program that appends, at `slot`, if any."""
    STORED: gl.constexpr = k_cache_ptr.dtype.element_ty
    if KV_QUANT:
        key, value = gl.div_rn(key, k_scale), gl.div_rn(value, v_scale)
    key, value = as_stored(key, STORED), as_stored(value, STORED)
    if is_mine & (slot >= 0):
        at = cache_offsets(slot, kv_head, HEAD_DIM, NUM_KV_HEADS, BLOCK_SIZE)
        gl.store(k_cache_ptr + at + columns, key)
        gl.store(v_cache_ptr + at + value_columns, value)
    return key, value
