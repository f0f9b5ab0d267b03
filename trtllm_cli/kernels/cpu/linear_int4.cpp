#include "linear.h"

namespace {

// A nibble is used where it stands in its half of the word, as q * 2^(4 j), with a scale that is 2^(4 j) smaller: exact,
// and unpacking takes a mask, a conversion and a multiply-add.
struct Int4 {
    static constexpr int kStep = kNibbles, kReadBytes = 4 * kTile, kHeaderBytes = 4 * kTile, kMostVectors = 6;
    static constexpr bool kUnpacked = false;
    struct Params {
        vf scale[4], minimum;
    };
    using Raw = vi;

    static INLINE Params params(const char* header, int v) {
        const uint16_t* halves = (const uint16_t*)header + v * kWidth;
        const vf scale = load_half(halves);
        return {{scale, scale * 0x1p-4f, scale * 0x1p-8f, scale * 0x1p-12f}, load_half(halves + kTile)};
    }
    static INLINE Raw read(const char* p, int v) { return load_words(p + v * 4 * kWidth); }
    static INLINE vf get(Raw word, const Params& params, int j) {
        const vi half = j < 4 ? word : (vi)((vu)word >> 16);
        return fma(to_float(half & (15 << 4 * (j % 4))), params.scale[j % 4], params.minimum);
    }
};

}  // namespace

void linear_int4(const Context& c) { linear<Int4>(c); }
