// pair_distill on the CPU. See vlpfast/ops/contrastive/distill.py for what it computes and vlpfast/ops/_schemas.py for
// the arguments.
//
// Student's and teacher's products exist one tile at a time: a strip of rows of the student above the same rows of the
// teacher, by a few hundred columns. Where both have the same y, that is one product [x; x_t] y^T, which reads y once.
// Every sum runs along rows, so that each row has its running maximum as shift (exact for all logits: there is no
// second form, and no pass over y for a bound on the logits). Rows may be few and columns many (a queue): the parallel
// parts are ranges of columns, each with sums of its own.
//
// Plans, in products of M N D multiplications each (student's and teacher's are two), forward + backward:
// - only x needs a gradient: 4 + 0. While a tile of y is in cache its exponentials are multiplied with it, E_s y and
//   E_t y; nothing of size M N is kept, y is read from memory once. Keeping the products instead takes 2 + 1, but reads
//   y again and writes and reads 2 M N numbers: 4 N (D + 4 M) bytes more for 2 M N D operations less. That is even at
//   64 rows of 256 features if 16 operations take the time of a byte, and a small gain for many rows.
// - y needs one as well: the products are kept (stash), tile by tile as far as there is room: 2 + 2, or 2 + 4 where
//   there is none.
// The gradient of scale is the mean of the differences under either softmax: it takes no product, and keeps the digits
// that <x, dLoss/dS y> loses where all logits are alike.
//
// Pairs that stay out (own pairs among them) are zeros in the tile; the own pairs' logits and gradients are made beside
// it. The logits come from differences to the own product (`origin`), taken before they are scaled: a product near the
// own one keeps its digits whatever the scale.
//
// The partition into parts and tiles depends on the shape alone, and partial sums are added in a fixed order: the
// number of threads changes no bit of any result.

#include "contrastive/distill.h"

#include <tuple>

namespace vlpfast::contrastive {
namespace {

// Sums over what has been seen of one row: of exp(logit - shift), and of that times the student's difference; shift:
// the largest logit.
template <class T> struct Row {
    double sum = 0, mean = 0;
    T shift = -std::numeric_limits<T>::infinity();

    T usable_shift() const { return shift == -std::numeric_limits<T>::infinity() ? T(0) : shift; }
    // The shift rises to `most` if that is larger; returns the factor that brings sums to the new one.
    double raise(T most) {
        if (!(most > shift))
            return 1;
        const double factor = std::exp(static_cast<double>(shift) - most);
        sum *= factor;
        mean *= factor;
        shift = most;
        return factor;
    }
    // An exponential e and the difference beside it become more exact.
    void change(double e, double by, double difference, double exact) {
        sum += by;
        mean += (e + by) * exact - e * difference;
    }
};

// One part's sums for a block of m rows.
template <class T> struct PartialSums {
    std::vector<Row<T>> student, teacher;
    T* weighted = nullptr; // [2 m, D] E_s y and E_t y in the order of Rows; null: not wanted
};

template <class T>
void sum_part(const Distillation<T>& d, const Rows<T>& rows, int64_t i0, int64_t from, int64_t count,
              const Stash<T>& stash, int64_t& kept_end, PartialSums<T>& sums) {
    const int64_t D = d.D(), N = d.N();
    Columns<T> columns(d);
    Buffer<T> scratch, row_buffer;
    T* const differences = row_buffer.get(3 * kTile);
    std::vector<T> x_copy(D), y_copy(D);
    const Parts tiles(count, kTile);
    for (int64_t J = 0; J < tiles.count; ++J) {
        const int64_t j0 = from + tiles.begin(J), n = tiles.length(J);
        const int64_t next = j0 + n, next_count = J + 1 < tiles.count ? tiles.length(J + 1) : 0;
        columns.set(j0, n, true, sums.weighted);
        for (int64_t strip = 0; strip < rows.strips.count; ++strip) {
            const int64_t begin = rows.strips.begin(strip), m = rows.strips.length(strip);
            T* const kept = stash.tile(2 * (i0 + begin), 2 * m, j0, n, N);
            const View<T> tile =
                kept ? View<T>{kept, n, 1} : View<T>{scratch.get(2 * kStrip * (kTile + kPad)), n + kPad, 1};
            if (kept)
                kept_end = std::max<int64_t>(kept_end, kept + 2 * m * n - stash.data);
            columns.products(tile, rows, begin, m);
            T* const weighted = sums.weighted ? sums.weighted + 2 * begin * D : nullptr;
            for (int64_t r = 0; r < m; ++r) {
                const int64_t i = i0 + begin + r;
                const T *products = tile.data + r * tile.row, *products_t = tile.data + (m + r) * tile.row;
                T* const s = kept ? differences + kTile : tile.data + r * tile.row;
                T* const t = kept ? differences + 2 * kTile : tile.data + (m + r) * tile.row;
                Row<T>&student = sums.student[begin + r], &teacher = sums.teacher[begin + r];

                if (strip == 0)
                    columns.prefetch(next + r * next_count / m, next + (r + 1) * next_count / m);
                d.student.differences(differences, products, n, i, j0);
                d.teacher.logits(t, products_t, n, i, j0);
                const T most_t = largest_of(t, n);
                const double factor_t = teacher.raise(most_t);
                exponentiate(t, differences, n, teacher.usable_shift(), teacher.sum, teacher.mean);
                d.teacher.refine(
                    t, n, i, j0, teacher.usable_shift(), most_t, teacher.sum, [&](int64_t j, double by, double) {
                        const double product =
                            dot(d.student.p.x.row(i, x_copy.data()), d.student.p.y.row(j0 + j, y_copy.data()), D);
                        teacher.change(t[j], by, differences[j], product - d.student.origin[i]);
                    });
                d.student.logits(s, products, n, i, j0);
                const T most = largest_of(s, n);
                const double factor = student.raise(most);
                exponentiate(s, differences, n, student.usable_shift(), student.sum, student.mean);
                d.student.refine(s, n, i, j0, student.usable_shift(), most, student.sum,
                                 [&](int64_t j, double by, double product) {
                                     student.change(s[j], by, differences[j], product - d.student.origin[i]);
                                 });
                if (weighted && factor != 1)
                    scale_row(weighted + r * D, D, factor, weighted + r * D);
                if (weighted && factor_t != 1)
                    scale_row(weighted + (m + r) * D, D, factor_t, weighted + (m + r) * D);
            }
            if (weighted)
                columns.times_y(weighted, tile.read(), 2 * m);
        }
    }
}

// The parts' sums of one row as one, and the factors [parts] that bring theirs to its shift.
template <class T, class F> Row<T> merge(int64_t count, std::vector<double>& factor, const F& row_of) {
    Row<T> all;
    for (int64_t k = 0; k < count; ++k)
        all.raise(row_of(k).shift);
    all.shift = all.usable_shift();
    for (int64_t k = 0; k < count; ++k) {
        factor[k] = std::exp(static_cast<double>(row_of(k).shift) - all.shift);
        all.sum += factor[k] * row_of(k).sum;
        all.mean += factor[k] * row_of(k).mean;
    }
    return all;
}

// student, teacher, cross, stats, slopes, stash
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T> Forward forward(const Distillation<T>& d, bool want_slopes, int64_t keep) {
    const int64_t M = d.M(), N = d.N(), D = d.D();
    STD_TORCH_CHECK(!want_slopes || keep == 0, "pair_distill_fwd: either slopes or a stash");
    const Tensor student = empty({M}, kScalarType<T>), teacher = empty({M}, kScalarType<T>),
                 cross = empty({M}, kScalarType<T>), stats = empty({6, M}, kScalarType<T>),
                 slopes = empty({want_slopes ? 2 : 0, M, D}, kScalarType<T>),
                 stash = empty({std::min(keep, 2 * M * N)}, kScalarType<T>);
    T *const student_out = student.mutable_data_ptr<T>(), *const teacher_out = teacher.mutable_data_ptr<T>(),
             *const cross_out = cross.mutable_data_ptr<T>(), *const stats_out = stats.mutable_data_ptr<T>(),
             *const slopes_out = slopes.mutable_data_ptr<T>();
    const Stash<T> kept{stash.mutable_data_ptr<T>(), stash.numel()};
    const Parts blocks(M, kBlock), parts = column_parts(N);
    std::vector<int64_t> kept_end(parts.count, 0);
    Buffer<T> weighted_buffer;
    for (int64_t block = 0; block < blocks.count; ++block) {
        const int64_t i0 = blocks.begin(block), m = blocks.length(block);
        const Rows<T> rows(d, i0, m);
        std::vector<PartialSums<T>> sums(parts.count);
        T* const weighted = want_slopes ? weighted_buffer.get(parts.count * 2 * m * D) : nullptr;
        parts.each([&](int64_t part, int64_t from, int64_t count) {
            PartialSums<T>& mine = sums[part];
            mine.student.resize(m);
            mine.teacher.resize(m);
            if (weighted) {
                mine.weighted = weighted + part * 2 * m * D;
                std::fill_n(mine.weighted, 2 * m * D, T(0));
            }
            sum_part(d, rows, i0, from, count, kept, kept_end[part], mine);
        });
        parallel_for(0, m, 16, [&](int64_t first, int64_t last) {
            std::vector<double> factor(parts.count), factor_t(parts.count);
            std::vector<T> y_copy(D);
            for (int64_t r = first; r < last; ++r) {
                const int64_t i = i0 + r;
                const Row<T> s = merge<T>(parts.count, factor, [&](int64_t k) { return sums[k].student[r]; });
                const Row<T> t = merge<T>(parts.count, factor_t, [&](int64_t k) { return sums[k].teacher[r]; });
                const double origin = d.student.origin[i] - d.student.own[i]; // differences were to the rounded one
                const double mean = s.sum == 0 ? -d.student.own[i] : s.mean / s.sum + origin;
                const double mean_t = t.sum == 0 ? 0 : t.mean / t.sum + origin;
                student_out[i] = static_cast<T>(std::log(s.sum) + s.shift + d.student.correction(i));
                teacher_out[i] = static_cast<T>(std::log(t.sum) + t.shift + d.teacher.correction(i));
                cross_out[i] = static_cast<T>(d.student.p.scale * mean_t);
                const double numbers[] = {s.sum, s.shift, t.sum, t.shift, mean, mean_t};
                for (int64_t k = 0; k < 6; ++k)
                    stats_out[k * M + i] = static_cast<T>(numbers[k]);
                if (!want_slopes)
                    continue;
                const int64_t strip = r / rows.strips.size, begin = rows.strips.begin(strip);
                const int64_t at[] = {begin + r, begin + r + rows.strips.length(strip)}; // in the order of Rows
                const std::vector<int64_t>& own = d.student.p.own_column;
                const T* const y_own = own.empty() ? nullptr : d.student.p.y.row(own[i], y_copy.data());
                for (int64_t side = 0; side < 2; ++side) {
                    const double sum = side == 0 ? s.sum : t.sum;
                    T* const out = slopes_out + (side * M + i) * D;
                    std::fill_n(out, D, T(0));
                    for (int64_t k = 0; k < parts.count && sum != 0; ++k) {
                        const double share = (side == 0 ? factor[k] : factor_t[k]) / sum;
                        add_scaled(out, weighted + (k * 2 * m + at[side]) * D, D, static_cast<T>(share));
                    }
                    if (y_own && (side == 0 || sum != 0))
                        add_scaled(out, y_own, D, T(-1));
                }
            }
        });
    }
    const int64_t end = parts.count ? *std::max_element(kept_end.begin(), kept_end.end()) : 0;
    std::fill(kept.data + end, kept.data + kept.size, T(0)); // the same bits every time
    return {student, teacher, cross, stats, slopes, stash};
}

// dx, dy: empty where not needed
using Backward = std::tuple<Tensor, Tensor>;

template <class T>
Backward backward(const Distillation<T>& d, const Tensor& grad_student, const Tensor& grad_cross, const Tensor& stats,
                  const Tensor& stash, ScalarType x_dtype, ScalarType y_dtype, bool need_x, bool need_y) {
    const int64_t M = d.M(), N = d.N(), D = d.D();
    const Problem<T>& p = d.student.p;
    const std::vector<T> g = read_vector<T>(grad_student, M), h = read_vector<T>(grad_cross, M);
    const T *const sum = stats.const_data_ptr<T>(), *const shift = sum + M, *const sum_t = sum + 2 * M,
                   *const shift_t = sum + 3 * M;
    const Stash<const T> kept_products{stash.const_data_ptr<T>(), stash.numel()};
    // P = a E_s + b E_t is unit times smaller than dLoss / dS, and so is dLoss / dS of the own pairs
    const double unit = weight_unit(g, h);
    std::vector<T> a(M), b(M), own(p.own_column.size());
    for (int64_t i = 0; i < M; ++i) {
        a[i] = sum[i] == 0 ? T(0) : static_cast<T>(g[i] / unit / sum[i]);
        b[i] = sum_t[i] == 0 ? T(0) : static_cast<T>(h[i] / unit / sum_t[i]);
        if (!own.empty())
            own[i] = static_cast<T>(-(static_cast<double>(g[i]) + (sum_t[i] == 0 ? T(0) : h[i])) / unit);
    }

    const Tensor dx = empty({need_x ? M : 0, D}, x_dtype), dy = empty({need_y ? N : 0, D}, y_dtype);
    Buffer<T> gx_buffer, gy_buffer;
    T* const gy = !need_y ? nullptr : y_dtype == kScalarType<T> ? dy.mutable_data_ptr<T>() : gy_buffer.get(N * D);
    if (gy)
        std::fill_n(gy, N * D, T(0));

    const Parts blocks(M, kBlock), parts = column_parts(N);
    for (int64_t block = 0; block < blocks.count; ++block) {
        const int64_t i0 = blocks.begin(block), m_block = blocks.length(block);
        const Rows<T> rows(d, i0, m_block);
        T* const partial = need_x ? gx_buffer.get((parts.count + 1) * m_block * D) : nullptr;
        parts.each([&](int64_t part, int64_t from, int64_t count) {
            T* const gx = partial ? partial + part * m_block * D : nullptr;
            if (gx)
                std::fill_n(gx, m_block * D, T(0));
            Columns<T> columns(d);
            Panels<T> x_rows;
            Buffer<T> scratch, row_buffer;
            T* const t = row_buffer.get(kTile);
            const Parts tiles(count, kTile);
            for (int64_t J = 0; J < tiles.count; ++J) {
                const int64_t j0 = from + tiles.begin(J), n = tiles.length(J);
                const auto place = [&](int64_t strip) {
                    return kept_products.tile(2 * (i0 + rows.strips.begin(strip)), 2 * rows.strips.length(strip), j0, n,
                                              N);
                };
                columns.set(j0, n, !place(rows.strips.count - 1), gx); // the last strip is the last to have a place
                for (int64_t strip = 0; strip < rows.strips.count; ++strip) {
                    const int64_t begin = rows.strips.begin(strip), m = rows.strips.length(strip);
                    const View<T> tile{scratch.get(2 * kStrip * (kTile + kPad)), n + kPad, 1};
                    const T* const kept = place(strip);
                    const View<const T> products = kept ? View<const T>{kept, n, 1} : tile.read();
                    if (!kept)
                        columns.products(tile, rows, begin, m);
                    for (int64_t r = 0; r < m; ++r) {
                        const int64_t i = i0 + begin + r;
                        T* const s = tile.data + r * tile.row;
                        const auto exponentials = [&](const Side<T>& side, T* out, int64_t row, T shift, T sum) {
                            side.logits(out, products.data + row * products.row, n, i, j0);
                            const T most = largest_of(out, n);
                            exponentiate(out, n, shift);
                            side.refine(out, n, i, j0, shift, most, sum, [](int64_t, double, double) {});
                        };
                        exponentials(d.teacher, t, m + r, shift_t[i], sum_t[i]);
                        exponentials(d.student, s, r, shift[i], sum[i]);
                        mix(s, a[i], t, b[i], n);
                    }
                    if (gx)
                        columns.times_y(gx + begin * D, tile.read(), m);
                    if (gy) {
                        x_rows.set(rows.student(begin), m, D);
                        x_rows.product({gy + j0 * D, D, 1}, tile.read().transposed(), n, true);
                    }
                }
            }
        });
        if (!need_x)
            continue;
        T* const gx = partial + parts.count * m_block * D;
        parallel_for(0, m_block, 16, [&](int64_t from, int64_t to) {
            std::vector<T> y_row(D);
            for (int64_t r = from; r < to; ++r) {
                T* const out = gx + r * D;
                std::fill_n(out, D, T(0));
                for (int64_t k = 0; k < parts.count; ++k)
                    add_scaled(out, partial + (k * m_block + r) * D, D, T(1));
                if (!own.empty())
                    add_scaled(out, p.y.row(p.own_column[i0 + r], y_row.data()), D, own[i0 + r]);
                store(out, D, unit * p.scale, dx, (i0 + r) * D);
            }
        });
    }
    if (gy) {
        std::vector<T> x_row(D);
        for (size_t i = 0; i < own.size(); ++i)
            add_scaled(gy + p.own_column[i] * D, p.x.row(i, x_row.data()), D, own[i]);
        parallel_for(0, N, 32, [&](int64_t from, int64_t to) {
            for (int64_t j = from; j < to; ++j)
                store(gy + j * D, D, unit * p.scale, dy, j * D);
        });
    }
    return {dx, dy};
}

Forward pair_distill_fwd(const Tensor& x, const Tensor& y, const Tensor& x_t, const std::optional<Tensor>& y_t,
                         const Tensor& scale, const Tensor& scale_t, const std::optional<Tensor>& bias_t,
                         const std::optional<Tensor>& own, std::optional<int64_t> own_offset,
                         const std::optional<Tensor>& row_ids, const std::optional<Tensor>& column_ids,
                         bool want_slopes, int64_t keep) {
    const auto run = [&]<class T>(T) {
        return forward(Distillation<T>(x, y, x_t, y_t, scale, scale_t, bias_t, own, own_offset, row_ids, column_ids),
                       want_slopes, keep);
    };
    return x.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

Backward pair_distill_bwd(const Tensor& grad_student, const Tensor& grad_cross, const Tensor& x, const Tensor& y,
                          const Tensor& x_t, const std::optional<Tensor>& y_t, const Tensor& scale,
                          const Tensor& scale_t, const std::optional<Tensor>& bias_t, const std::optional<Tensor>& own,
                          std::optional<int64_t> own_offset, const std::optional<Tensor>& row_ids,
                          const std::optional<Tensor>& column_ids, const Tensor& stats, const Tensor& stash,
                          bool need_x, bool need_y) {
    const auto run = [&]<class T>(T) {
        return backward(Distillation<T>(x, y, x_t, y_t, scale, scale_t, bias_t, own, own_offset, row_ids, column_ids),
                        grad_student, grad_cross, stats, stash, x.scalar_type(), y.scalar_type(), need_x, need_y);
    };
    return x.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

} // namespace
} // namespace vlpfast::contrastive

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
    m.impl("pair_distill_fwd", TORCH_BOX(&vlpfast::contrastive::pair_distill_fwd));
    m.impl("pair_distill_bwd", TORCH_BOX(&vlpfast::contrastive::pair_distill_bwd));
}
