#include "linear.h"

namespace {

struct Float32 {
    static constexpr int kStep = 1, kFetchBytes = 4 * kTile;
    static constexpr bool kGrouped = false, kUnpacked = true;

    static INLINE void fetch(const char* p, int v, vf (&b)[1]) { b[0] = load((const float*)p + v * kWidth); }
    static void prepare(const Linear&, const float*, float*) {}
};

}  // namespace

void linear_float32(const Context& c) { linear<Float32>(c); }

Scratch linear_scratch(const tl_step& step, int rows) {
    const Linear l(step, rows);
    const size_t prepared = l.prepared_stride() * sizeof(float);
    Scratch s;
    s.per_thread = BlockScratch(l).floats() * sizeof(float);
    if (rows <= 2) s.per_thread += 2 * prepared;
    else if (step.i[3] == kInt4 || l.padded_in != l.in) s.shared = rows * prepared;
    return s;
}
