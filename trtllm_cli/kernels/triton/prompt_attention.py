"""Causal attention of prompts on Hopper: some warps bring tiles of keys and values, others multiply and weigh them.

prefill_attention's sibling, with FlashAttention-3's division of labour (arXiv 2407.08608): a warpgroup fills shared
memory, two others have 64 rows each. They wait for tiles and not for each other, so that one multiplies while the other
weighs; and the next tile's scores are multiplied while the last one's are weighed (algorithm 2). prefill_attention.py
is the slow twin.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_cli.kernels.triton.decode_attention import LOG2E, LOWEST
from trtllm_cli.kernels.triton.device import as_stored, tanh
from trtllm_cli.kernels.triton.gluon_names import barrier, copy_to_shared
from trtllm_cli.kernels.triton.prefill_attention import tile_of

ROWS = gl.constexpr(64)  # of a warpgroup that multiplies
THREADS = gl.constexpr(128)  # of a warpgroup


@gluon.constexpr_function
def _in_lines(dtype, width):
    """The layout of rows in which a thread of a warpgroup has 16 bytes of one."""
    each = 128 // dtype.primitive_bitwidth
    lanes = width // each
    return gl.BlockedLayout([1, each], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.jit
def _tile(i, first, cached_tiles, new_first, cached, length, BLOCK_N: gl.constexpr):
    """Of a tile: its first token, and the end of those that it is for."""
    is_new = i >= cached_tiles
    token = gl.where(is_new, new_first + (i - cached_tiles) * BLOCK_N, first + i * BLOCK_N)
    return token, gl.where(is_new, length, cached)


@gluon.jit
def _bring(
    smem, full, free, k_ptr, v_ptr, table_ptr, slot, turn, token, stop, row, head,
    NUM_KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, BLOCK_N: gl.constexpr,
    PAGED: gl.constexpr,
):  # fmt: skip
    """A tile of keys, then of values, to memory that is free by then."""
    STORED: gl.constexpr = k_ptr.dtype.element_ty
    DTYPE: gl.constexpr = smem[0].dtype
    layout: gl.constexpr = _in_lines(STORED, HEAD_DIM)
    CHUNK: gl.constexpr = min(BLOCK_N, BLOCK_SIZE, BLOCK_N if STORED == DTYPE else 16)  # which takes registers
    rows = gl.arange(0, CHUNK, gl.SliceLayout(1, layout))
    cols = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    inside = rows[:, None] * HEAD_DIM + cols[None, :]
    bases = ()
    for c in gl.static_range(BLOCK_N // CHUNK):
        base = row + c * CHUNK
        if PAGED:
            begin = token + c * CHUNK
            block = gl.load(table_ptr + begin // BLOCK_SIZE, mask=begin < stop, other=0).to(gl.int64)
            base = (block * NUM_KV_HEADS + head) * BLOCK_SIZE + begin % BLOCK_SIZE
        bases += (base * HEAD_DIM,)
    for part in gl.static_range(2):
        memory = smem[part].index(slot)
        mbarrier.wait(free.index(2 * slot + part), turn ^ 1)
        for c in gl.static_range(BLOCK_N // CHUNK):
            # What lies past the sequence's tokens may be NaN, which a weight of zero does not hide.
            live = (token + c * CHUNK + rows < stop)[:, None] & (cols < HEAD_DIM)[None, :]
            ptrs = (k_ptr, v_ptr)[part] + bases[c] + inside
            if STORED == DTYPE:
                copy_to_shared(memory.slice(c * CHUNK, CHUNK), ptrs, live)
            else:
                memory.slice(c * CHUNK, CHUNK).store(gl.load(ptrs, mask=live, other=0.0).to(gl.float32).to(DTYPE))
        if STORED == DTYPE:
            async_copy.mbarrier_arrive(full.index(2 * slot + part), increment_count=False)
        else:
            fence_async_shared()
            mbarrier.arrive(full.index(2 * slot + part), count=THREADS)


@gluon.jit
def _bring_all(
    k_smem, v_smem, full, free, k_cache_ptr, v_cache_ptr, k_new_ptr, v_new_ptr, table_ptr, query_first, first,
    cached_tiles, new_first, num_tiles, cached, length, head,
    NUM_KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr, NEW_STRIDE: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What the warpgroup does that fills shared memory."""
    for i in range(cached_tiles):
        token, stop = _tile(i, first, cached_tiles, new_first, cached, length, BLOCK_N)
        _bring(
            (k_smem, v_smem), full, free, k_cache_ptr, v_cache_ptr, table_ptr, i % STAGES, (i // STAGES) & 1, token,
            stop, 0, head, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, True,
        )  # fmt: skip
    if NEW_STRIDE > 0:
        first_row = head.to(gl.int64) * NEW_STRIDE + query_first - cached
        for i in range(cached_tiles, num_tiles):
            token, stop = _tile(i, first, cached_tiles, new_first, cached, length, BLOCK_N)
            _bring(
                (k_smem, v_smem), full, free, k_new_ptr, v_new_ptr, table_ptr, i % STAGES, (i // STAGES) & 1, token,
                stop, first_row + token, head, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, BLOCK_N, False,
            )  # fmt: skip


@gluon.jit
def _weighed(
    products, top, total, token, stop, bounds, lowest, seen, most, in_log2, softcap,
    BLOCK_N: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """decode_attention.weighed of products of queries and keys, of which `in_log2` times are units of log2."""
    layout: gl.constexpr = products.type.layout
    if SOFTCAP:
        products = tanh(products * softcap)
    if (token + BLOCK_N > gl.minimum(seen, stop)) | ((WINDOW > 0) & (token < most)):
        tokens = (token + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout)))[None, :]
        visible = tokens < gl.minimum(bounds, stop)[:, None]
        if WINDOW > 0:
            visible = visible & (tokens >= lowest[:, None])
        products = gl.where(visible, products, float("-inf"))
    new_top = gl.maximum(top, gl.max(products, axis=1))
    weights = gl.exp2(products * in_log2 - (new_top * in_log2)[:, None])
    shrink = gl.exp2((top - new_top) * in_log2)
    return weights, shrink, new_top, total * shrink + gl.sum(weights, axis=1)


@gluon.jit
def _elements(
    which, query_first, num_queries, tile_first, head_first,
    NUM_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, PACK: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Of the rows of `which`: offsets in the queries and the output [num_tokens, NUM_HEADS, HEAD_DIM], and a mask."""
    rows = which * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    queries = tile_first + rows // PACK
    heads = (query_first + queries).to(gl.int64) * NUM_HEADS + head_first + rows % PACK
    cols = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    mask = (queries < num_queries)[:, None] & (cols < HEAD_DIM)[None, :]
    return (heads * HEAD_DIM)[:, None] + cols[None, :], mask


@gluon.jit
def _attend(
    which, q_smem, k_smem, v_smem, full, free, q_ptr, sinks_ptr, out_ptr, query_first, num_queries, tile_first, length,
    cached, first, cached_tiles, new_first, num_tiles, head_first, scale, softcap, v_scale, out_step,
    NUM_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr,
    PACK: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """What a warpgroup does for its 64 rows, those of `which`: queries of PACK heads."""
    DTYPE: gl.constexpr = k_smem.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, out_mma, 2)

    lines: gl.constexpr = _in_lines(q_ptr.dtype.element_ty, HEAD_DIM)
    offsets, mask = _elements(which, query_first, num_queries, tile_first, head_first, NUM_HEADS, HEAD_DIM, PACK, lines)
    mine = q_smem.index(which)
    mine.store(gl.load(q_ptr + offsets, mask=mask, other=0.0))
    fence_async_shared()
    barrier()

    # Row i sees tokens lowest[i] .. bounds[i] - 1 of the sequence.
    before = length - num_queries
    places = which * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, mma))
    bounds = gl.minimum(before + tile_first + places // PACK + 1, length)
    lowest = gl.maximum(bounds - WINDOW, 0)
    seen = before + tile_first + which * (ROWS // PACK) + 1
    end = gl.minimum(before + tile_first + (which + 1) * (ROWS // PACK), length)
    most = gl.maximum(end - WINDOW, 0)
    in_log2 = scale * LOG2E
    if SOFTCAP:
        in_log2 = softcap * LOG2E
        softcap = scale / softcap
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, mma))
    top = total + LOWEST
    if SINKS:
        heads = head_first + places % PACK
        top = gl.load(sinks_ptr + heads).to(gl.float32) * (LOG2E / in_log2)
        total += 1.0
    none = gl.zeros([ROWS, BLOCK_N], gl.float32, mma)
    acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, out_mma)

    mbarrier.wait(full.index(0), 0)
    fence_async_shared()
    products = warpgroup_mma(mine, k_smem.index(0).permute((1, 0)), none, use_acc=False)
    mbarrier.arrive(free.index(0), count=1)
    token, until = _tile(0, first, cached_tiles, new_first, cached, length, BLOCK_N)
    weights, shrink, top, total = _weighed(
        products, top, total, token, until, bounds, lowest, seen, most, in_log2, softcap, BLOCK_N, WINDOW, SOFTCAP
    )  # fmt: skip
    for i in range(1, num_tiles):
        slot = i % STAGES
        ready = (i - 1) % STAGES
        mbarrier.wait(full.index(2 * slot), (i // STAGES) & 1)
        fence_async_shared()
        coming = warpgroup_mma(mine, k_smem.index(slot).permute((1, 0)), none, use_acc=False, is_async=True)
        mbarrier.wait(full.index(2 * ready + 1), ((i - 1) // STAGES) & 1)
        fence_async_shared()
        p = gl.convert_layout(weights.to(DTYPE), operand)
        acc = warpgroup_mma(p, v_smem.index(ready), acc, is_async=True)
        products, acc = warpgroup_mma_wait(1, (coming, acc))
        mbarrier.arrive(free.index(2 * slot), count=1)
        token, until = _tile(i, first, cached_tiles, new_first, cached, length, BLOCK_N)
        weights, shrink, top, total = _weighed(
            products, top, total, token, until, bounds, lowest, seen, most, in_log2, softcap, BLOCK_N, WINDOW,
            SOFTCAP,
        )  # fmt: skip
        acc = warpgroup_mma_wait(0, (acc,))
        mbarrier.arrive(free.index(2 * ready + 1), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, out_mma))[:, None]
    last = (num_tiles - 1) % STAGES
    mbarrier.wait(full.index(2 * last + 1), ((num_tiles - 1) // STAGES) & 1)
    fence_async_shared()
    p = gl.convert_layout(weights.to(DTYPE), operand)
    acc = warpgroup_mma(p, v_smem.index(last), acc)

    factor = gl.convert_layout(v_scale / (total * out_step), gl.SliceLayout(1, out_mma))
    y = as_stored(acc * factor[:, None], out_ptr.dtype.element_ty)
    offsets, mask = _elements(
        which, query_first, num_queries, tile_first, head_first, NUM_HEADS, HEAD_DIM, PACK, out_mma
    )  # fmt: skip
    gl.store(out_ptr + offsets, y, mask=mask)


@gluon.jit
def prompt_attention(
    q_ptr, k_cache_ptr, v_cache_ptr, k_new_ptr, v_new_ptr, block_tables_ptr, query_start_ptr, seq_lens_ptr, sinks_ptr,
    kv_scale_ptr, out_scale_ptr, out_ptr, first_prompt_ptr, num_prompts, num_seqs, max_blocks, scale, softcap,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, SINKS: gl.constexpr, KV_QUANT: gl.constexpr, NEW_STRIDE: gl.constexpr,
    PACK: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """prefill_attention of the sequences with several tokens; arguments as there.

    Grid: (H / PACK, num_tokens // (128 / PACK) + num_prompts). BLOCK_N divides BLOCK_SIZE or is a multiple of it;
    HEAD_DIM is 64 or 128, of keys and of values; STAGES tiles have room. REGISTERS of a thread that multiplies.
    """
    if PDL:
        gdc_launch_dependents()
    BLOCK_Q: gl.constexpr = 2 * ROWS // PACK
    seq, query_first, num_queries, tile_first, length = tile_of(
        query_start_ptr, seq_lens_ptr, first_prompt_ptr, num_prompts, num_seqs, BLOCK_Q
    )
    if PDL:
        gdc_wait()
    if (tile_first >= num_queries) | (length <= 0) | (num_queries == 1):
        return

    DTYPE: gl.constexpr = q_ptr.dtype.element_ty
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_smem = gl.allocate_shared_memory(DTYPE, [2, ROWS, HEAD_DIM], swizzled)
    k_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_DIM], swizzled)
    v_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_DIM], swizzled)
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(full.index(i), count=THREADS)
        mbarrier.init(free.index(i), count=2)

    k_scale, v_scale, out_step = 1.0, 1.0, 1.0
    if KV_QUANT:
        k_scale = gl.load(kv_scale_ptr)
        v_scale = gl.load(kv_scale_ptr + 1)
    if out_ptr.dtype.element_ty == gl.float8e4nv:
        out_step = gl.load(out_scale_ptr)
    scale *= k_scale
    head_first = gl.program_id(0) * PACK
    table_ptr = block_tables_ptr + seq.to(gl.int64) * max_blocks
    before = length - num_queries
    least = gl.maximum(before + tile_first + 1 - WINDOW, 0) if WINDOW > 0 else 0
    end = gl.minimum(before + tile_first + BLOCK_Q, length)
    first = least // BLOCK_N * BLOCK_N
    cached = before if NEW_STRIDE > 0 else length
    cached_tiles = gl.maximum(gl.minimum(cached, end) - first + BLOCK_N - 1, 0) // BLOCK_N
    new_first = before + gl.maximum(least - before, 0) // BLOCK_N * BLOCK_N
    num_tiles = cached_tiles
    if NEW_STRIDE > 0:
        num_tiles += (end - new_first + BLOCK_N - 1) // BLOCK_N
    gl.warp_specialize(
        [
            (_attend, (
                0, q_smem, k_smem, v_smem, full, free, q_ptr, sinks_ptr, out_ptr, query_first, num_queries, tile_first,
                length, cached, first, cached_tiles, new_first, num_tiles, head_first, scale, softcap, v_scale,
                out_step, NUM_KV_HEADS * GROUP, HEAD_DIM, WINDOW, SOFTCAP, SINKS, PACK, BLOCK_N, STAGES,
            )),
            (_attend, (
                1, q_smem, k_smem, v_smem, full, free, q_ptr, sinks_ptr, out_ptr, query_first, num_queries, tile_first,
                length, cached, first, cached_tiles, new_first, num_tiles, head_first, scale, softcap, v_scale,
                out_step, NUM_KV_HEADS * GROUP, HEAD_DIM, WINDOW, SOFTCAP, SINKS, PACK, BLOCK_N, STAGES,
            )),
            (_bring_all, (
                k_smem, v_smem, full, free, k_cache_ptr, v_cache_ptr, k_new_ptr, v_new_ptr, table_ptr, query_first,
                first, cached_tiles, new_first, num_tiles, cached, length, head_first // GROUP, NUM_KV_HEADS, HEAD_DIM,
                BLOCK_SIZE, NEW_STRIDE, BLOCK_N, STAGES,
            )),
        ],
        [4, 4],
        [REGISTERS, 504 - 2 * REGISTERS],
    )  # fmt: skip
