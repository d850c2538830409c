// The float product kernel for AVX-512: 8 rows by 48 columns in 24 registers, one broadcast operand, one from panels.
//
// b [k, n] is cut into blocks of kDepth rows, a block into panels of 48 columns (the last one narrower, padded to a
// multiple of 16); a panel holds its rows one after the other. A panel (96 KiB) is read from the second-level cache by
// one block of 8 rows of a after the other. The order of the sums depends on the shapes alone.

#include "common/panels.h"

#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define VLPFAST_AVX512 __attribute__((target("avx512f")))
#endif

namespace vlpfast {

#ifdef VLPFAST_AVX512
namespace {

constexpr int64_t kHeight = 8, kLane = 16, kWidth = 3 * kLane, kDepth = 512;

bool faster_here() {
    static const bool yes = __builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f");
    return yes;
}

int64_t padded(int64_t n) {
    return (n + kLane - 1) / kLane * kLane;
}

// c [8, 16 vectors] (+)= a [8, k] @ b [k, 16 vectors]; element (i, l) of a is a[i * row + l * column].
template <int vectors>
VLPFAST_AVX512 void kernel(const float* a, int64_t row, int64_t column, const float* b, int64_t k, float* c,
                           int64_t c_row, bool accumulate) {
    __m512 sum[kHeight][vectors];
#pragma GCC unroll 8
    for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
            _mm_prefetch(reinterpret_cast<const char*>(c + i * c_row + v * kLane), _MM_HINT_T0);
            sum[i][v] = _mm512_setzero_ps();
        }
    }
    const float* a4 = a + 4 * row;
    for (int64_t l = 0; l < k; ++l) {
        __m512 right[vectors];
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            right[v] = _mm512_loadu_ps(b + v * kLane);
#pragma GCC unroll 8
        for (int i = 0; i < kHeight; ++i) {
            const __m512 left = _mm512_set1_ps(i < 4 ? a[i * row] : a4[(i - 4) * row]);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v)
                sum[i][v] = _mm512_fmadd_ps(left, right[v], sum[i][v]);
        }
        b += vectors * kLane;
        a += column;
        a4 += column;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kHeight; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
            float* const out = c + i * c_row + v * kLane;
            _mm512_storeu_ps(out, accumulate ? _mm512_add_ps(_mm512_loadu_ps(out), sum[i][v]) : sum[i][v]);
        }
    }
}

using Kernel = void (*)(const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t, bool);
constexpr Kernel kKernels[] = {kernel<1>, kernel<2>, kernel<3>};

// One panel: `width` columns of b from `column` on, `depth` rows from `begin` on.
void pack(View<const float> b, int64_t begin, int64_t depth, int64_t column, int64_t width, float* out) {
    const int64_t stride = padded(width);
    const float* from = b.data + begin * b.row + column * b.column;
    if (b.column == 1) {
        for (int64_t l = 0; l < depth; ++l) {
            std::memcpy(out + l * stride, from + l * b.row, width * sizeof(float));
            std::fill(out + l * stride + width, out + (l + 1) * stride, 0.0f);
        }
        return;
    }
    constexpr int64_t kBlock = 16; // of rows, so that their lines are still cached when the next columns are read
    for (int64_t start = 0; start < depth; start += kBlock) {
        const int64_t end = std::min(depth, start + kBlock);
        for (int64_t j = 0; j < stride; ++j) {
            for (int64_t l = start; l < end; ++l)
                out[l * stride + j] = j < width ? from[l * b.row + j * b.column] : 0.0f;
        }
    }
}

// Rows [begin, begin + height) of a, columns [start, start + depth), as kHeight consecutive numbers per column; the
// rows that are missing are 0.
void pack_rows(View<const float> a, int64_t begin, int64_t height, int64_t start, int64_t depth, float* out) {
    const float* from = a.data + begin * a.row + start * a.column;
    if (height < kHeight)
        std::fill_n(out, depth * kHeight, 0.0f);
    for (int64_t l = 0; l < depth; ++l) {
        for (int64_t i = 0; i < height; ++i)
            out[l * kHeight + i] = from[i * a.row + l * a.column];
    }
}

// out [m, n] (+)= a [m, k] @ the matrix in `packed`
void multiply(View<float> out, View<const float> a, const float* packed, int64_t m, int64_t n, int64_t k,
              bool accumulate) {
    static thread_local Buffer<float> rows_buffer;
    const int64_t blocks = (m + kHeight - 1) / kHeight;
    float* const rows = rows_buffer.get(blocks * kHeight * std::min(k, kDepth));
    float edge[kHeight * kWidth];
    for (int64_t start = 0; start < k; start += kDepth) {
        const int64_t depth = std::min(kDepth, k - start);
        const auto in_place = [&](int64_t block) { return a.column == 1 && (block + 1) * kHeight <= m; };
        for (int64_t block = 0; block < blocks; ++block) {
            if (!in_place(block)) {
                const int64_t begin = block * kHeight;
                pack_rows(a, begin, std::min(kHeight, m - begin), start, depth, rows + begin * depth);
            }
        }
        const bool add = accumulate || start > 0;
        for (int64_t column = 0; column < n; column += kWidth) {
            const int64_t width = std::min(kWidth, n - column), wide = padded(width);
            const float* const panel = packed + start * padded(n) + depth * column;
            const Kernel run = kKernels[wide / kLane - 1];
            for (int64_t block = 0; block < blocks; ++block) {
                const int64_t begin = block * kHeight, height = std::min(kHeight, m - begin);
                const View<const float> left = in_place(block)
                                                   ? View<const float>{a.data + begin * a.row + start, a.row, 1}
                                                   : View<const float>{rows + begin * depth, 1, kHeight};
                float* const c = out.data + begin * out.row + column;
                if (height == kHeight && wide == width) {
                    run(left.data, left.row, left.column, panel, depth, c, out.row, add);
                    continue;
                }
                run(left.data, left.row, left.column, panel, depth, edge, kWidth, false);
                for (int64_t i = 0; i < height; ++i) {
                    for (int64_t j = 0; j < width; ++j)
                        c[i * out.row + j] = (add ? c[i * out.row + j] : 0.0f) + edge[i * kWidth + j];
                }
            }
        }
    }
}

} // namespace
#endif

template <class T> void Panels<T>::set(View<const T> b, int64_t k, int64_t n, [[maybe_unused]] bool packed) {
    b_ = b;
    k_ = k;
    n_ = n;
#ifdef VLPFAST_AVX512
    if constexpr (std::is_same_v<T, float>) {
        is_packed_ = packed && faster_here();
        if (!is_packed_)
            return;
        float* const data = packed_.get(k * padded(n));
        const int64_t panels = (n + kWidth - 1) / kWidth;
        parallel_for(0, panels, 1, [&](int64_t from, int64_t to) {
            for (int64_t start = 0; start < k; start += kDepth) {
                const int64_t depth = std::min(kDepth, k - start);
                for (int64_t p = from; p < to; ++p) {
                    const int64_t column = p * kWidth;
                    pack(b, start, depth, column, std::min(kWidth, n - column),
                         data + start * padded(n) + depth * column);
                }
            }
        });
    }
#endif
}

template <class T> void Panels<T>::product(View<T> out, View<const T> a, int64_t m, bool accumulate) const {
#ifdef VLPFAST_AVX512
    if constexpr (std::is_same_v<T, float>) {
        if (is_packed_ && k_ > 0) {
            multiply(out, a, packed_.read(), m, n_, k_, accumulate);
            return;
        }
    }
#endif
    vlpfast::product<T>(out, a, b_, m, n_, k_, accumulate);
}

template class Panels<float>;
template class Panels<double>;

} // namespace vlpfast
