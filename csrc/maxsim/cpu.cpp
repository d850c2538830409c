// maxsim on the CPU. See vlpfast/ops/maxsim/maxsim.py for what it computes and vlpfast/ops/_schemas.py for the
// arguments.
//
// Forward: the tokens of one side are packed into panels, token beside token; a tile of products of one panel with some
// tokens of the other side stays in registers until the largest have been taken, both ways (tile.h). Masked tokens are
// left out when panels and rows are made. Backward: winners are known, so a gradient is a sum of tokens; every set's
// gradient is made by one thread, its partners in order.
//
// A product is one sum in order, scores are sums in double in the order of the tokens, and every result has one owner:
// neither the number of threads nor the instruction set's panels nor the choice of lanes decides about its bits.

#include "common/simd.h"
#include "maxsim/sweep.h"

#include <cstring>
#include <tuple>

namespace vlpfast::maxsim {
namespace {

constexpr int64_t kWinnerBytes = 16 << 20; // of winners that the backward finds again at once

Tensor make_winners(int64_t rows, int64_t width, int64_t longest) {
    const Tensor out = empty({rows, width}, index_type(longest));
    std::memset(out.mutable_data_ptr(), 0, out.numel() * out.element_size());
    return out;
}

// x_to_y, y_to_x, y_of_x, x_of_y
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class T>
Forward forward(const Problem<T>& p, int64_t x_longest, int64_t y_longest, bool want_x_to_y, bool want_y_to_x,
                bool keep) {
    const int64_t M = p.x.count();
    const Tensor x_to_y = empty({want_x_to_y ? M : 0, p.columns()}, kScalarType<T>),
                 y_to_x = empty({want_y_to_x ? M : 0, p.columns()}, kScalarType<T>),
                 y_of_x = make_winners(keep && want_x_to_y ? p.columns() : 0, p.x.tokens.count, y_longest),
                 x_of_y = make_winners(!keep || !want_y_to_x ? 0
                                       : p.all()             ? M
                                                             : 1,
                                       p.y.tokens.count, x_longest);
    Sweep<T>(p,
             {want_x_to_y ? x_to_y.mutable_data_ptr<T>() : nullptr,
              want_y_to_x ? y_to_x.mutable_data_ptr<T>() : nullptr,
              Winners(y_of_x),
              Winners(x_of_y),
              {0, M}},
             kernel_here<T>())
        .run();
    return {x_to_y, y_to_x, y_of_x, x_of_y};
}

struct Link {
    int32_t to, from;
};

// Row `to` of out += weight * row `from`, link by link.
template <class T>
VLPFAST_CLONES void add_linked(T* out, Rows<T> rows, const std::vector<Link>& links, T weight, int64_t width) {
    for (const Link& link : links) {
        T* __restrict const to = out + link.to * width;
        const T* const from = rows.data + link.from * rows.stride;
        for (int64_t d = 0; d < width; ++d)
            to[d] += weight * from[d];
    }
}

template <class T, class Out> VLPFAST_CLONES void convert(const T* in, int64_t n, Out* out) {
    for (int64_t i = 0; i < n; ++i)
        out[i] = static_cast<Out>(in[i]);
}

// A gradient of scores [M, columns], of any strides; none: the direction takes no part.
template <class T> struct Scores {
    const T* data = nullptr;
    int64_t row = 0, column = 0;

    explicit Scores(const std::optional<Tensor>& t) {
        if (t) {
            data = t->const_data_ptr<T>();
            row = t->stride(0);
            column = t->stride(1);
        }
    }
    T at(int64_t m, int64_t c) const { return data[m * row + c * column]; }
};

// The gradient of one side, `out` [tokens, D], which it adds to: what the pairs of some sets of x contribute.
template <class T>
void add_gradient(const Problem<T>& p, const Output<T>& winners, const Scores<T>& grad_x_to_y,
                  const Scores<T>& grad_y_to_x, bool of_y, T* out) {
    const Roles<T> roles{p, winners.x_sets, of_y};
    const Side<T>&own = roles.lanes(), &other = roles.rows();
    const int64_t D = p.D();
    const Scores<T>&grad_own = of_y ? grad_y_to_x : grad_x_to_y, &grad_other = of_y ? grad_x_to_y : grad_y_to_x;
    const std::vector<Range> chunks =
        roles.chunks(roles.sets(), kChunkBytes / static_cast<int64_t>(sizeof(T)) / std::max<int64_t>(1, D));
    // Tokens of `from` whose winner is a token of `to`: links from both ends' places.
    const auto each_winner = [&](const Side<T>& from, int64_t i, const Side<T>& to, int64_t j, int64_t m, int64_t n,
                                 const auto& f) {
        const bool from_y = &from == &p.y;
        const Winners& w = from_y ? winners.x_of_y : winners.y_of_x;
        const int64_t at = from_y ? winners.x_of_y_at(p, m, n) : winners.y_of_x_at(p, m, n);
        w.with_pointer([&](const auto* data) {
            for (int64_t k = from.first[i]; k < from.first[i + 1]; ++k) {
                const int64_t token = from.token(k) - from.start[i];
                const auto place = static_cast<int64_t>(data[at + token]);
                if (!p.zero || !to.masked(j, place))
                    f(static_cast<int32_t>(token), static_cast<int32_t>(place));
            }
        });
    };
    parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
        Buffer<T> copy;
        std::vector<Link> links;
        for (int64_t c = begin; c < end; ++c) {
            const Range partners = roles.partners(chunks[c].begin);
            for (int64_t j = partners.begin; j < partners.end; ++j) {
                if (other.kept_in(j) == 0)
                    continue;
                const Rows<T> rows = other.rows(other.start[j], other.start[j + 1], copy);
                for (int64_t i = chunks[c].begin; i < chunks[c].end; ++i) {
                    if (own.kept_in(i) == 0)
                        continue;
                    const int64_t m = of_y ? j : i, n = of_y ? i : j;
                    T* const to = out + own.start[i] * D;
                    if (grad_own.data) {
                        links.clear();
                        each_winner(own, i, other, j, m, n, [&](int32_t a, int32_t b) { links.push_back({a, b}); });
                        add_linked(to, rows, links, grad_own.at(m, p.column(m, n)) * p.weight(own.kept_in(i)), D);
                    }
                    if (grad_other.data) {
                        links.clear();
                        each_winner(other, j, own, i, m, n, [&](int32_t a, int32_t b) { links.push_back({b, a}); });
                        add_linked(to, rows, links, grad_other.at(m, p.column(m, n)) * p.weight(other.kept_in(j)), D);
                    }
                }
            }
        }
    });
}

// The gradient of one side while it is made: in the accumulating dtype, in the result's own memory if it can be.
template <class T> class Gradient {
  public:
    Gradient(bool needed, const Matrix<T>& tokens, ScalarType dtype)
        : result_(empty({needed ? tokens.count : 0, tokens.width}, dtype)) {
        if (needed) {
            data_ = dtype == kScalarType<T> ? result_.mutable_data_ptr<T>() : buffer_.get(result_.numel());
            std::fill_n(data_, result_.numel(), T(0));
        }
    }
    T* data() const { return data_; } // null: not needed
    Tensor result() const {
        if (data_ && result_.scalar_type() != kScalarType<T>) {
            with_floating_pointer(result_.mutable_data_ptr(), result_.scalar_type(), [&](auto* to) {
                using Out = std::remove_const_t<std::remove_pointer_t<decltype(to)>>;
                constexpr int64_t kBlock = 4096;
                parallel_for(0, (result_.numel() + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
                    const int64_t first = begin * kBlock, last = std::min(result_.numel(), end * kBlock);
                    convert(data_ + first, last - first, const_cast<Out*>(to) + first);
                });
            });
        }
        return result_;
    }

  private:
    const Tensor result_;
    Buffer<T> buffer_;
    T* data_ = nullptr;
};

// dx, dy: no rows where not needed
using Backward = std::tuple<Tensor, Tensor>;

template <class T>
Backward backward(const Problem<T>& p, const std::optional<Tensor>& grad_x_to_y,
                  const std::optional<Tensor>& grad_y_to_x, int64_t x_longest, int64_t y_longest, const Tensor& y_of_x,
                  const Tensor& x_of_y, ScalarType x_dtype, ScalarType y_dtype, bool need_x, bool need_y) {
    STD_TORCH_CHECK(y_of_x.size(1) == p.x.tokens.count && y_of_x.scalar_type() == index_type(y_longest) &&
                        x_of_y.size(1) == p.y.tokens.count && x_of_y.scalar_type() == index_type(x_longest),
                    "expected the winners that the forward made of the same tokens");
    const Scores<T> by_x(grad_x_to_y), by_y(grad_y_to_x);
    const Gradient<T> dx(need_x, p.x.tokens, x_dtype), dy(need_y, p.y.tokens, y_dtype);
    const auto add = [&](const Output<T>& winners) {
        if (need_x)
            add_gradient(p, winners, by_x, by_y, false, dx.data());
        if (need_y)
            add_gradient(p, winners, by_x, by_y, true, dy.data());
    };
    const Range everything{0, p.x.count()};
    const bool kept =
        (!by_x.data || y_of_x.size(0) == p.columns()) && (!by_y.data || x_of_y.size(0) == (p.all() ? p.x.count() : 1));
    if (kept) {
        add({nullptr, nullptr, Winners(y_of_x), Winners(x_of_y), everything});
    } else {
        const int64_t Lx = std::max<int64_t>(1, p.x.tokens.count), of_y = p.all() ? p.y.tokens.count : 0;
        // of one token of x, and its share of its set's
        const int64_t bytes = static_cast<int64_t>(sizeof(int32_t)) * (p.columns() + of_y * p.x.count() / Lx);
        for (const Range& sets : blocks(p.x, everything, kWinnerBytes / std::max<int64_t>(1, bytes))) {
            const Tensor again_y = make_winners(by_x.data ? p.columns() : 0,
                                                p.x.start[sets.end] - p.x.start[sets.begin], y_longest),
                         again_x = make_winners(!by_y.data ? 0
                                                : p.all()  ? sets.size()
                                                           : 1,
                                                p.y.tokens.count, x_longest);
            const Output<T> winners{nullptr, nullptr, Winners(again_y), Winners(again_x), sets};
            Sweep<T>(p, winners, kernel_here<T>()).run();
            add(winners);
        }
    }
    return {dx.result(), dy.result()};
}

bool in_double(const Tensor& x) {
    return x.scalar_type() == ScalarType::Double;
}

Forward maxsim_fwd(const Tensor& x, const Tensor& y, const Tensor& x_start, const Tensor& y_start,
                   const std::optional<Tensor>& x_keep, const std::optional<Tensor>& y_keep, int64_t x_longest,
                   int64_t y_longest, std::optional<int64_t> candidates, bool want_x_to_y, bool want_y_to_x, bool mean,
                   bool zero, bool keep_winners) {
    const auto run = [&]<class T>(T) {
        return forward(Problem<T>(x, y, x_start, y_start, x_keep, y_keep, x_longest, y_longest, candidates, mean, zero),
                       x_longest, y_longest, want_x_to_y, want_y_to_x, keep_winners);
    };
    return in_double(x) ? run(double()) : run(float());
}

Backward maxsim_bwd(const std::optional<Tensor>& grad_x_to_y, const std::optional<Tensor>& grad_y_to_x, const Tensor& x,
                    const Tensor& y, const Tensor& x_start, const Tensor& y_start, const std::optional<Tensor>& x_keep,
                    const std::optional<Tensor>& y_keep, int64_t x_longest, int64_t y_longest,
                    std::optional<int64_t> candidates, bool mean, bool zero, const Tensor& y_of_x, const Tensor& x_of_y,
                    bool need_x, bool need_y) {
    const auto run = [&]<class T>(T) {
        return backward(
            Problem<T>(x, y, x_start, y_start, x_keep, y_keep, x_longest, y_longest, candidates, mean, zero),
            grad_x_to_y, grad_y_to_x, x_longest, y_longest, y_of_x, x_of_y, x.scalar_type(), y.scalar_type(), need_x,
            need_y);
    };
    return in_double(x) ? run(double()) : run(float());
}

Tensor maxsim_int8(const Tensor& x, const Tensor& y, const Tensor& y_scale, const Tensor& x_start,
                   const Tensor& y_start, const std::optional<Tensor>& x_keep, const std::optional<Tensor>& y_keep,
                   int64_t x_longest, int64_t y_longest, bool mean, bool unit) {
    STD_TORCH_CHECK(y.scalar_type() == ScalarType::Char, "y: expected int8, got ",
                    torch::headeronly::toString(y.scalar_type()));
    STD_TORCH_CHECK(y_scale.dim() == 1 && y_scale.size(0) == y.size(0), "y_scale: expected ", y.size(0),
                    " numbers, got ", y_scale.numel());
    const auto run = [&]<class T>(T) {
        const Problem<T> p(x, y, x_start, y_start, x_keep, y_keep, x_longest, y_longest, std::nullopt, mean, false,
                           Scale{y_scale, unit});
        return std::get<0>(forward(p, x_longest, y_longest, true, false, false));
    };
    return in_double(x) ? run(double()) : run(float());
}

} // namespace
} // namespace vlpfast::maxsim

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
    m.impl("maxsim_fwd", TORCH_BOX(&vlpfast::maxsim::maxsim_fwd));
    m.impl("maxsim_bwd", TORCH_BOX(&vlpfast::maxsim::maxsim_bwd));
    m.impl("maxsim_int8", TORCH_BOX(&vlpfast::maxsim::maxsim_int8));
}
