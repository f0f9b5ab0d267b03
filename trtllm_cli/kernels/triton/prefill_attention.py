"""Causal attention of the new tokens of a ragged batch over their sequences' paged KV caches.

FlashAttention-2 (arXiv 2307.08691), its tiles laid over a ragged batch as vLLM's unified attention kernel does it.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_cli.kernels.triton.decode_attention import (
    LOG2E,
    LOWEST,
    attend,
    dot_dtype,
    load_whole_q,
    page_rows,
)
from trtllm_cli.kernels.triton.device import store


@triton.jit
def tile_of(query_start_ptr, seq_lens_ptr, first_prompt_ptr, num_prompts, num_seqs, BLOCK_Q: tl.constexpr):
    """A program's sequence, its first query and how many, which of them the program begins with, and its tokens.

    Only sequences from `first_prompt` on have tiles: those of s begin at (query_start[s] - query_start[first_prompt])
    // BLOCK_Q + s - first_prompt. The longest ones come first.
    """
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    first = tl.load(first_prompt_ptr)
    origin = tl.load(query_start_ptr + first)
    low, high = first, tl.minimum(first + num_prompts, num_seqs)
    while high - low > 1:
        middle = (low + high) // 2
        if (tl.load(query_start_ptr + middle) - origin) // BLOCK_Q + middle - first <= tile:
            low = middle
        else:
            high = middle
    query_first = tl.load(query_start_ptr + low)
    num_queries = tl.load(query_start_ptr + low + 1) - query_first
    tile_first = (tile - (query_first - origin) // BLOCK_Q - (low - first)) * BLOCK_Q
    return low, query_first, num_queries, tile_first, tl.load(seq_lens_ptr + low)


@triton.jit
def _attend_some(
    acc, top, total, q, q_rest, k_ptr, v_ptr, table_ptr, first_row, origin, first, last, bounds, lowest, num_blocks,
    stop, head, scale, softcap,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """`attend`, which is told where its first token is."""
    if PAGED:
        base = page_rows(table_ptr, first, num_blocks, head, NUM_KV_HEADS, BLOCK_SIZE, BLOCK_N)
    else:
        base = first_row + (first - origin)
    return attend(
        acc, top, total, q, q_rest, k_ptr, v_ptr, table_ptr, base, first, last, bounds, lowest, num_blocks, stop, head,
        scale, softcap, NUM_KV_HEADS, HEAD_DIM, V_HEAD_DIM, BLOCK_SIZE, BLOCK_N, WINDOW, SOFTCAP, MASKED, False, PAGED,
    )  # fmt: skip


@triton.jit
def _attend_to(
    acc, top, total, q, q_rest, k_ptr, v_ptr, table_ptr, first_row, origin, stop, bounds, lowest, seen, least, most,
    num_blocks, head, scale, softcap,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """`attend` to tokens `origin` .. `stop`, in tiles from `origin` on, which are masked where they have to be.

    Every row sees the tokens below `seen`; with WINDOW, from `most` on, and none sees any below `least`. `first_row`:
    where `origin` is, if not PAGED.
    """
    bounds = tl.minimum(bounds, stop)
    # Tiles of [all_from, all_to) are seen whole by every row.
    all_from, all_to = origin, origin + (tl.minimum(seen, stop) - origin) // BLOCK_N * BLOCK_N
    if WINDOW > 0:
        first = origin + tl.maximum(least - origin, 0) // BLOCK_N * BLOCK_N
        all_from = tl.minimum(origin + tl.cdiv(tl.maximum(most - origin, 0), BLOCK_N) * BLOCK_N, all_to)
        all_from = tl.maximum(all_from, first)
        all_to = tl.maximum(all_to, all_from)
        acc, top, total = _attend_some(
            acc, top, total, q, q_rest, k_ptr, v_ptr, table_ptr, first_row, origin, first, tl.minimum(all_from, stop),
            bounds, lowest, num_blocks, stop, head, scale, softcap,
            NUM_KV_HEADS, HEAD_DIM, V_HEAD_DIM, BLOCK_SIZE, BLOCK_N, WINDOW, SOFTCAP, True, PAGED,
        )  # fmt: skip
    acc, top, total = _attend_some(
        acc, top, total, q, q_rest, k_ptr, v_ptr, table_ptr, first_row, origin, all_from, all_to,
        bounds, lowest, num_blocks, stop, head, scale, softcap,
        NUM_KV_HEADS, HEAD_DIM, V_HEAD_DIM, BLOCK_SIZE, BLOCK_N, WINDOW, SOFTCAP, False, PAGED,
    )  # fmt: skip
    acc, top, total = _attend_some(
        acc, top, total, q, q_rest, k_ptr, v_ptr, table_ptr, first_row, origin, all_to, stop,
        bounds, lowest, num_blocks, stop, head, scale, softcap,
        NUM_KV_HEADS, HEAD_DIM, V_HEAD_DIM, BLOCK_SIZE, BLOCK_N, WINDOW, SOFTCAP, True, PAGED,
    )  # fmt: skip
    return acc, top, total


@triton.jit
def prefill_attention(
    q_ptr, k_cache_ptr, v_cache_ptr, k_new_ptr, v_new_ptr, block_tables_ptr, query_start_ptr, seq_lens_ptr, sinks_ptr,
    kv_scale_ptr, out_scale_ptr, out_ptr, first_prompt_ptr, num_prompts, num_seqs, max_blocks, scale, softcap,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, KV_QUANT: tl.constexpr,
    NEW_STRIDE: tl.constexpr, SKIP_DECODES: tl.constexpr, PACK: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention of the tokens of num_prompts sequences from `first_prompt` on, int32 [1] below num_seqs; with
    SKIP_DECODES, of those that have more than one.

    Grid: (NUM_KV_HEADS * GROUP // PACK, num_tokens // BLOCK_Q + num_prompts). A program takes PACK query heads of one
    KV head (a power of two that divides GROUP) of BLOCK_Q tokens: BLOCK_Q * PACK rows, 64 or 128 for wgmma. Packing
    heads leaves fewer scores to hide along the diagonal. BLOCK_N tokens of the cache at a time: a power of two that
    divides BLOCK_SIZE or that it divides. Tiles past the last leave early; the longest come first.

    q [num_tokens, H * HEAD_DIM] and out [num_tokens, H * V_HEAD_DIM], H = NUM_KV_HEADS * GROUP; caches [num_blocks,
    NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM or V_HEAD_DIM]; block_tables int32 [num_seqs, max_blocks]; query_start int32
    [num_seqs + 1]; seq_lens int32 [num_seqs], new tokens included; sinks [H], read with SINKS; kv_scale float32 [2],
    read with KV_QUANT; out_scale float32 [1], read where `out` is float8e4nv. WINDOW 0: none. num_prompts,
    num_seqs, max_blocks i32; scale and softcap (read with SOFTCAP) fp32.

    With NEW_STRIDE > 0 the step's own keys and values are read from k_new and v_new (of rope_append; BLOCK_N rows
    more than there are tokens), the cache for the tokens before them: wgmma reads shared memory, to which
    what has to be converted goes twice.
    """
    if PDL:
        gdc_launch_dependents()
    seq, query_first, num_queries, tile_first, length = tile_of(
        query_start_ptr, seq_lens_ptr, first_prompt_ptr, num_prompts, num_seqs, BLOCK_Q
    )
    if PDL:
        gdc_wait()
    if (tile_first >= num_queries) | (length <= 0):
        return
    if SKIP_DECODES and num_queries == 1:
        return

    V_BLOCK: tl.constexpr = max(16, triton.next_power_of_2(V_HEAD_DIM))
    DTYPE: tl.constexpr = dot_dtype(q_ptr.dtype.element_ty, KV_QUANT)
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    ROWS: tl.constexpr = BLOCK_Q * PACK
    rows = tl.arange(0, ROWS)
    queries = tile_first + rows // PACK
    heads = tl.program_id(0) * PACK + rows % PACK
    kv_head = tl.program_id(0) * PACK // GROUP
    real = queries < num_queries
    q_rows = (query_first + queries).to(tl.int64) * NUM_HEADS + heads
    k_scale, v_scale = 1.0, 1.0
    if KV_QUANT:
        k_scale = tl.load(kv_scale_ptr)
        v_scale = tl.load(kv_scale_ptr + 1)
    # Row i sees tokens lowest[i] .. bounds[i] - 1 of the sequence.
    before = length - num_queries
    bounds = tl.minimum(before + queries + 1, length)
    lowest = tl.maximum(bounds - WINDOW, 0)
    seen = before + tile_first + 1
    end = tl.minimum(before + tile_first + BLOCK_Q, length)
    least, most = tl.maximum(seen - WINDOW, 0), tl.maximum(end - WINDOW, 0)

    acc = tl.zeros([ROWS, V_BLOCK], tl.float32)
    if SINKS:
        top = tl.load(sinks_ptr + heads).to(tl.float32) * LOG2E
        total = tl.full([ROWS], 1.0, tl.float32)
    else:
        top = tl.full([ROWS], LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
    table_ptr = block_tables_ptr + seq.to(tl.int64) * max_blocks
    num_blocks = tl.cdiv(length, BLOCK_SIZE)
    cached = end
    if NEW_STRIDE > 0:
        cached = before
    if cached > 0:
        q, q_rest = load_whole_q(q_ptr, q_rows, real, HEAD_DIM, DTYPE)
        acc, top, total = _attend_to(
            acc, top, total, q, q_rest, k_cache_ptr, v_cache_ptr, table_ptr, 0, 0, cached, bounds, lowest, seen,
            least, most, num_blocks, kv_head, scale * k_scale, softcap,
            NUM_KV_HEADS, HEAD_DIM, V_HEAD_DIM, BLOCK_SIZE, BLOCK_N, WINDOW, SOFTCAP, True,
        )  # fmt: skip
    if NEW_STRIDE > 0:
        q, q_rest = load_whole_q(q_ptr, q_rows, real, HEAD_DIM, q_ptr.dtype.element_ty)
        first_row = kv_head.to(tl.int64) * NEW_STRIDE + query_first
        acc, top, total = _attend_to(
            acc, top, total, q, q_rest, k_new_ptr, v_new_ptr, table_ptr, first_row, before, end, bounds, lowest,
            seen, least, most, num_blocks, kv_head, scale * k_scale, softcap,
            NUM_KV_HEADS, HEAD_DIM, V_HEAD_DIM, BLOCK_SIZE, BLOCK_N, WINDOW, SOFTCAP, False,
        )  # fmt: skip

    out_step = 1.0
    if out_ptr.dtype.element_ty == tl.float8e4nv:
        out_step = tl.load(out_scale_ptr)
    cols = tl.arange(0, V_BLOCK)
    y = acc * (v_scale / (total * out_step))[:, None]
    mask = real[:, None] & (cols < V_HEAD_DIM)[None, :]
    store(out_ptr + (q_rows * V_HEAD_DIM)[:, None] + cols[None, :], y, mask)
