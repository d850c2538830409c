// Rows of tensors of any floating dtype, read and written in T: consecutive elements, wherever they lie.
#pragma once

#include "common/simd.h"
#include "common/tensors.h"

namespace vlpfast::temporal {
namespace { // each copy's dispatcher would otherwise be exported

template <class In, class Out> VLPFAST_CLONES void convert(const In* in, int64_t n, Out* out) {
    for (int64_t i = 0; i < n; ++i)
        out[i] = static_cast<Out>(in[i]);
}

// `count` pieces of n elements, `from` and `to` elements apart.
template <class In, class Out>
VLPFAST_CLONES void convert(const In* in, int64_t from, int64_t count, int64_t n, Out* out, int64_t to) {
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = 0; j < n; ++j)
            out[i * to + j] = static_cast<Out>(in[i * from + j]);
    }
}

template <class T> class Reader {
  public:
    explicit Reader(const Tensor& tensor)
        : data_(tensor.const_data_ptr()), dtype_(tensor.scalar_type()), same_(dtype_ == kScalarType<T>) {
        with_floating_pointer(data_, dtype_,
                              [](auto*) {}); // raises here on another dtype: nothing may be thrown in parallel_for
    }

    // n elements from `at` on: the tensor's own memory, or a copy in `scratch`.
    const T* read(int64_t at, int64_t n, T* scratch) const {
        if (same_)
            return static_cast<const T*>(data_) + at;
        copy(at, n, scratch);
        return scratch;
    }
    void copy(int64_t at, int64_t n, T* out) const {
        with_floating_pointer(data_, dtype_, [&](auto* data) { convert(data + at, n, out); });
    }
    // `count` pieces of n elements that lie one behind another; in `out` they are `stride` apart.
    void copy(int64_t at, int64_t count, int64_t n, T* out, int64_t stride) const {
        with_floating_pointer(data_, dtype_, [&](auto* data) { convert(data + at, n, count, n, out, stride); });
    }

  private:
    const void* const data_;
    const ScalarType dtype_;
    const bool same_;
};

template <class T> class Writer {
  public:
    explicit Writer(const Tensor& tensor) : data_(tensor.mutable_data_ptr()), dtype_(tensor.scalar_type()) {}

    void write(int64_t at, int64_t n, const T* in) const {
        with_floating_pointer(data_, dtype_, [&](auto* data) {
            using Out = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
            convert(in, n, const_cast<Out*>(data) + at);
        });
    }
    void write(int64_t at, int64_t count, int64_t n, const T* in, int64_t stride) const {
        with_floating_pointer(data_, dtype_, [&](auto* data) {
            using Out = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
            convert(in, stride, count, n, const_cast<Out*>(data) + at, n);
        });
    }

  private:
    void* const data_;
    const ScalarType dtype_;
};

} // namespace
} // namespace vlpfast::temporal
