"""Functions that kernels share: activations, rounding to narrow formats, stores.

FMT is a name as in kernels/quantization.py: "fp8" (E4M3), "int8" or "fp4" (E2M1). QUANT says how a kernel quantizes its
output: "none", "static" (a step given, one float32), "token" (a step found for each row, and written) or "group" (one
for each GROUP columns of a row).
"""

import triton
import triton.language as tl


@triton.constexpr_function
def is_compiled():
    """False in the interpreter, which plays no PTX."""
    return not triton.knobs.runtime.interpret


@triton.jit
def tanh(x):
    """Hyperbolic tangent of float32, to about 1e-7."""
    e = tl.exp(-2.0 * tl.abs(x))  # never overflows
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def sigmoid(x):
    """Logistic function of float32."""
    return 1.0 / (1.0 + tl.exp(tl.minimum(-x, 80.0)))  # not to overflow


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """One of model_config.Activation, but for "swiglu_oai", of float32."""
    tl.static_assert(
        ACTIVATION == "silu" or ACTIVATION == "gelu" or ACTIVATION == "gelu_pytorch_tanh" or ACTIVATION == "relu"
    )
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(tl.minimum(-x, 80.0)))  # one division; not to overflow
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_pytorch_tanh":
        # 0.5 * (1 + tanh(z)) is sigmoid(2z).
        y = x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):
    """functional.gated_act of float32."""
    if ACTIVATION == "swiglu_oai":
        gate = tl.minimum(gate, 7.0)
        up = tl.minimum(tl.maximum(up, -7.0), 7.0)
        y = gate * sigmoid(1.702 * gate) * (up + 1.0)
    else:
        y = activate(gate, ACTIVATION) * up
    return y


@triton.jit
def round_even(x):
    """float32 to the nearest whole number, ties to even; |x| below 2**22."""
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2**23: the sum has no bits for a fraction


@triton.jit
def round_to(x, FMT: tl.constexpr):
    """kernels.quantization.round_to: float32 values of FMT, what is larger becomes the largest."""
    tl.static_assert(FMT == "fp8" or FMT == "int8" or FMT == "fp4")
    if FMT == "int8":
        y = round_even(tl.minimum(tl.maximum(x, -127.0), 127.0))
    elif FMT == "fp8":
        x = tl.minimum(tl.maximum(x, -448.0), 448.0)
        # 2**e of x, at least the smallest normal 2**-6, whose three mantissa bits are steps of 2**(e - 3). The sum with
        # 1.5 * 2**23 of those steps has no bits for what is finer.
        exponent = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 0x3C800000)
        huge = exponent.to(tl.float32, bitcast=True) * 1572864.0
        y = (x + huge) - huge
    else:
        x = tl.minimum(tl.maximum(x, -6.0), 6.0)
        size = tl.abs(x)
        step = tl.where(size < 2.0, 0.5, tl.where(size < 4.0, 1.0, 2.0))
        y = round_even(x / step) * step
    return y


@triton.jit
def largest(FMT: tl.constexpr):
    """The largest number of FMT."""
    return 448.0 if FMT == "fp8" else (127.0 if FMT == "int8" else 6.0)


@triton.jit
def as_stored(y, DTYPE: tl.constexpr):
    """Float32 `y` as a type: fp8 and int8 are rounded to even and clamped (to 448 or 127)."""
    if DTYPE == tl.int8:
        y = round_to(y, "int8")
    return y.to(DTYPE)


@triton.jit
def store(ptrs, y, mask):
    """Stores float32 `y` `as_stored` in the pointers' type."""
    tl.store(ptrs, as_stored(y, ptrs.dtype.element_ty), mask=mask)


GROUP = tl.constexpr(128)


@triton.constexpr_function
def steps_of_row(quant, width):
    """How many steps a row of `width` columns has that are found and written."""
    return width // GROUP.value if quant == "group" else 1


@triton.constexpr_function
def _in_groups(shape):
    """A program's row as [groups, GROUP]."""
    size = 1
    for n in shape:
        size *= n
    return size // GROUP.value, GROUP.value


@triton.jit
def steps_in_one(out_scale_ptr, QUANT: tl.constexpr):
    """1 / the step of "static", else 1: for store_quantized. To be read before `gdc_wait`, not to wait for it later."""
    result = 1.0
    if QUANT == "static":
        result = 1.0 / tl.load(out_scale_ptr)
    return result


@triton.jit
def store_quantized(ptrs, y, mask, in_one, row_scale_ptr, QUANT: tl.constexpr):
    """Stores a program's whole row of float32 `y`, zero where `mask` is not, by QUANT.

    in_one: of `steps_in_one`. row_scale_ptr: where the row's step of "token" goes, max|y| / 448 or / 127, or
    the steps of "group", for which `y` may also be some whole groups of a row.
    """
    tl.static_assert(QUANT == "none" or QUANT == "static" or QUANT == "token" or QUANT == "group")
    limit: tl.constexpr = 448.0 if ptrs.dtype.element_ty == tl.float8e4nv else 127.0
    if QUANT == "static":
        y = y * in_one
    elif QUANT == "token":
        step = tl.maximum(tl.max(tl.abs(y)) / limit, 1e-30)
        tl.store(row_scale_ptr, step)
        y = y * (1.0 / step)
    elif QUANT == "group":
        parts = tl.reshape(y, _in_groups(y.shape))
        steps = tl.maximum(tl.max(tl.abs(parts), axis=1) / limit, 1e-30)
        real = tl.max(tl.reshape(tl.broadcast_to(mask, y.shape).to(tl.int32), parts.shape), axis=1) > 0
        tl.store(row_scale_ptr + tl.arange(0, parts.shape[0]), steps, mask=real)
        y = tl.reshape(parts * (1.0 / steps)[:, None], y.shape)
    store(ptrs, y, mask)


@triton.jit
def flagged(words, flag):
    """Words of 4 bytes, each with `flag` (int32) in the 4 bytes above it: int64. Whoever reads the flag has the word.

    As memory moves 8 bytes at once, this takes the place of barriers and fences (the LL protocol of NCCL).
    """
    return (words.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF) | (flag.to(tl.int64) << 32)


@triton.jit
def await_flagged(ptrs, mask, flag):
    """The words, int32, that lie `flagged` at `ptrs`, once all of them have this flag."""
    got = tl.load(ptrs, mask=mask, other=0, volatile=True)
    while tl.max((((got >> 32).to(tl.int32) != flag) & mask).to(tl.int32)) != 0:
        got = tl.load(ptrs, mask=mask, other=0, volatile=True)
    return got.to(tl.int32)


@triton.constexpr_function
def await_words(count):
    """PTX: waits until `count` words of 8 bytes have a flag above, and gives what lies below each.

    Each thread waits for its own words: a loop of Triton's takes a barrier a turn.
    """
    words = range(count)
    asked = [f" ld.volatile.global.b64 wide{i}, [${count + i}]; mov.b64 {{${i}, flag{i}}}, wide{i};" for i in words]
    seen = [f" setp.eq.and.b32 there, flag{i}, ${2 * count}, there;" for i in words]
    return (
        f"{{ .reg .b64 wide<{count}>; .reg .b32 flag<{count}>; .reg .pred there; again:"
        + "".join(asked) + " setp.eq.b32 there, 0, 0;" + "".join(seen) + " @!there bra again; }"
    )  # fmt: skip


@triton.constexpr_function
def await_words_constraints(count, flags):
    """The operands of `await_words`: results, pointers, and the flag so many times."""
    return ",".join(["=&r"] * count + ["l"] * count + ["r"] * flags)
