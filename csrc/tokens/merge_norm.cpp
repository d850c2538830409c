// A residual addition, the merging of tokens and the layer norm after it, on the CPU, and the gradient. See
// vlpfast/ops/tokens/merging.py for what it computes and vlpfast/ops/_schemas.py for the arguments.
//
// Every number comes from memory once and goes there once: a row of the result is made, normalised and let go while it
// is in the first-level cache. Backward a row of gradient goes through the norm and then to its tokens. The gradients
// of the norm's weight and bias are sums over all rows, made part by part of rows whose number depends on the shapes
// alone, and these added up in order: the number of threads decides about no bit.

#include "common/simd.h"
#include "tokens/groups.h"

#include <cmath>
#include <optional>
#include <tuple>

namespace vlpfast::tokens {
namespace {

constexpr int64_t kPartRows = 128; // whose gradients of weight and bias are summed together

// Loops that add up a row take nothing but numbers in the accumulating dtype: others would not be vectorised.
template <class T, class F> VLPFAST_INLINE T sum_of(int64_t n, const F& f) {
    T sum[kLanes] = {};
    int64_t c = 0;
    for (; c + kLanes <= n; c += kLanes) {
        for (int l = 0; l < kLanes; ++l)
            sum[l] += f(c + l);
    }
    for (; c < n; ++c)
        sum[0] += f(c);
    T total = 0;
    for (const T s : sum)
        total += s;
    return total;
}

template <class T> VLPFAST_CLONES T sum(const T* row, int64_t n) {
    return sum_of<T>(n, [&](int64_t c) { return row[c]; });
}

template <class T> VLPFAST_CLONES T squares(const T* row, int64_t n, T mean) {
    return sum_of<T>(n, [&](int64_t c) { return (row[c] - mean) * (row[c] - mean); });
}

template <class T> VLPFAST_CLONES T dot(const T* a, const T* b, int64_t n) {
    return sum_of<T>(n, [&](int64_t c) { return a[c] * b[c]; });
}

// out = x + delta, rounded, and the row of it
template <class In, class Delta, class T>
VLPFAST_CLONES void add(const In* x, const Delta* delta, int64_t n, In* __restrict out, T* __restrict row) {
    for (int64_t c = 0; c < n; ++c) {
        out[c] = static_cast<In>(static_cast<T>(x[c]) + static_cast<T>(delta[c]));
        row[c] = static_cast<T>(out[c]);
    }
}

// row += share * (x + delta), or = if it is the first
template <class In, class Delta, class T>
VLPFAST_CLONES void add_share(const In* x, const Delta* delta, int64_t n, T share, bool first, T* __restrict row) {
    if (first) {
        for (int64_t c = 0; c < n; ++c)
            row[c] = share * (static_cast<T>(x[c]) + static_cast<T>(delta[c]));
    } else {
        for (int64_t c = 0; c < n; ++c)
            row[c] += share * (static_cast<T>(x[c]) + static_cast<T>(delta[c]));
    }
}

// out = row, rounded, and the row of it
template <class T, class Out> VLPFAST_CLONES void round(T* __restrict row, int64_t n, Out* __restrict out) {
    for (int64_t c = 0; c < n; ++c) {
        out[c] = static_cast<Out>(row[c]);
        row[c] = static_cast<T>(out[c]);
    }
}

template <class T, class Out>
VLPFAST_CLONES void normalize(const T* row, const T* weight, const T* bias, int64_t n, T mean, T rstd,
                              Out* __restrict out) {
    for (int64_t c = 0; c < n; ++c)
        out[c] = static_cast<Out>((row[c] - mean) * rstd * weight[c] + bias[c]);
}

// unit = y normalised, and what its gradient adds to those of weight and bias
template <class In, class Normed, class T>
VLPFAST_CLONES void add_gradients(const Normed* grad, const In* y, int64_t n, T mean, T rstd, T* __restrict unit,
                                  T* __restrict weight, T* __restrict bias) {
    for (int64_t c = 0; c < n; ++c) {
        const T g = static_cast<T>(grad[c]);
        unit[c] = (static_cast<T>(y[c]) - mean) * rstd;
        weight[c] += g * unit[c];
        bias[c] += g;
    }
}

template <class Normed, class T>
VLPFAST_CLONES void multiply(const Normed* grad, const T* weight, int64_t n, T* __restrict product) {
    for (int64_t c = 0; c < n; ++c)
        product[c] = static_cast<T>(grad[c]) * weight[c];
}

// product = the gradient of y itself, and what comes back through the norm
template <class In, class T>
VLPFAST_CLONES void gradient(const In* grad_y, const T* unit, int64_t n, T rstd, T mean, T slope,
                             T* __restrict product) {
    for (int64_t c = 0; c < n; ++c)
        product[c] = static_cast<T>(grad_y[c]) + rstd * (product[c] - mean - unit[c] * slope);
}

template <class T, class Out> VLPFAST_CLONES void scale(const T* in, int64_t n, T by, Out* __restrict out) {
    for (int64_t c = 0; c < n; ++c)
        out[c] = static_cast<Out>(by * in[c]);
}

template <class T> VLPFAST_CLONES void accumulate(const T* in, int64_t n, T* __restrict out) {
    for (int64_t c = 0; c < n; ++c)
        out[c] += in[c];
}

// Calls f with a null pointer of the C++ type of x's residual: x's own, or a half type beside float.
template <class In, class F> void with_delta(ScalarType x, ScalarType delta, const F& f) {
    if constexpr (std::is_same_v<In, float>) {
        if (delta == ScalarType::Half)
            return f(static_cast<torch::headeronly::Half*>(nullptr));
        if (delta == ScalarType::BFloat16)
            return f(static_cast<torch::headeronly::BFloat16*>(nullptr));
    }
    STD_TORCH_CHECK(delta == x, "delta: expected x's dtype, or a half type beside float32, got ",
                    torch::headeronly::toString(delta));
    f(static_cast<In*>(nullptr));
}

// Likewise of what is normalised: x's own, or the accumulating one.
template <class In, class F> void with_normed(bool wide, const F& f) {
    if (wide)
        return f(static_cast<Wide<In>*>(nullptr));
    f(static_cast<In*>(nullptr));
}

template <class T> struct Norm {
    const T *weight, *bias;
    double eps;
};

template <class In, class Delta, class Normed>
void forward(const Tokens<In>& x, const Tokens<Delta>& delta, const Table<Wide<In>>& size, bool weighted,
             const Groups& groups, const Norm<Wide<In>>& norm, In* y, Normed* normed, Wide<In>* total,
             Wide<In>* stats) {
    using T = Wide<In>;
    const int64_t C = x.width, M = groups.places, rows = groups.batch * M;
    struct Scratch {
        Buffer<In> x;
        Buffer<Delta> delta;
        Buffer<T> row;
    };
    each_place(groups, [&] {
        return [&, scratch = Scratch()](int64_t image, int64_t place) mutable {
            const int32_t *const begin = groups.begin(image, place), *const end = groups.end(image, place);
            const int64_t row = image * M + place;
            T sizes = 0;
            for (const int32_t* i = begin; i < end; ++i)
                sizes += size.data ? size.at(image, *i) : T(1);
            const T weights = weighted ? sizes : static_cast<T>(end - begin);
            const auto share = [&](int32_t i) { return share_of(weighted ? size.at(image, i) : T(1), weights); };
            In* const out = y + row * C;
            T* const values = scratch.row.get(C);
            if (end - begin == 1 && share(*begin) == 1) {
                add(x.row(image, *begin, scratch.x), delta.row(image, *begin, scratch.delta), C, out, values);
            } else {
                bool first = true;
                for (const int32_t* i = begin; i < end; ++i) {
                    const T part = share(*i);
                    if (part == 0) // what weighs nothing may hold anything
                        continue;
                    add_share(x.row(image, *i, scratch.x), delta.row(image, *i, scratch.delta), C, part, first, values);
                    first = false;
                }
                if (first)
                    std::fill_n(values, C, T(0));
                round(values, C, out);
            }
            const T width = static_cast<T>(C), mean = sum(values, C) / width,
                    rstd = 1 / std::sqrt(squares(values, C, mean) / width + static_cast<T>(norm.eps));
            normalize(values, norm.weight, norm.bias, C, mean, rstd, normed + row * C);
            total[row] = sizes;
            stats[row] = mean;
            stats[rows + row] = rstd;
            stats[2 * rows + row] = weights;
        };
    });
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>; // y, total, normed, stats

Forward add_merge_norm_fwd(const Tensor& x, const Tensor& delta, const std::optional<Tensor>& size, const Tensor& kept,
                           const Tensor& source, const Tensor& target, const Tensor& weight, const Tensor& bias,
                           double eps, bool weighted, bool wide) {
    STD_TORCH_CHECK(x.dim() == 3 && delta.dim() == 3, "x, delta: expected 3 dimensions, got ", x.dim(), " and ",
                    delta.dim());
    const int64_t B = x.size(0), N = x.size(1), C = x.size(2);
    STD_TORCH_CHECK(delta.size(0) == B && delta.size(1) == N && delta.size(2) == C, "delta: expected x's shape");
    STD_TORCH_CHECK(size || !weighted, "size: expected it for a mean under sizes");
    STD_TORCH_CHECK(weight.dim() == 1 && bias.dim() == 1 && weight.size(0) == C && bias.size(0) == C,
                    "weight, bias: expected vectors of ", C);
    const Groups groups = groups_of(B, N, kept, source, target);
    const int64_t M = groups.places;
    const ScalarType dtype = x.scalar_type(), sums = dtype == ScalarType::Double ? dtype : ScalarType::Float;
    const Tensor y = empty({B, M, C}, dtype), total = empty({B, M}, sums),
                 normed = empty({B, M, C}, wide ? sums : dtype), stats = empty({3, B, M}, sums);
    with_dtype(x, [&]<class In>(In*) {
        using T = Wide<In>;
        const std::vector<T> weights = read_vector<T>(weight, C), biases = read_vector<T>(bias, C);
        const Table<T> sizes = size ? Table<T>("size", *size, B, N) : Table<T>();
        with_delta<In>(dtype, delta.scalar_type(), [&]<class Delta>(Delta*) {
            with_normed<In>(wide, [&]<class Normed>(Normed*) {
                forward<In, Delta, Normed>({"x", x}, {"delta", delta}, sizes, weighted, groups,
                                           {weights.data(), biases.data(), eps}, static_cast<In*>(y.mutable_data_ptr()),
                                           static_cast<Normed*>(normed.mutable_data_ptr()), total.mutable_data_ptr<T>(),
                                           stats.mutable_data_ptr<T>());
            });
        });
    });
    return {y, total, normed, stats};
}

template <class In, class Delta, class Normed>
void backward(const Tokens<In>& grad_y, const Tokens<Normed>& grad_normed, const Tokens<In>& y,
              const Table<Wide<In>>& size, const Wide<In>* stats, const Groups& groups, const Wide<In>* weight, In* dx,
              Delta* ddelta, Wide<In>* dweight, Wide<In>* dbias) {
    using T = Wide<In>;
    const int64_t C = y.width, M = groups.places, N = groups.count, rows = groups.batch * M;
    const Parts parts(rows, kPartRows);
    Buffer<T> partial; // [parts, 2, C]
    T* const sums = partial.get(parts.count * 2 * C);
    parts.each([&](int64_t part, int64_t start, int64_t length) {
        Buffer<In> of_grad_y, of_y;
        Buffer<Normed> of_grad_normed;
        Buffer<T> of_unit, of_product;
        T *const unit = of_unit.get(C), *const g = of_product.get(C), *const weight_sum = sums + part * 2 * C,
                 *const bias_sum = weight_sum + C;
        std::fill_n(weight_sum, 2 * C, T(0));
        for (int64_t row = start; row < start + length; ++row) {
            const int64_t image = row / M, place = row % M;
            const Normed* const from_normed = grad_normed.row(image, place, of_grad_normed);
            const In* const own = y.row(image, place, of_y);
            const T mean = stats[row], rstd = stats[rows + row], weights = stats[2 * rows + row];
            add_gradients(from_normed, own, C, mean, rstd, unit, weight_sum, bias_sum);
            if (!dx)
                continue;
            multiply(from_normed, weight, C, g);
            const T width = static_cast<T>(C), mean_product = sum(g, C) / width, slope = dot(g, unit, C) / width;
            gradient(grad_y.row(image, place, of_grad_y), unit, C, rstd, mean_product, slope, g);
            for (const int32_t* i = groups.begin(image, place); i < groups.end(image, place); ++i) {
                const T share = share_of(size.data ? size.at(image, *i) : T(1), weights);
                In* const out = dx + (image * N + *i) * C;
                if (share == 0)
                    std::fill_n(out, C, In(0));
                else
                    scale(g, C, share, out);
                if (ddelta && share == 0)
                    std::fill_n(ddelta + (image * N + *i) * C, C, Delta(0));
                else if (ddelta)
                    scale(g, C, share, ddelta + (image * N + *i) * C);
            }
        }
    });
    if (!dweight)
        return;
    std::fill_n(dweight, C, T(0));
    std::fill_n(dbias, C, T(0));
    for (int64_t part = 0; part < parts.count; ++part) {
        accumulate(sums + part * 2 * C, C, dweight);
        accumulate(sums + part * 2 * C + C, C, dbias);
    }
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>; // dx, ddelta, dweight, dbias

Backward add_merge_norm_bwd(const Tensor& grad_y, const Tensor& grad_normed, const Tensor& y, const Tensor& stats,
                            const std::optional<Tensor>& size, const Tensor& index, const Tensor& /* kept */,
                            const Tensor& weight, std::optional<ScalarType> delta_dtype, bool need_x,
                            bool need_weight) {
    STD_TORCH_CHECK(y.dim() == 3 && grad_y.dim() == 3 && grad_normed.dim() == 3 && index.dim() == 2,
                    "expected grad_y, grad_normed and y [B, N - r, C] and index [B, N]");
    const int64_t B = index.size(0), N = index.size(1), M = y.size(1), C = y.size(2);
    for (const Tensor* const t : {&grad_y, &grad_normed, &y})
        STD_TORCH_CHECK(t->size(0) == B && t->size(1) == M && t->size(2) == C,
                        "grad_y, grad_normed, y: expected one shape, of ", B, " images");
    STD_TORCH_CHECK(stats.dim() == 3 && stats.size(0) == 3 && stats.size(1) == B && stats.size(2) == M &&
                        stats.is_contiguous(),
                    "stats: expected the forward pass's");
    STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == C, "weight: expected a vector of ", C);
    const ScalarType dtype = y.scalar_type(), sums = dtype == ScalarType::Double ? dtype : ScalarType::Float,
                     normed = grad_normed.scalar_type(), delta = delta_dtype.value_or(dtype);
    STD_TORCH_CHECK(grad_y.scalar_type() == dtype && (normed == dtype || normed == sums),
                    "grad_y, grad_normed: expected the forward pass's dtypes");
    const Groups groups = groups_of(index, M);
    const Tensor dx = empty({need_x ? B : 0, N, C}, dtype),
                 ddelta = empty({need_x && delta_dtype ? B : 0, N, C}, delta),
                 dweight = empty({need_weight ? C : 0}, sums), dbias = empty({need_weight ? C : 0}, sums);
    with_dtype(y, [&]<class In>(In*) {
        using T = Wide<In>;
        const std::vector<T> weights = read_vector<T>(weight, C);
        const Table<T> sizes = size ? Table<T>("size", *size, B, N) : Table<T>();
        with_delta<In>(dtype, delta, [&]<class Delta>(Delta*) {
            with_normed<In>(normed == sums, [&]<class Normed>(Normed*) {
                backward<In, Delta, Normed>(
                    {"grad_y", grad_y}, {"grad_normed", grad_normed}, {"y", y}, sizes, stats.const_data_ptr<T>(),
                    groups, weights.data(), need_x ? static_cast<In*>(dx.mutable_data_ptr()) : nullptr,
                    need_x && delta_dtype ? static_cast<Delta*>(ddelta.mutable_data_ptr()) : nullptr,
                    need_weight ? dweight.mutable_data_ptr<T>() : nullptr,
                    need_weight ? dbias.mutable_data_ptr<T>() : nullptr);
            });
        });
    });
    return {dx, ddelta, dweight, dbias};
}

} // namespace
} // namespace vlpfast::tokens

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
    m.impl("add_merge_norm_fwd", TORCH_BOX(&vlpfast::tokens::add_merge_norm_fwd));
    m.impl("add_merge_norm_bwd", TORCH_BOX(&vlpfast::tokens::add_merge_norm_bwd));
}
