// What is done to one row of a tile of logits. S = scale * product + bias; E = exp(S - shift); P = dLoss / dS.
#pragma once

#include "common/simd.h"

#include <limits>

namespace vlpfast::contrastive {
namespace { // each copy's dispatcher would otherwise be exported

// s = scale * s + offset
template <class T> VLPFAST_CLONES void affine(T* s, int64_t n, T scale, const T* offset) {
    for (int64_t j = 0; j < n; ++j)
        s[j] = scale * s[j] + offset[j];
}

// s = exp(scale * s + offset)
template <class T> VLPFAST_CLONES void exp_affine(T* s, int64_t n, T scale, const T* offset) {
    for (int64_t j = 0; j < n; ++j)
        s[j] = exponential(scale * s[j] + offset[j]);
}

template <class T> VLPFAST_CLONES void set_where_equal(T* s, int64_t n, const int64_t* ids, int64_t id, T value) {
    for (int64_t j = 0; j < n; ++j)
        s[j] = ids[j] == id ? value : s[j];
}

// Returns the sum of the row and adds the row to `columns`.
template <class T> VLPFAST_CLONES T add_row(const T* e, int64_t n, T* columns) {
    T lanes[kLanes] = {};
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
        for (int l = 0; l < kLanes; ++l) {
            lanes[l] += e[j + l];
            columns[j + l] += e[j + l];
        }
    }
    T sum = 0;
    for (; j < n; ++j) {
        sum += e[j];
        columns[j] += e[j];
    }
    for (const T lane : lanes)
        sum += lane;
    return sum;
}

// Returns the largest of the row and raises `columns` to it; NaN is passed over (it shows in the sums).
template <class T> VLPFAST_CLONES T max_row(const T* s, int64_t n, T* columns) {
    T lanes[kLanes];
    for (T& lane : lanes)
        lane = -std::numeric_limits<T>::infinity();
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
        for (int l = 0; l < kLanes; ++l) {
            lanes[l] = s[j + l] > lanes[l] ? s[j + l] : lanes[l];
            columns[j + l] = s[j + l] > columns[j + l] ? s[j + l] : columns[j + l];
        }
    }
    for (; j < n; ++j) {
        lanes[0] = s[j] > lanes[0] ? s[j] : lanes[0];
        columns[j] = s[j] > columns[j] ? s[j] : columns[j];
    }
    T largest = lanes[0];
    for (const T lane : lanes)
        largest = lane > largest ? lane : largest;
    return largest;
}

// NaN is passed over (it shows in the sums).
template <class T> VLPFAST_CLONES T largest_of(const T* s, int64_t n) {
    T lanes[kLanes];
    for (T& lane : lanes)
        lane = -std::numeric_limits<T>::infinity();
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
        for (int l = 0; l < kLanes; ++l)
            lanes[l] = s[j + l] > lanes[l] ? s[j + l] : lanes[l];
    }
    T largest = -std::numeric_limits<T>::infinity();
    for (; j < n; ++j)
        largest = s[j] > largest ? s[j] : largest;
    for (const T lane : lanes)
        largest = lane > largest ? lane : largest;
    return largest;
}

// e = exp(s - shift), shift finite and the largest of s or above; returns the sum. e may be s.
template <class T> VLPFAST_CLONES double exponentiate(T* e, const T* s, int64_t n, T shift) {
    T lanes[kLanes] = {};
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
        T block[kLanes]; // all of it is read before any is written, which lets the compiler make vectors
        for (int l = 0; l < kLanes; ++l)
            block[l] = exponential(s[j + l] - shift);
        for (int l = 0; l < kLanes; ++l) {
            e[j + l] = block[l];
            lanes[l] += block[l];
        }
    }
    double sum = 0;
    for (; j < n; ++j) {
        e[j] = exponential(s[j] - shift);
        sum += e[j];
    }
    for (const T lane : lanes)
        sum += lane;
    return sum;
}

// Returns the sum of exp(s - row_shift) and adds exp(s - column_shift) to `columns`.
template <class T> VLPFAST_CLONES T exp_sum_row(const T* s, int64_t n, T row_shift, const T* column_shift, T* columns) {
    T lanes[kLanes] = {};
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
        for (int l = 0; l < kLanes; ++l) {
            lanes[l] += exponential(s[j + l] - row_shift);
            columns[j + l] += exponential(s[j + l] - column_shift[j + l]);
        }
    }
    T sum = 0;
    for (; j < n; ++j) {
        sum += exponential(s[j] - row_shift);
        columns[j] += exponential(s[j] - column_shift[j]);
    }
    for (const T lane : lanes)
        sum += lane;
    return sum;
}

template <class T> VLPFAST_CLONES bool any_above(const T* e, int64_t n, T limit, const T* limits) {
    int above = 0;
    for (int64_t j = 0; j < n; ++j)
        above |= (e[j] > limit) | (e[j] > limits[j]);
    return above;
}

// p = e * (a + b): the gradient of the logits from their exponentials; p may be e.
template <class T> VLPFAST_CLONES void weigh(T* p, const T* e, int64_t n, T a, const T* b) {
    for (int64_t j = 0; j < n; ++j)
        p[j] = e[j] * (a + b[j]);
}

// s = a * exp(s - row_shift) + b * exp(s - column_shift): the same where rows and columns have shifts of their own.
template <class T>
VLPFAST_CLONES void weigh_logits(T* s, int64_t n, T a, T row_shift, const T* b, const T* column_shift) {
    for (int64_t j = 0; j < n; ++j)
        s[j] = a * exponential(s[j] - row_shift) + b[j] * exponential(s[j] - column_shift[j]);
}

// out = static_cast<Out>(factor * in)
template <class T, class Out> VLPFAST_CLONES void scale_row(const T* in, int64_t n, double factor, Out* out) {
    for (int64_t j = 0; j < n; ++j)
        out[j] = static_cast<Out>(static_cast<T>(factor * in[j]));
}

template <class T> VLPFAST_CLONES double dot(const T* a, const T* b, int64_t n) {
    double lanes[kLanes] = {};
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
        for (int l = 0; l < kLanes; ++l)
            lanes[l] += static_cast<double>(a[j + l]) * b[j + l];
    }
    double sum = 0;
    for (; j < n; ++j)
        sum += static_cast<double>(a[j]) * b[j];
    for (const double lane : lanes)
        sum += lane;
    return sum;
}

// out += factor * in
template <class T> VLPFAST_CLONES void add_scaled(T* out, const T* in, int64_t n, T factor) {
    for (int64_t j = 0; j < n; ++j)
        out[j] += factor * in[j];
}

} // namespace
} // namespace vlpfast::contrastive
