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

} // namespace

void widen(const int8_t* in, int64_t step, int64_t n, float* out) {
    widen_row(in, step, n, out);
}
void widen(const int8_t* in, int64_t step, int64_t n, double* out) {
    widen_row(in, step, n, out);
}

} // namespace vlpfast
