#include "linear.h"

namespace {

struct Bfloat16 {
    static constexpr int kStep = 2, kFetchBytes = 4 * kTile;
    static constexpr bool kGrouped = false, kUnpacked = false;

    static INLINE void fetch(const char* p, int v, vf (&b)[2]) {
        const vi pair = load_words(p + v * 4 * kWidth);
        b[0] = as_float(pair << 16);
        b[1] = as_float(pair & (int32_t)0xffff0000);
    }
    static void prepare(const Linear& l, const float* x, float* row) {
        memcpy(row, x, l.in * sizeof(float));
        for (int k = l.in; k < l.padded_in; k++) row[k] = 0;
    }
};

}  // namespace

void linear_bfloat16(const Context& c) { linear<Bfloat16>(c); }
