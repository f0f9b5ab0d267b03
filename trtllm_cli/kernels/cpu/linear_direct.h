// A linear of few rows: the packed weight goes through registers, straight from memory.
#pragma once

#include "linear.h"

// c [M, NV * kWidth] += the sums of groups, which follow x, times the minima at p; tiles are `bytes` apart.
template <class F, int M, int NV>
INLINE void add_minima(const Linear& l, Input in, const char* p, int64_t bytes, float* c) {
    Block<M, NV> minima;
    minima.clear();
    Rows<M> sums(in.x + l.padded_in, in.stride);
    for (int g = 0; g < l.groups; g++, p += kScalesBytes<F>, sums.advance(1)) {
        vf b[NV];
        UNROLL for (int v = 0; v < NV; v++) b[v] = load_scales<F>(p + v / kTileVectors * bytes, v % kTileVectors);
        minima.step(sums, 0, b);
    }
    UNROLL for (int v = 0; v < NV; v++) minima.add_scaled(v, splat(1.0f), c + v * kWidth, NV * kWidth);
}

// M rows from `in` on, times NV vectors of outputs: whole tiles. c is [M, NV * kWidth].
template <class F, int M, int NV>
NOINLINE void direct(const Linear& l, Input in, int tile, float* c) {
    constexpr int kReads = F::kReadBytes < 64 ? 64 / F::kReadBytes : 1, kTiles = NV / kTileVectors;
    constexpr bool kGrouped = F::kScaleBytes > 0;
    // With few registers left, packed weights are read again for each input that they hold.
    constexpr bool kReread = F::kStep > 1 && (M + 2) * NV + 2 > kRegisters;
    const int64_t bytes = tile_bytes<F>(l);
    const char* p = l.weight + tile * bytes;
    Rows<M> x(in.x, in.stride);
    auto part = [&](const char* p, int v) __attribute__((always_inline)) { return p + v / kTileVectors * bytes; };
    auto scales_at = [&](const char* p, int v) __attribute__((always_inline)) {
        return load_scales<F>(part(p, v), v % kTileVectors);
    };
    if (kGrouped) memset(c, 0, M * NV * kWidth * sizeof(float));
    for (int g = 0; g < l.groups; g++) {
        Block<M, NV> block;
        block.clear();
        const char* scales = p;
        p += kScalesBytes<F>;
        auto read_and_step = [&]() __attribute__((always_inline)) {
            UNROLL for (int j = 0; j < F::kStep; j++) {
                vf b[NV];
                UNROLL for (int v = 0; v < NV; v++) b[v] = F::get(F::read(part(p, v), v % kTileVectors), j);
                block.step(x, j, b);
                if (kReread) asm("" : "+r"(p));
            }
            p += F::kReadBytes;
            x.advance(F::kStep);
        };
        int k = 0;
        for (; k + F::kStep * kReads <= l.padded_group; k += F::kStep * kReads) {
            UNROLL for (int t = 0; t < kTiles; t++) __builtin_prefetch(p + (t + kTiles) * bytes);
            UNROLL for (int i = 0; i < kReads; i++) read_and_step();
        }
        if constexpr (kReads > 1)
            for (; k < l.padded_group; k += F::kStep) read_and_step();
        if constexpr (!kGrouped) return block.write(c, NV * kWidth);
        else UNROLL for (int v = 0; v < NV; v++) block.add_scaled(v, scales_at(scales, v), c + v * kWidth, NV * kWidth);
    }
    if constexpr (kGrouped)
        if (l.minima) add_minima<F, M, NV>(l, in, p, bytes, c);
}

// Up to NT tiles at a time.
template <class F, int M, int NT>
void direct_tiles(const Linear& l, Input in, int row, int tile, int left) {
    if (left == NT) {
        float c[M * NT * kTile];
        direct<F, M, NT * kTileVectors>(l, {in.x + row * in.stride, in.stride}, tile, c);
        return finish(l, row, M, tile * kTile, NT * kTile, c);
    }
    if constexpr (NT > 1) direct_tiles<F, M, NT - 1>(l, in, row, tile, left);
}

// Tiles that M rows take at a time, so that the accumulators hide the multiply-add's latency and fit the registers.
template <class F, int M>
constexpr int tiles_at_once() {
    constexpr int vectors = (kRegisters == 32 ? 16 : 8) / M, most = F::kMostVectors;
    constexpr int n = (vectors < most ? vectors : most) / kTileVectors;
    return n < 1 ? 1 : n;
}

// Rows [row, row + m) times tiles [begin, end).
template <class F, int M = F::kPassRows>
void direct_pass(int m, const Linear& l, Input in, int row, int begin, int end) {
    if (m == M) {
        // Pieces of like size: 18 tiles by 4 are 4, 4, 4, 3, 3.
        constexpr int NT = tiles_at_once<F, M>();
        const int pieces = ceil_div(end - begin, NT);
        for (int i = 0; i < pieces; i++) {
            const int from = begin + (end - begin) * i / pieces, to = begin + (end - begin) * (i + 1) / pieces;
            direct_tiles<F, M, NT>(l, in, row, from, to - from);
        }
    } else if constexpr (M > 1) {
        direct_pass<F, M - 1>(m, l, in, row, begin, end);
    }
}

template <class F>
void direct_any(const Linear& l, Input in, int begin, int end) {
    const int passes = ceil_div(l.rows, F::kPassRows), step = passes == 1 ? end - begin : 1;
    for (int tile = begin; tile < end; tile += step)
        for (int i = 0; i < passes; i++) {
            const int from = l.rows * i / passes, to = l.rows * (i + 1) / passes;
            direct_pass<F>(to - from, l, in, from, tile, tile + step);
        }
}
