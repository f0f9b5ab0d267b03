#include "linear.h"

namespace {

struct Int8 {
    static constexpr int kStep = 1, kReadBytes = kTile, kMostVectors = 6, kPassRows = 6;
    static constexpr bool kGrouped = false, kUnpacked = false;
    using Raw = vf;

    static INLINE Raw read(const char* p, int v) { return load_int8((const int8_t*)p + v * kWidth); }
    static INLINE vf get(Raw raw, int) { return raw; }
    static void prepare(const Linear&, const float*, float*) {}
};

}  // namespace

void linear_int8(const Context& c, bool prepares) { linear<Int8>(c, prepares); }
