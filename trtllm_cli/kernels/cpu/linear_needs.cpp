// What steps of linears take: pieces and scratch.
#include "expert_groups.h"
#include "linear_blocked.h"

Needs linear_needs(const tl_step& step, int rows, int num_threads) {
    const Linear l(step, rows);
    const int stack = step.i[9];
    const size_t prepared = l.prepares() ? stack * rows * l.prepared_stride() * sizeof(float) : 0;
    Needs needs;
    if (rows > kDirectRows) {
        needs.per_thread = BlockScratch(l).bytes();
        needs.pieces = stack * ceil_div(rows, kRowGroup) * ceil_div(l.tiles, kBlockTiles);
    } else {
        // A few pieces a thread, so that none waits long for another; each of some tiles, which one row takes together.
        const int most = ceil_div(l.tiles, 4), wanted = ceil_div(4 * num_threads, stack);
        needs.pieces = rows == 0 ? 0 : stack * (most < wanted ? most : wanted);
    }
    if (rows <= kAloneRows) {
        needs.per_thread = prepared;
    } else if (prepared) {
        needs.shared = prepared;
        needs.preparation = stack * rows < num_threads ? stack * rows : num_threads;
    }
    return needs;
}

Needs expert_linear_needs(const tl_step& step, int tokens, int num_threads) {
    constexpr int kRangeTiles = 16;  // for many rows: one expert may have most of them, and all threads shall share it
    const ExpertStep e(step, tokens);
    Needs needs;
    needs.pieces = 0;
    if (tokens == 0) return needs;
    const Linear l(step, e.most_rows());
    const int most = ceil_div(l.tiles, 4), wanted = ceil_div(4 * num_threads, e.most_active());
    int ranges = most < wanted ? most : wanted;
    if (e.most_rows() > kDirectRows && ranges < ceil_div(l.tiles, kRangeTiles)) ranges = ceil_div(l.tiles, kRangeTiles);
    needs.pieces = ranges * e.most_active();
    needs.per_thread = e.most_rows() * l.prepared_stride() * sizeof(float);
    if (e.most_rows() > kDirectRows) needs.per_thread += BlockScratch(l).bytes();
    if (e.alone()) needs.per_thread += e.group_bytes();
    else needs.shared = e.group_bytes(), needs.preparation = 1;
    return needs;
}
