#include "linear_run.h"

namespace {

// With a scale for each output, or with ScaleBytes, for each output and group of inputs.
template <int ScaleBytes>
struct Int8 {
    static constexpr int kStep = 1, kReadBytes = kTile, kMostVectors = 6, kPassRows = 6, kScaleBytes = ScaleBytes;
    static constexpr bool kUnpacked = false;
    using Raw = vf;

    static INLINE Raw read(const char* p, int v) { return load_int8((const int8_t*)p + v * kWidth); }
    static INLINE vf get(Raw raw, int) { return raw; }
    static void prepare(const Linear& l, const float* x, float* row) { prepare_padded(l, x, row); }
};

}  // namespace

void linear_int8(const Context& c, bool prepares) {
    if (c.step.i[4]) run_format<Int8<2>>(c, prepares);
    else run_format<Int8<0>>(c, prepares);
}
