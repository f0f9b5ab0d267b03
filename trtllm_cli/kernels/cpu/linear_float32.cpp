#include "linear.h"

namespace {

struct Float32 {
    static constexpr int kStep = 1, kReadBytes = 4 * kTile, kMostVectors = 8, kPassRows = 6;
    static constexpr bool kGrouped = false, kUnpacked = true;
    using Raw = vf;

    static INLINE Raw read(const char* p, int v) { return load((const float*)p + v * kWidth); }
    static INLINE vf get(Raw raw, int) { return raw; }
    static void prepare(const Linear&, const float*, float*) {}
};

}  // namespace

void linear_float32(const Context& c, bool prepares) { linear<Float32>(c, prepares); }

Needs linear_needs(const tl_step& step, int rows, int num_threads) {
    const Linear l(step, rows);
    const size_t prepared = l.prepares() ? rows * l.prepared_stride() * sizeof(float) : 0;
    Needs needs;
    if (rows > kDirectRows) {
        needs.per_thread = BlockScratch(l).bytes();
        needs.pieces = ceil_div(rows, kRowGroup) * ceil_div(l.tiles, kBlockTiles);
    } else {
        // A few pieces a thread, so that none waits long for another; each of some tiles, which one row takes together.
        const int most = ceil_div(l.tiles, 4);
        needs.pieces = rows == 0 ? 0 : most < 4 * num_threads ? most : 4 * num_threads;
    }
    if (rows <= kAloneRows) {
        needs.per_thread = prepared;
    } else if (prepared) {
        needs.shared = prepared;
        needs.preparation = rows < num_threads ? rows : num_threads;
    }
    return needs;
}
