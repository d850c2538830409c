// Matrix products that share their right-hand matrix.
#pragma once

#include "common/tensors.h"

namespace vlpfast {

// The right-hand matrix b [k, n] of several products. Where torch's BLAS leaves speed on the table (float on AMD
// processors with AVX-512, where MKL takes its AVX2 kernel) it is held in the order in which a kernel of our own reads
// it; elsewhere it is the matrix itself, and the products are torch's.
template <class T> class Panels {
  public:
    // Reads b; in parallel outside of parallel_for, on one thread inside. `b` must stay as it is as long as products
    // are made. Not `packed`: for products of so few rows that holding it in another order does not pay.
    void set(View<const T> b, int64_t k, int64_t n, bool packed = true);

    // out [m, n] = a [m, k] @ b, added to what `out` holds if `accumulate`; inside parallel_for, one part of the work
    // each, like product().
    void product(View<T> out, View<const T> a, int64_t m, bool accumulate) const;

  private:
    View<const T> b_{nullptr, 0, 0};
    int64_t k_ = 0, n_ = 0;
    bool is_packed_ = false;
    Buffer<T> packed_;
};

} // namespace vlpfast
