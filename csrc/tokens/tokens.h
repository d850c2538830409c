// Tokens [batch, count, width] of any floating dtype whose last dimension is dense, and what a match says of them.
#pragma once

#include "common/tensors.h"

#include <optional>

namespace vlpfast::tokens {

// What sums of numbers of type In are made in.
template <class In> using Sum = std::conditional_t<std::is_same_v<In, double>, double, float>;

template <class In> struct Tokens {
    In* data;
    int64_t batch, count, width, image, row; // image, row: strides

    Tokens(In* data, const Tensor& t)
        : data(data), batch(t.size(0)), count(t.size(1)), width(t.size(2)), image(t.stride(0)), row(t.stride(1)) {}
    In* at(int64_t b, int64_t i) const { return data + b * image + i * row; }
};

inline void check_dense(const char* name, const Tensor& t) {
    STD_TORCH_CHECK(t.dim() == 3 && (t.size(2) <= 1 || t.stride(2) == 1), name,
                    ": expected three dimensions, the last one dense");
}

} // namespace vlpfast::tokens
