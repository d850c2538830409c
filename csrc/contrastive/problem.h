// The matrix of logits that pair_logsumexp is about: its features, what stays out of its sums, how it is cut up, and
// the sums themselves.
#pragma once

#include "common/parallel.h"
#include "common/tensors.h"
#include "contrastive/rows.h"

#include <cmath>
#include <optional>

namespace vlpfast::contrastive {

// A tile has at most kRows x kColumns logits, made in at most kStrips strips of rows: 256 x 1024 keep the products at
// full speed and a strip in the second-level cache for its fused pass. kPad spare elements after each row of a scratch
// tile keep power-of-two strides out of the products.
constexpr int64_t kRows = 2048, kColumns = 1024, kStrips = 8, kPad = 16;

inline Parts strips(int64_t n) {
    return Parts(n, std::max<int64_t>(16, (n + kStrips - 1) / kStrips));
}

// Centred exponentials stay below exp(kMaxExponent); sums under kSmallestSum have lost too much to flushed terms.
template <class T> constexpr double kMaxExponent = std::is_same_v<T, double> ? 700.0 : 87.0;
template <class T> constexpr double kSmallestSum = std::is_same_v<T, double> ? 1e-280 : 1e-25;

// A term that has more than this share of its row's or column's sum is made in double.
constexpr double kRefinedShare = 1.0 / 16;

// Sums of exp(logit - shift) along one axis.
template <class T> struct Sums {
    std::vector<double> sum;
    std::vector<T> shift;

    // An axis that was not asked for: the infinite shift makes every exponential 0.
    explicit Sums(int64_t n) : sum(n, 0.0), shift(n, std::numeric_limits<T>::infinity()) {}
    explicit Sums(const Tensor& stats) {
        const T* data = stats.const_data_ptr<T>();
        const int64_t n = stats.size(1);
        sum.assign(data, data + n);
        shift.assign(data + n, data + 2 * n);
    }
    bool underflow() const {
        return std::any_of(sum.begin(), sum.end(), [](double s) { return s < kSmallestSum<T>; }); // false on NaN
    }
    double logsumexp(int64_t i) const { return std::log(sum[i]) + shift[i]; }

    Tensor stats() const {
        const auto n = static_cast<int64_t>(sum.size());
        const Tensor out = empty({2, n}, kScalarType<T>);
        T* data = out.mutable_data_ptr<T>();
        std::transform(sum.begin(), sum.end(), data, [](double s) { return static_cast<T>(s); });
        std::copy(shift.begin(), shift.end(), data + n);
        return out;
    }
};

template <class T> struct Problem {
    const Matrix<T> x, y;
    const T scale;
    const std::vector<T> bias;       // [N]
    std::vector<int64_t> own_column; // [M] column of each row's own pair; empty: no row has one
    std::vector<int64_t> row_ids, column_ids;
    const bool want_rows, want_columns;
    const Parts row_tiles, column_tiles;

    Problem(const Tensor& x, const Tensor& y, const Tensor& scale, const std::optional<Tensor>& bias,
            const std::optional<Tensor>& own, std::optional<int64_t> own_offset, const std::optional<Tensor>& row_ids,
            const std::optional<Tensor>& column_ids, bool rows, bool columns)
        : x(x), y(y), scale(read_vector<T>(scale, 1)[0]),
          bias(bias ? read_vector<T>(*bias, this->y.count) : std::vector<T>(this->y.count, T(0))), want_rows(rows),
          want_columns(columns), row_tiles(this->x.count, kRows), column_tiles(this->y.count, kColumns) {
        STD_TORCH_CHECK(this->x.width == this->y.width, "x and y differ in width: ", this->x.width, " and ",
                        this->y.width);
        if (own)
            own_column = read_integers(*own);
        if (own_offset) {
            own_column.resize(M());
            for (int64_t i = 0; i < M(); ++i)
                own_column[i] = i + *own_offset;
        }
        STD_TORCH_CHECK(own_column.empty() || static_cast<int64_t>(own_column.size()) == M(), "own: expected ", M(),
                        " indices, got ", own_column.size());
        std::vector<char> taken(want_columns ? N() : 0);
        for (const int64_t j : own_column) {
            STD_TORCH_CHECK(j >= 0 && j < N(), "own: expected columns in [0, ", N(), "), got ", j);
            STD_TORCH_CHECK(!want_columns || !taken[j], "own: column ", j, " is the own pair of two rows");
            if (want_columns)
                taken[j] = 1;
        }
        if (row_ids) {
            this->row_ids = read_integers(*row_ids);
            this->column_ids = read_integers(*column_ids);
            STD_TORCH_CHECK(static_cast<int64_t>(this->row_ids.size()) == M() &&
                                static_cast<int64_t>(this->column_ids.size()) == N(),
                            "leave_out: expected ", M(), " and ", N(), " ids, got ", this->row_ids.size(), " and ",
                            this->column_ids.size());
        }
    }

    int64_t M() const { return x.count; }
    int64_t N() const { return y.count; }
    int64_t D() const { return x.width; }

    // Puts `value` where row i of the matrix, of which s holds columns [begin, begin + n), has a pair that stays out.
    void leave_out(T* s, int64_t n, int64_t i, int64_t begin, T value) const {
        if (!row_ids.empty())
            set_where_equal(s, n, column_ids.data() + begin, row_ids[i], value);
        if (!own_column.empty() && own_column[i] >= begin && own_column[i] < begin + n)
            s[own_column[i] - begin] = value;
    }

    // A row of products becomes a row of centred exponentials, respectively of logits; `offset` is bias - c.
    void exponentials(T* s, int64_t n, int64_t i, int64_t begin, const std::vector<T>& offset) const {
        exp_affine(s, n, scale, offset.data() + begin);
        leave_out(s, n, i, begin, T(0));
    }
    void logits(T* s, int64_t n, int64_t i, int64_t begin) const {
        affine(s, n, scale, bias.data() + begin);
        leave_out(s, n, i, begin, -std::numeric_limits<T>::infinity());
    }
    // Makes those centred exponentials of row i that are above `limit` or `limits[j]` again from a product in double,
    // and tells changed(j, by how much, the product). A float product is off by some 1e-7, times the scale: that shows
    // where a sum is one term, and averages out where it is many.
    template <class F>
    void refine(T* e, int64_t n, int64_t i, int64_t begin, double shift, T limit, const T* limits,
                const F& changed) const {
        if constexpr (std::is_same_v<T, float>) {
            constexpr int64_t kBlock = 128;
            std::vector<T> x_copy, y_copy;
            for (int64_t start = 0; start < n; start += kBlock) {
                const int64_t end = std::min(n, start + kBlock);
                if (!any_above(e + start, end - start, limit, limits + start))
                    continue;
                x_copy.resize(D());
                y_copy.resize(D());
                const T* const x_row = x.row(i, x_copy.data());
                for (int64_t j = start; j < end; ++j) {
                    if (!(e[j] > limit || e[j] > limits[j]))
                        continue;
                    const double product = dot(x_row, y.row(begin + j, y_copy.data()), D());
                    const double exact = std::exp(scale * product + bias[begin + j] - shift);
                    changed(j, exact - e[j], product);
                    e[j] = static_cast<T>(exact);
                }
            }
        }
    }
    std::vector<T> bias_minus(T shift) const {
        std::vector<T> out(bias);
        for (T& b : out)
            b -= shift;
        return out;
    }
};

// Gradient weights are scaled by this (and by the largest incoming gradient), so that neither tiny gradients nor sums
// near either end of the range leave float's normal numbers; the final factor takes it out again. A power of two: no
// rounding.
constexpr double kWeightScale = 0x1p40;

// The unit of gradient weights beside these incoming gradients.
template <class T> double weight_unit(const std::vector<T>& first, const std::vector<T>& second) {
    double largest = 0;
    for (const auto* grads : {&first, &second}) {
        for (const T v : *grads)
            largest = std::max(largest, std::abs(static_cast<double>(v)));
    }
    return (largest > 0 && std::isfinite(largest) ? std::exp2(std::ilogb(largest)) : 1.0) / kWeightScale;
}

// What is kept of a matrix with N columns: tile after tile, each dense and row-major, the first tiles that have room.
template <class T> struct Stash {
    T* data;
    int64_t size;

    // The place of the m x n tile at row i0 and column j0 of N columns; null: it has none.
    T* tile(int64_t i0, int64_t m, int64_t j0, int64_t n, int64_t N) const {
        const int64_t begin = i0 * N + j0 * m;
        return begin + m * n <= size ? data + begin : nullptr;
    }
};

// Adds the strips' partial sums of columns [strips, n], in the order of the strips.
template <class T> void add_partial(const T* partial, int64_t count, int64_t n, double* sum) {
    for (int64_t s = 0; s < count; ++s) {
        for (int64_t j = 0; j < n; ++j)
            sum[j] += partial[s * n + j];
    }
}

template <class T> double largest_norm(const Matrix<T>& m) {
    std::vector<double> norm(m.count);
    parallel_for(0, m.count, 64, [&](int64_t from, int64_t to) {
        std::vector<T> scratch(m.width);
        for (int64_t i = from; i < to; ++i) {
            const T* row = m.row(i, scratch.data());
            norm[i] = std::sqrt(dot(row, row, m.width));
        }
    });
    double largest = 0;
    for (const double n : norm)
        largest = n <= largest ? largest : n; // keeps NaN
    return largest;
}

// c = max(0, B - kMaxExponent + ln max(M, N) + 1) where B bounds the logits: no exponential and no sum overflows.
template <class T> T centre(const Problem<T>& p) {
    double bound = std::abs(static_cast<double>(p.scale)) * largest_norm(p.x) * largest_norm(p.y);
    if (!p.bias.empty())
        bound += *std::max_element(p.bias.begin(), p.bias.end());
    const double c = bound - kMaxExponent<T> + std::log(static_cast<double>(std::max<int64_t>({p.M(), p.N(), 1}))) + 1;
    return static_cast<T>(c <= 0 ? 0 : c); // keeps NaN
}

// out[at ...] = factor * in, in out's dtype
template <class T> void store(const T* in, int64_t n, double factor, const Tensor& out, int64_t at) {
    with_floating_pointer(out.mutable_data_ptr(), out.scalar_type(), [&](auto* data) {
        using Out = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
        scale_row(in, n, factor, const_cast<Out*>(data) + at);
    });
}

} // namespace vlpfast::contrastive
