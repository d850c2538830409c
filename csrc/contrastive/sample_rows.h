// What sample_hard_negatives does to one row of a tile of logits.
#pragma once

#include "common/philox.h"

#include <limits>

namespace vlpfast::contrastive {
namespace { // each copy's dispatcher would otherwise be exported

// v = (bits + 1/2) / 2^32, and the Gumbel variable that is made of it; 32 bits and a half are exact in double.
inline double unit(uint32_t bits) {
    return (bits + 0.5) * 0x1p-32;
}
inline double gumbel(uint32_t bits) {
    return -std::log(-std::log1p(-unit(bits)));
}

// Sets may[j] where a column of the row may have a key s + gumbel above `least` (where it has one, always), and returns
// whether it did. A key is above `least` if -log(1 - v) < exp(s - least), and v is below -log(1 - v). `slack` is more
// than the roundings of s - least.
template <class T>
VLPFAST_CLONES bool may_exceed(const T* s, const uint32_t* bits, int64_t n, T least, T slack, int32_t* may) {
    int32_t any = 0;
    for (int64_t j = 0; j < n; ++j) {
        const T difference = s[j] - least + slack, exponent = difference < T(1) ? difference : T(1);
        may[j] = (static_cast<T>(bits[j]) + T(0.5)) * T(0x1p-32) < exponential(exponent);
        any |= may[j];
    }
    return any;
}

VLPFAST_CLONES bool any_at_most(const uint32_t* bits, int64_t n, uint32_t limit) {
    int any = 0;
    for (int64_t j = 0; j < n; ++j)
        any |= bits[j] <= limit;
    return any;
}

// s = scale * s; NaN becomes infinite.
template <class T> VLPFAST_CLONES void scale_logits(T* s, int64_t n, T scale) {
    for (int64_t j = 0; j < n; ++j) {
        const T logit = scale * s[j];
        s[j] = logit == logit ? logit : std::numeric_limits<T>::infinity();
    }
}

// Returns the sum of exp(s - shift); shift is finite, and the row's largest or above.
template <class T> VLPFAST_CLONES double exp_sum(const T* s, int64_t n, T shift) {
    T lanes[kLanes] = {};
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
        for (int l = 0; l < kLanes; ++l)
            lanes[l] += exponential(s[j + l] - shift);
    }
    double sum = 0;
    for (; j < n; ++j)
        sum += exponential(s[j] - shift);
    for (const T lane : lanes)
        sum += lane;
    return sum;
}

} // namespace
} // namespace vlpfast::contrastive
