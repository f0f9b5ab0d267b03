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

void linear_float32(const Context& c) { linear<Float32>(c); }

Scratch linear_scratch(const tl_step& step, int rows) {
    const Linear l(step, rows);
    const size_t prepared = l.prepares() ? rows * l.prepared_stride() * sizeof(float) : 0;
    Scratch s;
    if (rows <= kAloneRows) s.per_thread = prepared;
    else s.shared = prepared;
    if (rows > kDirectRows) s.per_thread = BlockScratch(l).bytes();
    return s;
}
