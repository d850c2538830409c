// segment_pool on the CPU. See vlpfast/ops/temporal/segments.py for what it computes and vlpfast/ops/_schemas.py for
// the arguments.
//
// A block of channels of one segment (with "attention": a head) is made by one thread, token by token, its sums in the
// first-level cache; the backward makes again what it needs. Every sum has one order, in parts of kRun tokens, so that
// long ones keep their precision.

#include "temporal/rows.h"

#include <cmath>
#include <limits>
#include <tuple>

namespace vlpfast::temporal {
namespace {

enum Mode : int64_t { kMean, kMax, kLogSumExp, kAttention };

constexpr int64_t kBlock = 512, kRun = 128;
constexpr int64_t kGrain = 1 << 15; // elements that are worth a thread

template <class T> constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <class T> VLPFAST_CLONES void add(const T* in, int64_t n, T* out) {
    for (int64_t c = 0; c < n; ++c)
        out[c] += in[c];
}

template <class T> VLPFAST_CLONES void add_scaled(const T* in, int64_t n, T factor, T* out) {
    for (int64_t c = 0; c < n; ++c)
        out[c] += factor * in[c];
}

template <class T> VLPFAST_CLONES void scale(const T* in, int64_t n, T factor, T* out) {
    for (int64_t c = 0; c < n; ++c)
        out[c] = factor * in[c];
}

template <class T> VLPFAST_CLONES void divide(const T* in, int64_t n, T divisor, T* out) {
    for (int64_t c = 0; c < n; ++c)
        out[c] = in[c] / divisor;
}

// out += exp(in - shift)
template <class T> VLPFAST_CLONES void add_exponentials(const T* in, const T* shift, int64_t n, T* out) {
    for (int64_t c = 0; c < n; ++c)
        out[c] += exponential(in[c] - shift[c]);
}

// out = grad * exp(in - shift) / total
template <class T>
VLPFAST_CLONES void weigh(const T* in, const T* shift, const T* total, const T* grad, int64_t n, T* out) {
    for (int64_t c = 0; c < n; ++c)
        out[c] = grad[c] * (exponential(in[c] - shift[c]) / total[c]);
}

// Larger is: not less or equal, unless the old one is NaN: a NaN wins and stays, and on ties the first stays.
template <class T> VLPFAST_CLONES void raise(const T* in, int64_t n, T* best) {
    for (int64_t c = 0; c < n; ++c)
        best[c] = (in[c] <= best[c]) | (best[c] != best[c]) ? best[c] : in[c];
}

template <class T> VLPFAST_CLONES void raise(const T* in, int64_t n, int64_t row, T* best, int64_t* winner) {
    for (int64_t c = 0; c < n; ++c) {
        const bool stays = (in[c] <= best[c]) | (best[c] != best[c]);
        best[c] = stays ? best[c] : in[c];
        winner[c] = stays ? winner[c] : row;
    }
}

template <class T>
VLPFAST_CLONES void where_equal(const int64_t* winner, int64_t row, const T* grad, int64_t n, T* out) {
    for (int64_t c = 0; c < n; ++c)
        out[c] = winner[c] == row ? grad[c] : T(0);
}

template <class T> VLPFAST_CLONES T dot(const T* a, const T* b, int64_t n) {
    T lanes[kLanes] = {};
    int64_t c = 0;
    for (; c + kLanes <= n; c += kLanes) {
        for (int l = 0; l < kLanes; ++l)
            lanes[l] += a[c + l] * b[c + l];
    }
    T sum = 0;
    for (; c < n; ++c)
        sum += a[c] * b[c];
    for (const T lane : lanes)
        sum += lane;
    return sum;
}

// Channels [first, first + count) of the tokens [begin, end), one segment's.
struct Part {
    int64_t begin, end, first, count;
    int64_t length() const { return end - begin; }
};

template <class T> class Tokens {
  public:
    explicit Tokens(const Tensor& x)
        : data_(x), row_(x.stride(0)), column_(x.stride(1)), dense_(column_ == 1 || x.size(1) <= 1) {}
    const T* row(int64_t i, const Part& part, T* scratch) const {
        if (dense_)
            return data_.read(i * row_ + part.first, part.count, scratch);
        for (int64_t c = 0; c < part.count; ++c)
            data_.copy(i * row_ + (part.first + c) * column_, 1, scratch + c);
        return scratch;
    }

  private:
    const Reader<T> data_;
    const int64_t row_, column_;
    const bool dense_;
};

// Buffers of one thread, a part's channels wide; weights: a segment's tokens long.
template <class T> struct Scratch {
    Buffer<T> memory, weights, slopes;
    Buffer<int64_t> winners;
    T *token, *run, *best, *total, *grad, *made;

    explicit Scratch(int64_t width) {
        T* at = memory.get(6 * width);
        for (T** const part : {&token, &run, &best, &total, &grad, &made}) {
            *part = at;
            at += width;
        }
    }
};

// out [count] = the sum over the part's tokens of what add_token(i, token, out) adds for each.
template <class T, class F> void sum_tokens(const Part& part, Scratch<T>& s, T* out, const F& add_token) {
    std::fill_n(out, part.count, T(0));
    for (int64_t i = part.begin; i < part.end;) {
        std::fill_n(s.run, part.count, T(0));
        for (const int64_t stop = std::min(part.end, i + kRun); i < stop; ++i)
            add_token(i, s.run);
        add(s.run, part.count, out);
    }
}

// best = the largest of each channel; total = the sum of exp(x - shift), and best becomes the shift: the largest where
// that is finite. Where it is infinite the sum is as well, or 0.
template <class T> void exponential_sums(const Tokens<T>& x, const Part& part, Scratch<T>& s) {
    std::fill_n(s.best, part.count, -kInfinity<T>);
    for (int64_t i = part.begin; i < part.end; ++i)
        raise(x.row(i, part, s.token), part.count, s.best);
    for (int64_t c = 0; c < part.count; ++c)
        s.best[c] = s.best[c] == -kInfinity<T> ? T(0) : s.best[c];
    sum_tokens(part, s, s.total,
               [&](int64_t i, T* run) { add_exponentials(x.row(i, part, s.token), s.best, part.count, run); });
    for (int64_t c = 0; c < part.count; ++c)
        s.total[c] = s.best[c] == kInfinity<T> ? kInfinity<T> : s.total[c];
}

// Of one head's column of scores: exp(score - largest) of each of the part's tokens, and the sum of all.
template <class T> T score_weights(const T* score, int64_t heads, const Part& part, T* weights) {
    T largest = -kInfinity<T>;
    for (int64_t i = 0; i < part.length(); ++i) {
        weights[i] = score[(part.begin + i) * heads];
        raise(weights + i, 1, &largest);
    }
    double total = 0;
    for (int64_t i = 0; i < part.length(); ++i) {
        weights[i] = weights[i] == -kInfinity<T> ? T(0) : exponential(weights[i] - largest);
        total += weights[i];
    }
    return static_cast<T>(total);
}

// f(segment, part, head, scratch) for every part of every segment, in parallel. heads: 0 for blocks of channels.
template <class T, class F>
void each_part(const Tensor& start, int64_t length, int64_t width, int64_t heads, const F& f) {
    const std::vector<int64_t> first = read_integers(start);
    const int64_t segments = static_cast<int64_t>(first.size()) - 1;
    STD_TORCH_CHECK(first[0] == 0 && first[segments] == length && std::is_sorted(first.begin(), first.end()),
                    "cu_seqlens: expected numbers from 0 to the number of tokens that never fall");
    const int64_t wide = heads ? width / heads : std::min(width, kBlock);
    const int64_t parts = heads ? heads : wide ? (width + wide - 1) / wide : 0;
    const int64_t each = std::max<int64_t>(1, length * wide / std::max<int64_t>(1, segments));
    parallel_for(0, segments * parts, std::max<int64_t>(1, kGrain / each), [&](int64_t from, int64_t to) {
        Scratch<T> scratch(wide);
        for (int64_t i = from; i < to; ++i) {
            const int64_t s = i / parts, h = i % parts;
            f(s, Part{first[s], first[s + 1], h * wide, std::min(wide, width - h * wide)}, h, scratch);
        }
    });
}

template <class T>
Tensor forward(const Tensor& x, const Tensor& start, const std::optional<Tensor>& score, int64_t mode) {
    const int64_t width = x.size(1), heads = mode == kAttention ? score->size(1) : 0;
    const Tensor pooled = empty({start.size(0) - 1, width}, x.scalar_type());
    const Tokens<T> tokens(x);
    const Writer<T> out(pooled);
    const T* const scores = heads ? score->const_data_ptr<T>() : nullptr;
    each_part<T>(start, x.size(0), width, heads, [&](int64_t segment, const Part& part, int64_t h, Scratch<T>& s) {
        const int64_t n = part.count;
        std::fill_n(s.made, n, T(0));
        if (part.length() > 0) {
            if (mode == kMean) {
                sum_tokens(part, s, s.total, [&](int64_t i, T* run) { add(tokens.row(i, part, s.token), n, run); });
                divide(s.total, n, static_cast<T>(part.length()), s.made);
            } else if (mode == kMax) {
                std::fill_n(s.made, n, -kInfinity<T>);
                for (int64_t i = part.begin; i < part.end; ++i)
                    raise(tokens.row(i, part, s.token), n, s.made);
            } else if (mode == kLogSumExp) {
                exponential_sums(tokens, part, s);
                for (int64_t c = 0; c < n; ++c)
                    s.made[c] = std::log(s.total[c]) + s.best[c];
            } else {
                T* const weights = s.weights.get(part.length());
                const T total = score_weights(scores + h, heads, part, weights);
                if (total != T(0)) {
                    sum_tokens(part, s, s.total, [&](int64_t i, T* run) {
                        if (scores[i * heads + h] != -kInfinity<T>)
                            add_scaled(tokens.row(i, part, s.token), n, weights[i - part.begin], run);
                    });
                    divide(s.total, n, total, s.made);
                }
            }
        }
        out.write(segment * width + part.first, n, s.made);
    });
    return pooled;
}

using Backward = std::tuple<Tensor, Tensor>; // dx, dscore

// The gradients of one head of one segment.
template <class T>
void attention_gradient(const Tokens<T>& tokens, const Part& part, const T* score, int64_t heads, Scratch<T>& s,
                        const Writer<T>* dx, int64_t width, T* dscore) {
    T *const weights = s.weights.get(part.length()), *const slopes = s.slopes.get(part.length());
    const T total = score_weights(score, heads, part, weights);
    const auto seen = [&](int64_t i) { return score[(part.begin + i) * heads] != -kInfinity<T>; };
    double mean = 0;
    for (int64_t i = 0; i < part.length(); ++i) {
        weights[i] = seen(i) ? weights[i] / total : T(0);
        if (dx) {
            scale(s.grad, part.count, weights[i], s.made);
            if (!seen(i))
                std::fill_n(s.made, part.count, T(0));
            dx->write((part.begin + i) * width + part.first, part.count, s.made);
        }
        if (dscore) {
            slopes[i] = seen(i) ? dot(tokens.row(part.begin + i, part, s.token), s.grad, part.count) : T(0);
            mean += static_cast<double>(weights[i]) * slopes[i];
        }
    }
    for (int64_t i = 0; dscore && i < part.length(); ++i)
        dscore[(part.begin + i) * heads] = seen(i) ? weights[i] * (slopes[i] - static_cast<T>(mean)) : T(0);
}

template <class T>
Backward backward(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& start,
                  const std::optional<Tensor>& score, int64_t length, int64_t mode, bool need_x, bool need_score) {
    STD_TORCH_CHECK(mode == kMean || x, "expected x for every mode but the mean");
    const int64_t width = grad.size(1), heads = mode == kAttention ? score->size(1) : 0;
    const Tensor dx = empty({need_x ? length : 0, width}, grad.scalar_type()),
                 dscore = empty({need_score ? length : 0, need_score ? heads : 0}, kScalarType<T>);
    const Tokens<T> gradients(grad), tokens(x ? *x : grad);
    const Writer<T> out(dx);
    const T* const scores = heads ? score->const_data_ptr<T>() : nullptr;
    each_part<T>(start, length, width, heads, [&](int64_t segment, const Part& part, int64_t h, Scratch<T>& s) {
        const int64_t n = part.count;
        if (part.length() == 0)
            return;
        const T* const g = gradients.row(segment, part, s.grad);
        std::copy_n(g, g == s.grad ? 0 : n, s.grad);
        const auto each_token = [&](const auto& make) {
            for (int64_t i = part.begin; i < part.end; ++i) {
                make(i);
                out.write(i * width + part.first, n, s.made);
            }
        };
        if (mode == kAttention) {
            attention_gradient(tokens, part, scores + h, heads, s, need_x ? &out : nullptr, width,
                               need_score ? dscore.mutable_data_ptr<T>() + h : nullptr);
        } else if (!need_x) {
            return;
        } else if (mode == kMean) {
            divide(s.grad, n, static_cast<T>(part.length()), s.made);
            each_token([](int64_t) {});
        } else if (mode == kMax) {
            int64_t* const winner = s.winners.get(n);
            std::fill_n(winner, n, part.begin);
            std::fill_n(s.best, n, -kInfinity<T>);
            for (int64_t i = part.begin; i < part.end; ++i)
                raise(tokens.row(i, part, s.token), n, i, s.best, winner);
            each_token([&](int64_t i) { where_equal(winner, i, s.grad, n, s.made); });
        } else {
            exponential_sums(tokens, part, s);
            each_token([&](int64_t i) { weigh(tokens.row(i, part, s.token), s.best, s.total, s.grad, n, s.made); });
        }
    });
    return {dx, dscore};
}

Tensor segment_pool_fwd(const Tensor& x, const Tensor& start, const std::optional<Tensor>& score, int64_t mode) {
    const auto run = [&]<class T>(T) { return forward<T>(x, start, score, mode); };
    return x.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

Backward segment_pool_bwd(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& start,
                          const std::optional<Tensor>& score, int64_t length, int64_t mode, bool need_x,
                          bool need_score) {
    const auto run = [&]<class T>(T) { return backward<T>(grad, x, start, score, length, mode, need_x, need_score); };
    return grad.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

} // namespace
} // namespace vlpfast::temporal

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
    m.impl("segment_pool_fwd", TORCH_BOX(&vlpfast::temporal::segment_pool_fwd));
    m.impl("segment_pool_bwd", TORCH_BOX(&vlpfast::temporal::segment_pool_bwd));
}
