"""Tiles of a paged cache in shared memory, for attention of one new token a sequence, in Gluon.

Each warp takes tokens of its own, and meets the others when all have been seen. A tile is [warps, tokens, HEAD_DIM].
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from trtllm_cli.kernels.triton.decode_attention import byte_of, in_log2
from trtllm_cli.kernels.triton.device import await_flagged, await_words, await_words_constraints, is_compiled
from trtllm_cli.kernels.triton.gluon_names import barrier, copy_to_shared


@gluon.constexpr_function
def lanes_of_row(width, each):
    """How many lanes take a row of `width` elements, `each` of them at a time."""
    return min(32, width // each)


@gluon.constexpr_function
def in_copies(dtype, width, warps):
    """The layout of a tile [warps, tokens, width] in which each thread copies 16 bytes."""
    each = min(128 // dtype.primitive_bitwidth, width)
    lanes = lanes_of_row(width, each)
    return gl.BlockedLayout([1, 1, each], [1, 32 // lanes, lanes], [warps, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def in_columns(width, warps):
    """The layout of [warps, heads, width] in which a thread has what all warps found for its columns of a head."""
    lanes = lanes_of_row(width, 4)
    return gl.BlockedLayout([warps, 1, 4], [1, 32 // lanes, lanes], [1, warps, 1], [2, 1, 0])


@gluon.constexpr_function
def in_banks(dtype, width):
    """Rows of `width` in shared memory, so that eight of them lie in different banks, 16 bytes at a time."""
    size = dtype.primitive_bitwidth // 8
    rows = max(1, 128 // (width * size))  # in a line of all banks
    return gl.SwizzledSharedLayout(16 // size, rows, max(1, min(8, width * size // 16)), [2, 1, 0])


@gluon.constexpr_function
def columns_at_once(dtype):
    """Of keys that are operands, how many a thread has side by side: what it reads from shared memory is whole words.

    So of queries too. As it is the sum over all columns that counts, it does not matter which thread has which.
    """
    return max(2, 32 // dtype.primitive_bitwidth)


@gluon.constexpr_function
def parts_of_values(dtype):
    """How many numbers are in what values are read in: bytes are read in words."""
    return 4 if dtype.primitive_bitwidth == 8 else 1


@gluon.jit
def _tokens(first, warps: gl.constexpr, count: gl.constexpr, layout: gl.constexpr):
    """The tokens of a tile that begins at `first`, [warps, count]."""
    warp = gl.arange(0, warps, gl.SliceLayout(1, layout))
    return first + warp[:, None] * count + gl.arange(0, count, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def rows_of_tile(
    table_ptr, first, stop, kv_head, warps: gl.constexpr, COUNT: gl.constexpr, NUM_KV_HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Of a cache seen as rows [num_blocks * NUM_KV_HEADS * BLOCK_SIZE, HEAD_DIM]: those of a tile, up to token `stop`.

    int64, each less the token's place among its warp's: [warps, 1] where these lie in one block, else [warps, COUNT].
    """
    if COUNT <= BLOCK_SIZE:
        places = gl.arange(0, 1, gl.SliceLayout(0, layout))
    else:
        places = gl.arange(0, COUNT, gl.SliceLayout(0, layout))
    warp = gl.arange(0, warps, gl.SliceLayout(1, layout))
    tokens = first + warp[:, None] * COUNT + places[None, :]
    block = gl.load(table_ptr + tokens // BLOCK_SIZE, mask=tokens < stop, other=0).to(gl.int64)
    return (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + tokens % BLOCK_SIZE - places[None, :]


@gluon.jit
def rows_of_tiles(
    table_ptr, first, stop, kv_head, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, NUM_KV_HEADS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """`rows_of_tile` of as many tiles as have room, from `first` on."""
    warps: gl.constexpr = gl.num_warps()
    rows = ()
    for s in gl.static_range(STAGES):
        rows += (
            rows_of_tile(
                table_ptr, first + s * BLOCK_N, stop, kv_head, warps, BLOCK_N // warps, NUM_KV_HEADS, BLOCK_SIZE, layout
            ),
        )  # fmt: skip
    return rows


@gluon.jit
def copy_rows(smem, cache_ptr, rows, first, stop, layout: gl.constexpr):
    """Asks for a tile's keys or values, at `rows_of_tile`; zeros from token `stop` on, as there may be NaN."""
    COUNT: gl.constexpr = smem.shape[1]
    WIDTH: gl.constexpr = smem.shape[2]
    live = _tokens(first, smem.shape[0], COUNT, gl.SliceLayout(2, layout)) < stop
    places = gl.arange(0, COUNT, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    at = (places[None, :] * WIDTH)[:, :, None] + columns[None, None, :]
    starts = (rows * WIDTH)[:, :, None]
    copy_to_shared(smem, cache_ptr + starts + at, mask=live[:, :, None])


@gluon.jit
def copy_tile(k_smem, v_smem, k_cache_ptr, v_cache_ptr, rows, first, stop, layout: gl.constexpr):
    """Asks for a tile's keys and values; see copy_rows. Values may be words of four."""
    copy_rows(k_smem, k_cache_ptr, rows, first, stop, layout)
    of_values: gl.constexpr = in_copies(v_smem.dtype, v_smem.shape[2], v_smem.shape[0])
    rows = gl.convert_layout(rows, gl.SliceLayout(2, of_values), assert_trivial=True)
    copy_rows(v_smem, v_cache_ptr, rows, first, stop, of_values)
    async_copy.commit_group()


@gluon.jit
def halves(q_smem, warps: gl.constexpr, layout: gl.constexpr):
    """The halves of queries as operands [warps, heads, HALF], each warp's the same."""
    HALF: gl.constexpr = q_smem.shape[1] // 2
    SHAPE: gl.constexpr = [warps, q_smem.shape[0], HALF]
    low = q_smem.slice(0, HALF, 1).load(gl.SliceLayout(0, layout))
    high = q_smem.slice(HALF, HALF, 1).load(gl.SliceLayout(0, layout))
    zeros = gl.zeros(SHAPE, low.dtype, layout)
    return gl.broadcast(low[None, :, :], zeros)[0], gl.broadcast(high[None, :, :], zeros)[0]


@gluon.jit
def keys(k_smem, DTYPE: gl.constexpr, layout: gl.constexpr):
    """The halves of a tile's keys as operands [warps, HALF, tokens]; see columns_at_once."""
    HALF: gl.constexpr = k_smem.shape[2] // 2
    low = k_smem.slice(0, HALF, 2).permute((0, 2, 1)).load(layout)
    high = k_smem.slice(HALF, HALF, 2).permute((0, 2, 1)).load(layout)
    return low.to(DTYPE), high.to(DTYPE)


@gluon.jit
def values(v_smem, STORED: gl.constexpr, DTYPE: gl.constexpr, layout: gl.constexpr):
    """A tile's values as operands [warps, width, tokens]: one, or of words four, of columns 0, 4, ..., 1, 5, ..."""
    x = v_smem.permute((0, 2, 1)).load(layout)
    if STORED == DTYPE:
        return (x,)
    else:  # noqa: RET505 - for the compiler, which reads on behind a return
        return (
            byte_of(x, 0, STORED, DTYPE), byte_of(x, 1, STORED, DTYPE), byte_of(x, 2, STORED, DTYPE),
            byte_of(x, 3, STORED, DTYPE),
        )  # fmt: skip


@gluon.jit
def by_heads(accs):
    """Sums of `values` [warps, width, heads] as [warps, heads, HEAD_DIM]."""
    if len(accs) == 1:
        return gl.permute(accs[0], (0, 2, 1))
    else:  # noqa: RET505
        SHAPE: gl.constexpr = accs[0].shape
        words = gl.join(gl.join(accs[0], accs[2]), gl.join(accs[1], accs[3]))
        return gl.reshape(gl.permute(words, (0, 2, 1, 3, 4)), [SHAPE[0], SHAPE[2], 4 * SHAPE[1]])


@gluon.jit
def weights_of(q, q_high, k, k_high, seen, scale, softcap, top, SOFTCAP: gl.constexpr, mma: gl.constexpr):
    """Of a tile: weights [warps, heads, tokens], their sums and the largest scores, in units of log2."""
    none = gl.zeros([k.shape[0], q.shape[1], k.shape[2]], gl.float32, mma)
    # Two sums, as a product waits for the one that it is added to.
    products = mma_v2(q, k, none, input_precision="ieee") + mma_v2(q_high, k_high, none, input_precision="ieee")
    scores = gl.where(seen, in_log2(products, scale, softcap, SOFTCAP), float("-inf"))
    top = gl.maximum(top, gl.max(scores, 2))
    weights = gl.exp2(scores - top[:, :, None])
    return weights, gl.sum(weights, 2), top


@gluon.jit
def no_values(PARTS: gl.constexpr, warps: gl.constexpr, WIDTH: gl.constexpr, heads: gl.constexpr, mma: gl.constexpr):
    """Sums of `values` of no tile."""
    accs = ()
    for _ in gl.static_range(PARTS):
        accs += (gl.zeros([warps, WIDTH, heads], gl.float32, mma),)
    return accs


@gluon.jit
def with_values(accs, shrink, v, weights, layout: gl.constexpr):
    """Sums [warps, width, heads] times `shrink` [warps, heads], and a tile's values times weights."""
    weights = gl.convert_layout(gl.permute(weights.to(v[0].dtype), (0, 2, 1)), layout)  # nothing moves
    shrink = gl.convert_layout(shrink, gl.SliceLayout(1, accs[0].type.layout))[:, None, :]
    added = ()
    for p in gl.static_range(len(accs)):
        added += (mma_v2(v[p], weights, accs[p] * shrink, input_precision="ieee"),)
    return added


@gluon.jit
def seen_of(first, old, lowest, warps: gl.constexpr, count: gl.constexpr, WINDOW: gl.constexpr, mma: gl.constexpr):
    """Which of a tile's tokens are attended to, [warps, 1, tokens]."""
    tokens = _tokens(first, warps, count, gl.SliceLayout(1, mma))
    seen = tokens < old
    if WINDOW > 0:
        seen = seen & (tokens >= lowest)
    return seen[:, None, :]


@gluon.jit
def over_warps(acc, top, total, layout: gl.constexpr):
    """The warps' sums [warps, heads, HEAD_DIM] as one's: means [heads, HEAD_DIM] and log2 of the weights, [heads]."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    acc_smem = gl.allocate_shared_memory(gl.float32, acc.shape, gl.SwizzledSharedLayout(8, 2, 4, [2, 1, 0]))
    top_smem = gl.allocate_shared_memory(gl.float32, top.shape, plain)
    total_smem = gl.allocate_shared_memory(gl.float32, top.shape, plain)
    acc_smem.store(acc)
    top_smem.store(top)
    total_smem.store(total)
    barrier()
    tops, totals = top_smem.load(gl.SliceLayout(2, layout)), total_smem.load(gl.SliceLayout(2, layout))
    top = gl.max(tops, 0)
    shrinks = gl.exp2(tops - top[None, :])
    total = gl.sum(totals * shrinks, 0)
    total = gl.where(total > 0.0, total, 1.0)  # no token is seen: `top` is a weight of nothing
    of_head: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(0, layout))
    total = gl.convert_layout(total, of_head, assert_trivial=True)
    top = gl.convert_layout(top, of_head, assert_trivial=True)
    return gl.sum(acc_smem.load(layout) * shrinks[:, :, None], 0) / total[:, None], top + gl.log2(total)


@gluon.jit
def queries_for_dot(x, DTYPE: gl.constexpr):
    """Queries as what tiles are multiplied in."""
    if DTYPE == gl.float16:
        x = gl.minimum(gl.maximum(x.to(gl.float32), -65504.0), 65504.0)
    return x.to(DTYPE)


@gluon.jit
def await_parts(partial_ptr, lse_ptr, flag, SPLITS: gl.constexpr):
    """What splits found for a head and the log2 of their weights, float32, at pointers [SPLITS, HEAD_DIM]."""
    if is_compiled():
        parts, lse = gl.inline_asm_elementwise(
            await_words(2 * SPLITS), await_words_constraints(2 * SPLITS, SPLITS), [partial_ptr, lse_ptr, flag],
            dtype=(gl.int32, gl.int32), is_pure=False, pack=SPLITS,
        )  # fmt: skip
    else:
        parts, lse = await_flagged(partial_ptr, True, flag), await_flagged(lse_ptr, True, flag)
    return parts.to(gl.float32, bitcast=True), lse.to(gl.float32, bitcast=True)
