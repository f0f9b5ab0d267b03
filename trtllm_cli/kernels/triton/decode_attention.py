"""Attention of one new token a sequence over its paged KV cache, and the device functions it shares with prefill.

Flash-decoding (Dao and others, 2023): several programs each take a part of a sequence's cache, show the others what
they found, and combine some heads each. The query heads of a KV head are rows of one tile, so the cache is read once.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_cli.kernels.triton.device import await_flagged, flagged, is_compiled, store, tanh

LOG2E = tl.constexpr(1.4426950408889634)
# Where a running maximum starts: finite, so that a row whose scores are all hidden (-inf) gives zeros, not NaN.
LOWEST = tl.constexpr(-1.0e30)


@triton.constexpr_function
def head_parts(head_dim):
    """How a head's columns are tiled: the largest power of two within, and a power of two for the rest (or 0)."""
    main = max(16, triton.next_power_of_2(head_dim // 2 + 1))
    rest = head_dim - main
    return main, max(16, triton.next_power_of_2(rest)) if rest > 0 else 0


@triton.constexpr_function
def dot_dtype(q_dtype, kv_quant):
    """What tiles are multiplied in. float16 holds every FP8 and INT8 number, and converts faster than bfloat16."""
    return tl.float16 if kv_quant and q_dtype == tl.bfloat16 else q_dtype


@triton.jit
def for_dot(x, DTYPE: tl.constexpr):
    """Queries as what tiles are multiplied in."""
    if DTYPE == tl.float16:
        x = tl.clamp(x.to(tl.float32), -65504.0, 65504.0)
    return x.to(DTYPE)


@triton.jit
def _load_q(q_ptr, rows, live, FIRST: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, DTYPE: tl.constexpr):
    """Columns FIRST .. FIRST + BLOCK of the heads of q (seen as [., HEAD_DIM]) at `rows`, zeros past HEAD_DIM."""
    cols = FIRST + tl.arange(0, BLOCK)
    mask = live[:, None] & (cols < HEAD_DIM)[None, :]
    return for_dot(tl.load(q_ptr + (rows * HEAD_DIM)[:, None] + cols[None, :], mask=mask, other=0.0), DTYPE)


@triton.jit
def load_whole_q(q_ptr, rows, live, HEAD_DIM: tl.constexpr, DTYPE: tl.constexpr):
    """Both of head_parts; the second one is the first where there is none."""
    MAIN: tl.constexpr = head_parts(HEAD_DIM)[0]
    REST: tl.constexpr = head_parts(HEAD_DIM)[1]
    q = _load_q(q_ptr, rows, live, 0, MAIN, HEAD_DIM, DTYPE)
    q_rest = q
    if REST > 0:
        q_rest = _load_q(q_ptr, rows, live, MAIN, REST, HEAD_DIM, DTYPE)
    return q, q_rest


@triton.jit
def page_rows(
    table_ptr, first, num_blocks, head,
    NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of a cache seen as rows [num_blocks * NUM_KV_HEADS * BLOCK_SIZE, width]: the row of token `first` + i, less i.

    int64: one number where the tile of BLOCK_N tokens lies in one block, else [BLOCK_N]. Blocks past `num_blocks`, the
    sequence's, are taken to be block 0.
    """
    if BLOCK_N <= BLOCK_SIZE:
        index = first // BLOCK_SIZE
        block = tl.load(table_ptr + index, mask=index < num_blocks, other=0).to(tl.int64)
        base = (block * NUM_KV_HEADS + head) * BLOCK_SIZE + first % BLOCK_SIZE
    else:
        place = tl.arange(0, BLOCK_N) // BLOCK_SIZE
        base = tl.zeros([BLOCK_N], tl.int64)
        for i in tl.static_range(BLOCK_N // BLOCK_SIZE):
            index = first // BLOCK_SIZE + i
            block = tl.load(table_ptr + index, mask=index < num_blocks, other=0).to(tl.int64)
            base = tl.where(place == i, (block * NUM_KV_HEADS + head) * BLOCK_SIZE - i * BLOCK_SIZE, base)
    return base


@triton.jit
def load_kv(
    cache_ptr, base, live, FIRST: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Columns FIRST .. FIRST + BLOCK of a tile of BLOCK_N tokens, as stored.

    Zeros past WIDTH, and with MASKED where not `live` [BLOCK_N].
    """
    cols = FIRST + tl.arange(0, BLOCK)
    ptrs = (cache_ptr + base * WIDTH + tl.arange(0, BLOCK_N) * WIDTH)[:, None] + cols[None, :]
    PADDED: tl.constexpr = FIRST + BLOCK > WIDTH
    if MASKED:
        if PADDED:
            x = tl.load(ptrs, mask=live[:, None] & (cols < WIDTH)[None, :], other=0.0)
        else:
            x = tl.load(ptrs, mask=live[:, None], other=0.0)
    elif PADDED:
        x = tl.load(ptrs, mask=(cols < WIDTH)[None, :], other=0.0)
    else:
        x = tl.load(ptrs)
    return x


@triton.constexpr_function
def in_words(dtype, num_rows, v_head_dim):
    """Whether values of one byte are read from shared memory in words: for mma, where a byte at a time is slow."""
    return dtype.primitive_bitwidth == 8 and num_rows == 16 and v_head_dim % 4 == 0 and v_head_dim > 32


@triton.constexpr_function
def two_of_fp8(index):
    """PTX: byte `index` of two words, as two float16 numbers."""
    return (
        "{ .reg .b32 both; .reg .b16 low, high;"
        f" prmt.b32 both, $1, $2, 0x00{index + 4}{index}; mov.b32 {{low, high}}, both;"
        " cvt.rn.f16x2.e4m3x2 $0, low; }"
    )


@triton.jit
def byte_of(words, INDEX: tl.constexpr, STORED: tl.constexpr, DTYPE: tl.constexpr):
    """Byte INDEX of int32 `words`, a number of type STORED, as DTYPE."""
    if is_compiled() and STORED == tl.float8e4nv and DTYPE == tl.float16:
        # In two instructions for two numbers; the compiler finds five, and under load power is what there is least of.
        y = tl.inline_asm_elementwise(two_of_fp8(INDEX), "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    else:
        y = (words >> (8 * INDEX)).to(tl.int8).to(STORED, bitcast=True).to(DTYPE)
    return y


@triton.jit
def in_log2(products, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores in units of log2 of products q.k."""
    if SOFTCAP:
        scores = tanh(products * (scale / softcap)) * (softcap * LOG2E)
    else:
        scores = products * (scale * LOG2E)
    return scores


@triton.jit
def weighed(scores, top, total):
    """A tile's weights; what sums before it are times; the largest score and the sum of weights with it."""
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    return weights, shrink, new_top, total * shrink + tl.sum(weights, axis=1)


@triton.jit
def _added(acc, shrink, weights, v):
    return tl.dot(weights, v, acc=acc * shrink[:, None], input_precision="ieee")


@triton.jit
def attend(
    acc, top, total, q, q_rest, k_cache_ptr, v_cache_ptr, table_ptr, base, first, last, bounds, lowest, num_blocks,
    length, head, scale, softcap,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr, IN_WORDS: tl.constexpr,
    PAGED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the cache's tokens `first` .. `last`, in tiles of BLOCK_N.

    acc [M, V_BLOCK] is the sum of weights times values, `total` [M] of weights, `top` [M] the largest score; scores in
    units of log2. With MASKED, row i sees the tokens below `bounds[i]`, from `lowest[i]` on with WINDOW; what lies in
    the cache past `length` may be NaN. `scale` is that of a score q.k; `base` are the `page_rows` of `first`, or where
    the cache is not PAGED its row, after which all others follow. With IN_WORDS `acc` is zeros.
    """
    MAIN: tl.constexpr = head_parts(HEAD_DIM)[0]
    REST: tl.constexpr = head_parts(HEAD_DIM)[1]
    V_BLOCK: tl.constexpr = acc.shape[1]
    DTYPE: tl.constexpr = q.dtype
    STORED: tl.constexpr = v_cache_ptr.dtype.element_ty
    if IN_WORDS:  # of columns 0, 4, ..., of 1, 5, ...
        acc_0 = tl.zeros([acc.shape[0], V_BLOCK // 4], tl.float32)
        acc_1, acc_2, acc_3 = acc_0, acc_0, acc_0
    for start in range(first, last, BLOCK_N):
        if PAGED:
            # Carried over from a tile before, else the compiler spends stages of its pipeline on the block table.
            next_base = page_rows(table_ptr, start + BLOCK_N, num_blocks, head, NUM_KV_HEADS, BLOCK_SIZE, BLOCK_N)
        else:
            next_base = base + BLOCK_N
        tokens = start + tl.arange(0, BLOCK_N)
        live = tokens < length
        # Keys need no mask: a NaN key spoils its own score only, which is hidden below.
        k = load_kv(k_cache_ptr, base, live, 0, MAIN, HEAD_DIM, BLOCK_N, False).to(DTYPE)
        scores = tl.dot(q, k.T, input_precision="ieee")
        if REST > 0:
            k_rest = load_kv(k_cache_ptr, base, live, MAIN, REST, HEAD_DIM, BLOCK_N, False).to(DTYPE)
            scores = tl.dot(q_rest, k_rest.T, acc=scores, input_precision="ieee")
        scores = in_log2(scores, scale, softcap, SOFTCAP)
        if MASKED:
            seen = tokens[None, :] < bounds[:, None]
            if WINDOW > 0:
                seen = seen & (tokens[None, :] >= lowest[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        weights, shrink, new_top, total = weighed(scores, top, total)
        weights = weights.to(DTYPE)
        if IN_WORDS:
            words_ptr = v_cache_ptr.to(tl.pointer_type(tl.int32))
            v = load_kv(words_ptr, base, live, 0, V_BLOCK // 4, V_HEAD_DIM // 4, BLOCK_N, MASKED)
            acc_0 = _added(acc_0, shrink, weights, byte_of(v, 0, STORED, DTYPE))
            acc_1 = _added(acc_1, shrink, weights, byte_of(v, 1, STORED, DTYPE))
            acc_2 = _added(acc_2, shrink, weights, byte_of(v, 2, STORED, DTYPE))
            acc_3 = _added(acc_3, shrink, weights, byte_of(v, 3, STORED, DTYPE))
        else:
            v = load_kv(v_cache_ptr, base, live, 0, V_BLOCK, V_HEAD_DIM, BLOCK_N, MASKED).to(DTYPE)
            acc = _added(acc, shrink, weights, v)
        top, base = new_top, next_base
    if IN_WORDS:
        acc = tl.reshape(tl.join(tl.join(acc_0, acc_2), tl.join(acc_1, acc_3)), acc.shape)
    return acc, top, total


@triton.jit
def share_of(split, first_tile, num_tiles, stop, BLOCK_N: tl.constexpr, NUM_SPLITS: tl.constexpr):
    """A split's first token and the end of its last one, at most `stop`; how many splits have any."""
    share = tl.cdiv(num_tiles, NUM_SPLITS)
    first = (first_tile + split * share) * BLOCK_N
    return first, tl.minimum(first + share * BLOCK_N, stop), tl.cdiv(num_tiles, share)


@triton.jit
def heads_of(tile, GROUP: tl.constexpr, BLOCK_G: tl.constexpr):
    """A tile of heads: their KV head, the first one's place in its group, the heads, and which of these there are."""
    TILES_G: tl.constexpr = (GROUP + BLOCK_G - 1) // BLOCK_G
    kv_head = tile // TILES_G
    first_member = tile % TILES_G * BLOCK_G
    members = first_member + tl.arange(0, BLOCK_G)
    return kv_head, first_member, kv_head * GROUP + members, members < GROUP


@triton.jit
def read_steps(kv_scale_ptr, out_scale_ptr, out_ptr, KV_QUANT: tl.constexpr):
    """The steps of keys, values and output; 1 of what is not quantized."""
    k_scale, v_scale = 1.0, 1.0
    if KV_QUANT:
        k_scale = tl.load(kv_scale_ptr)
        v_scale = tl.load(kv_scale_ptr + 1)
    out_step = 1.0
    if out_ptr.dtype.element_ty == tl.float8e4nv:
        out_step = tl.load(out_scale_ptr)
    return k_scale, v_scale, out_step


@triton.jit
def decode_attention(
    q_ptr, k_cache_ptr, v_cache_ptr, block_tables_ptr, query_start_ptr, seq_lens_ptr, sinks_ptr, kv_scale_ptr,
    out_scale_ptr, out_ptr, row_seqs_ptr, partial_ptr, lse_ptr, step_ptr, calls, call, max_blocks, scale, softcap,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, KV_QUANT: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr, NUM_SPLITS: tl.constexpr, OF_ROWS: tl.constexpr, PUSH: tl.constexpr,
    PULL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention of the sequences that have one token in this step; the others' rows of `out` are left alone.

    Grid: (NUM_SPLITS, num_seqs, NUM_KV_HEADS * cdiv(GROUP, BLOCK_G)). A program takes BLOCK_G (16, 32, 64) of the GROUP
    query heads of a KV head, and its share of the sequence's tiles of BLOCK_N tokens: a power of two that divides
    BLOCK_SIZE or that it divides. Programs without a share leave early. Those that wait for each other begin one after
    another, so that all of them run when the first of them waits.

    q [num_tokens, H * HEAD_DIM] and out [num_tokens, H * V_HEAD_DIM], H = NUM_KV_HEADS * GROUP; caches [num_blocks,
    NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM or V_HEAD_DIM]; block_tables int32 [num_seqs, max_blocks]; query_start int32
    [num_seqs + 1]; seq_lens int32 [num_seqs], 0: padded: none of these four is written in this step. sinks [H], read
    with SINKS; kv_scale float32 [2], read with KV_QUANT; out_scale float32 [1], read where `out` is float8e4nv. WINDOW
    0: none. max_blocks i32; scale and softcap (read with SOFTCAP) fp32.

    With OF_ROWS the second part of the grid is rows of q and out, each a token of the sequence row_seqs[row], int32,
    whose first seq_lens[row] tokens it sees. query_start is not read.

    With NUM_SPLITS > 1: partial int64 [num_seqs * H * NUM_SPLITS * V_HEAD_DIM] and lse int64 [num_seqs * H *
    NUM_SPLITS] are scratch for what is `flagged`, zeros at first. step int32 [1]: the step's number, above 0; `call`:
    which of a step's `calls` this is. On a GPU programs push what they found and pull the others'. Where one processor
    plays all of them, all push, and then all pull.
    """
    split, row = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    length = tl.load(seq_lens_ptr + row)
    if OF_ROWS:
        token, seq, num_queries = row, tl.load(row_seqs_ptr + row), 1
    else:
        token, seq = tl.load(query_start_ptr + row), row
        num_queries = tl.load(query_start_ptr + row + 1) - token
    if (num_queries != 1) | (length <= 0):
        if PDL:
            gdc_wait()  # else this kernel could end before the one in front, and the next one take that for ended too
        return
    lowest = 0
    if WINDOW > 0:
        lowest = tl.maximum(length - WINDOW, 0)
    first_tile = lowest // BLOCK_N
    num_tiles = tl.cdiv(length, BLOCK_N) - first_tile
    first, last, num_splits = share_of(split, first_tile, num_tiles, length, BLOCK_N, NUM_SPLITS)
    if NUM_SPLITS == 1:
        num_splits = tl.constexpr(1)  # nothing of the scratch is compiled
    if split >= num_splits:
        return

    V_BLOCK: tl.constexpr = max(16, triton.next_power_of_2(V_HEAD_DIM))
    DTYPE: tl.constexpr = dot_dtype(q_ptr.dtype.element_ty, KV_QUANT)
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    kv_head, first_member, heads, real = heads_of(tl.program_id(2), GROUP, BLOCK_G)
    table_ptr, num_blocks = block_tables_ptr + seq.to(tl.int64) * max_blocks, tl.cdiv(length, BLOCK_SIZE)
    base = page_rows(table_ptr, first, num_blocks, kv_head, NUM_KV_HEADS, BLOCK_SIZE, BLOCK_N)
    k_scale, v_scale, out_step = read_steps(kv_scale_ptr, out_scale_ptr, out_ptr, KV_QUANT)
    flag = 0
    if NUM_SPLITS > 1:
        flag = tl.load(step_ptr) * calls + call
    if PDL:
        gdc_wait()
    seq_row = row.to(tl.int64) * NUM_HEADS
    if PUSH:
        q_rows = token.to(tl.int64) * NUM_HEADS + heads
        q, q_rest = load_whole_q(q_ptr, q_rows, real, HEAD_DIM, DTYPE)
        # Rows that are no head see no token: their weights are zeros, which take less power to multiply.
        acc, top, total = attend(
            tl.zeros([BLOCK_G, V_BLOCK], tl.float32), tl.where(real, LOWEST, 0.0), tl.where(real, 0.0, 1.0), q,
            q_rest, k_cache_ptr, v_cache_ptr, table_ptr, base, first, last,
            tl.where(real, length, 0), tl.full([BLOCK_G], lowest, tl.int32), num_blocks, length, kv_head,
            scale * k_scale, softcap,
            NUM_KV_HEADS, HEAD_DIM, V_HEAD_DIM, BLOCK_SIZE, BLOCK_N, WINDOW, SOFTCAP, True,
            in_words(v_cache_ptr.dtype.element_ty, BLOCK_G, V_HEAD_DIM), True,
        )  # fmt: skip
        push(
            acc, top, total, real, heads, q_rows, sinks_ptr, out_ptr, partial_ptr, lse_ptr, seq_row + heads, split,
            num_splits, flag, v_scale, out_step, V_HEAD_DIM, NUM_SPLITS, SINKS,
        )  # fmt: skip
    if PULL and NUM_SPLITS > 1:
        pull(
            partial_ptr, lse_ptr, sinks_ptr, out_ptr, seq_row, token.to(tl.int64) * NUM_HEADS,
            kv_head * GROUP + first_member, tl.minimum(GROUP - first_member, BLOCK_G), split, flag, num_splits,
            v_scale / out_step, V_HEAD_DIM, NUM_SPLITS, SINKS,
        )  # fmt: skip


@triton.jit
def push(
    acc, top, total, real, heads, out_rows, sinks_ptr, out_ptr, partial_ptr, lse_ptr, partial_rows, split, num_splits,
    flag, v_scale, out_step,
    V_HEAD_DIM: tl.constexpr, NUM_SPLITS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """What `attend` found, as output where it is all, else for the other splits to `pull`."""
    cols = tl.arange(0, acc.shape[1])
    mask = real[:, None] & (cols < V_HEAD_DIM)[None, :]
    if num_splits == 1:
        if SINKS:
            sinks = tl.load(sinks_ptr + heads, mask=real, other=0.0).to(tl.float32)
            total += tl.exp2(sinks * LOG2E - top)
        y = acc * (v_scale / (total * out_step))[:, None]
        store(out_ptr + (out_rows * V_HEAD_DIM)[:, None] + cols[None, :], y, mask)
    else:
        rows = partial_rows * NUM_SPLITS + split
        found = flagged(acc / total[:, None], flag)
        tl.store(partial_ptr + (rows * V_HEAD_DIM)[:, None] + cols[None, :], found, mask=mask)
        tl.store(lse_ptr + rows, flagged(top + tl.log2(total), flag), mask=real)


@triton.jit
def pull(
    partial_ptr, lse_ptr, sinks_ptr, out_ptr, partial_row, out_row, first_head, num_heads, split, flag, num_splits,
    factor,
    V_HEAD_DIM: tl.constexpr, NUM_SPLITS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """The outputs of some heads of a tile's, which its splits share out."""
    if num_splits > 1:
        for member in range(split, num_heads, num_splits):
            head = first_head + member
            _combine(
                partial_ptr, lse_ptr, sinks_ptr, out_ptr, partial_row + head, out_row + head, head, flag, num_splits,
                factor, V_HEAD_DIM, NUM_SPLITS, SINKS,
            )  # fmt: skip


@triton.jit
def _combine(
    partial_ptr, lse_ptr, sinks_ptr, out_ptr, partial_row, out_row, head, flag, num_splits, factor,
    V_HEAD_DIM: tl.constexpr, NUM_SPLITS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """The output of a head of what each split found, once it has: its own output, weighted by 2 ** lse."""
    splits = tl.arange(0, triton.next_power_of_2(NUM_SPLITS))
    live = splits < num_splits
    cols = tl.arange(0, triton.next_power_of_2(V_HEAD_DIM))
    wide = cols < V_HEAD_DIM
    rows = partial_row * NUM_SPLITS + splits
    places, mask = (rows * V_HEAD_DIM)[:, None] + cols[None, :], live[:, None] & wide[None, :]
    parts = await_flagged(partial_ptr + places, mask, flag).to(tl.float32, bitcast=True)
    lse = await_flagged(lse_ptr + rows, live, flag).to(tl.float32, bitcast=True)
    top = tl.max(tl.where(live, lse, LOWEST), axis=0)
    weights = tl.where(live, tl.exp2(lse - top), 0.0)
    total = tl.sum(weights, axis=0)
    if SINKS:
        total += tl.exp2(tl.load(sinks_ptr + head).to(tl.float32) * LOG2E - top)
    y = tl.sum(parts * weights[:, None], axis=0) * (factor / total)
    store(out_ptr + out_row * V_HEAD_DIM + cols, y, wide)
