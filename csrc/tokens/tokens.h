// Batches of token sequences in memory, read in place where that can be done.
#pragma once

#include "common/tensors.h"

namespace vlpfast::tokens {

// The dtype that numbers of type In are summed in.
template <class In> using Wide = std::conditional_t<std::is_same_v<In, double>, double, float>;

// x [B, N, C] of numbers In, any strides.
template <class In> class Tokens {
  public:
    const int64_t batch, count, width;

    Tokens(const char* name, const Tensor& x)
        : batch(x.size(0)), count(x.size(1)), width(x.size(2)), data_(static_cast<const In*>(x.const_data_ptr())),
          image_(x.stride(0)), token_(x.stride(1)), channel_(width > 1 ? x.stride(2) : 1) {
        STD_TORCH_CHECK(x.dim() == 3, name, ": expected 3 dimensions, got ", x.dim());
    }

    // Token i of an image, its channels one after the other: the tensor's own memory, or a copy in `scratch`.
    const In* row(int64_t image, int64_t i, Buffer<In>& scratch) const {
        const In* const from = data_ + image * image_ + i * token_;
        if (channel_ == 1)
            return from;
        In* const copy = scratch.get(width);
        for (int64_t c = 0; c < width; ++c)
            copy[c] = from[c * channel_];
        return copy;
    }

  private:
    const In* data_;
    const int64_t image_, token_, channel_;
};

// Numbers [B, N] of type T (an index, a mask, weights), any strides. None: no numbers.
template <class T> struct Table {
    const T* data = nullptr;
    int64_t row = 0, column = 0;

    Table() = default;
    Table(const char* name, const Tensor& t, int64_t rows, int64_t columns)
        : data(t.const_data_ptr<T>()), row(t.stride(0)), column(t.stride(1)) {
        STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, ": expected shape [", rows,
                        ", ", columns, "]");
    }
    T at(int64_t i, int64_t j) const { return data[i * row + j * column]; }
};

// Calls f with a null pointer of the C++ type that the dtype stands for.
template <class F> void with_dtype(const Tensor& x, const F& f) {
    with_floating_pointer(nullptr, x.scalar_type(), [&](auto* typed) {
        f(static_cast<std::remove_const_t<std::remove_pointer_t<decltype(typed)>>*>(nullptr));
    });
}

} // namespace vlpfast::tokens
