#include "linear.h"

namespace {

struct Int8 {
    static constexpr int kStep = 1, kFetchBytes = kTile;
    static constexpr bool kGrouped = false, kUnpacked = false;

    static INLINE void fetch(const char* p, int v, vf (&b)[1]) { b[0] = load_int8((const int8_t*)p + v * kWidth); }
    static void prepare(const Linear&, const float*, float*) {}
};

}  // namespace

void linear_int8(const Context& c) { linear<Int8>(c); }
