"""q, k and v between their linear and attention: head norm, rotary embedding, append to the paged KV cache."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_cli.kernels.triton.device import as_stored


@triton.jit
def cache_offsets(slots, heads, WIDTH: tl.constexpr, NUM_KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Where each (slot, head) begins in a cache [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, WIDTH]; int64."""
    blocks = (slots // BLOCK_SIZE).to(tl.int64)
    return ((blocks * NUM_KV_HEADS + heads) * BLOCK_SIZE + slots % BLOCK_SIZE) * WIDTH


@triton.jit
def _store_divided(
    y, cols, mask, out_ptr, out_starts, step_ptr, again_ptr, again_starts, QUANT: tl.constexpr, AGAIN: tl.constexpr
):  # fmt: skip
    """Stores `y`, with QUANT divided by the number at `step_ptr`; with AGAIN what it was rounded to once more."""
    if QUANT:
        y = tl.div_rn(y, tl.load(step_ptr))
    stored = as_stored(y, out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_starts[:, None] + cols, stored, mask=mask)
    if AGAIN:
        again = stored.to(tl.float32).to(again_ptr.dtype.element_ty)
        tl.store(again_ptr + again_starts[:, None] + cols, again, mask=mask)


@triton.jit
def _copy_rows(
    x_ptr, starts, live, out_ptr, out_starts, step_ptr, again_ptr, again_starts,
    WIDTH: tl.constexpr, QUANT: tl.constexpr, AGAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows of WIDTH elements, with PDL once the kernel in front has made them."""
    if PDL:
        gdc_wait()
    cols = tl.arange(0, triton.next_power_of_2(WIDTH))[None, :]
    mask = live[:, None] & (cols < WIDTH)
    x = tl.load(x_ptr + starts[:, None] + cols, mask=mask, other=0.0).to(tl.float32)
    _store_divided(x, cols, mask, out_ptr, out_starts, step_ptr, again_ptr, again_starts, QUANT, AGAIN)


@triton.jit
def _norm_rope_rows(
    x_ptr, starts, live, norm_ptr, eps, table_ptr, positions, out_ptr, out_starts, step_ptr, again_ptr, again_starts,
    HEAD_DIM: tl.constexpr, DIM: tl.constexpr, NEOX: tl.constexpr, NORM: tl.constexpr, QUANT: tl.constexpr,
    AGAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Heads, normed and rotated: one row [HEAD_DIM] for each of `starts`; with PDL once the kernel in front has made
    them.
    """
    HALF: tl.constexpr = DIM // 2
    REST: tl.constexpr = HEAD_DIM - DIM
    x_rows = x_ptr + starts[:, None]
    half = tl.arange(0, triton.next_power_of_2(max(HALF, 1)))[None, :]
    half_mask = live[:, None] & (half < HALF)
    rest = DIM + tl.arange(0, triton.next_power_of_2(max(REST, 1)))[None, :]
    rest_mask = live[:, None] & (rest < HEAD_DIM)
    whole = tl.arange(0, 2 * triton.next_power_of_2(max(HALF, 1)))[None, :]
    whole_mask = live[:, None] & (whole < DIM)

    if DIM > 0:
        angles = table_ptr + (positions.to(tl.int64) * DIM)[:, None]
        cos = tl.load(angles + half, mask=half_mask, other=0.0)
        sin = tl.load(angles + HALF + half, mask=half_mask, other=0.0)
    if PDL:
        gdc_wait()
    squares = tl.zeros([starts.shape[0]], tl.float32)
    if DIM > 0:
        if NEOX:
            a = tl.load(x_rows + half, mask=half_mask, other=0.0).to(tl.float32)
            b = tl.load(x_rows + HALF + half, mask=half_mask, other=0.0).to(tl.float32)
            squares += tl.sum(a * a + b * b, axis=1)
        else:
            x = tl.load(x_rows + whole, mask=whole_mask, other=0.0).to(tl.float32)
            squares += tl.sum(x * x, axis=1)
    if REST > 0:
        r = tl.load(x_rows + rest, mask=rest_mask, other=0.0).to(tl.float32)
        squares += tl.sum(r * r, axis=1)

    if NORM:
        factor = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        if DIM > 0:
            if NEOX:
                a *= factor * tl.load(norm_ptr + half, mask=half < HALF, other=0.0).to(tl.float32)
                b *= factor * tl.load(norm_ptr + HALF + half, mask=half < HALF, other=0.0).to(tl.float32)
            else:
                x *= factor * tl.load(norm_ptr + whole, mask=whole < DIM, other=0.0).to(tl.float32)
        if REST > 0:
            r *= factor * tl.load(norm_ptr + rest, mask=rest < HEAD_DIM, other=0.0).to(tl.float32)

    if DIM > 0:
        if NEOX:
            _store_divided(
                a * cos - b * sin, half, half_mask, out_ptr, out_starts, step_ptr, again_ptr, again_starts, QUANT, AGAIN
            )  # fmt: skip
            _store_divided(
                b * cos + a * sin, HALF + half, half_mask, out_ptr, out_starts, step_ptr, again_ptr, again_starts,
                QUANT, AGAIN,
            )  # fmt: skip
        else:
            a, b = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
            y = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), x.shape)
            _store_divided(
                y, whole, whole_mask, out_ptr, out_starts, step_ptr, again_ptr, again_starts, QUANT, AGAIN
            )  # fmt: skip
    if REST > 0:
        _store_divided(r, rest, rest_mask, out_ptr, out_starts, step_ptr, again_ptr, again_starts, QUANT, AGAIN)


@triton.jit
def rope_append(
    qkv_ptr, q_norm_ptr, k_norm_ptr, table_ptr, positions_ptr, slot_mapping_ptr, kv_scale_ptr,
    q_ptr, k_cache_ptr, v_cache_ptr, k_new_ptr, v_new_ptr, num_tokens, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    DIM: tl.constexpr, NEOX: tl.constexpr, NORM: tl.constexpr, KV_QUANT: tl.constexpr, NEW_STRIDE: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """q, k and v out of one linear's output: q and k normed and rotated, q to `q_ptr`, k and v to the paged cache.

    Grid: (cdiv(num_tokens, TOKENS), cdiv(NUM_HEADS, HEADS) + 2 * cdiv(NUM_KV_HEADS, HEADS)). A program does HEADS
    heads, all of q, all of k or all of v, of TOKENS tokens; both are powers of two.

    qkv [num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM]; q_norm, k_norm [HEAD_DIM], read with NORM; table
    float32 [max_position, DIM], the cosines of DIM / 2 angles, then their sines, read where DIM > 0, which rotates the
    first DIM columns of a head (NEOX: halves, else pairs); positions, slot_mapping int32 [num_tokens], a slot below 0:
    neither k nor v is appended; kv_scale float32 [2], read with KV_QUANT; q [num_tokens, NUM_HEADS * HEAD_DIM];
    caches [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]. num_tokens i32, eps fp32.

    With NEW_STRIDE > 0 what is appended is also written side by side, as the cache holds it but in bfloat16, for
    prefill_attention: k_new and v_new [NUM_KV_HEADS, NEW_STRIDE, HEAD_DIM], of which num_tokens rows of a head are
    written.
    """
    if PDL:
        gdc_launch_dependents()
    Q_GROUPS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    KV_GROUPS: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    group = tl.program_id(1)
    rows = tl.arange(0, TOKENS * HEADS)
    tokens = tl.program_id(0) * TOKENS + rows // HEADS
    live = tokens < num_tokens
    starts = tokens.to(tl.int64) * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    NEW: tl.constexpr = NEW_STRIDE > 0
    if group < Q_GROUPS:
        heads = group * HEADS + rows % HEADS
        live = live & (heads < NUM_HEADS)
        positions = tl.load(positions_ptr + tokens, mask=live, other=0)
        out_starts = (tokens.to(tl.int64) * NUM_HEADS + heads) * HEAD_DIM
        _norm_rope_rows(
            qkv_ptr, starts + heads * HEAD_DIM, live, q_norm_ptr, eps, table_ptr, positions, q_ptr, out_starts,
            kv_scale_ptr, q_ptr, out_starts, HEAD_DIM, DIM, NEOX, NORM, False, False, PDL,
        )  # fmt: skip
    else:
        heads = (group - Q_GROUPS) % KV_GROUPS * HEADS + rows % HEADS
        slots = tl.load(slot_mapping_ptr + tokens, mask=live, other=-1)
        live = live & (heads < NUM_KV_HEADS) & (slots >= 0)
        out_starts = cache_offsets(slots, heads, HEAD_DIM, NUM_KV_HEADS, BLOCK_SIZE)
        new_starts = (heads.to(tl.int64) * NEW_STRIDE + tokens) * HEAD_DIM
        if group < Q_GROUPS + KV_GROUPS:
            positions = tl.load(positions_ptr + tokens, mask=live, other=0)
            _norm_rope_rows(
                qkv_ptr, starts + (NUM_HEADS + heads) * HEAD_DIM, live, k_norm_ptr, eps, table_ptr, positions,
                k_cache_ptr, out_starts, kv_scale_ptr, k_new_ptr, new_starts, HEAD_DIM, DIM, NEOX, NORM, KV_QUANT, NEW,
                PDL,
            )  # fmt: skip
        else:
            v_starts = starts + (NUM_HEADS + NUM_KV_HEADS + heads) * HEAD_DIM
            _copy_rows(
                qkv_ptr, v_starts, live, v_cache_ptr, out_starts, kv_scale_ptr + 1, v_new_ptr, new_starts, HEAD_DIM,
                KV_QUANT, NEW, PDL,
            )  # fmt: skip


@triton.jit
def append(
    k_ptr, v_ptr, slot_mapping_ptr, kv_scale_ptr, k_cache_ptr, v_cache_ptr, k_new_ptr, v_new_ptr, num_tokens,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KV_QUANT: tl.constexpr, NEW_STRIDE: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """k and v, as they are, to the paged cache.

    Grid: (cdiv(num_tokens, TOKENS), 2 * cdiv(NUM_KV_HEADS, HEADS)). A program does HEADS heads of k or of v, of TOKENS
    tokens; both are powers of two.

    k [num_tokens, NUM_KV_HEADS * HEAD_DIM], v [num_tokens, NUM_KV_HEADS * V_HEAD_DIM]; slot_mapping int32 [num_tokens],
    a slot below 0: not appended; kv_scale float32 [2], read with KV_QUANT; caches [num_blocks, NUM_KV_HEADS,
    BLOCK_SIZE, HEAD_DIM or V_HEAD_DIM]. num_tokens i32. NEW_STRIDE, k_new and v_new as in `rope_append`.
    """
    if PDL:
        gdc_launch_dependents()
    GROUPS: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    group = tl.program_id(1)
    rows = tl.arange(0, TOKENS * HEADS)
    tokens = tl.program_id(0) * TOKENS + rows // HEADS
    heads = group % GROUPS * HEADS + rows % HEADS
    slots = tl.load(slot_mapping_ptr + tokens, mask=tokens < num_tokens, other=-1)
    live = (heads < NUM_KV_HEADS) & (slots >= 0)
    source = tokens.to(tl.int64) * NUM_KV_HEADS + heads
    new_rows = heads.to(tl.int64) * NEW_STRIDE + tokens
    if group < GROUPS:
        out_starts = cache_offsets(slots, heads, HEAD_DIM, NUM_KV_HEADS, BLOCK_SIZE)
        _copy_rows(
            k_ptr, source * HEAD_DIM, live, k_cache_ptr, out_starts, kv_scale_ptr, k_new_ptr, new_rows * HEAD_DIM,
            HEAD_DIM, KV_QUANT, NEW_STRIDE > 0, PDL,
        )  # fmt: skip
    else:
        out_starts = cache_offsets(slots, heads, V_HEAD_DIM, NUM_KV_HEADS, BLOCK_SIZE)
        _copy_rows(
            v_ptr, source * V_HEAD_DIM, live, v_cache_ptr, out_starts, kv_scale_ptr + 1, v_new_ptr,
            new_rows * V_HEAD_DIM, V_HEAD_DIM, KV_QUANT, NEW_STRIDE > 0, PDL,
        )  # fmt: skip
