// pair_softplus on the CPU. See vlpfast/ops/contrastive/softplus.py for what it computes and vlpfast/ops/_schemas.py
// for the arguments.
//
// The logits S = scale x y^T + bias [M, N] exist one tile at a time, and within a tile one thread makes a strip of
// rows: the product by torch's BLAS, then passes over it that sum softplus(S) and leave P = dLoss/dS = weight
// sigmoid(S) in its place. P needs no sum over the matrix, so two further products give P y and P^T x at once: three
// products in all, and nothing is kept that grows with M N. Pairs that stay out (own pairs among them) are zeros in the
// tile; the own pairs' logits, losses and gradients are made beside it.
//
// The partition into tiles and strips depends on the shape alone, and partial sums are added in a fixed order: the
// number of threads changes no bit of any result.

#include "common/panels.h"
#include "contrastive/problem.h"
#include "contrastive/softplus_rows.h"

#include <numeric>
#include <tuple>

namespace vlpfast::contrastive {
namespace {

// loss, dx, dy, dscale, dbias; gradients that are not needed are empty
using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
Result forward(const Problem<T>& p, double negative_weight, bool need_x, bool need_y, bool need_scale, bool need_bias) {
    const int64_t M = p.M(), N = p.N(), D = p.D();
    const double unit = std::exp2(std::ilogb(std::max(1.0, negative_weight))) / kWeightScale;
    const T weight = static_cast<T>(negative_weight / unit); // P is unit times smaller than dLoss / dS
    const bool gradient = need_x || need_y || need_scale || need_bias;

    const Tensor dx = empty({need_x ? M : 0, D}, kScalarType<T>), dy = empty({need_y ? N : 0, D}, kScalarType<T>);
    const bool scale_by_y = need_scale && !need_x && need_y, make_gx = need_x || (need_scale && !scale_by_y);
    std::vector<double> loss(M, 0.0), row_dot(scale_by_y ? N : M, 0.0), bias_sum(N, 0.0);
    Panels<T> x_rows, y_rows, y_columns;
    Buffer<T> x_copy, y_copy, scratch, partial_buffer, gx_buffer;
    T* const gy = need_y ? dy.mutable_data_ptr<T>() : nullptr;
    if (gy)
        std::fill_n(gy, N * D, T(0));

    // own pairs: their losses softplus(-S), and -sigmoid(-S) in P's unit
    std::vector<double> own_loss(p.own_column.size());
    std::vector<T> own(p.own_column.size());
    parallel_for(0, static_cast<int64_t>(own.size()), 64, [&](int64_t from, int64_t to) {
        std::vector<T> x_row(D), y_row(D);
        for (int64_t i = from; i < to; ++i) {
            const int64_t j = p.own_column[i];
            double s = -(p.scale * dot(p.x.row(i, x_row.data()), p.y.row(j, y_row.data()), D) + p.bias[j]);
            own_loss[i] = softplus<true>(s, 1 / unit);
            own[i] = static_cast<T>(-s);
        }
    });

    for (int64_t I = 0; I < p.row_tiles.count; ++I) {
        const int64_t i0 = p.row_tiles.begin(I), m = p.row_tiles.length(I);
        const View<const T> x = p.x.rows(i0, m, x_copy);
        T* const gx = need_x ? dx.mutable_data_ptr<T>() + i0 * D : make_gx ? gx_buffer.get(m * D) : nullptr;
        if (gx)
            std::fill_n(gx, m * D, T(0));
        if (gy)
            x_rows.set(x, m, D);
        for (int64_t J = 0; J < p.column_tiles.count; ++J) {
            const int64_t j0 = p.column_tiles.begin(J), n = p.column_tiles.length(J);
            const View<const T> y = p.y.rows(j0, n, y_copy);
            y_columns.set(y.transposed(), D, n);
            if (gx)
                y_rows.set(y, n, D);
            const View<T> tile{scratch.get(m * (n + kPad)), n + kPad, 1};
            T* const partial = need_bias ? partial_buffer.get(strips(m).count * n) : nullptr;
            strips(m).each([&](int64_t strip, int64_t begin, int64_t length) {
                T* const sums = partial ? partial + strip * n : nullptr;
                if (sums)
                    std::fill_n(sums, n, T(0));
                y_columns.product(tile.from(begin), x.from(begin), length, false);
                for (int64_t r = begin; r < begin + length; ++r) {
                    T* s = tile.data + r * tile.row;
                    p.logits(s, n, i0 + r, j0);
                    loss[i0 + r] += gradient ? softplus_row<true>(s, n, weight) : softplus_row<false>(s, n, weight);
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
                if (need_scale)
                    row_dot[i0 + r] = dot(x.data + r * x.row, gx + r * D, D);
                if (need_x)
                    store(gx + r * D, D, unit * p.scale, dx, (i0 + r) * D);
            }
        });
    }
    if (gy) {
        std::vector<T> x_row(D);
        for (size_t i = 0; i < own.size(); ++i)
            add_scaled(gy + p.own_column[i] * D, p.x.row(i, x_row.data()), D, own[i]);
        parallel_for(0, N, 32, [&](int64_t from, int64_t to) {
            std::vector<T> y_row(D);
            for (int64_t j = from; j < to; ++j) {
                if (scale_by_y)
                    row_dot[j] = dot(p.y.row(j, y_row.data()), gy + j * D, D);
                store(gy + j * D, D, unit * p.scale, dy, j * D);
            }
        });
    }

    const Tensor total = empty({}, kScalarType<T>), dscale = empty({need_scale ? 1 : 0}, kScalarType<T>),
                 dbias = empty({need_bias ? N : 0}, kScalarType<T>);
    const auto sum = [](const std::vector<double>& v) { return std::accumulate(v.begin(), v.end(), 0.0); };
    *total.mutable_data_ptr<T>() = static_cast<T>(sum(own_loss) + negative_weight * sum(loss));
    if (need_scale)
        *dscale.mutable_data_ptr<T>() = static_cast<T>(unit * sum(row_dot)); // sum of <x_i, (P y)_i>: needs no logits
    if (need_bias) {
        for (size_t i = 0; i < own.size(); ++i)
            bias_sum[p.own_column[i]] += own[i];
        T* out = dbias.mutable_data_ptr<T>();
        for (int64_t j = 0; j < N; ++j)
            out[j] = static_cast<T>(unit * bias_sum[j]);
    }
    return {total, dx, dy, dscale, dbias};
}

Result pair_softplus(const Tensor& x, const Tensor& y, const Tensor& scale, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& own, std::optional<int64_t> own_offset,
                     const std::optional<Tensor>& row_ids, const std::optional<Tensor>& column_ids,
                     double negative_weight, bool need_x, bool need_y, bool need_scale, bool need_bias) {
    const auto run = [&]<class T>(T) {
        return forward(Problem<T>(x, y, scale, bias, own, own_offset, row_ids, column_ids, true, false),
                       negative_weight, need_x, need_y, need_scale, need_bias);
    };
    return x.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

} // namespace
} // namespace vlpfast::contrastive

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
    m.impl("pair_softplus", TORCH_BOX(&vlpfast::contrastive::pair_softplus));
}
