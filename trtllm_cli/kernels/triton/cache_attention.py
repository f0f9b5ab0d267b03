"""Attention of one new token a sequence whose cache is on its way before the kernel in front has ended.

decode_attention.decode_attention is its slow twin, and serves what is shared out among programs. Here a program has all
of a sequence's cache, of which whole tiles of older tokens are asked for first: just the last tile has what this step
has appended. What follows the kernel in front is then mostly what the last tile takes.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_cli.kernels.triton.cache_tiles import (
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
from trtllm_cli.kernels.triton.decode_attention import LOG2E, LOWEST, dot_dtype, read_steps
from trtllm_cli.kernels.triton.device import as_stored


@gluon.jit
def cache_attention(
    q_ptr, k_cache_ptr, v_cache_ptr, block_tables_ptr, query_start_ptr, seq_lens_ptr, sinks_ptr, kv_scale_ptr,
    out_scale_ptr, out_ptr, max_blocks, scale, softcap,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr, KV_QUANT: gl.constexpr, BLOCK_G: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Grid (NUM_KV_HEADS * cdiv(GROUP, BLOCK_G), num_seqs); arguments as in decode_attention, of one split.

    The kernel in front may write this step's tokens to the cache, and no others. HEAD_DIM is a power of two of at least
    32, BLOCK_G 8 or a multiple of 16. STAGES tiles of BLOCK_N tokens, 16 or a multiple a warp, are on their way.
    """
    seq = gl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    warps: gl.constexpr = gl.num_warps()
    COUNT: gl.constexpr = BLOCK_N // warps  # tokens of a warp
    gl.static_assert(COUNT % 16 == 0)
    NUM_HEADS: gl.constexpr = NUM_KV_HEADS * GROUP
    DTYPE: gl.constexpr = dot_dtype(q_ptr.dtype.element_ty, KV_QUANT)
    STORED: gl.constexpr = k_cache_ptr.dtype.element_ty
    TILES_G: gl.constexpr = (GROUP + BLOCK_G - 1) // BLOCK_G
    kv_head = gl.program_id(0) // TILES_G
    first_member = gl.program_id(0) % TILES_G * BLOCK_G
    first_head = kv_head * GROUP + first_member
    num_heads = gl.minimum(GROUP - first_member, BLOCK_G)
    length = gl.load(seq_lens_ptr + seq)
    token = gl.load(query_start_ptr + seq)
    num_queries = gl.load(query_start_ptr + seq + 1) - token
    lowest = 0
    if WINDOW > 0:
        lowest = gl.maximum(length - WINDOW, 0)
    first = lowest // BLOCK_N * BLOCK_N
    last = (length - 1) // BLOCK_N * BLOCK_N  # where the last tile begins, which the newest token is in
    copied: gl.constexpr = in_copies(STORED, HEAD_DIM, warps)
    of_copied: gl.constexpr = gl.SliceLayout(2, copied)
    table_ptr = block_tables_ptr + seq.to(gl.int64) * max_blocks
    room = max_blocks * BLOCK_SIZE  # not as many as there are: that would have to be waited for first
    early = ()
    for s in gl.static_range(STAGES):
        early += (
            rows_of_tile(
                table_ptr, first + s * BLOCK_N, room, kv_head, warps, COUNT, NUM_KV_HEADS, BLOCK_SIZE, of_copied
            ),
        )  # fmt: skip
    if (num_queries != 1) | (length <= 0):
        if PDL:
            gdc_wait()  # else this kernel could end before the one in front, and the next one take that for ended too
        return

    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    of_queries: gl.constexpr = gl.DotOperandLayout(0, mma, columns_at_once(STORED))
    of_keys: gl.constexpr = gl.DotOperandLayout(1, mma, columns_at_once(STORED))
    PARTS: gl.constexpr = parts_of_values(STORED)
    WIDTH: gl.constexpr = HEAD_DIM // PARTS
    VALUES: gl.constexpr = STORED if PARTS == 1 else gl.int32
    v_cache_ptr = v_cache_ptr.to(gl.pointer_type(VALUES))
    k_smem = gl.allocate_shared_memory(STORED, [STAGES, warps, COUNT, HEAD_DIM], in_banks(STORED, HEAD_DIM))
    v_smem = gl.allocate_shared_memory(VALUES, [STAGES, warps, COUNT, WIDTH], in_banks(VALUES, WIDTH))
    for s in gl.static_range(STAGES):
        start = first + s * BLOCK_N
        if start < last:
            copy_tile(k_smem.index(s), v_smem.index(s), k_cache_ptr, v_cache_ptr, early[s], start, last, copied)
        else:
            async_copy.commit_group()
    newest = rows_of_tile(table_ptr, last, length, kv_head, warps, COUNT, NUM_KV_HEADS, BLOCK_SIZE, of_copied)

    lanes: gl.constexpr = lanes_of_row(HEAD_DIM, 8)
    in_lines: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [warps, 1], [1, 0])
    members = gl.arange(0, BLOCK_G, gl.SliceLayout(1, in_lines))
    columns = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, in_lines))[None, :]
    row = token.to(gl.int64) * NUM_HEADS + first_head
    q_ptrs = q_ptr + ((row + members) * HEAD_DIM)[:, None] + columns
    q_smem = gl.allocate_shared_memory(DTYPE, [BLOCK_G, HEAD_DIM], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    k_scale, v_scale, out_step = read_steps(kv_scale_ptr, out_scale_ptr, out_ptr, KV_QUANT)
    combined: gl.constexpr = in_columns(HEAD_DIM, warps)
    of_combined: gl.constexpr = gl.SliceLayout(0, combined)
    heads = gl.arange(0, BLOCK_G, gl.SliceLayout(1, of_combined))
    sinks = heads.to(gl.float32)
    if SINKS:
        sinks = gl.load(sinks_ptr + first_head + heads, mask=heads < num_heads, other=0.0).to(gl.float32) * LOG2E

    if PDL:
        gdc_wait()
    slot = (last - first) // BLOCK_N
    if slot < STAGES:
        copy_tile(k_smem.index(slot), v_smem.index(slot), k_cache_ptr, v_cache_ptr, newest, last, length, copied)
    q = gl.load(q_ptrs, mask=(members < num_heads)[:, None], other=0.0)
    q_smem.store(queries_for_dot(q, DTYPE))
    gl.thread_barrier()
    q_low, q_high = halves(q_smem, warps, of_queries)
    top = gl.full([warps, BLOCK_G], LOWEST, gl.float32, gl.SliceLayout(2, mma))
    total = gl.zeros([warps, BLOCK_G], gl.float32, gl.SliceLayout(2, mma))
    accs = no_values(PARTS, warps, WIDTH, BLOCK_G, mma)
    for start in range(first, length, BLOCK_N):
        if start == last:
            async_copy.wait_group(0)
        else:
            async_copy.wait_group(STAGES - 1)
        gl.thread_barrier()
        i = (start - first) // BLOCK_N % STAGES
        k, k_high = keys(k_smem.index(i), DTYPE, of_keys)
        seen = seen_of(start, length, lowest, warps, COUNT, WINDOW, mma)
        weights, more, new_top = weights_of(
            q_low, q_high, k, k_high, seen, scale * k_scale, softcap, top, SOFTCAP, mma
        )  # fmt: skip
        v = values(v_smem.index(i), STORED, DTYPE, left)
        ahead = start + STAGES * BLOCK_N
        if ahead <= last:
            gl.thread_barrier()
            rows = rows_of_tile(table_ptr, ahead, length, kv_head, warps, COUNT, NUM_KV_HEADS, BLOCK_SIZE, of_copied)
            copy_tile(k_smem.index(i), v_smem.index(i), k_cache_ptr, v_cache_ptr, rows, ahead, length, copied)
        else:
            async_copy.commit_group()
        shrink = gl.exp2(top - new_top)
        total, top = total * shrink + more, new_top
        accs = with_values(accs, shrink, v, weights, right)

    in_rows_of_heads: gl.constexpr = gl.SwizzledSharedLayout(8, 2, 4, [2, 1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    acc_smem = gl.allocate_shared_memory(gl.float32, [warps, BLOCK_G, HEAD_DIM], in_rows_of_heads)
    top_smem = gl.allocate_shared_memory(gl.float32, [warps, BLOCK_G], plain)
    total_smem = gl.allocate_shared_memory(gl.float32, [warps, BLOCK_G], plain)
    found, lse = over_warps(by_heads(accs), top, total, acc_smem, top_smem, total_smem, combined)
    factors = gl.full([BLOCK_G], v_scale / out_step, gl.float32, gl.SliceLayout(1, of_combined))
    if SINKS:
        factors = factors / (1.0 + gl.exp2(sinks - lse))
    places = ((row + heads) * HEAD_DIM)[:, None] + gl.arange(0, HEAD_DIM, gl.SliceLayout(0, of_combined))[None, :]
    y = as_stored(found * factors[:, None], out_ptr.dtype.element_ty)
    gl.store(out_ptr + places, y, mask=(heads < num_heads)[:, None])
