// The kernel, for the instruction set whose file includes this one: it says by VLPFAST_TARGET which one functions are
// compiled for, and brings a type L with the operations on a vector of `width` lanes. (An attribute cannot depend on a
// template's argument, and a function without it cannot take in one with it.)
//
// A tile of rows x vectors sums stays in registers over the whole width of the tokens. Every product is one sum in
// order (of blocks of kDepth): which tile it falls into changes no bit of it. Then the tile's largest are taken both
// ways. "Larger" is: not less or equal, unless the old one is NaN: a NaN wins and stays, and on ties the first stays.

#include "maxsim/kernel.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

namespace vlpfast::maxsim {
namespace {

constexpr int64_t kDepth = 512;

template <class L, int rows, int vectors, bool first>
VLPFAST_TARGET inline __attribute__((always_inline)) void
products(const typename L::Scalar* panel, const typename L::Scalar* row, int64_t stride, int64_t depth,
         typename L::V (&total)[rows][vectors]) {
    using V = typename L::V;
    V sum[rows][vectors];
#pragma GCC unroll 32
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            sum[i][v] = L::set(0);
    }
    const typename L::Scalar* at[(rows + 3) / 4]; // every fourth row: the others are reached by an index register
    for (int q = 0; q < (rows + 3) / 4; ++q)
        at[q] = row + 4 * q * stride;
    constexpr int64_t kLine = 64 / sizeof(typename L::Scalar);
    const typename L::Scalar* ahead = row + 2 * rows * stride; // the tile after the next, where tokens lie densely
    for (int64_t d = 0; d < depth;) {
#pragma GCC unroll 32
        for (int i = 0; i < rows; ++i)
            __builtin_prefetch(ahead + i * kLine);
        ahead += rows * kLine;
#pragma GCC unroll 1
        for (const int64_t end = std::min(depth, d + kLine); d < end; ++d) {
            V right[vectors];
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v)
                right[v] = L::load(panel + v * L::width);
#pragma GCC unroll 32
            for (int i = 0; i < rows; ++i) {
                const V left = L::set(at[i / 4][i % 4 * stride]);
#pragma GCC unroll 8
                for (int v = 0; v < vectors; ++v)
                    sum[i][v] = L::multiply_add(left, right[v], sum[i][v]);
            }
            panel += vectors * L::width;
#pragma GCC unroll 8
            for (int q = 0; q < (rows + 3) / 4; ++q)
                ++at[q];
        }
    }
#pragma GCC unroll 32
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            total[i][v] = first ? sum[i][v] : L::add(total[i][v], sum[i][v]);
    }
}

// Rows [begin, begin + rows) of the job.
template <class L, int rows, int vectors> VLPFAST_TARGET void tile(const Job<typename L::Scalar>& job, int64_t begin) {
    using T = typename L::Scalar;
    using V = typename L::V;
    V sum[rows][vectors];
    const T* const row = job.rows + begin * job.stride;
    products<L, rows, vectors, true>(job.panel, row, job.stride, std::min(kDepth, job.width), sum);
    for (int64_t start = kDepth; start < job.width; start += kDepth)
        products<L, rows, vectors, false>(job.panel + start * vectors * L::width, row + start, job.stride,
                                          std::min(kDepth, job.width - start), sum);
    if (job.scale) {
#pragma GCC unroll 32
        for (int i = 0; i < rows; ++i) {
            const V scale = L::set(job.scale[begin + i]);
#pragma GCC unroll 8
            for (int v = 0; v < vectors; ++v)
                sum[i][v] = L::multiply(sum[i][v], scale);
        }
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
        V best = L::load(job.lane_best + v * L::width);
        auto place = L::load_places(job.lane_place + v * L::width);
#pragma GCC unroll 32
        for (int i = 0; i < rows; ++i) {
            const auto larger = L::larger(sum[i][v], best);
            best = L::select(larger, sum[i][v], best);
            place = L::select(larger, L::set_place(static_cast<int32_t>(begin + i)), place);
        }
        L::store(job.lane_best + v * L::width, best);
        L::store_places(job.lane_place + v * L::width, place);
    }
    if (!job.row_best)
        return;
    const int64_t missing = vectors * L::width - job.lanes;
#pragma GCC unroll 32
    for (int i = 0; i < rows; ++i) {
        if (missing > 0)
            sum[i][vectors - 1] =
                L::first(sum[i][vectors - 1], L::width - missing, -std::numeric_limits<T>::infinity());
        V largest = sum[i][0];
        uint64_t nan = 0, equal = 0;
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) {
            largest = L::max(largest, sum[i][v]);
            nan |= L::is_nan(sum[i][v]) << (v * L::width);
        }
        T best = L::max_lane(largest);
        const V everywhere = L::set(best);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v)
            equal |= L::equal(sum[i][v], everywhere) << (v * L::width);
        if (nan != 0)
            best = std::numeric_limits<T>::quiet_NaN();
        const T old = job.row_best[begin + i];
        if (!(best <= old) && old == old) {
            job.row_best[begin + i] = best;
            job.row_place[begin + i] = job.first_lane + __builtin_ctzll(nan != 0 ? nan : equal);
        }
    }
}

template <class T> using Tile = void (*)(const Job<T>&, int64_t);

template <class L, int vectors, int... i>
constexpr std::array<Tile<typename L::Scalar>, sizeof...(i)> tiles(std::integer_sequence<int, i...>) {
    return {tile<L, i + 1, vectors>...};
}

template <class L, int vectors> VLPFAST_TARGET void run_vectors(const Job<typename L::Scalar>& job) {
    constexpr int kRows = L::rows(vectors);
    static constexpr auto kTiles = tiles<L, vectors>(std::make_integer_sequence<int, kRows>());
    const int64_t count = (job.count + kRows - 1) / kRows; // tiles that differ by one row at most
    for (int64_t t = 0, begin = 0; t < count; ++t) {
        const int64_t end = job.count * (t + 1) / count;
        kTiles[end - begin - 1](job, begin);
        begin = end;
    }
}

template <class L> VLPFAST_TARGET void run(const Job<typename L::Scalar>& job) {
    using T = typename L::Scalar;
    const int64_t vectors = (job.lanes + L::width - 1) / L::width;
    std::fill_n(job.lane_best, vectors * L::width, -std::numeric_limits<T>::infinity());
    std::fill_n(job.lane_place, vectors * L::width, 0);
    if (vectors == 1)
        return run_vectors<L, 1>(job);
    if constexpr (L::most >= 4) {
        if (vectors == 3)
            return run_vectors<L, 3>(job);
        if (vectors == 4)
            return run_vectors<L, 4>(job);
    }
    run_vectors<L, 2>(job);
}

} // namespace
} // namespace vlpfast::maxsim
