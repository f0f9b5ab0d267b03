#include "linear.h"

namespace {

struct Int8 {
    static constexpr int kStep = 1, kReadBytes = kTile, kHeaderBytes = 0, kMostVectors = 8;
    static constexpr bool kUnpacked = false;
    struct Params {};
    using Raw = vf;

    static INLINE Params params(const char*, int) { return {}; }
    static INLINE Raw read(const char* p, int v) { return load_int8((const int8_t*)p + v * kWidth); }
    static INLINE vf get(Raw raw, Params, int) { return raw; }
};

}  // namespace

void linear_int8(const Context& c) { linear<Int8>(c); }
