// pool_tokens on the CPU: adaptive pooling, channels last. See vlpfast/ops/temporal/pool.py for what it computes and
// vlpfast/ops/_schemas.py for the arguments.
//
// A cell of the result reads the C channels of every cell of its window, one row after another. The windows that hold a
// cell are found by the same formula with both lengths exchanged, so a gradient is such a result too: each cell adds
// up what the windows around it hand down. Every cell is made by one thread, its rows in order: neither the number of
// threads nor anything else decides about its bits.

#include "common/simd.h"
#include "common/tensors.h"

#include <tuple>

namespace vlpfast::temporal {
namespace {

constexpr int64_t kBlock = 512; // channels that are summed at once, in the first-level cache
constexpr int64_t kTaskElements = 1 << 15;

template <class S> using Wide = std::conditional_t<std::is_same_v<S, double>, double, float>;

// The places [begin(i), end(i)) of an axis of length `from` that place i of one of length `to` covers.
struct Axis {
    int64_t from, to;

    int64_t begin(int64_t i) const { return i * from / to; }
    int64_t end(int64_t i) const { return ((i + 1) * from + to - 1) / to; }
    int64_t length(int64_t i) const { return end(i) - begin(i); }
    int64_t longest() const {
        return from % std::max<int64_t>(1, to) ? from / to + 2 : from / std::max<int64_t>(1, to);
    }
    Axis reversed() const { return {to, from}; }
};

struct Cell {
    int64_t b, t, h, w;
};

struct Grid {
    Axis t, h, w;

    int64_t longest() const { return t.longest() * h.longest() * w.longest(); }
    int64_t cells() const { return t.to * h.to * w.to; }
    Cell cell(int64_t i) const { return {i / w.to / h.to / t.to, i / w.to / h.to % t.to, i / w.to % h.to, i % w.to}; }
    int64_t window(const Cell& c) const { return t.length(c.t) * h.length(c.h) * w.length(c.w); }
    Grid reversed() const { return {t.reversed(), h.reversed(), w.reversed()}; }
    // f(cell) for all of the window, in order
    template <class F> void each(const Cell& c, const F& f) const {
        for (int64_t i = t.begin(c.t); i < t.end(c.t); ++i) {
            for (int64_t j = h.begin(c.h); j < h.end(c.h); ++j) {
                for (int64_t k = w.begin(c.w); k < w.end(c.w); ++k)
                    f(Cell{c.b, i, j, k});
            }
        }
    }
};

// Where the channels of a cell are.
template <class S> struct Cells {
    S* data;
    int64_t b, t, h, w;

    explicit Cells(const Tensor& x)
        : data(x.numel() ? static_cast<S*>(const_cast<void*>(x.const_data_ptr())) : nullptr), b(x.stride(0)),
          t(x.stride(1)), h(x.stride(2)), w(x.stride(3)) {
        STD_TORCH_CHECK(x.size(4) <= 1 || x.stride(4) == 1, "expected channels that are consecutive, got stride ",
                        x.stride(4));
    }
    S* at(const Cell& c) const { return data + c.b * b + c.t * t + c.h * h + c.w * w; }
};

// The rows [n] times their weights, added in order to `sum` (that is new if `first`); after the last ones times
// `scale`.
template <int kRows, bool kLast, class S, class T>
VLPFAST_CLONES void add_rows(const S* const* rows, const T* weights, int64_t n, bool first, T scale, T* sum, S* out) {
    for (int64_t c = 0; c < n; ++c) {
        T total = first ? T(0) : sum[c];
        for (int k = 0; k < kRows; ++k)
            total += weights[k] * static_cast<T>(rows[k][c]);
        if constexpr (kLast)
            out[c] = static_cast<S>(total * scale);
        else
            sum[c] = total;
    }
}

// out [n] = scale * the sum of `count` rows times their weights, four of them at a time. The rows are moved on by n.
template <class S, class T>
void weighted_sum(const S** rows, const T* weights, int64_t count, int64_t n, T scale, T* sum, S* out) {
    int64_t k = 0;
    for (; k < count - 4; k += 4)
        add_rows<4, false>(rows + k, weights + k, n, k == 0, scale, sum, out);
    const auto last = count - k == 4   ? add_rows<4, true, S, T>
                      : count - k == 3 ? add_rows<3, true, S, T>
                      : count - k == 2 ? add_rows<2, true, S, T>
                                       : add_rows<1, true, S, T>;
    last(rows + k, weights + k, n, k == 0, scale, sum, out);
    for (k = 0; k < count; ++k)
        rows[k] += n;
}

// The largest so far and its place; NaN is larger than any number, and the first of equals stays.
template <class S, class T, class I>
VLPFAST_CLONES void take_larger(const S* row, int64_t n, I place, T* best, I* places) {
    for (int64_t c = 0; c < n; ++c) {
        const T value = static_cast<T>(row[c]);
        const bool larger = (value > best[c]) | ((value != value) & (best[c] == best[c]));
        best[c] = larger ? value : best[c];
        places[c] = larger ? place : places[c];
    }
}

template <class S, class T, class I> VLPFAST_CLONES void take_first(const S* row, int64_t n, T* best, I* places) {
    for (int64_t c = 0; c < n; ++c) {
        best[c] = static_cast<T>(row[c]);
        places[c] = 0;
    }
}

// sum += the row where `place` has won
template <class S, class T, class U>
VLPFAST_CLONES void add_won(const S* row, const U* winners, U place, int64_t n, T* sum) {
    for (int64_t c = 0; c < n; ++c)
        sum[c] += winners[c] == place ? static_cast<T>(row[c]) : T(0);
}

template <class From, class To> VLPFAST_CLONES void convert(const From* in, int64_t n, To* out) {
    for (int64_t c = 0; c < n; ++c)
        out[c] = static_cast<To>(in[c]);
}

// f(cell, its number) for every cell of `clips` results, in parallel.
template <class F> void each_cell(const Grid& grid, int64_t clips, int64_t width, const F& f) {
    const int64_t grain = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, grid.longest() * width));
    parallel_for(0, clips * grid.cells(), grain, [&](int64_t begin, int64_t end) {
        auto make = f(); // a thread's own, with its scratch
        for (int64_t i = begin; i < end; ++i)
            make(grid.cell(i), i);
    });
}

// Each cell of `out` is the mean of its window of x, or the sum over it, each cell of x divided by the size of the
// window that it is the mean of.
template <class S> void sum_windows(const Grid& grid, const Tensor& x, const Tensor& out, bool mean) {
    using T = Wide<S>;
    const int64_t clips = x.size(0), C = x.size(4);
    const Cells<S> from(x), to(out);
    const Grid back = grid.reversed();
    each_cell(grid, clips, C, [&] {
        return [&, rows = std::vector<const S*>(), weights = std::vector<T>()](const Cell& cell, int64_t) mutable {
            rows.clear(), weights.clear();
            grid.each(cell, [&](const Cell& c) {
                rows.push_back(from.at(c));
                weights.push_back(mean ? T(1) : T(1) / static_cast<T>(back.window(c)));
            });
            const auto count = static_cast<int64_t>(rows.size());
            const T scale = mean ? T(1) / static_cast<T>(count) : T(1);
            T sum[kBlock];
            for (int64_t c = 0; c < C; c += kBlock)
                weighted_sum(rows.data(), weights.data(), count, std::min(kBlock, C - c), scale, sum, to.at(cell) + c);
        };
    });
}

// winners: null where they are not kept; else what of the window has won, counted in its order.
template <class S, class U> void largest_of_windows(const Grid& grid, const Tensor& x, const Tensor& out, U* winners) {
    using T = Wide<S>;
    using I = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>; // as wide, so that both are vectors of one length
    const int64_t clips = x.size(0), C = x.size(4);
    const Cells<S> from(x), to(out);
    each_cell(grid, clips, C, [&] {
        return [&](const Cell& cell, int64_t number) {
            T best[kBlock];
            I places[kBlock];
            for (int64_t c = 0; c < C; c += kBlock) {
                const int64_t n = std::min(kBlock, C - c);
                I place = 0;
                grid.each(cell, [&](const Cell& source) {
                    const S* const row = from.at(source) + c;
                    if (place == 0)
                        take_first(row, n, best, places);
                    else
                        take_larger(row, n, place, best, places);
                    ++place;
                });
                convert(best, n, to.at(cell) + c);
                if (winners)
                    convert(places, n, winners + number * C + c);
            }
        };
    });
}

// grid: from windows to cells. Each cell of dx is the sum of the gradients of the windows that it has won.
template <class S, class U>
void give_to_winners(const Grid& grid, const Tensor& grad, const Tensor& winners, const Tensor& dx) {
    using T = Wide<S>;
    const int64_t clips = grad.size(0), C = grad.size(4);
    const Cells<S> from(grad), to(dx);
    const Cells<U> won(winners);
    const Grid forward = grid.reversed();
    each_cell(grid, clips, C, [&] {
        return [&](const Cell& cell, int64_t) {
            T sum[kBlock];
            for (int64_t c = 0; c < C; c += kBlock) {
                const int64_t n = std::min(kBlock, C - c);
                std::fill_n(sum, n, T(0));
                grid.each(cell, [&](const Cell& window) {
                    const int64_t t = cell.t - forward.t.begin(window.t), h = cell.h - forward.h.begin(window.h),
                                  w = cell.w - forward.w.begin(window.w);
                    const int64_t place = (t * forward.h.length(window.h) + h) * forward.w.length(window.w) + w;
                    add_won(from.at(window) + c, won.at(window) + c, static_cast<U>(place), n, sum);
                });
                convert(sum, n, to.at(cell) + c);
            }
        };
    });
}

ScalarType index_type(int64_t longest) {
    return longest <= 1 << 8 ? ScalarType::Byte : longest <= 1 << 16 ? ScalarType::Short : ScalarType::Int;
}

// f(U()) with the unsigned type that has the bits of `dtype`
template <class F> void with_index(ScalarType dtype, const F& f) {
    if (dtype == ScalarType::Byte)
        f(uint8_t());
    else if (dtype == ScalarType::Short)
        f(uint16_t());
    else
        f(uint32_t());
}

template <class F> void with_dtype(const Tensor& x, const F& f) {
    with_floating_pointer(nullptr, x.scalar_type(),
                          [&](auto* p) { f(std::remove_const_t<std::remove_pointer_t<decltype(p)>>()); });
}

std::tuple<Tensor, Tensor> pool_tokens_fwd(const Tensor& x, int64_t t, int64_t h, int64_t w, bool largest, bool keep) {
    const Grid grid{{x.size(1), t}, {x.size(2), h}, {x.size(3), w}};
    for (const Axis& axis : {grid.t, grid.h, grid.w})
        STD_TORCH_CHECK(axis.to >= 0 && (axis.to == axis.from || (axis.to > 0 && axis.from > 0)),
                        "expected a result of length >= 1 from at least one, got ", axis.to, " from ", axis.from);
    const int64_t C = x.size(4);
    const Tensor pooled = empty({x.size(0), t, h, w, C}, x.scalar_type()),
                 winners = empty({largest && keep ? x.size(0) : 0, t, h, w, C}, index_type(grid.longest()));
    if (pooled.numel() == 0)
        return {pooled, winners};
    STD_TORCH_CHECK(!largest || grid.longest() <= INT32_MAX, "expected windows of less than 2^31 cells, got ",
                    grid.longest());
    with_dtype(x, [&]<class S>(S) {
        if (!largest) {
            sum_windows<S>(grid, x, pooled, true);
            return;
        }
        with_index(winners.scalar_type(), [&]<class U>(U) {
            largest_of_windows<S>(grid, x, pooled, keep ? static_cast<U*>(winners.mutable_data_ptr()) : nullptr);
        });
    });
    return {pooled, winners};
}

Tensor pool_tokens_bwd(const Tensor& grad, const Tensor& winners, int64_t frames, int64_t height, int64_t width,
                       bool largest) {
    const Grid grid{{grad.size(1), frames}, {grad.size(2), height}, {grad.size(3), width}};
    const Tensor dx = empty({grad.size(0), frames, height, width, grad.size(4)}, grad.scalar_type());
    if (dx.numel() == 0)
        return dx;
    with_dtype(grad, [&]<class S>(S) {
        if (!largest) {
            sum_windows<S>(grid, grad, dx, false);
            return;
        }
        STD_TORCH_CHECK(winners.numel() == grad.numel() &&
                            winners.scalar_type() == index_type(grid.reversed().longest()),
                        "winners: expected those that the forward made of the same tokens");
        with_index(winners.scalar_type(), [&]<class U>(U) { give_to_winners<S, U>(grid, grad, winners, dx); });
    });
    return dx;
}

} // namespace
} // namespace vlpfast::temporal

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
    m.impl("pool_tokens_fwd", TORCH_BOX(&vlpfast::temporal::pool_tokens_fwd));
    m.impl("pool_tokens_bwd", TORCH_BOX(&vlpfast::temporal::pool_tokens_bwd));
}
