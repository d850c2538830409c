#include "common/simd.h"

#include <cstring>

namespace vlpfast {

VLPFAST_CLONES void copy_bytes(void* to, const void* from, int64_t bytes) {
    constexpr int64_t kLine = 64;
    typedef int64_t Line __attribute__((vector_size(kLine), aligned(1), may_alias));
    char* out = static_cast<char*>(to);
    const char* in = static_cast<const char*>(from);
#pragma GCC unroll 4
    for (; bytes >= kLine; out += kLine, in += kLine, bytes -= kLine)
        *reinterpret_cast<Line*>(out) = *reinterpret_cast<const Line*>(in);
    std::memcpy(out, in, bytes);
}

} // namespace vlpfast
