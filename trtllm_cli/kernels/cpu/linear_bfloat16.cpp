#include "linear.h"

namespace {

// A 32-bit lane has two inputs.
struct Bfloat16 {
    static constexpr int kStep = 2, kReadBytes = 4 * kTile, kHeaderBytes = 0, kMostVectors = 8;
    static constexpr bool kUnpacked = false;
    struct Params {};
    using Raw = vi;

    static INLINE Params params(const char*, int) { return {}; }
    static INLINE Raw read(const char* p, int v) { return load_words(p + v * 4 * kWidth); }
    static INLINE vf get(Raw pair, Params, int j) {
        return as_float(j == 0 ? pair << 16 : pair & (int32_t)0xffff0000);
    }
};

}  // namespace

void linear_bfloat16(const Context& c) { linear<Bfloat16>(c); }
