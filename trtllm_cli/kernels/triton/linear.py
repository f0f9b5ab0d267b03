"""Linears for few tokens: bound by reading the weights once, so everything here is about keeping loads in flight.

Each kernel computes `y [M, N] = x [M, K] @ w [N, K].T`, weights in one of these forms:

    bf16   w bf16
    fp8    w and x E4M3; the product times `w_scale` ([1], or [N] with W_SCALE "row") and `x_scale` ([1] or [M]). With
           "group" both have a scale for every BK inputs, float32 [K / BK, N] and [M, K / BK]
    int8   w in pieces of 16 outputs and 32 inputs, 512 bytes, outputs slowest. Byte 16 (4 i + j) + 8 k + 4 l + 2 m + n
           of a piece is of output i + 8 l and input 8 j + 4 n + 2 k + m
    int4   w in pieces of 16 outputs and 64 inputs, 512 bytes. Byte 16 (4 i + j) + 8 h + 4 k + 2 m + b of a piece has in
           its low nibble output i and input 32 h + 8 j + 4 b + 2 k + m, in the high one output i + 8

and end alike: bias, then the gated activation of two halves of N (GATED: rows n and N / 2 + n are gate and up; y is
[M, N / 2]) or none, rounded to y's dtype or quantized to E4M3. Scales of groups of inputs, `w_scale` and
`w_zero`, are float32 [ceil(N / 16), groups, 16]; a weight is (q - zero) * scale. Pieces that are short are padded.

The order of bytes in a piece is what a warp's registers hold before an mma instruction, so int8 and int4 go from memory
to tensor cores with neither shared memory nor shuffles, and masks and shifts make pairs of bf16 of words of 4 bytes.
(Marlin, arXiv:2408.11743, lays out weights for the same end.)

Split sums: SPLIT programs share an output tile, each sums a part of the inputs into `scratch`, and the last one to
finish adds the parts, in their order. `scratch` float32 begins with COUNTERS counters, zero before and after.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_cli.kernels.triton.device import gated, is_compiled, store

COUNTERS: tl.constexpr = tl.constexpr(8192)  # output tiles of a launch that splits sums, at most


@triton.constexpr_function
def pairs_of_word(form, apart):
    """PTX: pairs of bf16 of a word, each pair in a register, or with `apart` each number in one of 16 bits."""
    count = 4 if form == "int4" else 2
    word = f"${2 * count if apart else count}"
    pairs = [f"{'pair' if apart else '$'}{i}" for i in range(count)]
    if form == "int4":
        # A nibble becomes the last bits of 128.0 (0x4300 in bf16), whose last mantissa bit is 1. The low nibbles, of an
        # output, come first.
        shifted = [word, "a", "b", "c"]
        lines = [".reg .b32 a, b, c;", *(f"shr.u32 {shifted[i]}, {word}, {(0, 8, 4, 12)[i]};" for i in (1, 2, 3))]
        lines += [f"lop3.b32 {pairs[i]}, {shifted[i]}, 0x000F000F, 0x43004300, 0xEA;" for i in range(count)]
    else:
        # The last seven bits go into 128.0; the first one makes 256.0 of 128.0, to take off.
        lines = [".reg .b32 low, high, other, minus;", "mov.b32 minus, 0xBF80BF80;", f"shr.u32 other, {word}, 8;"]
        for pair, source in zip(pairs, (word, "other"), strict=True):
            lines += [
                f"lop3.b32 low, {source}, 0x007F007F, 0x43004300, 0xEA;",
                f"lop3.b32 high, {source}, 0x00800080, 0x43004300, 0xEA;",
                f"fma.rn.bf16x2 {pair}, high, minus, low;",
            ]
    if apart:
        lines = [f".reg .b32 {', '.join(pairs)};", *lines]
        lines += [f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, {pair};" for i, pair in enumerate(pairs)]
    return "\n".join(["{" if apart else "{ // side by side", *lines, "}"])


@triton.jit
def _unpacked(words, FORM: tl.constexpr, GROUP: tl.constexpr):
    """bf16 of flat words: 4 of int8, or 8 of int4 and 128 more than they are; exact.

    With groups of 32, which are split off, the compiler does not keep a word's copies in registers side by side.
    """
    each: tl.constexpr = 8 if FORM == "int4" else 4
    if is_compiled() and GROUP == 32:
        return _unpacked_apart(words, FORM)
    w = tl.join(words, words)
    w = tl.join(w, w)
    if FORM == "int4":
        w = tl.join(w, w)
    w = w.reshape(words.shape[0] * each)  # a word beside itself, for the same register holds all of it
    if not is_compiled():
        e = tl.arange(0, words.shape[0] * each) % each
        if FORM == "int4":
            number = (w >> (e // 4 * 4 + e // 2 % 2 * 8 + e % 2 * 16) & 15) + 128
        else:
            number = (w >> (e // 2 * 8 + e % 2 * 16) & 255 ^ 128) - 128
        w = number.to(tl.float32).to(tl.bfloat16)
    else:
        constraints: tl.constexpr = "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r" if FORM == "int4" else "=&r,=&r,r,r,r,r"
        w = tl.inline_asm_elementwise(
            pairs_of_word(FORM, False), constraints, [w], dtype=tl.bfloat16, is_pure=True, pack=each
        )
    return w


@triton.jit
def _unpacked_apart(words, FORM: tl.constexpr):
    """_unpacked, a number at a time."""
    if FORM == "int4":
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            pairs_of_word(FORM, True), "=h,=h,=h,=h,=h,=h,=h,=h,r", [words],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True,
            pack=1,
        )  # fmt: skip
        even, odd = tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h))
        w = tl.join(even.reshape(words.shape[0], 4), odd.reshape(words.shape[0], 4)).reshape(words.shape[0] * 8)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            pairs_of_word(FORM, True), "=h,=h,=h,=h,r", [words],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=1,
        )  # fmt: skip
        w = tl.join(tl.join(a, c), tl.join(b, d)).reshape(words.shape[0] * 4)
    return w.to(tl.bfloat16, bitcast=True)


@triton.jit
def _end(
    acc, up, x_scale_ptr, w_scale_ptr, bias_ptr, out_scale_ptr, y_ptr, n, tokens, num_tokens,
    N: tl.constexpr, W_SCALE: tl.constexpr, X_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """From sums [BN, BM] to what is stored."""
    outputs: tl.constexpr = N if GATED == "" else N // 2
    rows = tl.minimum(n, outputs - 1)
    token_mask = tokens < num_tokens
    x_scale = tl.full(tokens.shape, 1.0, tl.float32)
    if X_SCALE == "one":
        x_scale = x_scale * tl.load(x_scale_ptr)
    elif X_SCALE == "row":
        x_scale = tl.load(x_scale_ptr + tokens, mask=token_mask, other=0.0)
    y = _scaled(acc, x_scale, w_scale_ptr, bias_ptr, rows, W_SCALE, HAS_BIAS)
    if GATED != "":
        y = gated(y, _scaled(up, x_scale, w_scale_ptr, bias_ptr, rows + outputs, W_SCALE, HAS_BIAS), GATED)
    at = tokens[None, :].to(tl.int64) * outputs + n[:, None]
    mask = token_mask[None, :] & (n < outputs)[:, None]
    _store(y_ptr + at, y, mask, out_scale_ptr)


@triton.jit
def _end_split(
    acc, up, scratch_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, out_scale_ptr, y_ptr, n, tokens, num_tokens,
    N: tl.constexpr, W_SCALE: tl.constexpr, X_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """_end, by the last of the SPLIT programs (axis 2) of an output tile (axes 0 and 1)."""
    if SPLIT == 1:
        _end(
            acc, up, x_scale_ptr, w_scale_ptr, bias_ptr, out_scale_ptr, y_ptr, n, tokens, num_tokens, N,
            W_SCALE, X_SCALE, HAS_BIAS, GATED,
        )  # fmt: skip
    else:
        BN: tl.constexpr = acc.shape[0]
        BM: tl.constexpr = acc.shape[1]
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        parts: tl.constexpr = SPLIT if GATED == "" else 2 * SPLIT
        inside = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        at = scratch_ptr + COUNTERS + tile * (parts * BN * BM) + inside
        part = tl.program_id(2)
        tl.store(at + part * (BN * BM), acc)
        if GATED != "":
            tl.store(at + (SPLIT + part) * (BN * BM), up)
        tl.debug_barrier()  # all of the parts are written before the count goes up
        if tl.atomic_add(scratch_ptr + tile, 1.0, sem="acq_rel") == SPLIT - 1:
            total = tl.zeros((BN, BM), tl.float32)
            total_up = total
            for i in tl.static_range(SPLIT):
                total += tl.load(at + i * (BN * BM), cache_modifier=".cg")
                if GATED != "":
                    total_up += tl.load(at + (SPLIT + i) * (BN * BM), cache_modifier=".cg")
            tl.store(scratch_ptr + tile, 0.0)
            _end(
                total, total_up, x_scale_ptr, w_scale_ptr, bias_ptr, out_scale_ptr, y_ptr, n, tokens,
                num_tokens, N, W_SCALE, X_SCALE, HAS_BIAS, GATED,
            )  # fmt: skip


@triton.jit
def skinny_linear(
    x_ptr, w_ptr, w_scale_ptr, x_scale_ptr, bias_ptr, out_scale_ptr, scratch_ptr, y_ptr, num_tokens,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    W_SCALE: tl.constexpr, X_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """bf16 and fp8 through shared memory, the weights as the tall operand, any K.

    Grid (outputs / BN, num_tokens / BM, SPLIT). W_SCALE and X_SCALE: "none", "one" or "row", or both "group", where BK
    divides K. GATED: "", an activation.
    """
    GROUPED: tl.constexpr = W_SCALE == "group"
    tl.static_assert(GROUPED == (X_SCALE == "group") and (not GROUPED or K % BK == 0))
    outputs: tl.constexpr = N if GATED == "" else N // 2
    even: tl.constexpr = K % (BK * SPLIT) == 0
    count: tl.constexpr = ((K + BK - 1) // BK + SPLIT - 1) // SPLIT
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.minimum(n, outputs - 1).to(tl.int64)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    token_mask = tokens < num_tokens
    acc = tl.zeros((BN, BM), tl.float32)
    up = tl.zeros((BN, BM), tl.float32)
    k = tl.program_id(2) * (count * BK) + tl.arange(0, BK)
    w_at = w_ptr + rows[:, None] * K + k[None, :]
    x_at = x_ptr + tokens[None, :] * K + k[:, None]
    for i in range(count):
        start = i * BK
        if even:
            w = tl.load(w_at + start)
            x = tl.load(x_at + start, mask=token_mask[None, :], other=0.0)
        else:
            inside = start + k < K
            w = tl.load(w_at + start, mask=inside[None, :], other=0.0)
            x = tl.load(x_at + start, mask=token_mask[None, :] & inside[:, None], other=0.0)
        if GROUPED:
            group = tl.program_id(2) * count + i
            x_scale = _of_group(x_scale_ptr, tokens.to(tl.int64) * (K // BK) + group, token_mask, group, K // BK)
            acc += tl.dot(w, x) * _scales(w_scale_ptr, group, rows, x_scale, N, K // BK)
        else:
            acc = tl.dot(w, x, acc)
        if GATED != "":
            up_at = w_at + tl.full((), outputs, tl.int64) * K + start
            if even:
                w_up = tl.load(up_at)
            else:
                w_up = tl.load(up_at, mask=inside[None, :], other=0.0)
            if GROUPED:
                up += tl.dot(w_up, x) * _scales(w_scale_ptr, group, rows + outputs, x_scale, N, K // BK)
            else:
                up = tl.dot(w_up, x, up)
    _end_split(
        acc, up, scratch_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, out_scale_ptr, y_ptr, n, tokens, num_tokens, N,
        "none" if GROUPED else W_SCALE, "none" if GROUPED else X_SCALE, HAS_BIAS, GATED, SPLIT,
    )  # fmt: skip


@triton.jit
def _of_group(ptr, at, mask, group, GROUPS: tl.constexpr):
    """Scales of a group, zeros where there is no such group."""
    return tl.load(ptr + at, mask=mask & (group < GROUPS), other=0.0)


@triton.jit
def _scales(w_scale_ptr, group, rows, x_scale, N: tl.constexpr, GROUPS: tl.constexpr):
    """[BN, BM]: what the product of a group of inputs is times."""
    at = group.to(tl.int64) * N + rows
    return _of_group(w_scale_ptr, at, rows >= 0, group, GROUPS)[:, None] * x_scale[None, :]


@triton.jit
def _weights(
    w_ptr, first, i, N: tl.constexpr, K: tl.constexpr, FORM: tl.constexpr, WARPS: tl.constexpr, R: tl.constexpr,
    U: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Round i's weights of outputs first.. first + 16 R, flat, as lanes of warps take them; zeros past K."""
    turn = (i * SPLIT + tl.program_id(2)) * WARPS
    if FORM == "int4" or FORM == "int8":
        pieces: tl.constexpr = (K + 63) // 64  # of 64 inputs
        size: tl.constexpr = 128 if FORM == "int4" else 256  # words
        e = tl.arange(0, size * U * R * WARPS)
        piece = e // 128 % WARPS * U + e // (128 * WARPS * R) % U
        block = tl.minimum(first // 16 + e // (128 * WARPS) % R, (N + 15) // 16 - 1)
        at = (block.to(tl.int64) * pieces + piece) * size + e % 128
        if FORM == "int8":
            at += e // (128 * WARPS * R * U) * 128  # the first 32 inputs, then the others
        w_ptr += turn * (U * size)
        if pieces % (WARPS * U * SPLIT) == 0:
            w = tl.load(w_ptr + at)
        else:
            w = tl.load(w_ptr + at, mask=turn * U + piece < pieces, other=0)
    else:
        J: tl.constexpr = 8 if FORM == "bf16" else 16  # elements of 16 bytes
        e = tl.arange(0, 64 * J * U * R * WARPS)
        segment = (turn + e // (32 * J) % WARPS) * U + e // (64 * J * WARPS * R)
        k = segment * (4 * J) + e % (4 * J)
        row = first + e // (64 * J * WARPS) % R * 16 + e // (32 * J * WARPS) % 2 * 8 + e // (4 * J) % 8
        at = tl.minimum(row, N - 1).to(tl.int64) * K + k
        if K % (4 * J * WARPS * U * SPLIT) == 0:
            w = tl.load(w_ptr + at)
        else:
            w = tl.load(w_ptr + at, mask=k < K, other=0.0)
    return w


@triton.jit
def _group_scales(
    scale_ptr, first, i, HIGH: tl.constexpr, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, WARPS: tl.constexpr,
    R: tl.constexpr, U: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """[WARPS, 16 R]: of round i's weights, or of their second halves; zeros past K."""
    groups: tl.constexpr = (K + GROUP - 1) // GROUP
    piece = ((i * SPLIT + tl.program_id(2)) * WARPS + tl.arange(0, WARPS)) * U
    group = (piece * 64 + (32 if HIGH else 0)) // GROUP
    m = tl.arange(0, R * 16)
    block = tl.minimum(first // 16 + m // 16, (N + 15) // 16 - 1)
    at = (block[None, :] * groups + group[:, None]) * 16 + m[None, :] % 16
    if K % (64 * U * WARPS * SPLIT) == 0:
        scales = tl.load(scale_ptr + at)
    else:
        scales = tl.load(scale_ptr + at, mask=(group < groups)[:, None] & (m[None, :] >= 0), other=0.0)
    return scales


@triton.jit
def _inputs(
    x_ptr, i, num_tokens, K: tl.constexpr, BM: tl.constexpr, FORM: tl.constexpr, WARPS: tl.constexpr, U: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Round i's x [WARPS, inputs, BM] in the weights' order; tokens past the last one are copies of it.

    And the same for sums: there an operand's registers hold two inputs side by side, not four, and nothing is to move.
    """
    J: tl.constexpr = 16 if FORM == "fp8" else 8
    H: tl.constexpr = 1 if FORM == "bf16" or FORM == "fp8" else 2  # halves of 64 inputs
    L: tl.constexpr = BM // 8
    turn = (i * SPLIT + tl.program_id(2)) * WARPS
    e = tl.arange(0, L * U * H * WARPS * 32 * J)
    token = tl.program_id(1) * BM + e // (32 * J * WARPS * H * U) * 8 + e // (4 * J) % 8
    segment = (e // (32 * J) % WARPS * U + e // (32 * J * WARPS * H) % U) * H + e // (32 * J * WARPS) % H
    row = tl.max_constancy(tl.multiple_of(tl.minimum(token, num_tokens - 1) * K, 16), 4 * J)
    at = row + segment * (4 * J) + e % (4 * J)
    x_ptr += turn * (U * H * 4 * J)
    if K % (4 * J * H * U * WARPS * SPLIT) == 0:
        x = tl.load(x_ptr + at)
    else:
        x = tl.load(x_ptr + at, mask=turn * (U * H * 4 * J) + segment * (4 * J) + e % (4 * J) < K, other=0.0)
    if H == 1:
        ordered = x.reshape(L, U, WARPS, 8, 4, 2, 2, J // 4).permute(2, 1, 5, 6, 4, 7, 0, 3)
        ordered = ordered.reshape(WARPS, U * 4 * J, BM)
        pairs = ordered
    else:
        x = x.reshape(L, U, 2, WARPS, 8, 4, 2, 2, 2)
        ordered = x.permute(3, 1, 2, 7, 5, 6, 8, 0, 4).reshape(WARPS, U * 64, BM)
        pairs = x.permute(3, 1, 2, 6, 7, 5, 8, 0, 4).reshape(WARPS, U * 64, BM)
    return ordered, pairs


@triton.jit
def _ordered(w, FORM: tl.constexpr, GROUP: tl.constexpr, WARPS: tl.constexpr, R: tl.constexpr, U: tl.constexpr):
    """Flat weights as mma's operand [WARPS, 16 R, inputs]: they are in the right registers, so nothing moves.

    The order of inputs is free, as long as x has it too. Registers of an operand hold inputs that are side by side:
    2 of bf16, 4 of fp8 and of bf16 that words are unpacked to.
    """
    if FORM == "bf16" or FORM == "fp8":
        J: tl.constexpr = 8 if FORM == "bf16" else 16
        w = w.reshape(U, R, 2, WARPS, 8, 4, 2, 2, J // 4).permute(3, 1, 2, 4, 0, 6, 7, 5, 8)
        w = w.reshape(WARPS, R * 16, U * 4 * J)
    elif FORM == "int4":
        w = _unpacked(w, FORM, GROUP).reshape(U, R, WARPS, 8, 4, 2, 2, 2, 4).permute(2, 1, 7, 3, 0, 5, 6, 4, 8)
        w = w.reshape(WARPS, R * 16, U * 64)
    else:
        w = _unpacked(w, FORM, GROUP).reshape(2, U, R, WARPS, 8, 4, 2, 2, 4).permute(3, 2, 7, 4, 1, 0, 6, 5, 8)
        w = w.reshape(WARPS, R * 16, U * 64)
    return w


@triton.jit
def _products(w, offset, x, pairs, FORM: tl.constexpr, HAS_ZERO: tl.constexpr):
    """w @ x, and what belongs to inputs whose weights are `offset` [WARPS, 16 R] less than w."""
    part = tl.dot(w, x)
    if FORM == "int4" or HAS_ZERO:
        ones = tl.full(w.shape, 1.0, tl.float32).to(tl.bfloat16)  # sums of x come out where the products are
        part -= offset * tl.dot(ones, pairs)
    return part


@triton.jit
def _added(
    acc, w, scale, scale_high, zero, zero_high, x, pairs, FORM: tl.constexpr, GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr, WARPS: tl.constexpr, R: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """acc [WARPS, 16 R, BM] and a round's products."""
    w = _ordered(w, FORM, GROUP, WARPS, R, U)
    if FORM == "bf16" or FORM == "fp8":
        acc = tl.dot(w, x, acc)
    else:
        offset: tl.constexpr = 128.0 if FORM == "int4" else 0.0  # what _unpacked has added
        if GROUP == 32:
            BM: tl.constexpr = x.shape[2]
            w, w_high = w.reshape(WARPS, R * 16, 2, 32).permute(0, 1, 3, 2).split()
            x, x_high = x.reshape(WARPS, 2, 32, BM).permute(0, 2, 3, 1).split()
            pairs, pairs_high = pairs.reshape(WARPS, 2, 32, BM).permute(0, 2, 3, 1).split()
            acc += _products(w_high, zero_high + offset, x_high, pairs_high, FORM, HAS_ZERO) * scale_high
        acc += _products(w, zero + offset, x, pairs, FORM, HAS_ZERO) * scale
    return acc


@triton.jit
def _turn(
    acc, up, ring, i, x_ptr, w_ptr, w_scale_ptr, w_zero_ptr, num_tokens, first, N: tl.constexpr, K: tl.constexpr,
    BM: tl.constexpr, FORM: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, WARPS: tl.constexpr,
    R: tl.constexpr, U: tl.constexpr, SPLIT: tl.constexpr, GATED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Round i's products added to acc and up, and round i + AHEAD's weights asked for, unless it is 0."""
    outputs: tl.constexpr = N if GATED == "" else N // 2
    x, pairs = _inputs(x_ptr, i, num_tokens, K, BM, FORM, WARPS, U, SPLIT)
    for h in tl.static_range(1 if GATED == "" else 2):
        w, s, s_high, z, z_high = ring[0], ring[1], ring[2], ring[3], ring[4]
        ring = ring[5:]
        if AHEAD > 0:
            ring += _round(
                w_ptr, w_scale_ptr, w_zero_ptr, first + h * outputs, i + AHEAD, N, K, FORM, GROUP, HAS_ZERO, WARPS, R,
                U, SPLIT,
            )  # fmt: skip
        if FORM == "int4" or FORM == "int8":
            s, s_high = s[:, :, None], s_high[:, :, None]
            if HAS_ZERO:
                z, z_high = z[:, :, None], z_high[:, :, None]
        if h == 0:
            acc = _added(acc, w, s, s_high, z, z_high, x, pairs, FORM, GROUP, HAS_ZERO, WARPS, R, U)
        else:
            up = _added(up, w, s, s_high, z, z_high, x, pairs, FORM, GROUP, HAS_ZERO, WARPS, R, U)
    return acc, up, ring


@triton.jit
def fragment_linear(
    x_ptr, w_ptr, w_scale_ptr, w_zero_ptr, x_scale_ptr, bias_ptr, out_scale_ptr, scratch_ptr, y_ptr,
    num_tokens,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, R: tl.constexpr, U: tl.constexpr, DEPTH: tl.constexpr,
    SPLIT: tl.constexpr, WARPS: tl.constexpr, FORM: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr,
    W_SCALE: tl.constexpr, X_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Weights go from memory to registers and tensor cores; a program's warps share out the inputs.

    Grid (outputs / (16 R), num_tokens / BM, SPLIT); WARPS is num_warps. A warp takes 64 U inputs a round (bf16: 32 U)
    of 16 R outputs, and DEPTH rounds are in flight, the first ones before the kernel in front has ended.
    w_ptr is int32 of int8 and int4. K is a multiple of 16; 64 U divides GROUP, or U is 1, or the one group is all of K
    (0: no scales of groups).
    """
    outputs: tl.constexpr = N if GATED == "" else N // 2
    words: tl.constexpr = FORM == "int4" or FORM == "int8"
    taken: tl.constexpr = 32 * U if FORM == "bf16" else 64 * U
    iters: tl.constexpr = ((K + taken - 1) // taken + WARPS * SPLIT - 1) // (WARPS * SPLIT)
    # What a loop carries of weights narrower than a register has a register each, so short loops of those are unrolled.
    rounds: tl.constexpr = (iters - DEPTH) // DEPTH if words or iters > 32 else 0
    looped: tl.constexpr = rounds * DEPTH if rounds > 0 else 0
    tl.static_assert(not words or GATED == "" or outputs % 16 == 0)
    if PDL:
        gdc_launch_dependents()
    first = tl.program_id(0) * (R * 16)
    halves: tl.constexpr = 1 if GATED == "" else 2
    ring = ()
    for d in tl.static_range(DEPTH):
        if d < iters:
            for h in tl.static_range(halves):
                ring += _round(
                    w_ptr, w_scale_ptr, w_zero_ptr, first + h * outputs, d, N, K, FORM, GROUP, HAS_ZERO, WARPS, R, U,
                    SPLIT,
                )  # fmt: skip
    if PDL:
        gdc_wait()
    acc = tl.zeros((WARPS, R * 16, BM), tl.float32)
    up = tl.zeros((WARPS, R * 16, BM), tl.float32)
    if looped > 0:
        for base in range(0, looped, DEPTH):
            for d in tl.static_range(DEPTH):
                acc, up, ring = _turn(
                    acc, up, ring, base + d, x_ptr, w_ptr, w_scale_ptr, w_zero_ptr, num_tokens, first, N, K, BM, FORM,
                    GROUP, HAS_ZERO, WARPS, R, U, SPLIT, GATED, DEPTH,
                )  # fmt: skip
    for i in tl.static_range(looped, iters):
        acc, up, ring = _turn(
            acc, up, ring, i, x_ptr, w_ptr, w_scale_ptr, w_zero_ptr, num_tokens, first, N, K, BM, FORM, GROUP, HAS_ZERO,
            WARPS, R, U, SPLIT, GATED, DEPTH if i + DEPTH < iters else 0,
        )  # fmt: skip
    n = first + tl.arange(0, R * 16)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    _end_split(
        tl.sum(acc, 0), tl.sum(up, 0), scratch_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, out_scale_ptr,
        y_ptr, n, tokens, num_tokens, N, W_SCALE, X_SCALE, HAS_BIAS, GATED, SPLIT,
    )  # fmt: skip


@triton.jit
def _round(
    w_ptr, w_scale_ptr, w_zero_ptr, first, i, N: tl.constexpr, K: tl.constexpr, FORM: tl.constexpr, GROUP: tl.constexpr,
    HAS_ZERO: tl.constexpr, WARPS: tl.constexpr, R: tl.constexpr, U: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """What a round reads of the weights: them, scales and zeros of first and second halves; 1 and 8 if none."""
    w = _weights(w_ptr, first, i, N, K, FORM, WARPS, R, U, SPLIT)
    s, s_high, z, z_high = 1.0, 1.0, 8.0, 8.0
    if FORM == "int4" or FORM == "int8":
        s = _group_scales(w_scale_ptr, first, i, False, N, K, GROUP, WARPS, R, U, SPLIT)
        s_high = s
        if HAS_ZERO:
            z = _group_scales(w_zero_ptr, first, i, False, N, K, GROUP, WARPS, R, U, SPLIT)
        z_high = z
        if GROUP == 32:
            s_high = _group_scales(w_scale_ptr, first, i, True, N, K, GROUP, WARPS, R, U, SPLIT)
            if HAS_ZERO:
                z_high = _group_scales(w_zero_ptr, first, i, True, N, K, GROUP, WARPS, R, U, SPLIT)
    return w, s, s_high, z, z_high


@triton.jit
def _store(ptrs, y, mask, out_scale_ptr):
    """As the pointers' type; E4M3 in steps of `out_scale`."""
    if ptrs.dtype.element_ty == tl.float8e4nv:
        y = y * (1.0 / tl.load(out_scale_ptr))
    store(ptrs, y, mask)


@triton.jit
def _scaled(acc, x_scale, w_scale_ptr, bias_ptr, rows, W_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr):
    if W_SCALE == "one":
        acc *= tl.load(w_scale_ptr)
    elif W_SCALE == "row":
        acc *= tl.load(w_scale_ptr + rows)[:, None]
    acc *= x_scale[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
    return acc


@triton.jit
def vector_linear(
    x_ptr, w_ptr, w_scale_ptr, x_scale_ptr, bias_ptr, out_scale_ptr, y_ptr, num_tokens,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, DEPTH: tl.constexpr,
    W_SCALE: tl.constexpr, X_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BM tokens at most, on the ordinary units, weights bf16 or fp8: grid (outputs / BN).

    DEPTH weight tiles are in flight, the first ones before the kernel in front has ended. K is a multiple of BK.
    """
    outputs: tl.constexpr = N if GATED == "" else N // 2
    J: tl.constexpr = 16 if w_ptr.dtype.element_ty == tl.float8e4nv else 8  # elements that a thread has side by side
    iters: tl.constexpr = K // BK
    if PDL:
        gdc_launch_dependents()
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.minimum(n, outputs - 1).to(tl.int64)
    k = tl.arange(0, BK)
    w_at = w_ptr + rows[:, None] * K + k[None, :]
    up_at = w_at + tl.full((), outputs, tl.int64) * K
    ring = ()
    for d in tl.static_range(DEPTH):
        if d < iters:
            ring += (tl.load(w_at + d * BK),)
            if GATED != "":
                ring += (tl.load(up_at + d * BK),)
    if PDL:
        gdc_wait()
    sums, up_sums = (), ()
    for _ in tl.static_range(BM):
        sums += (tl.zeros((BN, BK // J), tl.float32),)
        up_sums += (tl.zeros((BN, BK // J), tl.float32),)
    for i in tl.static_range(iters):
        xs = ()
        for m in tl.static_range(BM):
            at = x_ptr + i * BK + k
            if m > 0:
                at += tl.minimum(m, num_tokens - 1) * K
            xs += (tl.load(at).to(tl.float32)[None, :],)
        w, ring = ring[0].to(tl.float32), ring[1:]
        if i + DEPTH < iters:
            ring += (tl.load(w_at + (i + DEPTH) * BK),)
        for m in tl.static_range(BM):
            sums = sums[1:] + (sums[0] + tl.sum((w * xs[m]).reshape(BN, BK // J, J), 2),)  # noqa: RUF005
        if GATED != "":
            w, ring = ring[0].to(tl.float32), ring[1:]
            if i + DEPTH < iters:
                ring += (tl.load(up_at + (i + DEPTH) * BK),)
            for m in tl.static_range(BM):
                up_sums = up_sums[1:] + (up_sums[0] + tl.sum((w * xs[m]).reshape(BN, BK // J, J), 2),)  # noqa: RUF005
    for m in tl.static_range(BM):
        there = (n < outputs) & (m < num_tokens)
        x_scale = 1.0
        if X_SCALE == "one":
            x_scale = tl.load(x_scale_ptr)
        elif X_SCALE == "row":
            x_scale = tl.load(x_scale_ptr + tl.minimum(m, num_tokens - 1))
        y = _finished(tl.sum(sums[m], 1), x_scale, w_scale_ptr, bias_ptr, rows, W_SCALE, HAS_BIAS)
        if GATED != "":
            up = _finished(tl.sum(up_sums[m], 1), x_scale, w_scale_ptr, bias_ptr, rows + outputs, W_SCALE, HAS_BIAS)
            y = gated(y, up, GATED)
        _store(y_ptr + m * outputs + n, y, there, out_scale_ptr)


@triton.jit
def _finished(total, x_scale, w_scale_ptr, bias_ptr, rows, W_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr):
    if W_SCALE == "one":
        total *= tl.load(w_scale_ptr)
    elif W_SCALE == "row":
        total *= tl.load(w_scale_ptr + rows)
    total *= x_scale
    if HAS_BIAS:
        total += tl.load(bias_ptr + rows).to(tl.float32)
    return total


@triton.jit
def dequantize_weight(
    w_ptr, w_scale_ptr, w_zero_ptr, out_ptr, N: tl.constexpr, K: tl.constexpr, U: tl.constexpr, FORM: tl.constexpr,
    GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """int8 or int4 weights as bf16 `out` [N, K]: grid (N / 16, K / (64 U)); w_ptr and U as in fragment_linear."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, step = tl.program_id(0) * 16, tl.program_id(1)
    pieces: tl.constexpr = (K + 63) // 64
    size: tl.constexpr = 128 if FORM == "int4" else 256
    e = tl.arange(0, size * U)
    piece = step * U + e // 128 % U
    at = (tl.program_id(0).to(tl.int64) * pieces + piece) * size + e % 128 + e // (128 * U) * 128
    w = _ordered(tl.load(w_ptr + at, mask=piece < pieces, other=0), FORM, GROUP, 1, 1, U)
    w = w.reshape(16, 64 * U).to(tl.float32)
    n = tl.arange(0, 16)
    c = tl.arange(0, 64 * U)
    high = (c // 32 % 2 == 1)[None, :]
    if FORM == "int4" or HAS_ZERO:
        offset: tl.constexpr = 128.0 if FORM == "int4" else 0.0  # what _unpacked has added
        zero = tl.full((16, 1), 8.0, tl.float32)
        if HAS_ZERO:
            zero = _step_scales(w_zero_ptr, n, high, step, K, U, GROUP)
        w -= zero + offset
    w *= _step_scales(w_scale_ptr, n, high, step, K, U, GROUP)
    # inputs are in _ordered's order
    k = step * (64 * U) + c // 32 * 32 + c // 4 % 4 * 8 + c // 2 % 2 * 4 + c // 16 % 2 * 2 + c % 2
    out_at = out_ptr + (row + n).to(tl.int64)[:, None] * K + k[None, :]
    tl.store(out_at, w.to(out_ptr.dtype.element_ty), mask=(row + n < N)[:, None] & (k < K)[None, :])


@triton.jit
def _step_scales(scale_ptr, n, high, step, K: tl.constexpr, U: tl.constexpr, GROUP: tl.constexpr):
    """dequantize_weight's scales or zeros [16, 1], or [16, 64] where groups are of 32."""
    groups: tl.constexpr = (K + GROUP - 1) // GROUP
    group = step * (64 * U) // GROUP
    at = scale_ptr + (tl.program_id(0) * groups + group) * 16 + n
    scales = tl.load(at)[:, None]
    if GROUP == 32:
        scales = tl.where(high, tl.load(at + 16, mask=(n >= 0) & (group + 1 < groups), other=0.0)[:, None], scales)
    return scales
