// Merging of tokens on the CPU, its gradient, and unmerging. See vlpfast/ops/tokens/merging.py for what it computes and
// vlpfast/ops/_schemas.py for the arguments.
//
// Most tokens are merged with none, so this is a copy of nearly all rows from one place to another. (Stores past the
// caches do not pay: a large result is fresh memory, which the system has just cleared, through the caches.) The tokens
// that come together are read in order and summed in the accumulating dtype, one row of which is there at a time. A row
// of a result has one owner and one order of its sum: the number of threads decides about no bit.

#include "common/simd.h"
#include "tokens/groups.h"

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

namespace vlpfast::tokens {
namespace {

// out += share * in, or = if it is the first
template <class In, class T> VLPFAST_CLONES void add(const In* in, int64_t n, T share, bool first, T* __restrict out) {
    if (first) {
        for (int64_t c = 0; c < n; ++c)
            out[c] = share * static_cast<T>(in[c]);
    } else {
        for (int64_t c = 0; c < n; ++c)
            out[c] += share * static_cast<T>(in[c]);
    }
}

// The larger of both, NaN where one is; of equal ones `out`.
template <class In> VLPFAST_CLONES void take_larger(const In* in, int64_t n, In* __restrict out) {
    using T = Wide<In>;
    for (int64_t c = 0; c < n; ++c) {
        const T value = static_cast<T>(in[c]), old = static_cast<T>(out[c]);
        out[c] = value > old || value != value ? in[c] : out[c];
    }
}

template <class T, class Out> VLPFAST_CLONES void convert(const T* in, int64_t n, Out* __restrict out) {
    for (int64_t c = 0; c < n; ++c)
        out[c] = static_cast<Out>(in[c]);
}

template <class T, class Out> VLPFAST_CLONES void scale(const Out* in, int64_t n, T by, Out* __restrict out) {
    for (int64_t c = 0; c < n; ++c)
        out[c] = static_cast<Out>(by * static_cast<T>(in[c]));
}

// sum of (x - y) * g; numbers of x that are none count as 0 if `guard`.
template <class In, class T> VLPFAST_CLONES T slope(const In* x, const T* y, const In* g, int64_t n, bool guard) {
    T sum[kLanes] = {};
    const auto term = [&](int64_t c) {
        T value = static_cast<T>(x[c]);
        if (guard)
            value = std::abs(value) <= std::numeric_limits<T>::max() ? value : T(0);
        return (value - y[c]) * static_cast<T>(g[c]);
    };
    int64_t c = 0;
    for (; c + kLanes <= n; c += kLanes) {
        for (int l = 0; l < kLanes; ++l)
            sum[l] += term(c + l);
    }
    for (; c < n; ++c)
        sum[0] += term(c);
    T total = 0;
    for (const T s : sum)
        total += s;
    return total;
}

// out = the sum of share(i) * x[i] of some tokens; one that has no share may hold anything
template <class In, class F>
void sum_rows(const Tokens<In>& x, int64_t image, const int32_t* begin, const int32_t* end, const F& share,
              Buffer<In>& copy, Wide<In>* out) {
    bool first = true;
    for (const int32_t* i = begin; i < end; ++i) {
        const Wide<In> part = share(*i);
        if (part == 0)
            continue;
        add(x.row(image, *i, copy), x.width, part, first, out);
        first = false;
    }
    if (first)
        std::fill_n(out, x.width, Wide<In>(0));
}

template <class In>
void forward(const Tokens<In>& x, const Table<Wide<In>>& weight, const Groups& groups, bool mean, bool largest, In* y,
             Wide<In>* total) {
    using T = Wide<In>;
    const int64_t C = x.width, bytes = C * static_cast<int64_t>(sizeof(In)), M = groups.places;
    each_place(groups, [&] {
        return [&, sum = Buffer<T>(), copy = Buffer<In>()](int64_t image, int64_t place) mutable {
            const int32_t *const begin = groups.begin(image, place), *const end = groups.end(image, place);
            T weights = 0;
            for (const int32_t* i = begin; i < end; ++i)
                weights += weight.data ? weight.at(image, *i) : T(1);
            total[image * M + place] = weights;
            In* const out = y + (image * M + place) * C;
            const auto share = [&](int32_t i) {
                return !mean ? T(1) : share_of(weight.data ? weight.at(image, i) : T(1), weights);
            };
            if (largest || (end - begin == 1 && share(*begin) == 1)) {
                copy_bytes(out, x.row(image, *begin, copy), bytes);
                for (const int32_t* i = begin + 1; i < end; ++i)
                    take_larger(x.row(image, *i, copy), C, out);
                return;
            }
            T* const row = sum.get(C);
            sum_rows(x, image, begin, end, share, copy, row);
            convert(row, C, out);
        };
    });
}

std::tuple<Tensor, Tensor> merge_fwd(const Tensor& x, const std::optional<Tensor>& weight, const Tensor& kept,
                                     const Tensor& source, const Tensor& target, bool mean, bool largest) {
    STD_TORCH_CHECK(x.dim() == 3, "x: expected 3 dimensions, got ", x.dim());
    const int64_t B = x.size(0), N = x.size(1);
    const Groups groups = groups_of(B, N, kept, source, target);
    const int64_t M = groups.places;
    const Tensor y = empty({B, M, x.size(2)}, x.scalar_type()),
                 total = empty({B, M}, x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
    with_dtype(x, [&]<class In>(In*) {
        using T = Wide<In>;
        const Table<T> weights = weight ? Table<T>("weight", *weight, B, N) : Table<T>();
        forward<In>(Tokens<In>("x", x), weights, groups, mean, largest, static_cast<In*>(y.mutable_data_ptr()),
                    total.mutable_data_ptr<T>());
    });
    return {y, total};
}

// What the gradient needs of the forward pass; nothing where the mode does without.
template <class In> struct Saved {
    std::optional<Tokens<In>> x;
    Table<Wide<In>> weight, total, grad_total;
};

template <class In>
void backward(const Tokens<In>& grad, const Groups& groups, const Saved<In>& saved, bool mean, bool largest, In* dx,
              Wide<In>* dweight) {
    using T = Wide<In>;
    const int64_t C = grad.width, bytes = C * static_cast<int64_t>(sizeof(In)), N = groups.count;
    struct Scratch {
        Buffer<In> grad, x, largest;
        Buffer<T> mean;
        Buffer<char> taken;
    };
    each_place(groups, [&] {
        return [&, scratch = Scratch()](int64_t image, int64_t place) mutable {
            const int32_t *const begin = groups.begin(image, place), *const end = groups.end(image, place);
            const In* const g = grad.row(image, place, scratch.grad);
            if (largest && dx && end - begin > 1) {
                In* const y = scratch.largest.get(C);
                copy_bytes(y, saved.x->row(image, *begin, scratch.x), bytes);
                for (const int32_t* i = begin + 1; i < end; ++i)
                    take_larger(saved.x->row(image, *i, scratch.x), C, y);
                char* const taken = scratch.taken.get(C);
                std::fill_n(taken, C, 0);
                for (const int32_t* i = begin; i < end; ++i) {
                    const In* const x = saved.x->row(image, *i, scratch.x);
                    In* const out = dx + (image * N + *i) * C;
                    for (int64_t c = 0; c < C; ++c) {
                        const T value = static_cast<T>(x[c]), best = static_cast<T>(y[c]);
                        const bool wins = !taken[c] && (value == best || (value != value && best != best));
                        taken[c] |= static_cast<char>(wins);
                        out[c] = wins ? g[c] : In(0);
                    }
                }
                return;
            }
            const T total = saved.total.data ? saved.total.at(image, place) : T(1);
            const auto weight = [&](int32_t i) { return saved.weight.data ? saved.weight.at(image, i) : T(1); };
            // alone a token is its own mean, whatever it weighs
            const bool slopes = dweight && mean && total != 0 && end - begin > 1;
            T* const row = slopes ? scratch.mean.get(C) : nullptr; // of the tokens, not rounded
            if (slopes)
                sum_rows(
                    *saved.x, image, begin, end, [&](int32_t i) { return share_of(weight(i), total); }, scratch.x, row);
            for (const int32_t* i = begin; i < end; ++i) {
                const T w = weight(*i);
                if (dx) {
                    In* const out = dx + (image * N + *i) * C;
                    const T share = mean ? share_of(w, total) : T(1);
                    if (share == 1)
                        copy_bytes(out, g, bytes);
                    else if (share == 0)
                        std::fill_n(out, C, In(0));
                    else
                        scale(g, C, share, out);
                }
                if (dweight) {
                    const T rise = slopes ? slope(saved.x->row(image, *i, scratch.x), row, g, C, w == 0) / total : T(0);
                    dweight[image * N + *i] = saved.grad_total.at(image, place) + rise;
                }
            }
        };
    });
}

std::tuple<Tensor, Tensor> merge_bwd(const Tensor& grad_y, const std::optional<Tensor>& grad_total, const Tensor& index,
                                     const std::optional<Tensor>& weight, const std::optional<Tensor>& total,
                                     const std::optional<Tensor>& x, bool mean, bool largest, bool need_x,
                                     bool need_weight) {
    STD_TORCH_CHECK(grad_y.dim() == 3 && index.dim() == 2, "expected grad_y [B, N - r, C] and index [B, N]");
    STD_TORCH_CHECK(!mean || total, "total: expected it for a mean");
    STD_TORCH_CHECK(x || !((need_weight && mean) || (need_x && largest)), "x: expected it for this gradient");
    STD_TORCH_CHECK(!need_weight || grad_total, "grad_total: expected it for the gradient of weight");
    const int64_t B = index.size(0), N = index.size(1), M = grad_y.size(1), C = grad_y.size(2);
    STD_TORCH_CHECK(grad_y.size(0) == B, "grad_y: expected ", B, " images, got ", grad_y.size(0));
    STD_TORCH_CHECK(!x || (x->scalar_type() == grad_y.scalar_type() && x->dim() == 3 && x->size(0) == B &&
                           x->size(1) == N && x->size(2) == C),
                    "x: expected the forward pass's");
    const Groups groups = groups_of(index, M);
    const ScalarType dtype = grad_y.scalar_type();
    const Tensor dx = empty({need_x ? B : 0, N, C}, dtype),
                 dweight = empty({need_weight ? B : 0, N},
                                 dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
    with_dtype(grad_y, [&]<class In>(In*) {
        using T = Wide<In>;
        Saved<In> saved;
        if (x)
            saved.x.emplace("x", *x);
        if (weight)
            saved.weight = {"weight", *weight, B, N};
        if (total)
            saved.total = {"total", *total, B, M};
        if (grad_total)
            saved.grad_total = {"grad_total", *grad_total, B, M};
        backward<In>(Tokens<In>("grad_y", grad_y), groups, saved, mean, largest,
                     need_x ? static_cast<In*>(dx.mutable_data_ptr()) : nullptr,
                     need_weight ? dweight.mutable_data_ptr<T>() : nullptr);
    });
    return {dx, dweight};
}

} // namespace
} // namespace vlpfast::tokens

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
    m.impl("merge_fwd", TORCH_BOX(&vlpfast::tokens::merge_fwd));
    m.impl("merge_bwd", TORCH_BOX(&vlpfast::tokens::merge_bwd));
}
