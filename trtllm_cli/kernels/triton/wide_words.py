"""Linears of 8 to 256 tokens whose int4 weights are on their way to shared memory before the kernel in front has ended.

stream_words' sibling for more tokens than fit beside each other. Weights are linear.py's words, whose fragment_linear
is the slow twin. They become bf16 in the registers of wgmma, each word an operand of 16 inputs, times their scales; x
comes piece by piece into shared memory, its inputs in the words' order. (Marlin, arXiv:2408.11743, does it with the
instructions of the generation before.)
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from trtllm_cli.kernels.triton.gluon_names import barrier, copy_to_shared, reinterpret
from trtllm_cli.kernels.triton.linear import pairs_of_word
from trtllm_cli.kernels.triton.stream_linear import read_biases, read_in_one
from trtllm_cli.kernels.triton.wide_linear import end_split, waited

TILE = gl.constexpr(128)  # inputs of a product


@gluon.constexpr_function
def _as_words(blocks, warps):
    """The layout of [blocks, words] in which a lane has the words that are its own of each piece, and copies them."""
    of_pieces = [[0, i] for i in _doubled(128, 2 * TILE.value)]
    registers = [[0, 1], [0, 2], *of_pieces, *([i, 0] for i in _doubled(warps, blocks))]
    lanes = [[0, i] for i in _doubled(4, 128)]
    return gl.DistributedLinearLayout(
        registers, lanes, [[i, 0] for i in _doubled(1, warps)], [], [blocks, 2 * TILE.value]
    )  # fmt: skip


@gluon.constexpr_function
def _doubled(first, end):
    """first, twice it, and so on below `end`."""
    return [first << i for i in range((end // first).bit_length() - 1)]


@gluon.jit
def _copy_words(smem, w_ptr, first, tile, R: gl.constexpr, P: gl.constexpr, outputs: gl.constexpr, K: gl.constexpr):
    """Asks for words [tiles, P, warps; 256] of blocks from `first` on, of gate's, then up's if P is twice R."""
    WARPS: gl.constexpr = gl.num_warps()
    layout: gl.constexpr = _as_words(smem.shape[0], WARPS)
    e = gl.arange(0, smem.shape[0], gl.SliceLayout(1, layout))
    words = gl.arange(0, smem.shape[1], gl.SliceLayout(0, layout))
    block = e // (R * WARPS) % (P // R) * (outputs // 16) + e % (R * WARPS)
    at = block * (2 * K) + e // (P * WARPS) * smem.shape[1]
    w_ptr += first.to(gl.int64) * (2 * K) + tile * smem.shape[1]
    copy_to_shared(smem, w_ptr + (at[:, None] + words[None, :]))


@gluon.jit
def _copy_scales(smem, ptr, first, tile, R: gl.constexpr, P: gl.constexpr, outputs: gl.constexpr, K: gl.constexpr,
                 GROUP: gl.constexpr):  # fmt: skip
    """Asks for scales, flat of [tiles, P, groups, rows]: those that _copy_words' words are times."""
    WARPS: gl.constexpr = gl.num_warps()
    here: gl.constexpr = TILE // GROUP
    e = gl.arange(0, smem.shape[0], gl.BlockedLayout([4], [32], [WARPS], [0]))
    part = e // (16 * WARPS * here) % P
    block = part // R * (outputs // 16) + part % R * WARPS + e // 16 % WARPS
    group = e // (16 * WARPS * here * P) * here + e // (16 * WARPS) % here
    ptr += (first.to(gl.int64) * (K // GROUP) + tile * here) * 16
    copy_to_shared(smem, ptr + ((block * (K // GROUP) + group) * 16 + e % 16))


@gluon.jit
def _copy_round(
    w_smem, s_smem, z_smem, w_ptr, w_scale_ptr, w_zero_ptr, first, tile, slot, R: gl.constexpr, P: gl.constexpr,
    outputs: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Asks for a round's words, scales and zeros, if there are any, from `tile` on."""
    _copy_words(w_smem.index(slot), w_ptr, first, tile, R, P, outputs, K)
    _copy_scales(s_smem.index(slot), w_scale_ptr, first, tile, R, P, outputs, K, GROUP)
    if z_smem is not None:
        _copy_scales(z_smem.index(slot), w_zero_ptr, first, tile, R, P, outputs, K, GROUP)


@gluon.jit
def _inputs(x_ptr, num_tokens, tile, K: gl.constexpr, BM: gl.constexpr, ROUND: gl.constexpr):
    """x of a round, int32 of two, panels of 64 inputs below each other: [., 32]; past the last token copies."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [gl.num_warps(), 1], [1, 0])
    rows = gl.arange(0, ROUND * TILE // 64 * BM, gl.SliceLayout(1, layout))
    columns = gl.arange(0, 32, gl.SliceLayout(0, layout))
    at = (gl.minimum(rows % BM, num_tokens - 1) * K + rows // BM * 64) // 2
    x_ptr = x_ptr.to(gl.pointer_type(gl.int32)) + tile * (TILE // 2)
    return gl.load(x_ptr + (at[:, None] + columns[None, :]))


@gluon.constexpr_function
def _two_of_word():
    """PTX: two bf16 of an int32."""
    return """{ // side by side
        mov.b32 $0, $1;
    }"""


@gluon.jit
def _store_inputs(smem, x):
    """_inputs' in the words' order."""
    ROWS: gl.constexpr = x.shape[0]
    x = gl.reshape(gl.join(x, x), [ROWS * 64])  # two beside themselves, for the same register holds both
    x = gl.inline_asm_elementwise(_two_of_word(), "=r,r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2)
    # inputs as [h, j, b, k, m]
    x = gl.permute(gl.reshape(x, [ROWS, 2, 4, 2, 2, 2]), [0, 1, 4, 3, 2, 5])
    smem.store(gl.reshape(x, [ROWS, 64]))


@gluon.constexpr_function
def _scaled(has_zero):
    """PTX: a pair of bf16, 136 more than it is, times a pair of scales; what the zeros make of it is added."""
    times = "fma.rn.bf16x2 $0, less, $2, $4;" if has_zero else "mul.rn.bf16x2 $0, less, $2;"
    return f"""{{ // side by side
        .reg .b32 more, less;
        mov.b32 more, 0x43084308;
        sub.rn.bf16x2 less, $1, more;
        {times}
    }}"""


@gluon.jit
def _pairs(x):
    """float32 as bf16 beside itself, in an int32."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $1, $1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.constexpr_function
def _as_scales(groups, warps):
    """The layout of [rows, groups] in which a lane has scales of its words."""
    registers = [[8, 0], *([0, i] for i in _doubled(1, groups))]
    lanes = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[i, 0] for i in _doubled(16, 16 * warps)], [], [16 * warps, groups]
    )


@gluon.jit
def _read(words, scales, zeros, slot):
    """A part's words [warps, .]; of their groups scales, and what zeros add, as pairs [ROWS, TILE / GROUP]."""
    layout: gl.constexpr = _as_scales(scales.shape[1], gl.num_warps())
    scale = scales.index(slot).permute((1, 0)).load(layout)
    w = words.index(slot).load(_as_words(gl.num_warps(), gl.num_warps()))
    if zeros is None:
        return w, _pairs(scale)
    else:  # noqa: RET505 - for the compiler, which reads on behind a return
        return w, _pairs(scale), _pairs((8.0 - zeros.index(slot).permute((1, 0)).load(layout)) * scale)


@gluon.jit
def _of_each(pairs, w):
    """[rows, groups] of groups for each of the weights [rows, groups, .], flat."""
    pairs = gl.convert_layout(pairs, gl.SliceLayout(2, w.type.layout), assert_trivial=True)
    pairs, _ = gl.broadcast(pairs[:, :, None], w)
    return gl.reshape(pairs, [w.shape[0] * w.shape[1] * w.shape[2]])


@gluon.jit
def _weights(part, words, mma: gl.constexpr):
    """What _read has read as the operand [ROWS, TILE] in bf16; it is in the right registers, so nothing moves."""
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = 16 * WARPS
    w = gl.reshape(words, [WARPS * 2 * TILE])
    w = gl.join(w, w)
    w = gl.join(w, w)
    w = gl.join(w, w)
    w = gl.reshape(w, [ROWS * TILE])  # a word beside itself, for the same register holds all of it
    w = gl.inline_asm_elementwise(
        pairs_of_word("int4", False), "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r", [w], dtype=gl.bfloat16, is_pure=True, pack=8
    )
    # words as [blocks, pieces, i, j, h, k], what they hold as [l, b, m]
    w = gl.permute(gl.reshape(w, [WARPS, TILE // 64, 8, 4, 2, 2, 2, 2, 2]), [0, 6, 2, 1, 4, 5, 7, 3, 8])
    groups: gl.constexpr = part[1].shape[1]
    w = gl.reshape(w, [ROWS, groups, TILE // groups])
    if len(part) == 2:
        operands = (gl.reshape(w, [ROWS * TILE]), _of_each(part[1], w))
        w = gl.inline_asm_elementwise(_scaled(False), "=r,r,r,r", operands, dtype=gl.bfloat16, is_pure=True, pack=2)
    else:
        operands = (gl.reshape(w, [ROWS * TILE]), _of_each(part[1], w), _of_each(part[2], w))
        w = gl.inline_asm_elementwise(_scaled(True), "=r,r,r,r,r,r", operands, dtype=gl.bfloat16, is_pure=True, pack=2)
    return gl.convert_layout(gl.reshape(w, [ROWS, TILE]), gl.DotOperandLayout(0, mma, 2), assert_trivial=True)


@gluon.jit
def _with(sums, p: gl.constexpr, new):
    """The sums, of which one is another."""
    return sums[:p] + (new,) + sums[p + 1 :]  # noqa: RUF005


@gluon.jit
def _one_under_way(sums, words):
    """The sums when one product is left to wait for, and the words for the next one, not to be unpacked before."""
    found = warpgroup_mma_wait(1, sums + (words,))  # noqa: RUF005
    return found[: len(sums)], found[len(sums)]


@gluon.jit
def wide_words(
    x_ptr, w_ptr, w_scale_ptr, w_zero_ptr, bias_ptr, out_scale_ptr, scratch_ptr, y_ptr, num_tokens,
    N: gl.constexpr, K: gl.constexpr, BM: gl.constexpr, R: gl.constexpr, STAGES: gl.constexpr, ROUND: gl.constexpr,
    SPLIT: gl.constexpr, GROUP: gl.constexpr, HAS_ZERO: gl.constexpr, HAS_BIAS: gl.constexpr, GATED: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Grid (SPLIT, num_tokens / BM, outputs / (16 R warps)): programs of one multiprocessor tend to read the same x.

    A program has R times 16 outputs a warp (4 or 8 warps, or 16), with GATED as many gates and ups, and a SPLITth of
    their inputs, in rounds of ROUND tiles; STAGES rounds of words are on their way. A weight is its nibble less 8, or
    with HAS_ZERO less the zero of its GROUP, 32, 64 or 128 inputs, times that group's scale, rounded to bf16 as the
    scale is. Sums are split as linear.py's are.
    """
    outputs: gl.constexpr = N if GATED == "" else N // 2
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = 16 * WARPS
    P: gl.constexpr = R if GATED == "" else 2 * R
    rounds: gl.constexpr = K // (TILE * ROUND * SPLIT)
    gl.static_assert(rounds * ROUND * TILE * SPLIT == K and TILE % GROUP == 0 and outputs % (R * ROWS) == 0)
    gl.static_assert(STAGES <= rounds and BM % 8 == 0)
    if PDL:
        gdc_launch_dependents()
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    here: gl.constexpr = TILE // GROUP
    w_smem = gl.allocate_shared_memory(gl.int32, [STAGES, ROUND * P * WARPS, 2 * TILE], plain)
    s_smem = gl.allocate_shared_memory(gl.float32, [STAGES, ROUND * P * here * ROWS], flat)
    z_smem = None
    if HAS_ZERO:
        z_smem = gl.allocate_shared_memory(gl.float32, [STAGES, ROUND * P * here * ROWS], flat)
    x_smem = gl.allocate_shared_memory(gl.bfloat16, [2, ROUND * TILE // 64 * BM, 64], swizzled)
    start = gl.program_id(0) * (rounds * ROUND)
    token = gl.program_id(1) * BM
    block = gl.program_id(2) * (R * WARPS)
    for s in gl.static_range(STAGES):
        _copy_round(
            w_smem, s_smem, z_smem, w_ptr, w_scale_ptr, w_zero_ptr, block, start + s * ROUND, s, R, P, outputs, K, GROUP
        )  # fmt: skip
        async_copy.commit_group()

    # What is no output of the kernel in front is read here too: after the products it would have to be waited for.
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
    biases = ()
    for r in gl.static_range(R):
        rows = block * 16 + r * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, mma))
        biases += read_biases(bias_ptr, rows, outputs, HAS_BIAS, GATED)
    in_one = read_in_one(y_ptr, out_scale_ptr)

    if PDL:
        gdc_wait()
    x_ptr += token.to(gl.int64) * K
    x = _inputs(x_ptr, num_tokens - token, start, K, BM, ROUND)
    sums, factors = (), ()
    for _ in gl.static_range(P):
        sums += (gl.zeros([ROWS, BM], gl.float32, mma),)
        factors += (1.0,)  # weights are times their scales
    parts: gl.constexpr = ROUND * P
    words = reinterpret(w_smem, gl.int32, [STAGES * parts, WARPS, 2 * TILE], plain)
    scales = reinterpret(s_smem, gl.float32, [STAGES * parts, here, ROWS], plain)
    zeros = None
    if HAS_ZERO:
        zeros = reinterpret(z_smem, gl.float32, [STAGES * parts, here, ROWS], plain)
    xs = reinterpret(x_smem, gl.bfloat16, [2 * ROUND, BM, TILE], swizzled)
    for i in range(rounds):
        async_copy.wait_group(STAGES - 1)
        barrier()  # also of the products that read what is written next
        _store_inputs(x_smem.index(i % 2), x)
        fence_async_shared()
        x = _inputs(x_ptr, num_tokens - token, start + gl.minimum(i + 1, rounds - 1) * ROUND, K, BM, ROUND)
        read = ()
        for p in gl.static_range(parts):
            read += (_read(words, scales, zeros, i % STAGES * parts + p),)
        w = _weights(read[0], read[0][0], mma)
        barrier()
        if STAGES < rounds:  # else all is on its way
            if i + STAGES < rounds:
                _copy_round(
                    w_smem, s_smem, z_smem, w_ptr, w_scale_ptr, w_zero_ptr, block, start + (i + STAGES) * ROUND,
                    i % STAGES, R, P, outputs, K, GROUP,
                )  # fmt: skip
        async_copy.commit_group()
        for p in gl.static_range(parts):
            inputs = xs.index(i % 2 * ROUND + p // P).permute((1, 0))
            sums = _with(sums, p % P, warpgroup_mma(w, inputs, sums[p % P], is_async=True))
            # What a product has in registers has to stay there until it has been waited for.
            if p + 1 < parts:
                sums, later = _one_under_way(sums, read[p + 1][0])
                w = _weights(read[p + 1], later, mma)
        sums = waited(1 if parts > 1 else 0, sums)
    sums = waited(0, sums)
    end_split(
        sums, factors, biases, in_one, scratch_ptr, y_ptr, block * 16, token, num_tokens, outputs, R, GATED, SPLIT
    )  # fmt: skip
