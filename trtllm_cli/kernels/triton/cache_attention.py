"""Attention of one new token a sequence whose cache is on its way before the kernel in front has ended.

decode_attention.decode_attention is its slow twin. Here whole tiles of older tokens are asked for first, as just the
last one has what this step has appended, and a sequence has one program for each KV head until it is long: then several
have a part each, and show the others what they found.
"""

from __future__ import annotations

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
    rows_of_tiles,
    seen_of,
    values,
    weights_of,
    with_values,
)
from trtllm_cli.kernels.triton.decode_attention import LOG2E, LOWEST, dot_dtype, in_log2, read_steps
from trtllm_cli.kernels.triton.device import as_stored, flagged
from trtllm_cli.kernels.triton.gluon_names import barrier
from trtllm_cli.kernels.triton.rope_tiles import append, norms_of, rotated, turns_of


@gluon.jit
def _pull(
    partial_ptr, lse_ptr, sinks_ptr, out_ptr, partial_row, out_row, head, flag, num_splits, factor,
    HEAD_DIM: gl.constexpr, NUM_SPLITS: gl.constexpr, SINKS: gl.constexpr,
):  # fmt: skip
    """The output of a head of what each split found, once it has."""
    # Each warp has whole rows, and a thread all splits' parts of its columns.
    layout: gl.constexpr = gl.BlockedLayout([NUM_SPLITS, 1], [1, 32], [1, gl.num_warps()], [1, 0])
    columns = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    part = gl.arange(0, NUM_SPLITS, gl.SliceLayout(1, layout))[:, None]
    places = partial_row + gl.minimum(part, num_splits - 1) + columns[None, :] * 0
    parts, lse = await_parts(partial_ptr + places * HEAD_DIM + columns[None, :], lse_ptr + places, flag, NUM_SPLITS)
    lse = gl.where(part < num_splits, lse, float("-inf"))
    top = gl.max(lse, 0)
    weights = gl.exp2(lse - top[None, :])
    total = gl.sum(weights, 0)
    if SINKS:
        total += gl.exp2(gl.load(sinks_ptr + head).to(gl.float32) * LOG2E - top)
    y = gl.sum(parts * weights, 0) * (factor / total)
    gl.store(out_ptr + out_row * HEAD_DIM + columns, as_stored(y, out_ptr.dtype.element_ty))


@gluon.jit
def _with_new(found, lse, value, score):
    """What over_warps found of older tokens, and the new token's value, whose weights are 2**score."""
    top = gl.maximum(lse, score)
    old, new = gl.exp2(lse - top), gl.exp2(score - top)
    total = old + new
    mean = found * (old / total)[:, None] + value.to(gl.float32)[None, :] * (new / total)[:, None]
    return mean, top + gl.log2(total)


@gluon.jit
def cache_attention(
    q_ptr, k_cache_ptr, v_cache_ptr, block_tables_ptr, query_start_ptr, seq_lens_ptr, sinks_ptr, kv_scale_ptr,
    out_scale_ptr, out_ptr, partial_ptr, lse_ptr, step_ptr, q_norm_ptr, k_norm_ptr, angles_ptr, positions_ptr,
    slot_mapping_ptr, calls, call, max_blocks, scale, softcap, eps,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr, KV_QUANT: gl.constexpr, BLOCK_G: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, NUM_SPLITS: gl.constexpr, SHARE: gl.constexpr, ROPE: gl.constexpr,
    NORM: gl.constexpr, PUSH: gl.constexpr, PULL: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Grid (splits, NUM_KV_HEADS * cdiv(GROUP, BLOCK_G), num_seqs); arguments as in decode_attention.

    Up to NUM_SPLITS programs share a sequence's tiles, as many as the grid has and as there are SHARE tokens. With more
    than one, programs push and pull as decode_attention's do. HEAD_DIM is a power of two of at least 32, BLOCK_G 8 or a
    multiple of 16. STAGES tiles of BLOCK_N tokens, 16 or a multiple a warp, are on their way. The kernel in front may
    write this step's tokens to the cache, and no others.

    With ROPE the queries are a linear's output [num_seqs, (NUM_KV_HEADS * (GROUP + 2)) * HEAD_DIM], one token each, and
    what rope_append does is done here, with its arguments: q_norm, k_norm (read with NORM), angles, its table, of
    halves; positions, slot_mapping and eps.
    """
    split, seq = gl.program_id(0), gl.program_id(2)
    if PDL:
        gdc_launch_dependents()
    warps: gl.constexpr = gl.num_warps()
    COUNT: gl.constexpr = BLOCK_N // warps  # tokens of a warp
    gl.static_assert(COUNT % 16 == 0)
    NUM_HEADS: gl.constexpr = NUM_KV_HEADS * GROUP
    DTYPE: gl.constexpr = dot_dtype(q_ptr.dtype.element_ty, KV_QUANT)
    STORED: gl.constexpr = k_cache_ptr.dtype.element_ty
    HALF: gl.constexpr = HEAD_DIM // 2
    TILES_G: gl.constexpr = (GROUP + BLOCK_G - 1) // BLOCK_G
    kv_head = gl.program_id(1) // TILES_G
    first_member = gl.program_id(1) % TILES_G * BLOCK_G
    first_head = kv_head * GROUP + first_member
    num_heads = gl.minimum(GROUP - first_member, BLOCK_G)
    length = gl.load(seq_lens_ptr + seq)
    token = gl.load(query_start_ptr + seq)
    num_queries = gl.load(query_start_ptr + seq + 1) - token
    lowest = 0
    if WINDOW > 0:
        lowest = gl.maximum(length - WINDOW, 0)
    first = lowest // BLOCK_N * BLOCK_N
    copied: gl.constexpr = in_copies(STORED, HEAD_DIM, warps)
    of_copied: gl.constexpr = gl.SliceLayout(2, copied)
    table_ptr = block_tables_ptr + seq.to(gl.int64) * max_blocks
    room = max_blocks * BLOCK_SIZE  # not as many as there are: that would have to be waited for first
    rows = rows_of_tiles(table_ptr, first, room, kv_head, STAGES, BLOCK_N, NUM_KV_HEADS, BLOCK_SIZE, of_copied)
    if (num_queries != 1) | (length <= 0):
        if PDL:
            gdc_wait()  # else this kernel could end before the one in front, and the next one take that for ended too
        return

    stop = length  # of the tokens that are in the cache when this kernel reads it
    if ROPE:
        stop = length - 1
    newest = (gl.maximum(stop, 1) - 1 if ROPE else stop - 1) // BLOCK_N * BLOCK_N  # where the last tile begins
    final, num_splits = newest, 1  # of this program
    if NUM_SPLITS > 1:
        num_tiles = (newest - first) // BLOCK_N + 1
        wanted = gl.minimum((num_tiles * BLOCK_N + SHARE - 1) // SHARE, gl.num_programs(0))
        share = (num_tiles + wanted - 1) // wanted
        num_splits = (num_tiles + share - 1) // share
        if split >= num_splits:
            return
        first += split * share * BLOCK_N
        final = gl.minimum(first + (share - 1) * BLOCK_N, newest)
        if split > 0:
            rows = rows_of_tiles(
                table_ptr, first, stop, kv_head, STAGES, BLOCK_N, NUM_KV_HEADS, BLOCK_SIZE, of_copied
            )  # fmt: skip
    row = token.to(gl.int64) * NUM_HEADS + first_head
    q_row = row
    if ROPE:
        q_row += token.to(gl.int64) * (2 * NUM_KV_HEADS)
        angles_ptr += gl.load(positions_ptr + token).to(gl.int64) * HEAD_DIM
        slot_of_new = gl.load(slot_mapping_ptr + token)
    k_scale, v_scale, out_step = read_steps(kv_scale_ptr, out_scale_ptr, out_ptr, KV_QUANT)
    factor = v_scale / out_step
    flag = 0
    if NUM_SPLITS > 1:
        flag = gl.load(step_ptr) * calls + call

    if PUSH:
        mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])
        left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
        right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
        of_queries: gl.constexpr = gl.DotOperandLayout(0, mma, columns_at_once(STORED))
        of_keys: gl.constexpr = gl.DotOperandLayout(1, mma, columns_at_once(STORED))
        PARTS: gl.constexpr = parts_of_values(STORED)
        WIDTH: gl.constexpr = HEAD_DIM // PARTS
        VALUES: gl.constexpr = STORED if PARTS == 1 else gl.int32
        new_values_ptr = v_cache_ptr
        v_cache_ptr = v_cache_ptr.to(gl.pointer_type(VALUES))
        k_smem = gl.allocate_shared_memory(STORED, [STAGES, warps, COUNT, HEAD_DIM], in_banks(STORED, HEAD_DIM))
        v_smem = gl.allocate_shared_memory(VALUES, [STAGES, warps, COUNT, WIDTH], in_banks(VALUES, WIDTH))
        for s in gl.static_range(STAGES):
            start = first + s * BLOCK_N
            if (start <= final) & (ROPE | (start < newest)):  # else the last tile has what the step appends
                copy_tile(k_smem.index(s), v_smem.index(s), k_cache_ptr, v_cache_ptr, rows[s], start, stop, copied)
            else:
                async_copy.commit_group()
        if not ROPE:
            last_rows = rows_of_tile(
                table_ptr, newest, stop, kv_head, warps, COUNT, NUM_KV_HEADS, BLOCK_SIZE, of_copied
            )  # fmt: skip

        lanes: gl.constexpr = lanes_of_row(HEAD_DIM, 8)
        in_lines: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [warps, 1], [1, 0])
        members = gl.arange(0, BLOCK_G, gl.SliceLayout(1, in_lines))
        columns = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, in_lines))[None, :]
        q_ptrs = q_ptr + ((q_row + members) * HEAD_DIM)[:, None]
        is_head = (members < num_heads)[:, None]
        q_smem = gl.allocate_shared_memory(DTYPE, [BLOCK_G, HEAD_DIM], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
        combined: gl.constexpr = in_columns(HEAD_DIM, warps)
        of_combined: gl.constexpr = gl.SliceLayout(0, combined)
        heads = gl.arange(0, BLOCK_G, gl.SliceLayout(1, of_combined))
        real = heads < num_heads
        sinks = heads.to(gl.float32)
        if SINKS:
            sinks = gl.load(sinks_ptr + first_head + heads, mask=real, other=0.0).to(gl.float32) * LOG2E
        across = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, of_combined))
        if ROPE:
            far = (columns + HALF) % HEAD_DIM
            turns = turns_of(angles_ptr, columns, HEAD_DIM)
            q_norms, k_norms = norms_of(q_norm_ptr, columns, far, NORM), norms_of(k_norm_ptr, columns, far, NORM)
            k_row = q_ptr + (q_row + (NUM_HEADS - first_head) + kv_head) * HEAD_DIM
    if PDL:
        gdc_wait()
    if PUSH:
        q = gl.load(q_ptrs + columns, mask=is_head, other=0.0)
        if ROPE:
            key, value = gl.load(k_row + columns), gl.load(k_row + NUM_KV_HEADS * HEAD_DIM + across).to(gl.float32)
            q_far, key_far = gl.load(q_ptrs + far, mask=is_head, other=0.0), gl.load(k_row + far)
            q = rotated(q, q_far, turns, q_norms, eps, 1, NORM).to(q.dtype)  # rounded as a q in memory is
            key, value = append(
                rotated(key, key_far, turns, k_norms, eps, 1, NORM), value, k_scale, v_scale, k_cache_ptr,
                new_values_ptr, slot_of_new, (split == 0) & (first_member == 0), kv_head, columns, across,
                NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, KV_QUANT,
            )  # fmt: skip
            product = gl.sum(queries_for_dot(q, DTYPE).to(gl.float32) * key.to(gl.float32), 1)
            score = in_log2(product, scale * k_scale, softcap, SOFTCAP)
            score = gl.convert_layout(score, gl.SliceLayout(1, of_combined))
        else:
            slot = (newest - first) // BLOCK_N
            if (slot < STAGES) & (final == newest):
                copy_tile(
                    k_smem.index(slot), v_smem.index(slot), k_cache_ptr, v_cache_ptr, last_rows, newest, stop, copied
                )
        q_smem.store(queries_for_dot(q, DTYPE))
        barrier()
        q_low, q_high = halves(q_smem, warps, of_queries)
        top = gl.full([warps, BLOCK_G], LOWEST, gl.float32, gl.SliceLayout(2, mma))
        total = gl.zeros([warps, BLOCK_G], gl.float32, gl.SliceLayout(2, mma))
        accs = no_values(PARTS, warps, WIDTH, BLOCK_G, mma)
        for start in range(first, final + 1, BLOCK_N):
            if start == final:
                async_copy.wait_group(0)
            else:
                async_copy.wait_group(STAGES - 1)
            barrier()
            i = (start - first) // BLOCK_N % STAGES
            k, k_high = keys(k_smem.index(i), DTYPE, of_keys)
            seen = seen_of(start, stop, lowest, warps, COUNT, WINDOW, mma)
            weights, more, new_top = weights_of(
                q_low, q_high, k, k_high, seen, scale * k_scale, softcap, top, SOFTCAP, mma
            )  # fmt: skip
            v = values(v_smem.index(i), STORED, DTYPE, left)
            ahead = start + STAGES * BLOCK_N
            if ahead <= final:
                barrier()
                next_rows = rows_of_tile(
                    table_ptr, ahead, stop, kv_head, warps, COUNT, NUM_KV_HEADS, BLOCK_SIZE, of_copied
                )  # fmt: skip
                copy_tile(k_smem.index(i), v_smem.index(i), k_cache_ptr, v_cache_ptr, next_rows, ahead, stop, copied)
            else:
                async_copy.commit_group()
            shrink = gl.exp2(top - new_top)
            total, top = total * shrink + more, new_top
            accs = with_values(accs, shrink, v, weights, right)

        found, lse = over_warps(by_heads(accs), top, total, combined)
        if ROPE and split == 0:
            found, lse = _with_new(found, lse, value, score)
        if num_splits == 1:
            factors = gl.full([BLOCK_G], 1.0, gl.float32, gl.SliceLayout(1, of_combined)) * factor
            if SINKS:
                factors = factors / (1.0 + gl.exp2(sinks - lse))
            y = as_stored(found * factors[:, None], out_ptr.dtype.element_ty)
            gl.store(out_ptr + ((row + heads) * HEAD_DIM)[:, None] + across[None, :], y, mask=real[:, None])
        elif NUM_SPLITS > 1:
            places = (seq.to(gl.int64) * NUM_HEADS + first_head + heads) * NUM_SPLITS + split
            parts_ptrs = partial_ptr + (places * HEAD_DIM)[:, None] + across[None, :]
            gl.store(parts_ptrs, flagged(found, flag), mask=real[:, None])
            gl.store(lse_ptr + places, flagged(lse, flag), mask=real)

    if PULL and NUM_SPLITS > 1:
        if num_splits > 1:
            first_row = seq.to(gl.int64) * NUM_HEADS + first_head
            for member in range(split, num_heads, num_splits):
                _pull(
                    partial_ptr, lse_ptr, sinks_ptr, out_ptr, (first_row + member) * NUM_SPLITS, row + member,
                    first_head + member, flag, num_splits, factor, HEAD_DIM, NUM_SPLITS, SINKS,
                )  # fmt: skip
