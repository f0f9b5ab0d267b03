"""Rotary positions, the cache's append and attention of one new token a sequence in one kernel: for few sequences.

rope_append.rope_append and decode_attention.decode_attention compute the same, one after another. Here the cache is on
its way before the linear in front has ended, as the new token's key and value come from that linear's output.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_cli.kernels.triton.decode_attention import (
    LOWEST,
    attend,
    dot_dtype,
    for_dot,
    heads_of,
    in_log2,
    in_words,
    load_kv,
    page_rows,
    pull,
    push,
    read_steps,
    share_of,
    weighed,
)
from trtllm_cli.kernels.triton.device import as_stored
from trtllm_cli.kernels.triton.rope_append import cache_offsets


@triton.jit
def _halves(ptr, mask, HALF: tl.constexpr):
    """Of heads at `ptr` [., 1], the first and the second HALF columns."""
    columns = tl.arange(0, HALF)[None, :]
    return tl.load(ptr + columns, mask=mask, other=0.0), tl.load(ptr + HALF + columns, mask=mask, other=0.0)


@triton.jit
def _rotated(a, b, norm_ptr, eps, cos, sin, HALF: tl.constexpr, NORM: tl.constexpr):
    """Halves, normed and rotated; float32."""
    columns = tl.arange(0, HALF)[None, :]
    a, b = a.to(tl.float32), b.to(tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(a * a + b * b, axis=1, keep_dims=True) / (2 * HALF) + eps)
        a *= factor * tl.load(norm_ptr + columns).to(tl.float32)
        b *= factor * tl.load(norm_ptr + HALF + columns).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def rope_decode_attention(
    qkv_ptr, q_norm_ptr, k_norm_ptr, table_ptr, positions_ptr, slot_mapping_ptr, k_cache_ptr, v_cache_ptr,
    block_tables_ptr, query_start_ptr, seq_lens_ptr, sinks_ptr, kv_scale_ptr, out_scale_ptr, out_ptr, partial_ptr,
    lse_ptr, step_ptr, calls, call, max_blocks, scale, softcap, eps,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, KV_QUANT: tl.constexpr, NORM: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, NUM_SPLITS: tl.constexpr, PUSH: tl.constexpr, PULL: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Every sequence has one token in this step, or is padded.

    Grid and arguments as in decode_attention, but for q: qkv [num_seqs, (NUM_KV_HEADS * (GROUP + 2)) * HEAD_DIM], and
    what rope_append makes q and the cache's new rows of: q_norm, k_norm [HEAD_DIM], read with NORM; table float32
    [max_position, HEAD_DIM], cosines, then sines, of halves; positions, slot_mapping int32 [num_seqs]. HEAD_DIM is a
    power of two. The cache's row of the new token is written, and not read; the first split has its key and value.
    """
    split, seq = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    length = tl.load(seq_lens_ptr + seq)
    token = tl.load(query_start_ptr + seq)
    if length <= 0:
        if PDL:
            gdc_wait()  # else this kernel could end before the one in front, and the next one take that for ended too
        return
    old = length - 1  # tokens in the cache
    lowest = 0
    if WINDOW > 0:
        lowest = tl.maximum(length - WINDOW, 0)
    first_tile = lowest // BLOCK_N
    num_tiles = tl.maximum(tl.cdiv(old, BLOCK_N) - first_tile, 1)
    first, last, num_splits = share_of(split, first_tile, num_tiles, old, BLOCK_N, NUM_SPLITS)
    if split >= num_splits:
        return

    HALF: tl.constexpr = HEAD_DIM // 2
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    WIDE: tl.constexpr = qkv_ptr.dtype.element_ty
    DTYPE: tl.constexpr = dot_dtype(WIDE, KV_QUANT)
    STORED: tl.constexpr = k_cache_ptr.dtype.element_ty
    kv_head, first_member, heads, real = heads_of(tl.program_id(2), GROUP, BLOCK_G)
    tiles_ptr, num_blocks = block_tables_ptr + seq.to(tl.int64) * max_blocks, tl.cdiv(length, BLOCK_SIZE)
    columns = tl.arange(0, HEAD_DIM)
    half = tl.arange(0, HALF)[None, :]
    angles = table_ptr + tl.load(positions_ptr + token).to(tl.int64) * HEAD_DIM
    cos, sin = tl.load(angles + half), tl.load(angles + HALF + half)
    slot = tl.load(slot_mapping_ptr + token)
    k_scale, v_scale, out_step = read_steps(kv_scale_ptr, out_scale_ptr, out_ptr, KV_QUANT)
    flag = tl.load(step_ptr) * calls + call
    seq_row = seq.to(tl.int64) * NUM_HEADS
    if PUSH:
        tokens = first + tl.arange(0, BLOCK_N)
        live = tokens < old
        base = page_rows(tiles_ptr, first, num_blocks, kv_head, NUM_KV_HEADS, BLOCK_SIZE, BLOCK_N)
        next_base = page_rows(tiles_ptr, first + BLOCK_N, num_blocks, kv_head, NUM_KV_HEADS, BLOCK_SIZE, BLOCK_N)
        k = load_kv(k_cache_ptr, base, live, 0, HEAD_DIM, HEAD_DIM, BLOCK_N, False)
        v = load_kv(v_cache_ptr, base, live, 0, HEAD_DIM, HEAD_DIM, BLOCK_N, True)
        if PDL:
            gdc_wait()
        row = qkv_ptr + token.to(tl.int64) * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
        # The first split's: asked for here, as behind the tile's products it would have to be waited for.
        is_first = split == 0
        k_row = row + (NUM_HEADS + kv_head) * HEAD_DIM + tl.zeros([1, 1], tl.int32)
        v_row = row + (NUM_HEADS + NUM_KV_HEADS + kv_head) * HEAD_DIM
        q_a, q_b = _halves(row + heads[:, None] * HEAD_DIM, real[:, None] & (half < HALF), HALF)
        k_a, k_b = _halves(k_row, is_first & (half < HALF), HALF)
        new_v = tl.load(v_row + columns, mask=is_first & (columns < HEAD_DIM), other=0.0)
        q_a, q_b = _rotated(q_a, q_b, q_norm_ptr, eps, cos, sin, HALF, NORM)
        q_a, q_b = for_dot(q_a.to(WIDE), DTYPE), for_dot(q_b.to(WIDE), DTYPE)  # rounded as a q in memory is
        q = tl.reshape(tl.permute(tl.join(q_a, q_b), (0, 2, 1)), [BLOCK_G, HEAD_DIM])

        # The first tile. Rows that are no head see no token.
        top, total = tl.where(real, LOWEST, 0.0), tl.where(real, 0.0, 1.0)
        bounds, lows = tl.where(real, old, 0), tl.full([BLOCK_G], lowest, tl.int32)
        scores = in_log2(tl.dot(q, k.to(DTYPE).T, input_precision="ieee"), scale * k_scale, softcap, SOFTCAP)
        seen = (tokens[None, :] < bounds[:, None]) & (tokens[None, :] >= lows[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        weights, _, top, total = weighed(scores, top, total)
        acc = tl.dot(weights.to(DTYPE), v.to(DTYPE), input_precision="ieee")
        if is_first:
            key_a, key_b = _rotated(k_a, k_b, k_norm_ptr, eps, cos, sin, HALF, NORM)
            value = new_v.to(tl.float32)
            if KV_QUANT:
                key_a, key_b, value = tl.div_rn(key_a, k_scale), tl.div_rn(key_b, k_scale), tl.div_rn(value, v_scale)
            key_a, key_b, value = as_stored(key_a, STORED), as_stored(key_b, STORED), as_stored(value, STORED)
            if (first_member == 0) & (slot >= 0):
                at = cache_offsets(slot, kv_head, HEAD_DIM, NUM_KV_HEADS, BLOCK_SIZE)
                tl.store(k_cache_ptr + at + half, key_a)
                tl.store(k_cache_ptr + at + HALF + half, key_b)
                tl.store(v_cache_ptr + at + columns, value)
            products = q_a.to(tl.float32) * key_a.to(tl.float32) + q_b.to(tl.float32) * key_b.to(tl.float32)
            score = in_log2(tl.sum(products, axis=1), scale * k_scale, softcap, SOFTCAP)
            score = tl.where(real, score, float("-inf"))
            new_top = tl.maximum(top, score)
            weight, shrink = tl.exp2(score - new_top), tl.exp2(top - new_top)
            total = total * shrink + weight
            acc = acc * shrink[:, None] + weight[:, None] * value.to(tl.float32)[None, :]
            top = new_top
        if first + BLOCK_N < last:
            more, new_top, total = attend(
                tl.zeros([BLOCK_G, HEAD_DIM], tl.float32), top, total, q, q, k_cache_ptr, v_cache_ptr, tiles_ptr,
                next_base, first + BLOCK_N, last, bounds, lows, num_blocks, old, kv_head, scale * k_scale, softcap,
                NUM_KV_HEADS, HEAD_DIM, HEAD_DIM, BLOCK_SIZE, BLOCK_N, WINDOW, SOFTCAP, True,
                in_words(STORED, BLOCK_G, HEAD_DIM), True,
            )  # fmt: skip
            acc = acc * tl.exp2(top - new_top)[:, None] + more
            top = new_top
        q_rows = token.to(tl.int64) * NUM_HEADS + heads
        push(
            acc, top, total, real, heads, q_rows, sinks_ptr, out_ptr, partial_ptr, lse_ptr, (seq_row + heads),
            split, num_splits, flag, v_scale, out_step, HEAD_DIM, NUM_SPLITS, SINKS,
        )  # fmt: skip
    if PULL:
        pull(
            partial_ptr, lse_ptr, sinks_ptr, out_ptr, seq_row, token.to(tl.int64) * NUM_HEADS,
            kv_head * GROUP + first_member, tl.minimum(GROUP - first_member, BLOCK_G), split, flag, num_splits,
            v_scale / out_step, HEAD_DIM, NUM_SPLITS, SINKS,
        )  # fmt: skip
