#include "linear.h"

namespace {

struct Float32 {
    static constexpr int kStep = 1, kReadBytes = 4 * kTile, kHeaderBytes = 0, kMostVectors = 8;
    static constexpr bool kUnpacked = true;
    struct Params {};
    using Raw = vf;

    static INLINE Params params(const char*, int) { return {}; }
    static INLINE Raw read(const char* p, int v) { return load((const float*)p + v * kWidth); }
    static INLINE vf get(Raw raw, Params, int) { return raw; }
};

}  // namespace

void linear_float32(const Context& c) { linear<Float32>(c); }

Scratch linear_scratch(const tl_step& step, int rows) {
    const Linear l(step, rows);
    Scratch s;
    if (rows > kDirectRows) s.per_thread = kBlockScratchBytes;
    if (l.padded()) s.shared = rows * l.padded_stride() * sizeof(float);
    return s;
}
