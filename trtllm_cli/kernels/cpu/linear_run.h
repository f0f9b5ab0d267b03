// What a step of linears does, for each format: one linear, a stack of linears side by side, or those of experts.
#pragma once

#include "expert_groups.h"
#include "linear_blocked.h"
#include "linear_direct.h"

// Member `i` of a stack of weights: its weight, scale and bias follow those before it.
template <class F>
Linear member(const Linear& first, int i) {
    Linear l = first;
    l.weight += i * (l.tiles * tile_bytes<F>(l));
    if (l.scale) l.scale += (int64_t)i * l.tiles * kTile;
    if (l.bias) l.bias += (int64_t)i * l.out;
    return l;
}

template <class F>
void blocked_any(const Linear& l, Input in, int from, int to, int begin, int end, float* scratch) {
    for (int tile = begin; tile < end; tile += kBlockTiles)
        if (tile + kBlockTiles <= end) blocked<F, kBlockTiles>(l, in, from, to - from, tile, scratch);
        else for (int t = tile; t < end; t++) blocked<F, 1>(l, in, from, to - from, t, scratch);
}

// Piece i of n of one linear whose input is ready.
template <class F>
void run_linear(const Linear& l, Input in, int i, int n, float* scratch) {
    if (l.rows <= kDirectRows) return direct_any<F>(l, in, part_of(l.tiles, i, n), part_of(l.tiles, i + 1, n));
    const int columns = ceil_div(l.tiles, kBlockTiles), row_groups = n / columns;
    const int g = i / columns, tile = i % columns * kBlockTiles;
    const int end = tile + kBlockTiles < l.tiles ? tile + kBlockTiles : l.tiles;
    blocked_any<F>(l, in, part_of(l.rows, g, row_groups), part_of(l.rows, g + 1, row_groups), tile, end, scratch);
}

// A linear; or `stack` of them, each of its own columns of x, and to its own columns of y.
template <class F>
void linear(const Context& c, bool prepares) {
    const Linear first(c.step, rows_of(c.step, c.batch));
    const int stack = c.step.i[9];
    const int64_t stride = first.prepared_stride();
    auto prepare = [&](int row, float* to) {  // row r of member h is row h * rows + r
        const int h = row / first.rows, r = row % first.rows;
        F::prepare(first, first.x + r * first.x_stride + (int64_t)h * first.in, to);
    };
    if (prepares) {
        int begin, end;
        c.share(stack * first.rows, begin, end);
        for (int row = begin; row < end; row++) prepare(row, c.shared() + row * stride);
        return;
    }
    const int each = c.pieces / stack, h = c.piece / each;
    Linear l = member<F>(first, h);
    l.y += (int64_t)h * l.out;
    Input in{l.x + (int64_t)h * l.in, l.x_stride};
    if (l.prepares()) {
        const bool alone = l.rows <= kAloneRows;
        in = {(alone ? c.scratch() : c.shared()) + h * l.rows * stride, stride};
        if (alone && c.first)
            for (int row = 0; row < stack * l.rows; row++) prepare(row, c.scratch() + row * stride);
    }
    run_linear<F>(l, in, c.piece % each, each, c.scratch());
}

// Each token by each of its experts. A piece is a range of the output tiles of an expert that has tokens; their rows of x
// are gathered, so that the weight is read once for all of them.
template <class F>
void expert_linear(const Context& c, bool prepares) {
    const ExpertStep step(c.step, rows_of(c.step, c.batch));
    char* memory = step.alone() ? (char*)c.scratch() : (char*)c.shared();
    ExpertGroups groups(step, (int32_t*)memory);
    if (prepares || (step.alone() && c.first)) groups.find(step);
    if (prepares) return;
    const Linear first(c.step, 0);
    const int foreign = groups.start[groups.active()];  // from here on pairs are other ranks'
    int from_pair, to_pair;
    c.share(step.pairs() - foreign, from_pair, to_pair);
    for (int p = from_pair; p < to_pair; p++)
        memset(first.y + groups.pairs[foreign + p] * first.out_stride, 0, first.out * sizeof(float));
    const int ranges = c.pieces / step.most_active(), which = c.piece / ranges, range = c.piece % ranges;
    if (which >= groups.active()) return;

    Linear l = member<F>(first, groups.expert[which]);
    const int begin = part_of(l.tiles, range, ranges), end = part_of(l.tiles, range + 1, ranges);
    float* rows = (float*)((char*)c.scratch() + (step.alone() ? step.group_bytes() : 0));
    const int64_t stride = l.prepared_stride();
    for (int from = groups.start[which]; from < groups.start[which + 1]; from += kRowGroup) {
        const int left = groups.start[which + 1] - from;
        l.rows = left < kRowGroup ? left : kRowGroup;
        l.places = groups.pairs + from;
        auto row = [&](int r) { return l.x + (int64_t)(step.x_per_choice ? l.places[r] : l.places[r] / step.top_k) * l.in; };
        Input in{rows, stride};
        if (l.rows == 1 && !l.prepares()) in.x = row(0);
        else for (int r = 0; r < l.rows; r++) {
            if (l.prepares()) F::prepare(l, row(r), rows + r * stride);
            else memcpy(rows + r * stride, row(r), l.in * sizeof(float));
        }
        if (l.rows <= kDirectRows) direct_any<F>(l, in, begin, end);
        else blocked_any<F>(l, in, 0, l.rows, begin, end, rows + step.most_rows() * stride);
    }
}

// A format's function, for every op that multiplies by a packed weight.
template <class F>
void run_format(const Context& c, bool prepares) {
    if (c.step.op == kExpertLinear) expert_linear<F>(c, prepares);
    else linear<F>(c, prepares);
}
