// Bipartite matching on the CPU. See vlpfast/ops/tokens/matching.py for what it computes and vlpfast/ops/_schemas.py
// for the arguments.
//
// One image after the other, each by one thread: its tokens are brought to unit length, those that can be merged away
// into panels, those that can be merged into one after the other; late interaction's kernel takes the largest product
// of each lane of a panel while the products are in registers (csrc/maxsim/tile.h). What is left is a selection among
// one number for each token of A.
//
// A product is one sum in order and images do not meet: the number of threads decides about no bit.

#include "common/simd.h"
#include "maxsim/kernel.h"
#include "tokens/tokens.h"

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

namespace vlpfast::tokens {
namespace {

// Where tokens without a similarity come in the order of merging, after all similarities and before each other.
constexpr float kNoSimilarity = -3, kPadding = -4, kNoPartner = -5;

// out = row / its length, or zeros; false: it has a number that is none. `row` and `out` may be one.
template <class T> VLPFAST_CLONES bool unit(const T* row, int64_t n, T* out) {
    T sum[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int l = 0; l < kLanes; ++l)
            sum[l] += row[i + l] * row[i + l];
    }
    for (; i < n; ++i)
        sum[0] += row[i] * row[i];
#pragma GCC unroll 4
    for (int half = kLanes / 2; half > 0; half /= 2) { // one after the other they would take longer than all else here
#pragma GCC unroll 8
        for (int l = 0; l < half; ++l)
            sum[l] += sum[l + half];
    }
    const T length = std::sqrt(sum[0]);
    if (length == 0) {
        for (i = 0; i < n; ++i)
            out[i] = 0;
        return true;
    }
#pragma GCC ivdep // they are the same or apart
    for (i = 0; i < n; ++i)
        out[i] = row[i] / length;
    if (std::isfinite(length))
        return true;
    for (i = 0; i < n; ++i) {
        if (std::isnan(out[i]))
            return false;
    }
    return true;
}

template <class In, class T> VLPFAST_CLONES void widen(const In* in, int64_t n, T* __restrict out) {
    for (int64_t i = 0; i < n; ++i)
        out[i] = static_cast<T>(in[i]);
}

template <class In, class T> bool unit_of(const In* in, int64_t n, T* out) {
    if constexpr (std::is_same_v<In, T>) {
        return unit(in, n, out);
    } else {
        widen(in, n, out);
        return unit(out, n, out);
    }
}

// panel [n, padded] = the transpose of rows [padded, n], in blocks that fit registers of every width.
template <class T> VLPFAST_CLONES void to_panel(const T* rows, int64_t n, int64_t padded, T* __restrict panel) {
    constexpr int64_t kChannels = 16;      // at a time, so that what is written stays in the first-level cache
    int64_t lanes = 0, channels = 0;       // that blocks reach
#if __has_builtin(__builtin_shufflevector) // GCC has it from 12 on
    typedef T Four __attribute__((vector_size(4 * sizeof(T)), aligned(alignof(T)), may_alias));
    lanes = padded / 4 * 4, channels = n / 4 * 4;
    for (int64_t start = 0; start < channels; start += kChannels) {
        const int64_t end = std::min(start + kChannels, channels);
        for (int64_t lane = 0; lane < lanes; lane += 4) {
            for (int64_t c = start; c < end; c += 4) {
                Four row[4];
                for (int i = 0; i < 4; ++i)
                    row[i] = *reinterpret_cast<const Four*>(rows + (lane + i) * n + c);
                for (int pair = 0; pair < 2; ++pair) { // of channels
                    const Four first = pair ? __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7)
                                            : __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5),
                               last = pair ? __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7)
                                           : __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5);
                    T* const to = panel + (c + 2 * pair) * padded + lane;
                    *reinterpret_cast<Four*>(to) = __builtin_shufflevector(first, last, 0, 1, 4, 5);
                    *reinterpret_cast<Four*>(to + padded) = __builtin_shufflevector(first, last, 2, 3, 6, 7);
                }
            }
        }
    }
#endif
    for (int64_t lane = 0; lane < padded; ++lane) {
        for (int64_t c = lane < lanes ? channels : 0; c < n; ++c)
            panel[c * padded + lane] = rows[lane * n + c];
    }
}

// The places of one set, ascending, and those below `protect` among them.
struct Set {
    std::vector<int64_t> places;
    int64_t first = 0; // that may be merged

    int64_t size() const { return static_cast<int64_t>(places.size()); }
};

struct Sets {
    Set a, b;

    Sets(const std::optional<Tensor>& a_index, const std::optional<Tensor>& b_index, int64_t every, int64_t n,
         int64_t protect) {
        STD_TORCH_CHECK(a_index.has_value() == b_index.has_value(), "a, b: expected both or none");
        if (b_index) {
            a.places = read_integers(*a_index);
            b.places = read_integers(*b_index);
        } else {
            STD_TORCH_CHECK(every >= 2, "every: expected >= 2, got ", every);
            for (int64_t i = 0; i < n; ++i)
                (i % every == every - 1 ? b : a).places.push_back(i);
        }
        std::vector<char> seen(n, false);
        for (Set* const set : {&a, &b}) {
            for (const int64_t place : set->places) {
                STD_TORCH_CHECK(place >= 0 && place < n && !seen[place], "a, b: expected each of 0 to ", n - 1,
                                " once, got ", place);
                seen[place] = true;
            }
            STD_TORCH_CHECK(std::is_sorted(set->places.begin(), set->places.end()), "a, b: expected ascending places");
            set->first = std::lower_bound(set->places.begin(), set->places.end(), protect) - set->places.begin();
        }
        STD_TORCH_CHECK(a.size() + b.size() == n, "a, b: expected ", n, " places, got ", a.size() + b.size());
    }
};

struct Result {
    int64_t *index, *kept, *source, *target;
};

template <class In> class Matcher {
    using T = Wide<In>;

  public:
    Matcher(const Tokens<In>& tokens, const Sets& sets, const Table<bool>& mask, int64_t protect, int64_t r,
            bool by_score)
        : tokens_(tokens), sets_(sets), mask_(mask), kernel_(maxsim::kernel_here<T>()), protect_(protect), r_(r),
          by_score_(by_score), keys_(sets.a.size()), to_(sets.a.size()) {}

    void run(int64_t image, const Result& out) {
        similarities(image);
        others(image);
        write(out);
    }

  private:
    struct Entry {
        T key;
        int64_t place; // in set A
    };

    bool real(int64_t image, int64_t place) const { return !mask_.data || mask_.at(image, place); }

    // keys_ and to_ (a place in set B) of the tokens of A that are compared; NaN for the other ones.
    void similarities(int64_t image) {
        const Set &a = sets_.a, &b = sets_.b;
        const int64_t C = tokens_.width;
        rows_.clear();
        T* const row = row_.get(b.size() * C);
        for (int64_t j = b.first; j < b.size(); ++j) {
            T* const at = row + static_cast<int64_t>(rows_.size()) * C;
            if (real(image, b.places[j]) && unit_of(tokens_.row(image, b.places[j], scratch_), C, at))
                rows_.push_back(j);
        }
        std::fill(keys_.begin(), keys_.end(), std::numeric_limits<T>::quiet_NaN());
        if (rows_.empty())
            return;
        lanes_.clear();
        T* const lane = lane_.get(kernel_.panel * C);
        for (int64_t i = a.first; i < a.size(); ++i) {
            if (real(image, a.places[i]) &&
                unit_of(tokens_.row(image, a.places[i], scratch_), C, lane + static_cast<int64_t>(lanes_.size()) * C))
                lanes_.push_back(i);
            if (!lanes_.empty() && (static_cast<int64_t>(lanes_.size()) == kernel_.panel || i + 1 == a.size())) {
                compare(lane, row);
                lanes_.clear();
            }
        }
    }

    void compare(T* lane, const T* row) {
        const int64_t C = tokens_.width, lanes = static_cast<int64_t>(lanes_.size()),
                      padded = (lanes + kernel_.lane - 1) / kernel_.lane * kernel_.lane;
        std::fill(lane + lanes * C, lane + padded * C, T(0));
        T* const panel = panel_.get(padded * C);
        to_panel(lane, C, padded, panel);
        T* const best = best_.get(kernel_.panel);
        int32_t* const place = place_.get(kernel_.panel);
        maxsim::Job<T> job{};
        job.panel = panel;
        job.lanes = lanes;
        job.rows = row;
        job.stride = job.width = C;
        job.count = static_cast<int64_t>(rows_.size());
        job.lane_best = best;
        job.lane_place = place;
        kernel_.run(job);
        for (int64_t l = 0; l < lanes; ++l) {
            keys_[lanes_[l]] = best[l];
            to_[lanes_[l]] = rows_[place[l]];
        }
    }

    // Keys and partners of the tokens of A that are not compared.
    void others(int64_t image) {
        const Set &a = sets_.a, &b = sets_.b;
        int64_t first_real = -1, first_padding = -1; // of B
        for (int64_t j = b.size() - 1; j >= b.first; --j)
            (real(image, b.places[j]) ? first_real : first_padding) = j;
        for (int64_t i = a.first; i < a.size(); ++i) {
            if (!std::isnan(keys_[i]))
                continue;
            const bool is_real = real(image, a.places[i]);
            to_[i] = is_real ? first_real : first_padding;
            keys_[i] = to_[i] < 0 ? kNoPartner : is_real ? kNoSimilarity : kPadding;
        }
    }

    void write(const Result& out) {
        const Set &a = sets_.a, &b = sets_.b;
        const auto before = [](const Entry& x, const Entry& y) {
            return x.key != y.key ? x.key > y.key : x.place < y.place;
        };
        order_.clear();
        for (int64_t i = a.first; i < a.size(); ++i)
            order_.push_back({keys_[i], i});
        const auto begin = order_.begin(), split = begin + r_;
        std::nth_element(begin, split, order_.end(), before);
        std::sort(begin, split, before);
        if (by_score_)
            std::sort(split, order_.end(), before);

        int64_t place = 0;
        const auto keep = [&](int64_t token) {
            out.kept[place] = token;
            out.index[token] = place++;
        };
        for (int64_t token = 0; token < protect_; ++token)
            keep(token);
        if (by_score_) {
            for (auto entry = split; entry != order_.end(); ++entry)
                keep(a.places[entry->place]);
        } else {
            for (auto entry = begin; entry != split; ++entry)
                keys_[entry->place] = std::numeric_limits<T>::quiet_NaN(); // no key is one: these are merged
            for (int64_t i = a.first; i < a.size(); ++i) {
                if (!std::isnan(keys_[i]))
                    keep(a.places[i]);
            }
        }
        for (int64_t j = b.first; j < b.size(); ++j)
            keep(b.places[j]);

        int64_t turn = b.first; // of B, for those that have no partner
        for (int64_t k = 0; k < r_; ++k) {
            const auto [key, i] = begin[k];
            const bool alone = key == kNoPartner;
            const int64_t token = a.places[i], target = out.index[b.places[alone ? turn : to_[i]]];
            if (alone)
                turn = turn + 1 < b.size() ? turn + 1 : b.first;
            out.source[k] = token;
            out.index[token] = out.target[k] = target;
        }
    }

    const Tokens<In>& tokens_;
    const Sets& sets_;
    const Table<bool>& mask_;
    const maxsim::Kernel<T>& kernel_;
    const int64_t protect_, r_;
    const bool by_score_;
    std::vector<T> keys_;               // of A: what merges first
    std::vector<int64_t> to_;           // of A: in set B
    std::vector<Entry> order_;          // of A, what merges before the rest
    std::vector<int64_t> rows_, lanes_; // of B and of A: what is in rows and in the panel
    Buffer<T> row_, lane_, panel_, best_;
    Buffer<int32_t> place_;
    Buffer<In> scratch_;
};

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor>; // index, kept, source, target

Forward match_fwd(const Tensor& metric, const std::optional<Tensor>& a, const std::optional<Tensor>& b, int64_t every,
                  int64_t protect, int64_t r, bool by_score, const std::optional<Tensor>& mask) {
    STD_TORCH_CHECK(metric.dim() == 3, "metric: expected 3 dimensions, got ", metric.dim());
    const int64_t B = metric.size(0), N = metric.size(1);
    STD_TORCH_CHECK(protect >= 0 && protect <= N, "protect: expected 0 to ", N, ", got ", protect);
    STD_TORCH_CHECK(N <= INT32_MAX, "metric: expected less than 2^31 tokens, got ", N);
    const Sets sets(a, b, every, N, protect);
    STD_TORCH_CHECK(r >= 1 && r <= sets.a.size() - sets.a.first, "r: expected 1 to ", sets.a.size() - sets.a.first,
                    ", got ", r);
    STD_TORCH_CHECK(sets.b.first < sets.b.size(), "b: expected a place that is not protected");
    const Table<bool> real = mask ? Table<bool>("mask", *mask, B, N) : Table<bool>();
    const Tensor index = empty({B, N}, ScalarType::Long), kept = empty({B, N - r}, ScalarType::Long),
                 source = empty({B, r}, ScalarType::Long), target = empty({B, r}, ScalarType::Long);
    const Result out{index.mutable_data_ptr<int64_t>(), kept.mutable_data_ptr<int64_t>(),
                     source.mutable_data_ptr<int64_t>(), target.mutable_data_ptr<int64_t>()};
    with_dtype(metric, [&]<class In>(In*) {
        const Tokens<In> tokens("metric", metric);
        parallel_for(0, B, 1, [&](int64_t from, int64_t to) {
            Matcher<In> matcher(tokens, sets, real, protect, r, by_score);
            for (int64_t i = from; i < to; ++i)
                matcher.run(i, {out.index + i * N, out.kept + i * (N - r), out.source + i * r, out.target + i * r});
        });
    });
    return {index, kept, source, target};
}

} // namespace
} // namespace vlpfast::tokens

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
    m.impl("match_fwd", TORCH_BOX(&vlpfast::tokens::match_fwd));
}
