// Linear layers. Few rows: the packed weight goes through registers once, straight from memory (linear_direct.h). Many
// rows: a tile is unpacked to float32 in cache, and all rows pass over it (linear_blocked.h). Both compute each output as
// the same chain of multiply-adds over k: the same bits.
//
// A format F says how a packed tile is read; pack.py has the layouts:
//     kStep, kReadBytes   inputs that one read gives, and bytes of the tile that they take
//     read(p, v)          vector v of the 16 outputs, as it is stored, for kStep inputs from p
//     get(raw, j)         its weights for input j of them
//     kMostVectors        vectors of outputs at a time for one row
//     kPassRows           rows that pass over the packed weight together
//     kScaleBytes         groups of inputs have a scale of so many bytes (before their weights) and perhaps a minimum (at
//                         the tile's end); then an output is the sum over groups of scale * (sum of x * weight), plus the
//                         sum over groups of minimum * (sum of x). 0: there are no groups
//     kUnpacked           a tile is float32 as it is
//     prepare(l, x, row)  a row of x as the kernels want it, where l.prepares()
#pragma once

#include "micro.h"
#include "ops.h"

constexpr int kDirectRows = 12;  // rows for which unpacking does not pay: they take the packed weight in passes
constexpr int kBlockRows = kWidth == 16 ? 12 : 6;
constexpr int kBlockTiles = kWidth == 16 ? 2 : 1;
constexpr int kRowGroup = 16 * kBlockRows;  // rows that pass over one unpacked tile; their x stays in L2
constexpr int kBlockInputs = 256;           // inputs of an unpacked tile; it stays in L1
constexpr int kNibbles = 8;                 // inputs in a word of int4
constexpr int kAloneRows = 2;               // rows that each thread prepares for itself

// A step's parameters; library.py's linear_step and expert_linear_step put them there. Inputs come in groups, each padded
// to whole reads; without scales for groups, all are one group.
struct Linear {
    int rows, in, out, tiles;
    bool grouped, minima;
    int group, groups, padded_group, padded_in;
    int64_t x_stride, out_stride;
    bool accumulate;
    const float* x;
    float* y;
    const char* weight;
    const float *scale, *bias;
    const int32_t* places = nullptr;  // the row of y that each row goes to; by default its own

    Linear(const tl_step& s, int rows)
        : rows(rows), in(s.i[1]), out(s.i[2]), tiles(ceil_div(out, kTile)), grouped(s.i[4] != 0), minima(s.i[8]),
          group(grouped ? s.i[4] : in), groups(ceil_div(in, group)), x_stride(s.i[6]), out_stride(s.i[7]),
          accumulate(s.i[5]), x((const float*)s.p[0]), y((float*)s.p[1]), weight((const char*)s.p[2]),
          scale((const float*)s.p[3]), bias((const float*)s.p[4]) {
        const int step = s.i[3] == kInt4 ? kNibbles : s.i[3] == kBfloat16 ? 2 : 1;
        padded_group = (int)round_up(group, step);
        padded_in = groups * padded_group;
        scales_x = s.i[3] == kInt4;
    }
    // Whether the kernels want another x: zeros where the weight has padding; int4's scaling, and sums of groups.
    bool prepares() const { return scales_x || minima || padded_in != in; }
    int64_t prepared_stride() const { return (int64_t)round_up(padded_in + groups, kTile); }

   private:
    bool scales_x;
};

// The input of all rows: x itself, or prepared; then each row is followed by its sums of groups.
struct Input {
    const float* x;
    int64_t stride;
};

// out = c * scale + bias, and out += that; c is [rows, width] for outputs from `first` on.
inline void finish(const Linear& l, int row, int rows, int first, int width, const float* c) {
    const int valid = first + width <= l.out ? width : l.out - first;
    for (int m = 0; m < rows; m++, c += width) {
        float* y = l.y + (l.places ? l.places[row + m] : row + m) * l.out_stride + first;
        int j = 0;
        for (; j + kWidth <= valid; j += kWidth) {
            vf v = load(c + j);
            if (l.scale) v = v * load(l.scale + first + j);
            if (l.bias) v = v + load(l.bias + first + j);
            if (l.accumulate) v = load(y + j) + v;
            store(y + j, v);
        }
        for (; j < valid; j++) {
            float v = c[j];
            if (l.scale) v = v * l.scale[first + j];
            if (l.bias) v = v + l.bias[first + j];
            y[j] = l.accumulate ? y[j] + v : v;
        }
    }
}

// The bytes of a group's scales or minima, and vector v of them.
template <class F>
constexpr int kScalesBytes = F::kScaleBytes * kTile;

template <class F>
INLINE vf load_scales(const char* p, int v) {
    if constexpr (F::kScaleBytes == 2) return load_half((const uint16_t*)p + v * kWidth);
    else return load((const float*)p + v * kWidth);
}

template <class F>
int64_t group_bytes(const Linear& l) {
    return kScalesBytes<F> + (int64_t)(l.padded_group / F::kStep) * F::kReadBytes;
}

template <class F>
int64_t tile_bytes(const Linear& l) {
    return l.groups * (group_bytes<F>(l) + (l.minima ? kScalesBytes<F> : 0));
}

// Row `x` with zeros where the weight has padding, followed by the sums of its groups where there are minima: for
// formats that have one input a step, or one group.
inline void prepare_padded(const Linear& l, const float* x, float* row) {
    memcpy(row, x, l.in * sizeof(float));
    for (int k = l.in; k < l.padded_in; k++) row[k] = 0;
    if (!l.minima) return;
    float* sums = row + l.padded_in;
    for (int g = 0; g < l.groups; g++, row += l.padded_group) {
        vf sum = {};
        int k = 0;
        for (; k + kWidth <= l.padded_group; k += kWidth) sum = sum + load(row + k);
        sums[g] = sum_lanes(sum);
        for (; k < l.padded_group; k++) sums[g] += row[k];
    }
}
