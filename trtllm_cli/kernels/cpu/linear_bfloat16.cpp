#include "linear_run.h"

namespace {

// A 32-bit lane has two inputs.
struct Bfloat16 {
    static constexpr int kStep = 2, kReadBytes = 4 * kTile, kMostVectors = 8, kPassRows = 5, kScaleBytes = 0;
    static constexpr bool kUnpacked = false;
    using Raw = vi;

    static INLINE Raw read(const char* p, int v) { return load_words(p + v * 4 * kWidth); }
    static INLINE vf get(Raw raw, int j) { return as_float(j == 0 ? raw << 16 : raw & (int32_t)0xffff0000); }
    static void prepare(const Linear& l, const float* x, float* row) { prepare_padded(l, x, row); }
};

}  // namespace

void linear_bfloat16(const Context& c, bool prepares) { run_format<Bfloat16>(c, prepares); }
