// What score_ce_fwd does to a part of a line of scores.
#pragma once

#include "common/simd.h"

#include <limits>

namespace vlpfast::maxsim {
namespace { // each copy's dispatcher would otherwise be exported

template <class T> VLPFAST_CLONES void subtract(T* s, int64_t n, T origin) {
    for (int64_t j = 0; j < n; ++j)
        s[j] -= origin;
}

// d = a * d + b
template <class T> VLPFAST_CLONES void affine(T* d, int64_t n, T a, T b) {
    for (int64_t j = 0; j < n; ++j)
        d[j] = a * d[j] + b;
}

// The largest scale * d, -inf of none; NaN is passed over (it shows in the sums).
template <class T> VLPFAST_CLONES T largest(const T* d, int64_t n, T scale) {
    T lanes[kLanes];
    for (T& lane : lanes)
        lane = -std::numeric_limits<T>::infinity();
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
        for (int l = 0; l < kLanes; ++l)
            lanes[l] = scale * d[j + l] > lanes[l] ? scale * d[j + l] : lanes[l];
    }
    for (; j < n; ++j)
        lanes[0] = scale * d[j] > lanes[0] ? scale * d[j] : lanes[0];
    T most = lanes[0];
    for (const T lane : lanes)
        most = lane > most ? lane : most;
    return most;
}

struct Sums {
    double total, weighted, plain; // of E = exp(scale * d - shift), of E * d, of d

    void operator+=(const Sums& other) {
        total += other.total;
        weighted += other.weighted;
        plain += other.plain;
    }
};

// The sums over d, which becomes E; scale * d must not exceed the shift.
template <class T> VLPFAST_CLONES Sums exponentials(T* d, int64_t n, T scale, T shift) {
    T total[kLanes] = {}, weighted[kLanes] = {}, plain[kLanes] = {};
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
        for (int l = 0; l < kLanes; ++l) {
            const T e = exponential(scale * d[j + l] - shift);
            total[l] += e;
            weighted[l] += e * d[j + l];
            plain[l] += d[j + l];
            d[j + l] = e;
        }
    }
    for (int l = 0; j < n; ++j, ++l) {
        const T e = exponential(scale * d[j] - shift);
        total[l] += e;
        weighted[l] += e * d[j];
        plain[l] += d[j];
        d[j] = e;
    }
    Sums sums{0, 0, 0};
    for (int l = 0; l < kLanes; ++l)
        sums += {static_cast<double>(total[l]), static_cast<double>(weighted[l]), static_cast<double>(plain[l])};
    return sums;
}

} // namespace
} // namespace vlpfast::maxsim
