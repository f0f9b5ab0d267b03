"""Rotary positions, the cache's append and attention of one new token a sequence in one kernel: for few sequences.

rope_append.rope_append and decode_attention.decode_attention compute the same, one after another. Here the cache is on
its way before the linear in front has ended, as the new token's key and value come from that linear's output.

In Gluon, as what lies between that linear's end and this kernel's own is latency: each warp takes tokens of its own and
meets the others twice, and a thread waits for just those words of other programs that it combines.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_cli.kernels.triton.cache_tiles import (
    await_parts,
    by_heads,
    columns_at_once,
    copy_tile,
    halves,
    in_banks,
    in_columns,
    in_copies,
    keys,
    lanes_of_row,
    no_values,
    over_warps,
    parts_of_values,
    queries_for_dot,
    rows_of_tile,
    seen_of,
    values,
    weights_of,
    with_values,
)
from trtllm_cli.kernels.triton.decode_attention import LOG2E, LOWEST, dot_dtype, in_log2, read_steps, share_of
from trtllm_cli.kernels.triton.device import as_stored, flagged
from trtllm_cli.kernels.triton.gluon_names import barrier
from trtllm_cli.kernels.triton.rope_tiles import append, norms_of, rotated, turns_of


@gluon.jit
def rope_decode_attention(
    qkv_ptr, q_norm_ptr, k_norm_ptr, table_ptr, positions_ptr, slot_mapping_ptr, k_cache_ptr, v_cache_ptr,
    block_tables_ptr, query_start_ptr, seq_lens_ptr, sinks_ptr, kv_scale_ptr, out_scale_ptr, out_ptr, partial_ptr,
    lse_ptr, step_ptr, calls, call, max_blocks, scale, softcap, eps,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr, KV_QUANT: gl.constexpr, NORM: gl.constexpr,
    BLOCK_G: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, NUM_SPLITS: gl.constexpr, PUSH: gl.constexpr,
    PULL: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Every sequence has one token in this step, or is padded.

    Grid and arguments as in decode_attention, but for q: qkv [num_seqs, (NUM_KV_HEADS * (GROUP + 2)) * HEAD_DIM], and
    what rope_append makes q and the cache's new rows of: q_norm, k_norm [HEAD_DIM], read with NORM; table float32
    [max_position, HEAD_DIM], cosines, then sines, of halves; positions, slot_mapping int32 [num_seqs]. HEAD_DIM is a
    power of two of at least 32, BLOCK_G 8 or a multiple of 16. STAGES tiles of BLOCK_N tokens, 16 or a multiple a warp,
    are on their way. partial and lse are used with one split too.

    Programs push what they found in the cache. Those that pull a head add the new token, whose rows in the cache the
    first split's write, and nobody reads.
    """
    split, seq = gl.program_id(0), gl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    length = gl.load(seq_lens_ptr + seq)
    token = gl.load(query_start_ptr + seq)
    if length <= 0:
        if PDL:
            gdc_wait()  # else this kernel could end before the one in front, and the next one take that for ended too
        return
    old = length - 1  # tokens in the cache
    lowest = 0
    if WINDOW > 0:
        lowest = gl.maximum(length - WINDOW, 0)
    first_tile = lowest // BLOCK_N
    num_tiles = gl.maximum((old + BLOCK_N - 1) // BLOCK_N - first_tile, 1)
    first, last, num_splits = share_of(split, first_tile, num_tiles, old, BLOCK_N, NUM_SPLITS)
    TILES_G: gl.constexpr = (GROUP + BLOCK_G - 1) // BLOCK_G
    kv_head = gl.program_id(2) // TILES_G
    first_member = gl.program_id(2) % TILES_G * BLOCK_G
    num_heads = gl.minimum(GROUP - first_member, BLOCK_G)
    if split >= gl.maximum(num_splits, num_heads):
        return

    warps: gl.constexpr = gl.num_warps()
    COUNT: gl.constexpr = BLOCK_N // warps  # tokens of a warp
    gl.static_assert(COUNT % 16 == 0)
    NUM_HEADS: gl.constexpr = NUM_KV_HEADS * GROUP
    HALF: gl.constexpr = HEAD_DIM // 2
    WIDE: gl.constexpr = qkv_ptr.dtype.element_ty
    DTYPE: gl.constexpr = dot_dtype(WIDE, KV_QUANT)
    STORED: gl.constexpr = k_cache_ptr.dtype.element_ty
    first_head = kv_head * GROUP + first_member
    seq_row = seq.to(gl.int64) * NUM_HEADS
    row = qkv_ptr + token.to(gl.int64) * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    angles = table_ptr + gl.load(positions_ptr + token).to(gl.int64) * HEAD_DIM
    slot = gl.load(slot_mapping_ptr + token)
    k_scale, v_scale, out_step = read_steps(kv_scale_ptr, out_scale_ptr, out_ptr, KV_QUANT)
    flag = gl.load(step_ptr) * calls + call

    # For heads that are pulled: each warp has whole rows, and a thread all splits' parts of its columns.
    SPLITS: gl.constexpr = triton.next_power_of_2(NUM_SPLITS)
    in_row: gl.constexpr = gl.BlockedLayout([HEAD_DIM // 32], [32], [warps], [0])
    pulled: gl.constexpr = gl.BlockedLayout([SPLITS, 1], [1, 32], [1, warps], [1, 0])
    columns = gl.arange(0, HEAD_DIM, in_row)
    far_columns = (columns + HALF) % HEAD_DIM
    own_columns = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, pulled))
    turns = turns_of(angles, columns, HEAD_DIM)
    q_norms = norms_of(q_norm_ptr, columns, far_columns, NORM)
    k_norms = norms_of(k_norm_ptr, columns, far_columns, NORM)

    if PUSH:
        copied: gl.constexpr = in_copies(STORED, HEAD_DIM, warps)
        of_copied: gl.constexpr = gl.SliceLayout(2, copied)
        mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])
        left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
        right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
        of_queries: gl.constexpr = gl.DotOperandLayout(0, mma, columns_at_once(STORED))
        of_keys: gl.constexpr = gl.DotOperandLayout(1, mma, columns_at_once(STORED))
        PARTS: gl.constexpr = parts_of_values(STORED)
        WIDTH: gl.constexpr = HEAD_DIM // PARTS
        VALUES: gl.constexpr = STORED if PARTS == 1 else gl.int32
        values_ptr = v_cache_ptr.to(gl.pointer_type(VALUES))
        k_smem = gl.allocate_shared_memory(STORED, [STAGES, warps, COUNT, HEAD_DIM], in_banks(STORED, HEAD_DIM))
        v_smem = gl.allocate_shared_memory(VALUES, [STAGES, warps, COUNT, WIDTH], in_banks(VALUES, WIDTH))
        stop = gl.where(split < num_splits, last, first)
        tiles_ptr = block_tables_ptr + seq.to(gl.int64) * max_blocks
        for s in gl.static_range(STAGES):
            start = first + s * BLOCK_N
            rows = rows_of_tile(tiles_ptr, start, stop, kv_head, warps, COUNT, NUM_KV_HEADS, BLOCK_SIZE, of_copied)
            copy_tile(k_smem.index(s), v_smem.index(s), k_cache_ptr, values_ptr, rows, start, stop, copied)
        ahead = first + STAGES * BLOCK_N
        rows = rows_of_tile(tiles_ptr, ahead, stop, kv_head, warps, COUNT, NUM_KV_HEADS, BLOCK_SIZE, of_copied)

        side: gl.constexpr = lanes_of_row(HEAD_DIM, 8)
        in_lines: gl.constexpr = gl.BlockedLayout([1, 8], [32 // side, side], [warps, 1], [1, 0])
        members = gl.arange(0, BLOCK_G, gl.SliceLayout(1, in_lines))
        across = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, in_lines))[None, :]
        far_across = (across + HALF) % HEAD_DIM
        q_turns, norms = turns_of(angles, across, HEAD_DIM), norms_of(q_norm_ptr, across, far_across, NORM)
        q_ptrs = row + ((first_head + members) * HEAD_DIM)[:, None]
        is_head = (members < num_heads)[:, None]
        q_smem = gl.allocate_shared_memory(DTYPE, [BLOCK_G, HEAD_DIM], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
        seen = seen_of(first, stop, lowest, warps, COUNT, WINDOW, mma)
        async_copy.wait_group(0)
        barrier()
        k, k_high = keys(k_smem.index(0), DTYPE, of_keys)
        v = values(v_smem.index(0), STORED, DTYPE, left)
        if ahead < stop:
            barrier()
            copy_tile(k_smem.index(0), v_smem.index(0), k_cache_ptr, values_ptr, rows, ahead, stop, copied)
            ahead += BLOCK_N
            rows = rows_of_tile(tiles_ptr, ahead, stop, kv_head, warps, COUNT, NUM_KV_HEADS, BLOCK_SIZE, of_copied)
    if PDL:
        gdc_wait()
    if PUSH:
        q = gl.load(q_ptrs + across, mask=is_head, other=0.0)
        q_far = gl.load(q_ptrs + far_across, mask=is_head, other=0.0)
    # Asked for here, as behind the products they would have to be waited for.
    k_row = row + (NUM_HEADS + kv_head) * HEAD_DIM
    key, key_far = gl.load(k_row + columns), gl.load(k_row + far_columns)
    value = gl.load(k_row + NUM_KV_HEADS * HEAD_DIM + own_columns).to(gl.float32)
    if PUSH:
        q = rotated(q, q_far, q_turns, norms, eps, 1, NORM)
        q_smem.store(queries_for_dot(q.to(WIDE), DTYPE))  # rounded as a q in memory is
        barrier()
        q_low, q_high = halves(q_smem, warps, of_queries)
        top = gl.full([warps, BLOCK_G], LOWEST, gl.float32, gl.SliceLayout(2, mma))
        weights, total, top = weights_of(
            q_low, q_high, k, k_high, seen, scale * k_scale, softcap, top, SOFTCAP, mma
        )  # fmt: skip
        once = gl.full([warps, BLOCK_G], 1.0, gl.float32, gl.SliceLayout(2, mma))
        accs = with_values(no_values(PARTS, warps, WIDTH, BLOCK_G, mma), once, v, weights, right)
        if first + BLOCK_N < stop:
            for start in range(first + BLOCK_N, stop, BLOCK_N):
                async_copy.wait_group(STAGES - 1)
                barrier()
                i = (start - first) // BLOCK_N % STAGES
                k, k_high = keys(k_smem.index(i), DTYPE, of_keys)
                seen = seen_of(start, stop, lowest, warps, COUNT, WINDOW, mma)
                weights, more, new_top = weights_of(
                    q_low, q_high, k, k_high, seen, scale * k_scale, softcap, top, SOFTCAP, mma
                )  # fmt: skip
                v = values(v_smem.index(i), STORED, DTYPE, left)
                barrier()
                copy_tile(k_smem.index(i), v_smem.index(i), k_cache_ptr, values_ptr, rows, ahead, stop, copied)
                ahead += BLOCK_N
                rows = rows_of_tile(tiles_ptr, ahead, stop, kv_head, warps, COUNT, NUM_KV_HEADS, BLOCK_SIZE, of_copied)
                shrink = gl.exp2(top - new_top)
                total, top = total * shrink + more, new_top
                accs = with_values(accs, shrink, v, weights, right)
            async_copy.wait_group(0)
            barrier()

        combined: gl.constexpr = in_columns(HEAD_DIM, warps)
        found, lse = over_warps(by_heads(accs), top, total, combined)
        of_combined: gl.constexpr = gl.SliceLayout(0, combined)
        heads = gl.arange(0, BLOCK_G, gl.SliceLayout(1, of_combined))
        real = (heads < num_heads) & (split < num_splits)
        places = (seq_row + first_head + heads) * NUM_SPLITS + split
        parts_ptrs = partial_ptr + (places * HEAD_DIM)[:, None] + gl.arange(
            0, HEAD_DIM, gl.SliceLayout(0, of_combined)
        )[None, :]  # fmt: skip
        gl.store(parts_ptrs, flagged(found, flag), mask=real[:, None])
        gl.store(lse_ptr + places, flagged(lse, flag), mask=real)

    if PULL and split < num_heads:
        stored_key, stored_value = append(
            rotated(key, key_far, turns, k_norms, eps, 0, NORM), value, k_scale, v_scale, k_cache_ptr, v_cache_ptr,
            slot, (split == 0) & (first_member == 0), kv_head, columns, own_columns, NUM_KV_HEADS, HEAD_DIM,
            BLOCK_SIZE, KV_QUANT,
        )  # fmt: skip
        part = gl.arange(0, SPLITS, gl.SliceLayout(1, pulled))[:, None]
        for member in range(split, num_heads, NUM_SPLITS):
            head = first_head + member
            q_row = row + head * HEAD_DIM
            query = rotated(gl.load(q_row + columns), gl.load(q_row + far_columns), turns, q_norms, eps, 0, NORM)
            query = queries_for_dot(query.to(WIDE), DTYPE).to(gl.float32)
            score = in_log2(gl.sum(query * stored_key.to(gl.float32), 0), scale * k_scale, softcap, SOFTCAP)
            places_of = (seq_row + head) * NUM_SPLITS + gl.minimum(part, num_splits - 1) + own_columns[None, :] * 0
            parts, lses = await_parts(
                partial_ptr + places_of * HEAD_DIM + own_columns[None, :], lse_ptr + places_of, flag, SPLITS
            )  # fmt: skip
            lses = gl.where(part < num_splits, lses, float("-inf"))
            largest = gl.maximum(gl.max(lses, 0), score)
            shares, share = gl.exp2(lses - largest[None, :]), gl.exp2(score - largest)
            whole = gl.sum(shares, 0) + share
            if SINKS:
                whole += gl.exp2(gl.load(sinks_ptr + head).to(gl.float32) * LOG2E - largest)
            y = (gl.sum(parts * shares, 0) + share * stored_value.to(gl.float32)) * ((v_scale / out_step) / whole)
            out_at = (token.to(gl.int64) * NUM_HEADS + head) * HEAD_DIM
            gl.store(out_ptr + out_at + own_columns, as_stored(y, out_ptr.dtype.element_ty))
