// pair_logsumexp on the CPU. See vlpfast/ops/contrastive/pair.py for what it computes and vlpfast/ops/_schemas.py
// for the arguments.
//
// The logits S = scale x y^T + bias [M, N] exist one tile at a time, and within a tile one thread makes a strip of
// rows: the product by torch's BLAS, then one fused pass over it that takes exponentials and sums along both axes. The
// backward forms P = dLoss/dS in the tile, and two further products give P y and P^T x. Pairs that stay out (own pairs
// among them) are zeros in the tile; the own pairs' logits and gradients are made beside it.
//
// Rows alone have a kernel of their own, in rows_only.cpp. Here there are two forms of the exponentials:
// - centred: E = exp(S - c), one shift c for the whole matrix: one exponential serves rows and columns, and E can be
//   kept (stash), tile by tile as far as there is room;
// - exact: each row and column has its own largest logit as shift: two exponentials. Taken when a centred sum comes
//   out too small.
//
// The partition into tiles and strips depends on the shape alone, and partial sums are added in a fixed order: the
// number of threads changes no bit of any result.

#include "contrastive/pair.h"
#include "common/panels.h"

namespace vlpfast::contrastive {
namespace {

// The limits above which terms are refined, of sums that may get more terms; none for an axis that was not asked for.
template <class T> T limit_of(double sum, bool wanted) {
    return wanted ? static_cast<T>(kRefinedShare * sum) : std::numeric_limits<T>::infinity();
}
template <class T>
std::vector<T> limits_of(const Sums<T>& sums, bool wanted, int64_t begin, int64_t n, const T* more = nullptr) {
    std::vector<T> out(n);
    for (int64_t j = 0; j < n; ++j)
        out[j] = limit_of<T>(sums.sum[begin + j] + (more ? more[j] : T(0)), wanted);
    return out;
}

template <class T>
void sum_centred(const Problem<T>& p, T shift, const Stash<T>& stash, Sums<T>& rows, Sums<T>& columns) {
    const std::vector<T> offset = p.bias_minus(shift);
    if (p.want_rows)
        std::fill(rows.shift.begin(), rows.shift.end(), shift);
    if (p.want_columns)
        std::fill(columns.shift.begin(), columns.shift.end(), shift);
    Panels<T> y_columns;
    Buffer<T> x_copy, y_copy, scratch, partial_buffer;
    T* kept_end = stash.data;
    for (int64_t I = 0; I < p.row_tiles.count; ++I) {
        const int64_t i0 = p.row_tiles.begin(I), m = p.row_tiles.length(I);
        const View<const T> x = p.x.rows(i0, m, x_copy);
        for (int64_t J = 0; J < p.column_tiles.count; ++J) {
            const int64_t j0 = p.column_tiles.begin(J), n = p.column_tiles.length(J);
            y_columns.set(p.y.rows(j0, n, y_copy).transposed(), p.D(), n);
            T* const kept = stash.tile(i0, m, j0, n, p.N());
            kept_end = kept ? kept + m * n : kept_end;
            const View<T> tile = kept ? View<T>{kept, n, 1} : View<T>{scratch.get(m * (n + kPad)), n + kPad, 1};
            T* partial = partial_buffer.get(strips(m).count * n);
            strips(m).each([&](int64_t strip, int64_t begin, int64_t length) {
                T* const sums = partial + strip * n;
                std::fill_n(sums, n, T(0));
                y_columns.product(tile.from(begin), x.from(begin), length, false);
                for (int64_t r = begin; r < begin + length; ++r) {
                    T* e = tile.data + r * tile.row;
                    p.exponentials(e, n, i0 + r, j0, offset);
                    rows.sum[i0 + r] += add_row(e, n, sums);
                }
                const std::vector<T> limits = limits_of(columns, p.want_columns, j0, n, sums);
                for (int64_t r = begin; r < begin + length; ++r) {
                    double& sum = rows.sum[i0 + r];
                    p.refine(tile.data + r * tile.row, n, i0 + r, j0, shift, limit_of<T>(sum, p.want_rows),
                             limits.data(), [&](int64_t j, double difference, double) {
                                 sum += difference;
                                 sums[j] += static_cast<T>(difference);
                             });
                }
            });
            add_partial(partial, strips(m).count, n, columns.sum.data() + j0);
        }
    }
    std::fill(kept_end, stash.data + stash.size, T(0)); // the same bits every time
}

template <class T> void sum_exact(const Problem<T>& p, Sums<T>& rows, Sums<T>& columns) {
    constexpr T kNone = -std::numeric_limits<T>::infinity();
    if (p.want_rows)
        std::fill(rows.shift.begin(), rows.shift.end(), kNone);
    if (p.want_columns)
        std::fill(columns.shift.begin(), columns.shift.end(), kNone);
    Panels<T> y_columns;
    Buffer<T> x_copy, y_copy, scratch, partial_buffer;
    std::vector<T> column_shift(p.column_tiles.size);
    for (int64_t I = 0; I < p.row_tiles.count; ++I) {
        const int64_t i0 = p.row_tiles.begin(I), m = p.row_tiles.length(I);
        const View<const T> x = p.x.rows(i0, m, x_copy);
        for (int64_t J = 0; J < p.column_tiles.count; ++J) {
            const int64_t j0 = p.column_tiles.begin(J), n = p.column_tiles.length(J);
            y_columns.set(p.y.rows(j0, n, y_copy).transposed(), p.D(), n);
            const View<T> tile{scratch.get(m * (n + kPad)), n + kPad, 1};
            T* partial = partial_buffer.get(strips(m).count * n);
            strips(m).each([&](int64_t strip, int64_t begin, int64_t length) {
                T* const largest = partial + strip * n;
                std::fill_n(largest, n, kNone);
                y_columns.product(tile.from(begin), x.from(begin), length, false);
                for (int64_t r = begin; r < begin + length; ++r) {
                    T* s = tile.data + r * tile.row;
                    p.logits(s, n, i0 + r, j0);
                    raise(rows.sum[i0 + r], rows.shift[i0 + r], max_row(s, n, largest));
                }
            });
            for (int64_t s = 0; s < strips(m).count; ++s) {
                for (int64_t j = 0; j < n; ++j)
                    raise(columns.sum[j0 + j], columns.shift[j0 + j], partial[s * n + j]);
            }
            for (int64_t j = 0; j < n; ++j)
                column_shift[j] = usable(columns.shift[j0 + j]);
            strips(m).each([&](int64_t strip, int64_t begin, int64_t length) {
                T* const sums = partial + strip * n;
                std::fill_n(sums, n, T(0));
                for (int64_t r = begin; r < begin + length; ++r) {
                    rows.sum[i0 + r] +=
                        exp_sum_row(tile.data + r * tile.row, n, usable(rows.shift[i0 + r]), column_shift.data(), sums);
                }
            });
            add_partial(partial, strips(m).count, n, columns.sum.data() + j0);
        }
    }
    std::transform(rows.shift.begin(), rows.shift.end(), rows.shift.begin(), usable<T>);
    std::transform(columns.shift.begin(), columns.shift.end(), columns.shift.begin(), usable<T>);
}

template <class T> Forward forward(const Problem<T>& p, int64_t keep) {
    const Tensor stash = empty({std::min(keep, p.M() * p.N())}, kScalarType<T>);
    Sums<T> rows(p.M()), columns(p.N());
    sum_centred(p, centre(p), {stash.mutable_data_ptr<T>(), stash.numel()}, rows, columns);
    const Tensor exact = empty({}, ScalarType::Bool);
    const bool again = (p.want_rows && rows.underflow()) || (p.want_columns && columns.underflow());
    *exact.mutable_data_ptr<bool>() = again;
    if (again) {
        rows = Sums<T>(p.M());
        columns = Sums<T>(p.N());
        sum_exact(p, rows, columns);
    }
    const Tensor row_out = empty({p.want_rows ? p.M() : 0}, kScalarType<T>),
                 column_out = empty({p.want_columns ? p.N() : 0}, kScalarType<T>);
    const std::vector<double> own_of_row = own_logits(p);
    std::vector<double> own_of_column(p.N(), 0.0);
    if (p.want_rows) {
        T* out = row_out.mutable_data_ptr<T>();
        for (int64_t i = 0; i < p.M(); ++i)
            out[i] = static_cast<T>(rows.logsumexp(i) - own_of_row[i]);
    }
    if (p.want_columns) {
        for (size_t i = 0; i < p.own_column.size(); ++i)
            own_of_column[p.own_column[i]] = own_of_row[i];
        T* out = column_out.mutable_data_ptr<T>();
        for (int64_t j = 0; j < p.N(); ++j)
            out[j] = static_cast<T>(columns.logsumexp(j) - own_of_column[j]);
    }
    return {row_out, column_out, rows.stats(), columns.stats(), exact, stash};
}

template <class T>
Backward backward(const Problem<T>& p, const Tensor& grad_rows, const Tensor& grad_columns, const Sums<T>& rows,
                  const Sums<T>& columns, bool exact, const Stash<const T>& stash, ScalarType x_dtype,
                  ScalarType y_dtype, bool need_x, bool need_y, bool need_scale, bool need_bias) {
    const int64_t M = p.M(), N = p.N(), D = p.D();
    const std::vector<T> g = p.want_rows ? read_vector<T>(grad_rows, M) : std::vector<T>(M, T(0));
    const std::vector<T> h = p.want_columns ? read_vector<T>(grad_columns, N) : std::vector<T>(N, T(0));
    const double unit = weight_unit(g, h);
    // E (a_i + b_j) is unit times smaller than dLoss / dS
    const auto weights = [unit](const std::vector<T>& grad, const std::vector<double>& sum) {
        std::vector<T> out(grad.size());
        for (size_t i = 0; i < out.size(); ++i)
            out[i] = sum[i] == 0 ? T(0) : static_cast<T>(grad[i] / unit / sum[i]);
        return out;
    };
    const std::vector<T> a = weights(g, rows.sum), b = weights(h, columns.sum);
    std::vector<T> own(p.own_column.size()); // dLoss / dS of the own pairs, in the same unit
    for (size_t i = 0; i < own.size(); ++i)
        own[i] = static_cast<T>(-(static_cast<double>(g[i]) + h[p.own_column[i]]) / unit);
    const T shift = p.want_rows ? (M ? rows.shift[0] : T(0)) : (N ? columns.shift[0] : T(0)); // where it is one for all
    const std::vector<T> offset = p.bias_minus(shift);

    const Tensor dx = empty({need_x ? M : 0, D}, x_dtype), dy = empty({need_y ? N : 0, D}, y_dtype);
    const bool scale_by_y = need_scale && !need_x && need_y, make_gx = need_x || (need_scale && !scale_by_y);
    std::vector<double> row_dot(scale_by_y ? N : M, 0.0), bias_sum(N, 0.0);
    Panels<T> x_rows, y_rows, y_columns;
    Buffer<T> x_copy, y_copy, scratch, partial_buffer, gx_buffer, gy_buffer;
    T* const gy = !need_y ? nullptr : y_dtype == kScalarType<T> ? dy.mutable_data_ptr<T>() : gy_buffer.get(N * D);
    if (gy)
        std::fill_n(gy, N * D, T(0));

    for (int64_t I = 0; I < p.row_tiles.count; ++I) {
        const int64_t i0 = p.row_tiles.begin(I), m = p.row_tiles.length(I);
        const View<const T> x = p.x.rows(i0, m, x_copy);
        T* const gx = make_gx ? gx_buffer.get(m * D) : nullptr;
        if (gx)
            std::fill_n(gx, m * D, T(0));
        if (gy)
            x_rows.set(x, m, D);
        for (int64_t J = 0; J < p.column_tiles.count; ++J) {
            const int64_t j0 = p.column_tiles.begin(J), n = p.column_tiles.length(J);
            const View<const T> y = p.y.rows(j0, n, y_copy);
            const View<T> tile{scratch.get(m * (n + kPad)), n + kPad, 1};
            const T* kept = exact ? nullptr : stash.tile(i0, m, j0, n, N);
            if (gx)
                y_rows.set(y, n, D);
            if (!kept)
                y_columns.set(y.transposed(), D, n);
            const std::vector<T> limits = limits_of(columns, p.want_columns, j0, n);
            T* partial = need_bias ? partial_buffer.get(strips(m).count * n) : nullptr;
            strips(m).each([&](int64_t strip, int64_t begin, int64_t length) {
                T* const sums = partial ? partial + strip * n : nullptr;
                if (sums)
                    std::fill_n(sums, n, T(0));
                if (!kept)
                    y_columns.product(tile.from(begin), x.from(begin), length, false);
                for (int64_t r = begin; r < begin + length; ++r) {
                    T* s = tile.data + r * tile.row;
                    const int64_t i = i0 + r;
                    if (exact) {
                        p.logits(s, n, i, j0);
                        weigh_logits(s, n, a[i], rows.shift[i], b.data() + j0, columns.shift.data() + j0);
                    } else {
                        if (!kept) {
                            p.exponentials(s, n, i, j0, offset);
                            p.refine(s, n, i, j0, shift, limit_of<T>(rows.sum[i], p.want_rows), limits.data(),
                                     [](int64_t, double, double) {});
                        }
                        weigh(s, kept ? kept + r * n : s, n, a[i], b.data() + j0);
                    }
                    if (sums)
                        add_row(s, n, sums);
                }
                if (gx)
                    y_rows.product({gx + begin * D, D, 1}, tile.from(begin).read(), length, true);
            });
            if (partial)
                add_partial(partial, strips(m).count, n, bias_sum.data() + j0);
            if (!gy)
                continue;
            strips(n).each([&](int64_t, int64_t begin, int64_t length) {
                x_rows.product({gy + (j0 + begin) * D, D, 1}, tile.read().transposed().from(begin), length, true);
            });
        }
        if (!gx)
            continue;
        parallel_for(0, m, 32, [&](int64_t from, int64_t to) {
            std::vector<T> y_row(D);
            for (int64_t r = from; r < to; ++r) {
                if (!own.empty())
                    add_scaled(gx + r * D, p.y.row(p.own_column[i0 + r], y_row.data()), D, own[i0 + r]);
                if (!scale_by_y)
                    row_dot[i0 + r] = dot(x.data + r * x.row, gx + r * D, D);
                if (need_x)
                    store(gx + r * D, D, unit * p.scale, dx, (i0 + r) * D);
            }
        });
    }
    if (gy)
        finish_columns(p, gy, own, unit, dy, scale_by_y ? row_dot.data() : nullptr);
    return {dx, dy, scale_gradient<T>(row_dot, unit, need_scale), bias_gradient(p, bias_sum, own, unit, need_bias)};
}

bool in_double(const Tensor& x) {
    return x.scalar_type() == ScalarType::Double;
}

Forward pair_fwd(const Tensor& x, const Tensor& y, const Tensor& scale, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& own, std::optional<int64_t> own_offset,
                 const std::optional<Tensor>& row_ids, const std::optional<Tensor>& column_ids, bool rows, bool columns,
                 int64_t keep) {
    const auto run = [&]<class T>(T) {
        const Problem<T> p(x, y, scale, bias, own, own_offset, row_ids, column_ids, rows, columns);
        return rows && !columns ? rows_only_forward(p, keep) : forward(p, keep);
    };
    return in_double(x) ? run(double()) : run(float());
}

Backward pair_bwd(const Tensor& grad_rows, const Tensor& grad_columns, const Tensor& x, const Tensor& y,
                  const Tensor& scale, const std::optional<Tensor>& bias, const std::optional<Tensor>& own,
                  std::optional<int64_t> own_offset, const std::optional<Tensor>& row_ids,
                  const std::optional<Tensor>& column_ids, bool rows, bool columns, const Tensor& row_stats,
                  const Tensor& column_stats, const Tensor& exact, const Tensor& stash, bool need_x, bool need_y,
                  bool need_scale, bool need_bias) {
    const auto run = [&]<class T>(T) {
        const Problem<T> p(x, y, scale, bias, own, own_offset, row_ids, column_ids, rows, columns);
        const Stash<const T> kept{stash.const_data_ptr<T>(), stash.numel()};
        const ScalarType x_dtype = x.scalar_type(), y_dtype = y.scalar_type();
        if (rows && !columns)
            return rows_only_backward(p, grad_rows, Sums<T>(row_stats), kept, x_dtype, y_dtype, need_x, need_y,
                                      need_scale, need_bias);
        return backward(p, grad_rows, grad_columns, Sums<T>(row_stats), Sums<T>(column_stats),
                        *exact.const_data_ptr<bool>(), kept, x_dtype, y_dtype, need_x, need_y, need_scale, need_bias);
    };
    return in_double(x) ? run(double()) : run(float());
}

} // namespace
} // namespace vlpfast::contrastive

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
    m.impl("pair_fwd", TORCH_BOX(&vlpfast::contrastive::pair_fwd));
    m.impl("pair_bwd", TORCH_BOX(&vlpfast::contrastive::pair_bwd));
}
