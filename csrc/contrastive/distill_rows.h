// What pair_distill does to one row of a tile of products.
#pragma once

#include "common/simd.h"

namespace vlpfast::contrastive {
namespace { // each copy's dispatcher would otherwise be exported

// out = scale * (s - origin) + bias: exact differences where products are close to the origin; out may be s.
template <class T> VLPFAST_CLONES void to_logits(T* out, const T* s, int64_t n, T scale, T origin, const T* bias) {
    for (int64_t j = 0; j < n; ++j)
        out[j] = scale * (s[j] - origin) + bias[j];
}

template <class T> VLPFAST_CLONES void subtract(T* out, const T* s, int64_t n, T origin) {
    for (int64_t j = 0; j < n; ++j)
        out[j] = s[j] - origin;
}

// s = exp(s - shift). No s may be above the shift.
template <class T> VLPFAST_CLONES void exponentiate(T* s, int64_t n, T shift) {
    for (int64_t j = 0; j < n; ++j)
        s[j] = exponential(s[j] - shift);
}

// The same; adds the sum to `sum` and that of s * d to `mean`.
template <class T> VLPFAST_CLONES void exponentiate(T* s, const T* d, int64_t n, T shift, double& sum, double& mean) {
    T lanes[kLanes] = {}, mean_lanes[kLanes] = {};
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
        for (int l = 0; l < kLanes; ++l) {
            s[j + l] = exponential(s[j + l] - shift);
            lanes[l] += s[j + l];
            mean_lanes[l] += s[j + l] * d[j + l];
        }
    }
    for (; j < n; ++j) {
        s[j] = exponential(s[j] - shift);
        lanes[0] += s[j];
        mean_lanes[0] += s[j] * d[j];
    }
    T part = 0, mean_part = 0;
    for (int l = 0; l < kLanes; ++l) {
        part += lanes[l];
        mean_part += mean_lanes[l];
    }
    sum += part;
    mean += mean_part;
}

// s = a * s + b * t
template <class T> VLPFAST_CLONES void mix(T* s, T a, const T* t, T b, int64_t n) {
    for (int64_t j = 0; j < n; ++j)
        s[j] = a * s[j] + b * t[j];
}

} // namespace
} // namespace vlpfast::contrastive
