#include "fp8.h"
#include "linear_run.h"

namespace {

// E4M3, with scales as int8 has them. A weight is 2^-8 of what it is, and the scales 2^8: see load_fp8_256ths.
template <int ScaleBytes>
struct Fp8 {
    static constexpr int kStep = 1, kReadBytes = kTile, kMostVectors = 6, kPassRows = 6, kScaleBytes = ScaleBytes;
    static constexpr bool kUnpacked = false;
    using Raw = vf;

    static INLINE Raw read(const char* p, int v) { return load_fp8_256ths((const uint8_t*)p + v * kWidth); }
    static INLINE vf get(Raw raw, int) { return raw; }
    static void prepare(const Linear& l, const float* x, float* row) { prepare_padded(l, x, row); }
};

}  // namespace

void linear_fp8(const Context& c, bool prepares) {
    if (c.step.i[4]) run_format<Fp8<4>>(c, prepares);
    else run_format<Fp8<0>>(c, prepares);
}
