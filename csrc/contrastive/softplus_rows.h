// What pair_softplus does to one row of a tile of logits.
#pragma once

#include "common/simd.h"

namespace vlpfast::contrastive {
namespace { // each copy's dispatcher would otherwise be exported

// Returns softplus(s) = log(1 + exp(s)) and, if kGradient, makes s = weight * sigmoid(s). One exponential, never above
// 1, serves both: neither overflows, and both keep their relative precision where exp(s) is tiny.
template <bool kGradient, class T> VLPFAST_INLINE T softplus(T& s, T weight) {
    const T e = exponential(-std::abs(s)), value = (s > T(0) ? s : T(0)) + log1p_unit(e);
    if (kGradient) {
        const T larger = weight / (T(1) + e); // of sigmoid(s) and sigmoid(-s)
        s = s > T(0) ? larger : larger * e;
    }
    return value;
}

// Returns the sum of softplus over the row; if kGradient, the row becomes weight * sigmoid(row).
template <bool kGradient, class T> VLPFAST_CLONES double softplus_row(T* s, int64_t n, T weight) {
    T lanes[kLanes] = {};
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
        for (int l = 0; l < kLanes; ++l)
            lanes[l] += softplus<kGradient>(s[j + l], weight);
    }
    double sum = 0;
    for (; j < n; ++j)
        sum += softplus<kGradient>(s[j], weight);
    for (const T lane : lanes)
        sum += lane;
    return sum;
}

} // namespace
} // namespace vlpfast::contrastive
