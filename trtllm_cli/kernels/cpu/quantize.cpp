// Activations rounded to a quantized format and back.
#include "ops.h"
#include "row.h"

namespace {

// f of the magnitude, with the sign.
template <class F>
INLINE vf on_magnitude(vf x, F f) {
    const vi sign = as_int(x) & INT32_MIN;
    return as_float(as_int(f(as_float(as_int(x) & INT32_MAX))) | sign);
}

INLINE vf round_to_integer(vf x) { return (x + 0x1p23f) - 0x1p23f; }  // 0 <= x < 2^23; ties to even, as all here

// The nearest E4M3: three bits after the first, and multiples of 2^-9 below 2^-6.
INLINE vf round_fp8(vf x) {
    return on_magnitude(x, [](vf a) {
        a = vmin(a, splat(448.0f));
        const vi bits = as_int(a);
        const vf normal = as_float((bits + 0x7ffff + (bits >> 20 & 1)) & ~0xfffff);
        return a < 0x1p-6f ? (a + 0x1p14f) - 0x1p14f : normal;
    });
}

INLINE vf round_int8(vf x) {
    return on_magnitude(x, [](vf a) { return round_to_integer(vmin(a, splat(127.0f))); });
}

// The nearest E2M1.
INLINE vf round_fp4(vf x) {
    return on_magnitude(x, [](vf a) {
        a = vmin(a, splat(6.0f));
        const vf step = a < 2.0f ? splat(0.5f) : a < 4.0f ? splat(1.0f) : splat(2.0f);
        return round_to_integer(a / step) * step;
    });
}

float largest_magnitude(const float* x, int n) {
    vf most = {};
    int k = 0;
    for (; k + kWidth <= n; k += kWidth) most = vmax(as_float(as_int(load(x + k)) & INT32_MAX), most);
    float largest = max_lanes(most);
    for (; k < n; k++) largest = __builtin_fabsf(x[k]) > largest ? __builtin_fabsf(x[k]) : largest;
    return largest;
}

// Each row in parts that have a step each: `scale`, or else the largest magnitude over that of the format.
template <class F>
void round_rows(const Context& c, float format_largest, bool rounds_steps, F round) {
    const int width = c.step.i[1], group = c.step.i[3] ? c.step.i[3] : width;
    const float* scale = (const float*)c.step.p[2];
    int begin, end;
    c.share(rows_of(c.step, c.batch), begin, end);
    for (int64_t r = begin; r < end; r++)
        for (int from = 0; from < width; from += group) {
            const int n = from + group < width ? group : width - from;
            const float* x = (const float*)c.step.p[0] + r * width + from;
            float step;
            if (scale && !rounds_steps) {
                step = *scale;
            } else {
                step = largest_magnitude(x, n) / format_largest;
                if (scale) step = round_fp8(splat(step / *scale))[0] * *scale;
                step = step < 1e-30f ? 1e-30f : step;
            }
            map_row((float*)c.step.p[1] + r * width + from, n, [=](vf v) { return round(v / step) * step; }, x);
        }
}

}  // namespace

void qdq(const Context& c) {
    switch (c.step.i[2]) {
        case kQdqFp8: return round_rows(c, 448.0f, false, [](vf x) { return round_fp8(x); });
        case kQdqInt8: return round_rows(c, 127.0f, false, [](vf x) { return round_int8(x); });
        case kQdqFp4: return round_rows(c, 6.0f, true, [](vf x) { return round_fp4(x); });
    }
}
