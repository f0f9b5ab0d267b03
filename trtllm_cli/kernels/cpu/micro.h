// The register block that every product is made of: M rows of a times NV vectors of columns, summed over k in order.
// One output is one accumulator, whatever M and NV are, so the sum's order never depends on how rows are blocked.
#pragma once

#include "simd.h"
#include "steps.h"

#define UNROLL _Pragma("GCC unroll 16")

constexpr int kTileVectors = kTile / kWidth;

// M rows that are `stride` apart, by a pointer to every third: what x86 can address without arithmetic. The compiler is
// kept from making a pointer of its own for each row and column.
template <int M>
struct Rows {
    static constexpr int kBases = (M + 2) / 3;
    const float* base[kBases];
    int64_t stride;

    INLINE Rows(const float* x, int64_t stride) : stride(stride) {
        UNROLL for (int i = 0; i < kBases; i++) base[i] = x + 3 * i * stride;
        hide();
    }
    INLINE void advance(int n) {
        UNROLL for (int i = 0; i < kBases; i++) base[i] += n;
        hide();
    }
    INLINE void hide() {
        UNROLL for (int i = 0; i < kBases; i++) asm("" : "+r"(base[i]));
    }
    INLINE const float* at(int m, int k) const { return base[m / 3] + m % 3 * stride + k; }
};

template <int M, int NV>
struct Block {
    vf acc[M][NV];

    INLINE void clear() {
        UNROLL for (int m = 0; m < M; m++) UNROLL for (int v = 0; v < NV; v++) acc[m][v] = (vf){};
    }
    INLINE void read(const float* c, int64_t ldc) {
        UNROLL for (int m = 0; m < M; m++) UNROLL for (int v = 0; v < NV; v++) acc[m][v] = load(c + m * ldc + v * kWidth);
    }
    INLINE void write(float* c, int64_t ldc) const {
        UNROLL for (int m = 0; m < M; m++) UNROLL for (int v = 0; v < NV; v++) store(c + m * ldc + v * kWidth, acc[m][v]);
    }
    // c[m] += column v of the block * scale
    INLINE void add_scaled(int v, vf scale, float* c, int64_t ldc) const {
        UNROLL for (int m = 0; m < M; m++) store(c + m * ldc, fma(acc[m][v], scale, load(c + m * ldc)));
    }
    // += a[:, k] * b
    INLINE void step(const Rows<M>& a, int k, const vf (&b)[NV]) {
        UNROLL for (int m = 0; m < M; m++) {
            const vf x = splat(*a.at(m, k));
            UNROLL for (int v = 0; v < NV; v++) acc[m][v] = fma(x, b[v], acc[m][v]);
        }
    }
};
