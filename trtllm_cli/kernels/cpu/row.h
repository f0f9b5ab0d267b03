// What is done to one row.
#pragma once

#include "simd.h"

// out = f of every vector of the rows `in`, each of n; the last one padded with zeros. `out` may be one of them.
template <class F, class... P>
INLINE void map_row(float* out, int n, F f, const P*... in) {
    int j = 0;
    for (; j + kWidth <= n; j += kWidth) store(out + j, f(load(in + j)...));
    if (j == n) return;
    auto rest = [=](const float* p) {
        float lanes[kWidth] = {};
        memcpy(lanes, p + j, (n - j) * sizeof(float));
        return load(lanes);
    };
    float lanes[kWidth];
    store(lanes, f(rest(in)...));
    memcpy(out + j, lanes, (n - j) * sizeof(float));
}
