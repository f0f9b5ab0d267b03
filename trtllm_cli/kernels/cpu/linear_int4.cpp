#include "linear.h"

namespace {

// A nibble is used where it stands in its word, as q * 2^(4 j), and x is divided by as much beforehand: both are exact,
// and unpacking takes a mask and a conversion. The highest would be negative, and is shifted down.
struct Int4 {
    static constexpr int kStep = kNibbles, kReadBytes = 4 * kTile, kMostVectors = 6;
    static constexpr bool kGrouped = true, kUnpacked = false;
    using Raw = vi;

    static INLINE Raw read(const char* p, int v) { return load_words(p + v * 4 * kWidth); }
    static INLINE vf get(Raw word, int j) {
        return to_float(j == kNibbles - 1 ? (vi)((vu)word >> 28) : word & (15 << 4 * j));
    }

    static void prepare(const Linear& l, const float* x, float* row) {
        static const float down[kNibbles] = {1, 0x1p-4f, 0x1p-8f, 0x1p-12f, 0x1p-16f, 0x1p-20f, 0x1p-24f, 1};
        float* sums = row + l.padded_in;
        for (int g = 0; g < l.groups; g++, x += l.group, row += l.padded_group) {
            const int inputs = l.in - g * l.group < l.group ? l.in - g * l.group : l.group;
            float partial[kNibbles] = {};
            int k = 0;
            for (; k + kNibbles <= inputs; k += kNibbles)
                for (int j = 0; j < kNibbles; j++) row[k + j] = x[k + j] * down[j], partial[j] += x[k + j];
            for (; k < l.padded_group; k++) {
                const float value = k < inputs ? x[k] : 0.0f;
                row[k] = value * down[k % kNibbles], partial[k % kNibbles] += value;
            }
            sums[g] = ((partial[0] + partial[4]) + (partial[1] + partial[5])) +
                      ((partial[2] + partial[6]) + (partial[3] + partial[7]));
        }
    }
};

}  // namespace

void linear_int4(const Context& c) { linear<Int4>(c); }
