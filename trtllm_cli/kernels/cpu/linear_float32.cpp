#include "linear_run.h"

namespace {

struct Float32 {
    static constexpr int kStep = 1, kReadBytes = 4 * kTile, kMostVectors = 8, kPassRows = 6, kScaleBytes = 0;
    static constexpr bool kUnpacked = true;
    using Raw = vf;

    static INLINE Raw read(const char* p, int v) { return load((const float*)p + v * kWidth); }
    static INLINE vf get(Raw raw, int) { return raw; }
    static void prepare(const Linear&, const float*, float*) {}
};

}  // namespace

void linear_float32(const Context& c, bool prepares) { run_format<Float32>(c, prepares); }
