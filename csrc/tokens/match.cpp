// match_tokens on the CPU. See vlpfast/ops/tokens/matching.py for the rule, reference.py beside it for the order of
// what is not a cosine, and vlpfast/ops/_schemas.py for the arguments.
//
// One thread makes one image. Its rows are brought to unit length once; those of set a lie side by side in the panels
// of late interaction's kernel, which finds for each the nearest row of set b without writing a product to memory.

#include "common/simd.h"
#include "maxsim/kernel.h"
#include "tokens/tokens.h"

#include <limits>
#include <numeric>
#include <tuple>

namespace vlpfast::tokens {
namespace {

using maxsim::Job;
using maxsim::Kernel;

// Less than every cosine; the same numbers as in reference.py.
constexpr double kNan = -2, kPadding = -3, kMixed = -4, kNever = -5;

template <class In, class T> VLPFAST_CLONES T squares(const In* row, int64_t n, T* __restrict out) {
    T parts[kLanes] = {};
    int64_t d = 0;
    for (; d + kLanes <= n; d += kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) {
            const T value = static_cast<T>(row[d + l]);
            out[d + l] = value;
            parts[l] += value * value;
        }
    }
    T sum = 0;
    for (; d < n; ++d) {
        const T value = static_cast<T>(row[d]);
        out[d] = value;
        sum += value * value;
    }
    for (const T part : parts)
        sum += part;
    return sum;
}

template <class T> VLPFAST_CLONES void divide(T* row, int64_t n, T by) {
    for (int64_t d = 0; d < n; ++d)
        row[d] /= by;
}

// A row of unit length; whether it holds no NaN. A zero row stays.
template <class In, class T> bool unit_row(const In* row, int64_t n, T* out) {
    const T length = std::sqrt(squares(row, n, out));
    if (length != 0)
        divide(out, n, length);
    return std::isfinite(length) || std::none_of(out, out + n, [](T value) { return std::isnan(value); });
}

struct Sets {
    std::vector<int64_t> a, b; // places of tokens
    int64_t r, protect;
    bool by_score;
};

// One image's tokens of both sets against each other, and room for it.
template <class In> class Image {
  public:
    using T = Sum<In>;

    Image(const Tokens<const In>& metric, const Sets& sets)
        : metric_(metric), sets_(sets), kernel_(maxsim::kernel_here<T>()), score_(sets.a.size()), to_(sets.a.size()),
          order_(sets.a.size()), merged_(sets.a.size()) {}

    // mask: of this image's tokens, `step` apart; null: all are real.
    void match(int64_t b, const bool* mask, int64_t step, int64_t* kept, int64_t* source, int64_t* index) {
        compare(b, [&](int64_t place) { return !mask || mask[place * step]; });
        std::iota(order_.begin(), order_.end(), 0);
        const auto before = [&](int32_t i, int32_t j) {
            return score_[i] != score_[j] ? score_[i] > score_[j] : i < j;
        };
        const int64_t r = sets_.r, count_a = static_cast<int64_t>(sets_.a.size());
        std::partial_sort(order_.begin(), order_.begin() + (sets_.by_score ? count_a : r), order_.end(), before);
        int64_t out = 0;
        const auto keep = [&](int64_t place) {
            kept[out] = place;
            index[place] = out++;
        };
        if (sets_.by_score) {
            for (int64_t i = r; i < count_a; ++i)
                keep(sets_.a[order_[i]]);
        } else {
            std::fill(merged_.begin(), merged_.end(), 0);
            for (int64_t i = 0; i < r; ++i)
                merged_[order_[i]] = 1;
            for (int64_t i = 0; i < count_a; ++i) {
                if (!merged_[i])
                    keep(sets_.a[i]);
            }
        }
        for (const int64_t place : sets_.b)
            keep(place);
        for (int64_t i = 0; i < r; ++i) {
            source[i] = sets_.a[order_[i]];
            index[source[i]] = count_a - r + to_[order_[i]];
        }
    }

  private:
    template <class Real> void compare(int64_t b, const Real& real) {
        const int64_t width = metric_.width;
        const int64_t count_a = static_cast<int64_t>(sets_.a.size()), count_b = static_cast<int64_t>(sets_.b.size());
        int64_t first[2] = {-1, -1}; // of b's tokens that may be merged into: padding, real
        rows_.clear();
        T* const row = row_data_.get(count_b * width);
        for (int64_t j = 0; j < count_b; ++j) {
            const int64_t place = sets_.b[j];
            if (place < sets_.protect)
                continue;
            int64_t& earliest = first[real(place)];
            if (earliest < 0)
                earliest = j;
            if (real(place) && unit_row(metric_.at(b, place), width, row + rows_.size() * width))
                rows_.push_back(j);
        }
        lanes_.clear();
        T* const lane = lane_data_.get(count_a * width);
        for (int64_t i = 0; i < count_a; ++i) {
            const int64_t place = sets_.a[i];
            const bool is_real = place >= sets_.protect && real(place);
            if (is_real && !rows_.empty() && unit_row(metric_.at(b, place), width, lane + lanes_.size() * width)) {
                lanes_.push_back(i);
                continue;
            }
            const bool same = first[is_real] >= 0;
            score_[i] = !same ? kMixed : is_real ? kNan : kPadding;
            to_[i] = same ? first[is_real] : first[!is_real];
            if (place < sets_.protect || to_[i] < 0) {
                score_[i] = kNever;
                to_[i] = 0;
            }
        }
        for (size_t begin = 0; begin < lanes_.size(); begin += kernel_.panel)
            run_panel(begin, std::min<int64_t>(kernel_.panel, lanes_.size() - begin), lane + begin * width, row);
    }

    void run_panel(size_t begin, int64_t count, const T* lane, const T* row) {
        const int64_t width = metric_.width, padded = (count + kernel_.lane - 1) / kernel_.lane * kernel_.lane;
        T* const panel = panel_.get(width * padded);
        constexpr int64_t kBlock = 16; // of columns, so that what is written stays in the first-level cache
        for (int64_t start = 0; start < width; start += kBlock) {
            const int64_t end = std::min(width, start + kBlock);
            for (int64_t l = 0; l < padded; ++l) {
                for (int64_t d = start; d < end; ++d)
                    panel[d * padded + l] = l < count ? lane[l * width + d] : T(0);
            }
        }
        Job<T> job{};
        job.panel = panel;
        job.lanes = count;
        job.rows = row;
        job.stride = job.width = width;
        job.count = static_cast<int64_t>(rows_.size());
        job.lane_best = best_.get(kernel_.panel);
        job.lane_place = place_.get(kernel_.panel);
        kernel_.run(job);
        for (int64_t l = 0; l < count; ++l) {
            score_[lanes_[begin + l]] = job.lane_best[l];
            to_[lanes_[begin + l]] = rows_[job.lane_place[l]];
        }
    }

    const Tokens<const In>& metric_;
    const Sets& sets_;
    const Kernel<T>& kernel_;
    std::vector<T> score_;              // of each token of a: its largest cosine, or one of the numbers above
    std::vector<int64_t> to_;           // the place in b of the token that it has with
    std::vector<int32_t> order_;        // places in a
    std::vector<char> merged_;          // whether each token of a is
    std::vector<int64_t> lanes_, rows_; // places in a and b of the tokens in lane_data_ and row_data_
    Buffer<T> lane_data_, row_data_, panel_, best_;
    Buffer<int32_t> place_;
};

std::tuple<Tensor, Tensor, Tensor> match_tokens(const Tensor& metric, const Tensor& a, const Tensor& b, int64_t r,
                                                int64_t protect, const std::optional<Tensor>& mask, bool by_score) {
    check_dense("metric", metric);
    const Sets sets{read_integers(a), read_integers(b), r, protect, by_score};
    const int64_t batch = metric.size(0), n = metric.size(1), count_a = static_cast<int64_t>(sets.a.size());
    STD_TORCH_CHECK(0 <= r && r <= count_a, "r: expected 0 to ", count_a, ", got ", r);
    STD_TORCH_CHECK(r == 0 || !sets.b.empty(), "b: expected at least one token, got none");
    std::vector<char> seen(n, 0);
    for (const auto* set : {&sets.a, &sets.b}) {
        for (const int64_t place : *set) {
            STD_TORCH_CHECK(0 <= place && place < n && !seen[place], "a, b: expected the ", n,
                            " places of tokens, each once, got ", place);
            seen[place] = 1;
        }
    }
    STD_TORCH_CHECK(count_a + static_cast<int64_t>(sets.b.size()) == n, "a, b: expected ", n, " places, got ",
                    count_a + static_cast<int64_t>(sets.b.size()));
    STD_TORCH_CHECK(!mask || (mask->dim() == 2 && mask->size(0) == batch && mask->size(1) == n),
                    "mask: expected a value for each token");
    Tensor kept = empty({batch, n - r}, ScalarType::Long), source = empty({batch, r}, ScalarType::Long),
           index = empty({batch, n}, ScalarType::Long);
    const bool* const masks = mask ? mask->const_data_ptr<bool>() : nullptr;
    const int64_t image = mask ? mask->stride(0) : 0, step = mask ? mask->stride(1) : 0;
    auto* const kept_data = kept.mutable_data_ptr<int64_t>();
    auto* const source_data = source.mutable_data_ptr<int64_t>();
    auto* const index_data = index.mutable_data_ptr<int64_t>();
    with_floating_pointer(metric.const_data_ptr(), metric.scalar_type(), [&](auto* data) {
        using In = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
        const Tokens<const In> tokens(data, metric);
        parallel_for(0, batch, 1, [&](int64_t from, int64_t to) {
            Image<In> one(tokens, sets);
            for (int64_t i = from; i < to; ++i)
                one.match(i, masks ? masks + i * image : nullptr, step, kept_data + i * (n - r), source_data + i * r,
                          index_data + i * n);
        });
    });
    return {kept, source, index};
}

} // namespace
} // namespace vlpfast::tokens

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
    m.impl("match_tokens", TORCH_BOX(&vlpfast::tokens::match_tokens));
}
