// Tokens of images in memory, and what is done to one row of them.
#pragma once

#include "common/simd.h"
#include "common/tensors.h"

#include <optional>

namespace vlpfast::tokens {

// The dtype that sums are made in.
template <class E> using Wide = std::conditional_t<std::is_same_v<E, double>, double, float>;

// Calls f with a value of the C++ type that `dtype` stands for.
template <class F> auto with_floating_type(ScalarType dtype, const F& f) {
    switch (dtype) {
    case ScalarType::Float:
        return f(float());
    case ScalarType::Double:
        return f(double());
    case ScalarType::Half:
        return f(torch::headeronly::Half());
    case ScalarType::BFloat16:
        return f(torch::headeronly::BFloat16());
    default:
        STD_TORCH_CHECK(false, "expected a floating dtype, got ", torch::headeronly::toString(dtype));
    }
}

// A row of C numbers in memory, `step` apart.
template <class E> struct Row {
    const E* data;
    int64_t step;
};

// [B, N, C] in memory, of any strides.
template <class E> class Images {
  public:
    const int64_t B, N, C;

    Images(const char* name, const Tensor& x)
        : B(checked(name, x).size(0)), N(x.size(1)), C(x.size(2)), data_(x.const_data_ptr<E>()), image_(x.stride(0)),
          token_(x.stride(1)), step_(x.stride(2)) {}
    Row<E> row(int64_t b, int64_t n) const { return {data_ + b * image_ + n * token_, step_}; }

  private:
    static const Tensor& checked(const char* name, const Tensor& x) {
        STD_TORCH_CHECK(x.dim() == 3, name, ": expected 3 dimensions, got ", x.dim());
        return x;
    }

    const E* const data_;
    const int64_t image_, token_, step_;
};

// [B, K] in memory, of any strides.
template <class T> class Table {
  public:
    Table(const char* name, const Tensor& t, int64_t rows, int64_t columns)
        : data_(t.const_data_ptr<T>()), row_(t.dim() == 2 ? t.stride(0) : 0), column_(t.dim() == 2 ? t.stride(1) : 0) {
        STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name, ": expected shape [", rows,
                        ", ", columns, "]");
    }
    T at(int64_t i, int64_t j) const { return data_[i * row_ + j * column_]; }

  private:
    const T* const data_;
    const int64_t row_, column_;
};

// [B, K] of rows of images with N of them, -1 for none where `none` is allowed.
inline Table<int64_t> read_indices(const Tensor& indices, int64_t B, int64_t N, bool none) {
    STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long && indices.dim() == 2,
                    "indices: expected int64 of two dimensions");
    const Table<int64_t> table("indices", indices, B, indices.size(1));
    for (int64_t b = 0; b < B; ++b) {
        for (int64_t j = 0; j < indices.size(1); ++j)
            STD_TORCH_CHECK(table.at(b, j) >= (none ? -1 : 0) && table.at(b, j) < N, "indices: expected ",
                            none ? -1 : 0, " to ", N - 1, ", got ", table.at(b, j));
    }
    return table;
}

template <class E> void copy_row(Row<E> row, int64_t C, E* out) {
    if (row.step == 1) {
        copy_bytes(out, row.data, C * sizeof(E));
        return;
    }
    for (int64_t c = 0; c < C; ++c)
        out[c] = row.data[c * row.step];
}

namespace { // each copy's dispatcher would otherwise be exported

// sum += weight * row
template <class E, class T> VLPFAST_CLONES void add_row(T weight, Row<E> row, int64_t C, T* __restrict sum) {
    if (row.step == 1) {
        for (int64_t c = 0; c < C; ++c)
            sum[c] += weight * static_cast<T>(row.data[c]);
    } else {
        for (int64_t c = 0; c < C; ++c)
            sum[c] += weight * static_cast<T>(row.data[c * row.step]);
    }
}

// out = weight * row, rounded
template <class T, class E> VLPFAST_CLONES void scale_row(T weight, const T* row, int64_t C, E* __restrict out) {
    for (int64_t c = 0; c < C; ++c)
        out[c] = static_cast<E>(weight * row[c]);
}

template <class E, class T> VLPFAST_CLONES double dot(Row<E> row, const T* other, int64_t C) {
    T lanes[kLanes] = {};
    int64_t c = 0;
    if (row.step == 1) {
        for (; c + kLanes <= C; c += kLanes) {
            for (int l = 0; l < kLanes; ++l)
                lanes[l] += static_cast<T>(row.data[c + l]) * other[c + l];
        }
    }
    double sum = 0;
    for (; c < C; ++c)
        sum += static_cast<T>(row.data[c * row.step]) * other[c];
    for (const T lane : lanes)
        sum += lane;
    return sum;
}

} // namespace
} // namespace vlpfast::tokens
