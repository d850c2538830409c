// Tensors on torch's stable ABI: reading matrices of any floating dtype and layout, making outputs, matrix products.
#pragma once

#include "common/parallel.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int); // 0: the thread has no number of its own

namespace vlpfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The dtype that sums and products are made in: float for half types, the tensor's own otherwise.
template <class T>
constexpr ScalarType kScalarType = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// Large results are memory that the system has yet to clear, page by page: in pages of 2 MiB that takes a fraction of
// the time. A request, no more: where it is not granted, nothing changes.
inline void ask_for_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kPage = 2 << 20;
    const uintptr_t start = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage,
                    end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
    if (end > start + kPage)
        madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
}

inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
    const std::vector<int64_t> shape(sizes);
    Tensor result = torch::stable::empty({shape.data(), shape.size()}, dtype, std::nullopt,
                                         torch::stable::Device(torch::headeronly::DeviceType::CPU));
    ask_for_large_pages(result.mutable_data_ptr(), result.numel() * result.element_size());
    return result;
}

// Calls f with a pointer of the C++ type that `dtype` stands for.
template <class F> void with_floating_pointer(const void* data, ScalarType dtype, const F& f) {
    switch (dtype) {
    case ScalarType::Float:
        return f(static_cast<const float*>(data));
    case ScalarType::Double:
        return f(static_cast<const double*>(data));
    case ScalarType::Half:
        return f(static_cast<const torch::headeronly::Half*>(data));
    case ScalarType::BFloat16:
        return f(static_cast<const torch::headeronly::BFloat16*>(data));
    default:
        STD_TORCH_CHECK(false, "expected a floating dtype, got ", torch::headeronly::toString(dtype));
    }
}

// Uninitialised memory that grows when asked for more and never shrinks. Aligned, because a BLAS may order its sums by
// alignment.
template <class T> class Buffer {
  public:
    T* get(int64_t count) {
        if (count > size_) {
            data_.reset(static_cast<T*>(::operator new(count * sizeof(T), kAlignment)));
            size_ = count;
        }
        return data_.get();
    }
    const T* read() const { return data_.get(); }

  private:
    static constexpr std::align_val_t kAlignment{64};
    struct Free {
        void operator()(T* data) const { ::operator delete(data, kAlignment); }
    };
    std::unique_ptr<T, Free> data_;
    int64_t size_ = 0;
};

// A matrix in memory: element (i, j) is data[i * row + j * column].
template <class T> struct View {
    T* data;
    int64_t row, column;

    View<T> transposed() const { return {data, column, row}; }
    View<T> from(int64_t i) const { return {data + i * row, row, column}; }
    View<const T> read() const { return {data, row, column}; }
};

// int8 numbers in another type: out[i] = in[i * step].
void widen(const int8_t* in, int64_t step, int64_t n, float* out);
void widen(const int8_t* in, int64_t step, int64_t n, double* out);
// The sum of the squares of numbers that widen() has made: exact, in float up to n = 16384.
double sum_of_squares(const float* in, int64_t n);
double sum_of_squares(const double* in, int64_t n);

// A [count, width] tensor of any floating dtype, of int8 where `int8` allows it, and of any strides, read in T.
template <class T> class Matrix {
  public:
    const int64_t count, width;

    explicit Matrix(const Tensor& tensor, bool int8 = false)
        : count(tensor.size(0)), width(tensor.size(1)), data_(tensor.const_data_ptr()), dtype_(tensor.scalar_type()),
          row_(tensor.stride(0)), column_(tensor.stride(1)) {
        if (!int8 || dtype_ != ScalarType::Char)
            with_floating_pointer(data_, dtype_,
                                  [](auto*) {}); // raises here on another dtype: nothing may be thrown in parallel_for
    }

    // Whether row() gives the tensor's own memory: then row i + 1 lies stride() after row i.
    bool in_place() const { return dtype_ == kScalarType<T> && column_ == 1; }
    int64_t stride() const { return row_; }

    // Rows [begin, begin + rows): the tensor's own memory where a product can read it, else a copy in `scratch`.
    View<const T> rows(int64_t begin, int64_t rows, Buffer<T>& scratch) const {
        if (in_place())
            return {static_cast<const T*>(data_) + begin * row_, row_, 1};
        T* copy = scratch.get(rows * width);
        parallel_for(0, rows, 64, [&](int64_t from, int64_t to) {
            for (int64_t i = from; i < to; ++i)
                read_row(begin + i, copy + i * width);
        });
        return {copy, width, 1};
    }

    // Row i, dense, with consecutive elements.
    const T* row(int64_t i, T* scratch) const {
        if (in_place())
            return static_cast<const T*>(data_) + i * row_;
        read_row(i, scratch);
        return scratch;
    }

    // Asks for row i to be brought into the second-level cache, where it lies in one piece.
    void prefetch(int64_t i) const {
        const char* const row = static_cast<const char*>(data_) + i * row_ * static_cast<int64_t>(sizeof(T));
        for (int64_t at = 0; at < (in_place() ? width : 0) * static_cast<int64_t>(sizeof(T)); at += 64)
            __builtin_prefetch(row + at, 0, 2);
    }

  private:
    void read_row(int64_t i, T* out) const {
        if (dtype_ == ScalarType::Char)
            return widen(static_cast<const int8_t*>(data_) + i * row_, column_, width, out);
        with_floating_pointer(data_, dtype_, [&](auto* data) {
            for (int64_t d = 0; d < width; ++d)
                out[d] = static_cast<T>(data[i * row_ + d * column_]);
        });
    }

    const void* data_;
    const ScalarType dtype_;
    const int64_t row_, column_;
};

// A vector (or a single number: then `count` equal ones) of any floating dtype, read in T.
template <class T> std::vector<T> read_vector(const Tensor& tensor, int64_t count) {
    std::vector<T> out(count);
    const int64_t stride = tensor.dim() == 0 ? 0 : tensor.stride(0);
    with_floating_pointer(tensor.const_data_ptr(), tensor.scalar_type(), [&](auto* data) {
        for (int64_t i = 0; i < count; ++i)
            out[i] = static_cast<T>(data[i * stride]);
    });
    return out;
}

inline std::vector<int64_t> read_integers(const Tensor& tensor) {
    const int64_t* data = tensor.const_data_ptr<int64_t>();
    std::vector<int64_t> out(tensor.size(0));
    for (size_t i = 0; i < out.size(); ++i)
        out[i] = data[static_cast<int64_t>(i) * tensor.stride(0)];
    return out;
}

// While it lives, MKL (where torch has it) takes this thread for the only one.
struct OneBlasThread {
    const int before = MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0;
    ~OneBlasThread() {
        if (MKL_Set_Num_Threads_Local)
            MKL_Set_Num_Threads_Local(before);
    }
};

// out [m, n] = a [m, k] @ b [k, n], added to what `out` holds if `accumulate`; by torch's own BLAS.
// Call it inside parallel_for, one part of the work each: there it runs on one thread, so that its bits do not depend
// on the number of threads (a threaded BLAS cuts small products differently for every number, MKL by the number it
// might have used). It makes tensors from raw pointers and goes past the dispatcher, so no state of the calling thread
// (autocast, modes, function transforms) matters.
template <class T>
void product(View<T> out, View<const T> a, View<const T> b, int64_t m, int64_t n, int64_t k, bool accumulate) {
    const auto tensor = [](View<const T> v, int64_t rows, int64_t columns) {
        const std::array<int64_t, 2> sizes{rows, columns}, strides{v.row, v.column};
        return torch::stable::from_blob(const_cast<T*>(v.data), {sizes.data(), 2}, {strides.data(), 2},
                                        torch::stable::Device(torch::headeronly::DeviceType::CPU), kScalarType<T>);
    };
    const Tensor c = tensor({out.data, out.row, out.column}, m, n), left = tensor(a, m, k), right = tensor(b, k, n);
    const OneBlasThread here;
    if (accumulate) {
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(c.get(), c.get(), left.get(), right.get(), 1.0, 1.0));
    } else {
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(c.get(), left.get(), right.get()));
    }
}

} // namespace vlpfast
