// What the two kernels of pair_logsumexp share: for both directions or columns alone (pair.cpp), for rows alone
// (rows_only.cpp).
#pragma once

#include "contrastive/problem.h"

#include <tuple>

namespace vlpfast::contrastive {

// rows, columns, row_stats, column_stats, exact, stash
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
// dx, dy, dscale, dbias: empty where not needed
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class T> Forward rows_only_forward(const Problem<T>& p, int64_t keep);
template <class T>
Backward rows_only_backward(const Problem<T>& p, const Tensor& grad_rows, const Sums<T>& rows,
                            const Stash<const T>& stash, ScalarType x_dtype, ScalarType y_dtype, bool need_x,
                            bool need_y, bool need_scale, bool need_bias);

// The running maximum of one row or column rises to `largest`: what was summed so far is rescaled.
template <class T> void raise(double& sum, T& shift, T largest) {
    if (!(largest > shift))
        return;
    sum *= std::exp(static_cast<double>(shift) - largest);
    shift = largest;
}

// A shift to subtract from logits that are all -inf: -inf - (-inf) is no number.
template <class T> T usable(T shift) {
    return shift == -std::numeric_limits<T>::infinity() ? T(0) : shift;
}

// The own logits of all rows, 0 without.
template <class T> std::vector<double> own_logits(const Problem<T>& p) {
    std::vector<double> own(p.M(), 0.0);
    parallel_for(0, static_cast<int64_t>(p.own_column.size()), 64, [&](int64_t from, int64_t to) {
        std::vector<T> x_copy(p.D()), y_copy(p.D());
        for (int64_t i = from; i < to; ++i) {
            const int64_t j = p.own_column[i];
            own[i] = p.scale * dot(p.x.row(i, x_copy.data()), p.y.row(j, y_copy.data()), p.D()) + p.bias[j];
        }
    });
    return own;
}

// gy [N, D] = P^T x without the own pairs, whose gradients `own` are added. Becomes unit * scale times that in dy;
// where `dots` [N] is wanted, <y, gy>.
template <class T>
void finish_columns(const Problem<T>& p, T* gy, const std::vector<T>& own, double unit, const Tensor& dy,
                    double* dots) {
    const int64_t D = p.D();
    std::vector<T> x_row(D);
    for (size_t i = 0; i < own.size(); ++i)
        add_scaled(gy + p.own_column[i] * D, p.x.row(i, x_row.data()), D, own[i]);
    parallel_for(0, p.N(), 32, [&](int64_t from, int64_t to) {
        std::vector<T> y_row(D);
        for (int64_t j = from; j < to; ++j) {
            if (dots)
                dots[j] = dot(p.y.row(j, y_row.data()), gy + j * D, D);
            store(gy + j * D, D, unit * p.scale, dy, j * D);
        }
    });
}

template <class T> Tensor scale_gradient(const std::vector<double>& dots, double unit, bool needed) {
    const Tensor out = empty({needed ? 1 : 0}, kScalarType<T>);
    double sum = 0;
    for (const double d : dots)
        sum += d;
    if (needed)
        *out.mutable_data_ptr<T>() = static_cast<T>(unit * sum);
    return out;
}

// `sum` [N]: of P along its columns without the own pairs.
template <class T>
Tensor bias_gradient(const Problem<T>& p, std::vector<double> sum, const std::vector<T>& own, double unit,
                     bool needed) {
    const Tensor out = empty({needed ? p.N() : 0}, kScalarType<T>);
    if (!needed)
        return out;
    for (size_t i = 0; i < own.size(); ++i)
        sum[p.own_column[i]] += own[i];
    T* const data = out.mutable_data_ptr<T>();
    for (int64_t j = 0; j < p.N(); ++j)
        data[j] = static_cast<T>(unit * sum[j]);
    return out;
}

} // namespace vlpfast::contrastive
