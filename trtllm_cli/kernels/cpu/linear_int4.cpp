#include "linear_run.h"

namespace {

// A nibble is used where it stands in its word, as q * 2^(4 j), and x is divided by as much beforehand: both are exact,
// and unpacking takes a mask and a conversion. The highest would be negative, and is shifted down.
struct Int4 {
    static constexpr int kStep = kNibbles, kReadBytes = 4 * kTile, kMostVectors = 6, kPassRows = 6, kScaleBytes = 2;
    static constexpr bool kUnpacked = false;
    using Raw = vi;

    static INLINE Raw read(const char* p, int v) { return load_words(p + v * 4 * kWidth); }
    static INLINE vf get(Raw word, int j) {
        return to_float(j == kNibbles - 1 ? (vi)((vu)word >> 28) : word & (15 << 4 * j));
    }

    static void prepare(const Linear& l, const float* x, float* row) {
        typedef float v8 __attribute__((vector_size(32)));
        typedef float v8_any __attribute__((vector_size(32), aligned(4), may_alias));
        const v8 down = {1, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1};
        float* sums = row + l.padded_in;
        for (int g = 0; g < l.groups; g++, x += l.group, row += l.padded_group) {
            const int inputs = l.in - g * l.group < l.group ? l.in - g * l.group : l.group;
            v8 sum = {};
            for (int k = 0; k < l.padded_group; k += kNibbles) {
                v8 word = {};
                if (k + kNibbles <= inputs) word = *(const v8_any*)(x + k);
                else for (int j = k; j < inputs; j++) word[j - k] = x[j];
                *(v8_any*)(row + k) = word * down;
                sum = sum + word;
            }
            sums[g] = ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7]));
        }
    }
};

}  // namespace

void linear_int4(const Context& c, bool prepares) { run_format<Int4>(c, prepares); }
