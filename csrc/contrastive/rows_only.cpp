// pair_logsumexp for rows alone, on the CPU: vocabularies, queues, rankings.
//
// Each row has its running maximum over the column tiles as shift, so that it is exact whatever the norms: there is no
// second form and no pass over the features for a bound on the logits. What is kept (stash) are the logits, bias
// included and -inf where a pair stays out, because a tile's shift is not yet the row's.
//
// Plans, forward + backward, M N D multiplications a product, M N exponentials:
// - all logits kept: 1 + 2 products, 1 + 1 exponentials;
// - none kept: 1 + 3 products, 1 + 1 exponentials.
// With E = exp(S - shift) and row weights a, dLoss / dS = diag(a) E: the rows of E y are multiplied with a afterwards
// and the rows of x beforehand, and no pass over the tile does it.
//
// Terms that carry much of their row's sum are made again in double (Problem::refine), in the backward as well: kept
// logits are rounded to float, by 4e-6 at 100 and 5e-4 at 10^4.
//
// Strips of rows run in parallel where there are many rows; where they are few, ranges of columns do, each with sums of
// its own and with its rows of dy. The partition depends on the shape alone, and partial sums are added in a fixed
// order: the number of threads changes no bit of any result.

#include "common/panels.h"
#include "contrastive/pair.h"

namespace vlpfast::contrastive {
namespace {

// Up to kFewRows rows the columns are cut into at most kParts ranges of at least kLeastColumns.
constexpr int64_t kFewRows = 256, kParts = 16, kLeastColumns = 256;
// With so many rows and fewer, y is read once for each product as it is.
constexpr int64_t kUnpackedRows = 16;

// f(part, begin, length) for the ranges of columns; a single one leaves the threads to the strips within its tiles.
template <class F> void each_range(const Parts& ranges, const F& f) {
    if (ranges.count > 1)
        ranges.each(f);
    else
        f(0, 0, ranges.total);
}
Parts column_ranges(int64_t M, int64_t N) {
    const int64_t most = M > kFewRows ? N : std::max(kLeastColumns, (N + kParts - 1) / kParts);
    return Parts(N, std::max<int64_t>(most, 1));
}

// Row i's terms e = exp(S - shift) that carry much of `sum` become more exact; changed(by how much).
template <class T, class F>
void refine(const Problem<T>& p, T* e, int64_t n, int64_t i, int64_t begin, T shift, double sum, const F& changed) {
    static const std::vector<T> no_limits(kColumns, std::numeric_limits<T>::infinity());
    p.refine(e, n, i, begin, shift, static_cast<T>(kRefinedShare * sum), no_limits.data(),
             [&](int64_t, double by, double) { changed(by); });
}

// Sums of m rows x, the first of them row i0, over columns [from, from + count).
template <class T>
void sum_range(const Problem<T>& p, View<const T> x, int64_t i0, int64_t m, int64_t from, int64_t count,
               const Stash<T>& stash, Sums<T>& sums, int64_t& kept_end) {
    Panels<T> y_columns;
    Buffer<T> y_copy, scratch;
    const Parts tiles(count, kColumns);
    for (int64_t J = 0; J < tiles.count; ++J) {
        const int64_t j0 = from + tiles.begin(J), n = tiles.length(J);
        y_columns.set(p.y.rows(j0, n, y_copy).transposed(), p.D(), n, m > kUnpackedRows);
        T* const kept = stash.tile(i0, m, j0, n, p.N());
        if (kept)
            kept_end = kept + m * n - stash.data;
        const View<T> tile = kept ? View<T>{kept, n, 1} : View<T>{scratch.get(m * (n + kPad)), n + kPad, 1};
        strips(m).each([&](int64_t, int64_t begin, int64_t length) {
            std::vector<T> beside(kept ? n : 0);
            y_columns.product(tile.from(begin), x.from(begin), length, false);
            for (int64_t r = begin; r < begin + length; ++r) {
                T *const s = tile.data + r * tile.row, *const e = kept ? beside.data() : s;
                p.logits(s, n, i0 + r, j0);
                double& sum = sums.sum[r];
                raise(sum, sums.shift[r], largest_of(s, n));
                const T shift = usable(sums.shift[r]);
                sum += exponentiate(e, s, n, shift);
                refine(p, e, n, i0 + r, j0, shift, sum, [&](double by) { sum += by; });
            }
        });
    }
}

} // namespace

template <class T> Forward rows_only_forward(const Problem<T>& p, int64_t keep) {
    const int64_t M = p.M(), N = p.N();
    const Tensor row_out = empty({M}, kScalarType<T>), column_stats = empty({2, N}, kScalarType<T>),
                 exact = empty({}, ScalarType::Bool), stash = empty({std::min(keep, M * N)}, kScalarType<T>);
    const Stash<T> kept{stash.mutable_data_ptr<T>(), stash.numel()};
    const Parts ranges = column_ranges(M, N);
    std::vector<int64_t> kept_end(ranges.count + 1, 0);
    Sums<T> rows(M);
    Buffer<T> x_copy;
    for (int64_t I = 0; I < p.row_tiles.count; ++I) {
        const int64_t i0 = p.row_tiles.begin(I), m = p.row_tiles.length(I);
        const View<const T> x = p.x.rows(i0, m, x_copy);
        Sums<T> none(m);
        std::fill(none.shift.begin(), none.shift.end(), -std::numeric_limits<T>::infinity());
        std::vector<Sums<T>> sums(std::max<int64_t>(ranges.count, 1), none);
        each_range(ranges, [&](int64_t part, int64_t from, int64_t count) {
            sum_range(p, x, i0, m, from, count, kept, sums[part], kept_end[part]);
        });
        for (int64_t r = 0; r < m; ++r) {
            double sum = sums[0].sum[r];
            T shift = sums[0].shift[r];
            for (size_t k = 1; k < sums.size(); ++k) {
                raise(sum, shift, sums[k].shift[r]);
                sum += sums[k].sum[r] * std::exp(static_cast<double>(sums[k].shift[r]) - usable(shift));
            }
            rows.sum[i0 + r] = sum;
            rows.shift[i0 + r] = usable(shift);
        }
    }
    std::fill(kept.data + *std::max_element(kept_end.begin(), kept_end.end()), kept.data + kept.size, T(0));
    std::fill_n(column_stats.mutable_data_ptr<T>(), 2 * N, T(0));
    *exact.mutable_data_ptr<bool>() = true;
    const std::vector<double> own = own_logits(p);
    T* const out = row_out.mutable_data_ptr<T>();
    for (int64_t i = 0; i < M; ++i)
        out[i] = static_cast<T>(rows.logsumexp(i) - own[i]);
    return {row_out, empty({0}, kScalarType<T>), rows.stats(), column_stats, exact, stash};
}

template <class T>
Backward rows_only_backward(const Problem<T>& p, const Tensor& grad_rows, const Sums<T>& rows,
                            const Stash<const T>& stash, ScalarType x_dtype, ScalarType y_dtype, bool need_x,
                            bool need_y, bool need_scale, bool need_bias) {
    const int64_t M = p.M(), N = p.N(), D = p.D();
    const std::vector<T> g = read_vector<T>(grad_rows, M);
    const double unit = weight_unit(g, {});
    // diag(a) E is unit times smaller than dLoss / dS, and so is `own`, dLoss / dS of the own pairs
    std::vector<T> a(M), own(p.own_column.size());
    for (int64_t i = 0; i < M; ++i)
        a[i] = rows.sum[i] == 0 ? T(0) : static_cast<T>(g[i] / unit / rows.sum[i]);
    for (size_t i = 0; i < own.size(); ++i)
        own[i] = static_cast<T>(-g[i] / unit);
    const Tensor dx = empty({need_x ? M : 0, D}, x_dtype), dy = empty({need_y ? N : 0, D}, y_dtype);
    const bool scale_by_y = need_scale && !need_x && need_y, make_gx = need_x || (need_scale && !scale_by_y);
    std::vector<double> dots(scale_by_y ? N : M, 0.0), bias_sum(N, 0.0);
    Panels<T> x_rows;
    Buffer<T> x_copy, x_weighted, gx_buffer, gy_buffer;
    T* const gy = !need_y ? nullptr : y_dtype == kScalarType<T> ? dy.mutable_data_ptr<T>() : gy_buffer.get(N * D);
    if (gy && M == 0)
        std::fill_n(gy, N * D, T(0)); // else the first tile of rows writes it

    const Parts ranges = column_ranges(M, N);
    for (int64_t I = 0; I < p.row_tiles.count; ++I) {
        const int64_t i0 = p.row_tiles.begin(I), m = p.row_tiles.length(I);
        const View<const T> x = p.x.rows(i0, m, x_copy);
        if (gy) {
            T* const weighted = x_weighted.get(m * D);
            parallel_for(0, m, 64, [&](int64_t from, int64_t to) {
                for (int64_t r = from; r < to; ++r)
                    scale_row(x.data + r * x.row, D, a[i0 + r], weighted + r * D);
            });
            x_rows.set({weighted, D, 1}, m, D);
        }
        T* const gx = make_gx ? gx_buffer.get(std::max<int64_t>(ranges.count, 1) * m * D) : nullptr; // [ranges, m, D]
        each_range(ranges, [&](int64_t part, int64_t from, int64_t count) {
            T* const partial = gx ? gx + part * m * D : nullptr;
            if (partial)
                std::fill_n(partial, m * D, T(0));
            Panels<T> y_rows, y_columns;
            Buffer<T> y_copy, scratch, sums_buffer;
            const Parts tiles(count, kColumns);
            for (int64_t J = 0; J < tiles.count; ++J) {
                const int64_t j0 = from + tiles.begin(J), n = tiles.length(J);
                const View<const T> y = p.y.rows(j0, n, y_copy);
                const View<T> tile{scratch.get(m * (n + kPad)), n + kPad, 1};
                const T* const kept = stash.tile(i0, m, j0, n, N);
                if (partial)
                    y_rows.set(y, n, D, m > kUnpackedRows);
                if (!kept)
                    y_columns.set(y.transposed(), D, n, m > kUnpackedRows);
                T* const strip_sums = need_bias ? sums_buffer.get(strips(m).count * n) : nullptr;
                strips(m).each([&](int64_t strip, int64_t begin, int64_t length) {
                    T* const sums = strip_sums ? strip_sums + strip * n : nullptr;
                    if (sums)
                        std::fill_n(sums, n, T(0));
                    if (!kept)
                        y_columns.product(tile.from(begin), x.from(begin), length, false);
                    for (int64_t r = begin; r < begin + length; ++r) {
                        const int64_t i = i0 + r;
                        T* const e = tile.data + r * tile.row;
                        if (!kept)
                            p.logits(e, n, i, j0);
                        exponentiate(e, kept ? kept + r * n : e, n, rows.shift[i]);
                        refine(p, e, n, i, j0, rows.shift[i], rows.sum[i], [](double) {});
                        if (sums)
                            add_scaled(sums, e, n, a[i]);
                    }
                    if (partial)
                        y_rows.product({partial + begin * D, D, 1}, tile.from(begin).read(), length, true);
                });
                if (strip_sums)
                    add_partial(strip_sums, strips(m).count, n, bias_sum.data() + j0);
                if (!gy)
                    continue;
                strips(n).each([&](int64_t, int64_t begin, int64_t length) {
                    x_rows.product({gy + (j0 + begin) * D, D, 1}, tile.read().transposed().from(begin), length, I > 0);
                });
            }
        });
        if (!gx)
            continue;
        parallel_for(0, m, 32, [&](int64_t from, int64_t to) {
            std::vector<T> y_row(D);
            for (int64_t r = from; r < to; ++r) {
                const int64_t i = i0 + r;
                T* const out = gx + r * D;
                for (int64_t k = 1; k < ranges.count; ++k)
                    add_scaled(out, gx + (k * m + r) * D, D, T(1));
                scale_row(out, D, a[i], out);
                if (!own.empty())
                    add_scaled(out, p.y.row(p.own_column[i], y_row.data()), D, own[i]);
                if (!scale_by_y)
                    dots[i] = dot(x.data + r * x.row, out, D);
                if (need_x)
                    store(out, D, unit * p.scale, dx, i * D);
            }
        });
    }
    if (gy)
        finish_columns(p, gy, own, unit, dy, scale_by_y ? dots.data() : nullptr);
    return {dx, dy, scale_gradient<T>(dots, unit, need_scale), bias_gradient(p, bias_sum, own, unit, need_bias)};
}

template Forward rows_only_forward(const Problem<float>&, int64_t);
template Forward rows_only_forward(const Problem<double>&, int64_t);
template Backward rows_only_backward(const Problem<float>&, const Tensor&, const Sums<float>&,
                                     const Stash<const float>&, ScalarType, ScalarType, bool, bool, bool, bool);
template Backward rows_only_backward(const Problem<double>&, const Tensor&, const Sums<double>&,
                                     const Stash<const double>&, ScalarType, ScalarType, bool, bool, bool, bool);

} // namespace vlpfast::contrastive
