// The two matrices of logits that pair_distill is about, a student's and a teacher's, and how their products are made.
#pragma once

#include "common/panels.h"
#include "contrastive/distill_rows.h"
#include "contrastive/problem.h"

#include <cstring>

namespace vlpfast::contrastive {

// Rows that share the parts' sums, rows of a strip (as many again are the teacher's), parts of the columns, columns of
// a tile. A tile, its rows of y and the next ones stay in a second-level cache of 2 MiB.
constexpr int64_t kBlock = 512, kStrip = 128, kParts = 16, kTile = 512;

inline Parts column_parts(int64_t N) {
    return Parts(N, std::max<int64_t>(64, (N + kParts - 1) / kParts));
}

// One model's logits, relative to scale * origin.
template <class T> struct Side {
    const Problem<T> p;
    std::vector<double> own; // [M] products of the own pairs, 0 without
    std::vector<T> origin;   // [M] the same, rounded

    template <class... Arguments>
    explicit Side(const Arguments&... arguments) : p(arguments..., true, false), own(p.M(), 0.0) {
        parallel_for(0, static_cast<int64_t>(p.own_column.size()), 64, [&](int64_t from, int64_t to) {
            std::vector<T> x_copy(p.D()), y_copy(p.D());
            for (int64_t i = from; i < to; ++i)
                own[i] = dot(p.x.row(i, x_copy.data()), p.y.row(p.own_column[i], y_copy.data()), p.D());
        });
        origin.assign(own.begin(), own.end());
    }

    // What is to be added to a logit to have it relative to the own one (to 0 without one).
    double correction(int64_t i) const {
        return p.own_column.empty() ? 0 : p.scale * (origin[i] - own[i]) - p.bias[p.own_column[i]];
    }
    // A row of products becomes one of differences to the own one, 0 for those that stay out.
    void differences(T* out, const T* products, int64_t n, int64_t i, int64_t begin) const {
        subtract(out, products, n, origin[i]);
        p.leave_out(out, n, i, begin, T(0));
    }
    // A row of products becomes one of logits.
    void logits(T* out, const T* products, int64_t n, int64_t i, int64_t begin) const {
        to_logits(out, products, n, p.scale, origin[i], p.bias.data() + begin);
        p.leave_out(out, n, i, begin, -std::numeric_limits<T>::infinity());
    }
    // See Problem::refine; most: the largest logit of these, sum: of the row.
    template <class F>
    void refine(T* e, int64_t n, int64_t i, int64_t begin, T shift, T most, double sum, const F& changed) const {
        static const std::vector<T> no_limits(kTile, std::numeric_limits<T>::infinity());
        const T limit = static_cast<T>(kRefinedShare * sum);
        if (std::exp(most - shift) > limit / 2)
            p.refine(e, n, i, begin, static_cast<double>(shift) + static_cast<double>(p.scale) * origin[i], limit,
                     no_limits.data(), changed);
    }
};

template <class T> struct Distillation {
    const Side<T> student, teacher;
    const bool shared; // the two have one y

    Distillation(const Tensor& x, const Tensor& y, const Tensor& x_t, const std::optional<Tensor>& y_t,
                 const Tensor& scale, const Tensor& scale_t, const std::optional<Tensor>& bias_t,
                 const std::optional<Tensor>& own, std::optional<int64_t> own_offset,
                 const std::optional<Tensor>& row_ids, const std::optional<Tensor>& column_ids)
        : student(x, y, scale, std::optional<Tensor>(), own, own_offset, row_ids, column_ids),
          teacher(x_t, y_t ? *y_t : y, scale_t, bias_t, own, own_offset, row_ids, column_ids), shared(!y_t) {
        STD_TORCH_CHECK(M() == teacher.p.M() && N() == teacher.p.N(), "expected the teacher's x_t and y_t to have ",
                        M(), " and ", N(), " rows, got ", teacher.p.M(), " and ", teacher.p.N());
    }
    int64_t M() const { return student.p.M(); }
    int64_t N() const { return student.p.N(); }
    int64_t D() const { return student.p.D(); }
};

// The features of a block of rows: those of a strip are the student's above the teacher's where y is shared.
template <class T> class Rows {
  public:
    const Parts strips;

    Rows(const Distillation<T>& d, int64_t i0, int64_t m) : strips(m, kStrip), shared_(d.shared) {
        if (!shared_) {
            x_ = d.student.p.x.rows(i0, m, x_copy_);
            x_t_ = d.teacher.p.x.rows(i0, m, x_t_copy_);
            return;
        }
        const int64_t D = d.D();
        T* const both = x_copy_.get(2 * m * D);
        x_ = {both, D, 1};
        const auto copy = [&](const Matrix<T>& x, int64_t i, T* out) {
            if (const T* row = x.row(i, out); row != out && D > 0)
                std::memcpy(out, row, D * sizeof(T));
        };
        strips.each([&](int64_t, int64_t begin, int64_t length) {
            for (int64_t r = 0; r < length; ++r) {
                copy(d.student.p.x, i0 + begin + r, both + (2 * begin + r) * D);
                copy(d.teacher.p.x, i0 + begin + r, both + (2 * begin + length + r) * D);
            }
        });
    }
    View<const T> student(int64_t begin) const { return x_.from(shared_ ? 2 * begin : begin); }
    View<const T> teacher(int64_t begin) const { return x_t_.from(begin); } // where y is not shared

  private:
    const bool shared_;
    Buffer<T> x_copy_, x_t_copy_;
    View<const T> x_{nullptr, 0, 0}, x_t_{nullptr, 0, 0};
};

// The columns of a tile, on one thread.
template <class T> class Columns {
  public:
    explicit Columns(const Distillation<T>& d) : d_(d) {}

    void set(int64_t begin, int64_t n, bool for_products, bool for_times_y) {
        const View<const T> y = d_.student.p.y.rows(begin, n, y_copy_);
        if (for_times_y)
            rows_.set(y, n, d_.D());
        if (!for_products)
            return;
        student_.set(y.transposed(), d_.D(), n);
        if (!d_.shared)
            teacher_.set(d_.teacher.p.y.rows(begin, n, y_t_copy_).transposed(), d_.teacher.p.D(), n);
    }
    // tile [2 m, n]: the products of the strip of m rows at `begin`, the student's above the teacher's
    void products(View<T> tile, const Rows<T>& x, int64_t begin, int64_t m) const {
        student_.product(tile, x.student(begin), d_.shared ? 2 * m : m, false);
        if (!d_.shared)
            teacher_.product(tile.from(m), x.teacher(begin), m, false);
    }
    // Asks for rows of y ahead of their use, which they would otherwise hold up: a product's own reads are too late.
    void prefetch(int64_t begin, int64_t end) const {
        for (int64_t j = begin; j < end; ++j)
            d_.student.p.y.prefetch(j);
    }
    // out [m, D] += weights [m, n] y
    void times_y(T* out, View<const T> weights, int64_t m) const { rows_.product({out, d_.D(), 1}, weights, m, true); }

  private:
    const Distillation<T>& d_;
    Buffer<T> y_copy_, y_t_copy_;
    Panels<T> rows_, student_, teacher_;
};

} // namespace vlpfast::contrastive
