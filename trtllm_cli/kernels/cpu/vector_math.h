// exp and what is made of it, on vectors: no libm, the same bits wherever a value stands in a row.
#pragma once

#include "simd.h"

// Within 2 ulp; 1 at 0, 0 below -87.3 and at -inf, NaN at NaN. After Cephes' expf.
INLINE vf vexp(vf x) {
    const float lowest = -87.33654f, highest = 88.37626f, magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds
    vf c = x > highest ? splat(highest) : x;
    c = c < lowest ? splat(lowest) : c;
    vf n = fma(c, splat(1.44269504088896341f), splat(magic)) - magic;
    vf r = fma(n, splat(-0.693359375f), c);
    r = fma(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    vf y = p * as_float((__builtin_convertvector(n, vi) + 127) << 23);
    return x < lowest ? (vf){} : y;
}

INLINE vf vsigmoid(vf x) { return 1.0f / (1.0f + vexp(-x)); }

INLINE vf vtanh(vf x) { return 2.0f * vsigmoid(2.0f * x) - 1.0f; }

// Abramowitz and Stegun 7.1.26: within 1.5e-7.
INLINE vf verf(vf x) {
    vf a = x < 0.0f ? -x : x;
    vf t = 1.0f / fma(splat(0.3275911f), a, splat(1.0f));
    vf p = splat(1.061405429f);
    p = fma(p, t, splat(-1.453152027f));
    p = fma(p, t, splat(1.421413741f));
    p = fma(p, t, splat(-0.284496736f));
    p = fma(p, t, splat(0.254829592f));
    vf y = 1.0f - p * t * vexp(-a * a);
    return x < 0.0f ? -y : y;
}
