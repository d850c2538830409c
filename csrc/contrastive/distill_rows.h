// What pair_distill does to one row of a tile of products.
#pragma once

#include "common/simd.h"

#include <limits>

namespace vlpfast::contrastive {
namespace { // each copy's dispatcher would otherwise be exported

// out = s - origin: exact where products are close to the origin; out may be s.
template <class T> VLPFAST_CLONES void subtract(T* out, const T* s, int64_t n, T origin) {
    for (int64_t j = 0; j < n; ++j)
        out[j] = s[j] - origin;
}

// out = scale * d + bias; out may be d.
template <class T> VLPFAST_CLONES void scale_and_add(T* out, const T* d, int64_t n, T scale, const T* bias) {
    for (int64_t j = 0; j < n; ++j)
        out[j] = scale * d[j] + bias[j];
}

// NaN is passed over (it shows in the sums).
template <class T> VLPFAST_CLONES T largest(const T* s, int64_t n) {
    T lanes[kLanes];
    for (T& lane : lanes)
        lane = -std::numeric_limits<T>::infinity();
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
        for (int l = 0; l < kLanes; ++l)
            lanes[l] = s[j + l] > lanes[l] ? s[j + l] : lanes[l];
    }
    for (; j < n; ++j)
        lanes[0] = s[j] > lanes[0] ? s[j] : lanes[0];
    T most = lanes[0];
    for (const T lane : lanes)
        most = lane > most ? lane : most;
    return most;
}

// s = exp(s - shift); returns the sum. No s may be above the shift.
template <class T> VLPFAST_CLONES T exponentiate(T* s, int64_t n, T shift) {
    T lanes[kLanes] = {};
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
        for (int l = 0; l < kLanes; ++l)
            lanes[l] += s[j + l] = exponential(s[j + l] - shift);
    }
    T sum = 0;
    for (; j < n; ++j)
        sum += s[j] = exponential(s[j] - shift);
    for (const T lane : lanes)
        sum += lane;
    return sum;
}

// The sum of e * d.
template <class T> VLPFAST_CLONES T weighted_sum(const T* e, const T* d, int64_t n) {
    T lanes[kLanes] = {};
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
        for (int l = 0; l < kLanes; ++l)
            lanes[l] += e[j + l] * d[j + l];
    }
    T sum = 0;
    for (; j < n; ++j)
        sum += e[j] * d[j];
    for (const T lane : lanes)
        sum += lane;
    return sum;
}

// s = a * s + b * t
template <class T> VLPFAST_CLONES void mix(T* s, T a, const T* t, T b, int64_t n) {
    for (int64_t j = 0; j < n; ++j)
        s[j] = a * s[j] + b * t[j];
}

} // namespace
} // namespace vlpfast::contrastive
