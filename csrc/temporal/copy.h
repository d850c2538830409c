// Copies that are as fast as memory is.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace vlpfast::temporal {

// Results of at least so many bytes leave no room for themselves in the caches of a core: they are written past these.
constexpr int64_t kStreamBytes = 8 << 20;

// As std::memcpy; with `stream` past the caches. end_stream() before another thread reads it.
inline void copy(void* to, const void* from, int64_t bytes, [[maybe_unused]] bool stream) {
    char* out = static_cast<char*>(to);
    const char* in = static_cast<const char*>(from);
#if defined(__SSE2__)
    constexpr int64_t kLine = 64;
    if (stream && bytes >= 4 * kLine) {
        const int64_t head = -reinterpret_cast<intptr_t>(out) & (kLine - 1);
        std::memcpy(out, in, head);
        out += head, in += head, bytes -= head;
        for (; bytes >= kLine; out += kLine, in += kLine, bytes -= kLine) {
            __m128i line[4];
            std::memcpy(line, in, kLine);
            for (int i = 0; i < 4; ++i)
                _mm_stream_si128(reinterpret_cast<__m128i*>(out) + i, line[i]);
        }
    }
#endif
    std::memcpy(out, in, bytes);
}

inline void end_stream([[maybe_unused]] bool stream) {
#if defined(__SSE2__)
    if (stream)
        _mm_sfence();
#endif
}

} // namespace vlpfast::temporal
