// int8 tokens as the kernels read them: a row at a time, into a buffer that stays in the cache.

#include "common/simd.h"
#include "common/tensors.h"

namespace vlpfast {
namespace {

template <class T> VLPFAST_CLONES void widen_row(const int8_t* in, int64_t step, int64_t n, T* __restrict out) {
    if (step == 1) {
        for (int64_t i = 0; i < n; ++i)
            out[i] = static_cast<T>(in[i]);
    } else {
        for (int64_t i = 0; i < n; ++i)
            out[i] = static_cast<T>(in[i * step]);
    }
}

template <class T> VLPFAST_CLONES double squares(const T* in, int64_t n) {
    T parts[kLanes] = {};
    double sum = 0;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int64_t l = 0; l < kLanes; ++l)
            parts[l] += in[i + l] * in[i + l];
    }
    for (; i < n; ++i)
        sum += static_cast<double>(in[i]) * static_cast<double>(in[i]);
    for (const T part : parts)
        sum += static_cast<double>(part);
    return sum;
}

} // namespace

void widen(const int8_t* in, int64_t step, int64_t n, float* out) {
    widen_row(in, step, n, out);
}
void widen(const int8_t* in, int64_t step, int64_t n, double* out) {
    widen_row(in, step, n, out);
}

double sum_of_squares(const float* in, int64_t n) {
    return squares(in, n);
}
double sum_of_squares(const double* in, int64_t n) {
    return squares(in, n);
}

} // namespace vlpfast
