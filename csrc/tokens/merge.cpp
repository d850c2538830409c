// merge_fwd and merge_bwd on the CPU. See vlpfast/ops/tokens/merging.py for what they compute and
// vlpfast/ops/_schemas.py for the arguments.
//
// One thread makes one image, its output rows in order: a token that nothing is merged into is copied, the others are
// summed in the order kept token, sources. The gradient is a gather.

#include "common/simd.h"
#include "tokens/tokens.h"

#include <cstring>
#include <tuple>

namespace vlpfast::tokens {
namespace {

// sum (+)= weight * row
template <class In, class T>
VLPFAST_CLONES void add(const In* row, T weight, int64_t n, bool first, T* __restrict sum) {
    if (first) {
        for (int64_t d = 0; d < n; ++d)
            sum[d] = weight * static_cast<T>(row[d]);
    } else {
        for (int64_t d = 0; d < n; ++d)
            sum[d] += weight * static_cast<T>(row[d]);
    }
}

template <class In, class T> VLPFAST_CLONES void write_quotient(const T* sum, T by, int64_t n, In* __restrict out) {
    for (int64_t d = 0; d < n; ++d)
        out[d] = static_cast<In>(sum[d] / by);
}

template <class In, class T> VLPFAST_CLONES void write_product(const In* row, T factor, int64_t n, In* __restrict out) {
    for (int64_t d = 0; d < n; ++d)
        out[d] = static_cast<In>(factor * static_cast<T>(row[d]));
}

// Whether `value` takes the place of the largest so far: a NaN does, and stays.
template <class T> VLPFAST_INLINE bool larger(T value, T old) {
    return !(value <= old) && old == old;
}

template <class In, class T>
VLPFAST_CLONES void larger_of(const In* row, int64_t n, int32_t member, T* __restrict best, int32_t* __restrict who) {
    for (int64_t d = 0; d < n; ++d) {
        const T value = static_cast<T>(row[d]);
        const bool takes = larger(value, best[d]);
        best[d] = takes ? value : best[d];
        who[d] = takes ? member : who[d];
    }
}

template <class In>
VLPFAST_CLONES void write_won(const In* grad, const int32_t* who, int32_t member, int64_t n, In* __restrict out) {
    for (int64_t d = 0; d < n; ++d)
        out[d] = who[d] == member ? grad[d] : static_cast<In>(0.0f);
}

template <class In, class T> VLPFAST_CLONES T dot(const In* a, const In* b, const T* minus, int64_t n) {
    T parts[kLanes] = {};
    int64_t d = 0;
    for (; d + kLanes <= n; d += kLanes) {
        for (int64_t l = 0; l < kLanes; ++l)
            parts[l] += static_cast<T>(a[d + l]) * (static_cast<T>(b[d + l]) - minus[d + l]);
    }
    T sum = 0;
    for (; d < n; ++d)
        sum += static_cast<T>(a[d]) * (static_cast<T>(b[d]) - minus[d]);
    for (const T part : parts)
        sum += part;
    return sum;
}

// A match of all images, checked: every token occurs once, and index says where it is.
class Matches {
  public:
    const int64_t batch, count, outputs;

    Matches(const Tensor& kept, const Tensor& source, const Tensor& index)
        : batch(index.size(0)), count(index.size(1)), outputs(kept.size(1)), kept_(read(kept)), source_(read(source)),
          index_(read(index)) {
        STD_TORCH_CHECK(kept.size(0) == batch && source.size(0) == batch && outputs + source.size(1) == count,
                        "match: expected kept and source to have the ", count, " tokens of index");
        std::vector<char> seen(count);
        for (int64_t b = 0; b < batch; ++b) {
            std::fill(seen.begin(), seen.end(), 0);
            const int64_t *kept = kept_.data() + b * outputs, *source = source_.data() + b * sources(),
                          *index = index_.data() + b * count;
            const auto once = [&](int64_t token) {
                STD_TORCH_CHECK(0 <= token && token < count && !seen[token], "match: expected the tokens 0 to ",
                                count - 1, ", each once in kept and source, got ", token, " for image ", b);
                seen[token] = 1;
            };
            for (int64_t j = 0; j < outputs; ++j) {
                once(kept[j]);
                STD_TORCH_CHECK(index[kept[j]] == j, "match: expected index ", j, " for the token kept there, got ",
                                index[kept[j]]);
            }
            for (int64_t i = 0; i < sources(); ++i) {
                once(source[i]);
                STD_TORCH_CHECK(0 <= index[source[i]] && index[source[i]] < outputs, "match: expected an index below ",
                                outputs, ", got ", index[source[i]]);
            }
        }
    }

    // Calls f(output, members, count of them) for every output of image b; the kept token comes first.
    template <class F> void each(int64_t b, std::vector<int64_t>& sorted, const F& f) const {
        const int64_t *kept = kept_.data() + b * outputs, *index = index_.data() + b * count;
        sorted.assign(source_.begin() + b * sources(), source_.begin() + (b + 1) * sources());
        std::stable_sort(sorted.begin(), sorted.end(), [&](int64_t i, int64_t j) { return index[i] < index[j]; });
        std::vector<int64_t> members;
        for (int64_t j = 0, at = 0; j < outputs; ++j) {
            members.assign(1, kept[j]);
            for (; at < sources() && index[sorted[at]] == j; ++at)
                members.push_back(sorted[at]);
            f(j, members);
        }
    }

  private:
    int64_t sources() const { return count - outputs; }
    static std::vector<int64_t> read(const Tensor& t) {
        const auto* data = t.const_data_ptr<int64_t>();
        std::vector<int64_t> out(t.size(0) * t.size(1));
        for (int64_t b = 0; b < t.size(0); ++b) {
            for (int64_t i = 0; i < t.size(1); ++i)
                out[b * t.size(1) + i] = data[b * t.stride(0) + i * t.stride(1)];
        }
        return out;
    }

    std::vector<int64_t> kept_, source_, index_;
};

// Weights [batch, count], ones where there are none.
template <class T> struct Weights {
    const T* data = nullptr;
    int64_t image = 0, step = 0;

    Weights(const std::optional<Tensor>& t, const Matches& matches) {
        if (!t)
            return;
        STD_TORCH_CHECK(t->scalar_type() == kScalarType<T> && t->dim() == 2 && t->size(0) == matches.batch &&
                            t->size(1) == matches.count,
                        "weight: expected one number of the accumulating dtype for each token");
        data = t->const_data_ptr<T>();
        image = t->stride(0);
        step = t->stride(1);
    }
    T at(int64_t b, int64_t i) const { return data ? data[b * image + i * step] : T(1); }
    T total(int64_t b, const std::vector<int64_t>& members) const {
        T sum = 0;
        for (const int64_t i : members)
            sum += at(b, i);
        return sum;
    }
};

void check_tokens(const char* name, const Tensor& t, int64_t batch, int64_t count) {
    check_dense(name, t);
    STD_TORCH_CHECK(t.size(0) == batch && t.size(1) == count, name, ": expected ", batch, " x ", count,
                    " tokens as the match has, got ", t.size(0), " x ", t.size(1));
}

std::tuple<Tensor, Tensor> merge_fwd(const Tensor& x, const Tensor& kept, const Tensor& source, const Tensor& index,
                                     const std::optional<Tensor>& weight, bool divide, bool largest) {
    const Matches matches(kept, source, index);
    check_tokens("x", x, matches.batch, matches.count);
    const ScalarType dtype = x.scalar_type();
    const int64_t width = x.size(2), outputs = matches.outputs;
    Tensor y = empty({matches.batch, outputs, width}, dtype);
    Tensor total =
        empty({matches.batch, outputs}, dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
    with_floating_pointer(x.const_data_ptr(), dtype, [&](auto* data) {
        using In = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
        using T = Sum<In>;
        const Tokens<const In> tokens(data, x);
        const Weights<T> weights(weight, matches);
        In* const y_data = static_cast<In*>(y.mutable_data_ptr());
        T* const total_data = static_cast<T*>(total.mutable_data_ptr());
        parallel_for(0, matches.batch, 1, [&](int64_t from, int64_t to) {
            Buffer<T> buffer;
            T* const sum = buffer.get(width);
            std::vector<int32_t> who(largest ? width : 0);
            std::vector<int64_t> sorted;
            for (int64_t b = from; b < to; ++b) {
                matches.each(b, sorted, [&](int64_t j, const std::vector<int64_t>& members) {
                    In* const out = y_data + (b * outputs + j) * width;
                    const T all = total_data[b * outputs + j] = weights.total(b, members);
                    if (members.size() == 1) {
                        std::memcpy(static_cast<void*>(out), tokens.at(b, members[0]), width * sizeof(In));
                        return;
                    }
                    for (size_t k = 0; k < members.size(); ++k) {
                        const In* const row = tokens.at(b, members[k]);
                        if (largest && k > 0)
                            larger_of(row, width, static_cast<int32_t>(k), sum, who.data());
                        else
                            add(row, largest ? T(1) : weights.at(b, members[k]), width, k == 0, sum);
                    }
                    if (divide && all == 0)
                        std::fill_n(out, width, static_cast<In>(0.0f));
                    else
                        write_quotient(sum, divide ? all : T(1), width, out);
                });
            }
        });
    });
    return {y, total};
}

std::tuple<Tensor, Tensor> merge_bwd(const Tensor& grad, const std::optional<Tensor>& grad_total,
                                     const std::optional<Tensor>& x, const Tensor& kept, const Tensor& source,
                                     const Tensor& index, const std::optional<Tensor>& weight, bool divide,
                                     bool largest, bool need_x, bool need_weight) {
    const Matches matches(kept, source, index);
    const int64_t batch = matches.batch, count = matches.count, outputs = matches.outputs, width = grad.size(2);
    check_tokens("grad", grad, batch, outputs);
    STD_TORCH_CHECK(x || !(need_weight || (largest && need_x)), "x: expected the tokens that were merged, got none");
    STD_TORCH_CHECK(weight || !need_weight, "weight: expected one, as its gradient is asked for, got none");
    STD_TORCH_CHECK(!largest || !weight, "weight: expected none with largest values");
    const ScalarType dtype = grad.scalar_type();
    if (x) {
        check_tokens("x", *x, batch, count);
        STD_TORCH_CHECK(x->scalar_type() == dtype && x->size(2) == width, "x: expected the dtype and width of grad");
    }
    Tensor dx = empty({need_x ? batch : 0, count, width}, dtype);
    Tensor dweight =
        empty({need_weight ? batch : 0, count}, dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
    with_floating_pointer(grad.const_data_ptr(), dtype, [&](auto* data) {
        using In = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
        using T = Sum<In>;
        const Tokens<const In> grads(data, grad);
        const Tokens<const In> tokens(x ? static_cast<const In*>(x->const_data_ptr()) : data, x ? *x : grad);
        const Weights<T> weights(weight, matches);
        STD_TORCH_CHECK(!grad_total || (grad_total->scalar_type() == kScalarType<T> && grad_total->size(0) == batch &&
                                        grad_total->size(1) == outputs),
                        "grad_total: expected one number of the accumulating dtype for each output");
        const auto of_total = [&](int64_t b, int64_t j) {
            return grad_total ? grad_total->const_data_ptr<T>()[b * grad_total->stride(0) + j * grad_total->stride(1)]
                              : T(0);
        };
        In* const dx_data = static_cast<In*>(dx.mutable_data_ptr());
        T* const dweight_data = static_cast<T*>(dweight.mutable_data_ptr());
        parallel_for(0, batch, 1, [&](int64_t from, int64_t to) {
            Buffer<T> buffer;
            T* const sum = buffer.get(width);
            std::vector<int32_t> who(largest ? width : 0);
            std::vector<int64_t> sorted;
            const auto dx_row = [&](int64_t b, int64_t i) { return dx_data + (b * count + i) * width; };
            for (int64_t b = from; b < to; ++b) {
                matches.each(b, sorted, [&](int64_t j, const std::vector<int64_t>& members) {
                    const In* const g = grads.at(b, j);
                    if (members.size() == 1) {
                        if (need_x)
                            std::memcpy(static_cast<void*>(dx_row(b, members[0])), g, width * sizeof(In));
                        if (need_weight)
                            dweight_data[b * count + members[0]] = of_total(b, j);
                        return;
                    }
                    if (largest && need_x) {
                        std::fill(who.begin(), who.end(), 0);
                        for (size_t k = 0; k < members.size(); ++k) {
                            if (k == 0)
                                add(tokens.at(b, members[k]), T(1), width, true, sum);
                            else
                                larger_of(tokens.at(b, members[k]), width, static_cast<int32_t>(k), sum, who.data());
                        }
                        for (size_t k = 0; k < members.size(); ++k)
                            write_won(g, who.data(), static_cast<int32_t>(k), width, dx_row(b, members[k]));
                        return;
                    }
                    const T all = weights.total(b, members);
                    const T by = !divide ? T(1) : all == 0 ? T(0) : 1 / all;
                    if (need_x) {
                        for (const int64_t i : members)
                            write_product(g, weights.at(b, i) * by, width, dx_row(b, i));
                    }
                    if (!need_weight)
                        return;
                    std::fill_n(sum, width, T(0)); // the mean, which the weights' gradient is relative to
                    if (divide) {
                        for (const int64_t i : members)
                            add(tokens.at(b, i), weights.at(b, i) * by, width, false, sum);
                    }
                    for (const int64_t i : members)
                        dweight_data[b * count + i] = of_total(b, j) + by * dot(g, tokens.at(b, i), sum, width);
                });
            }
        });
    });
    return {dx, dweight};
}

} // namespace
} // namespace vlpfast::tokens

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
    m.impl("merge_fwd", TORCH_BOX(&vlpfast::tokens::merge_fwd));
    m.impl("merge_bwd", TORCH_BOX(&vlpfast::tokens::merge_bwd));
}
