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

// out = in, and the sum of the squares.
template <class In, class T> VLPFAST_CLONES T widen(const In* in, int64_t n, T* out) {
    T sum[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        for (int l = 0; l < kLanes; ++l) {
            out[i + l] = static_cast<T>(in[i + l]);
            sum[l] += out[i + l] * out[i + l];
        }
    }
    for (; i < n; ++i) {
        out[i] = static_cast<T>(in[i]);
        sum[0] += out[i] * out[i];
    }
    T total = 0;
    for (const T s : sum)
        total += s;
    return total;
}

template <class T> VLPFAST_CLONES void divide(T* x, int64_t n, T by) {
    for (int64_t i = 0; i < n; ++i)
        x[i] /= by;
}

// A row of unit length, or of zeros; false: it has a number that is none.
template <class In, class T> bool unit(const In* in, int64_t n, T* out) {
    const T square = widen(in, n, out);
    if (square == 0)
        std::fill_n(out, n, T(0));
    else
        divide(out, n, std::sqrt(square));
    return std::isfinite(square) || std::none_of(out, out + n, [](T value) { return std::isnan(value); });
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
          by_score_(by_score), keys_(sets.a.size()), to_(sets.a.size()), order_(sets.a.size()) {}

    void run(int64_t image, const Result& out) {
        similarities(image);
        others(image);
        write(out);
    }

  private:
    bool real(int64_t image, int64_t place) const { return !mask_.data || mask_.at(image, place); }

    // keys_ and to_ (a place in set B) of the tokens of A that are compared; NaN for the other ones.
    void similarities(int64_t image) {
        const Set &a = sets_.a, &b = sets_.b;
        const int64_t C = tokens_.width;
        rows_.clear();
        T* const row = row_.get(b.size() * C);
        for (int64_t j = b.first; j < b.size(); ++j) {
            T* const at = row + static_cast<int64_t>(rows_.size()) * C;
            if (real(image, b.places[j]) && unit(tokens_.row(image, b.places[j], scratch_), C, at))
                rows_.push_back(j);
        }
        std::fill(keys_.begin(), keys_.end(), std::numeric_limits<T>::quiet_NaN());
        if (rows_.empty())
            return;
        lanes_.clear();
        T* const lane = lane_.get(kernel_.panel * C);
        for (int64_t i = a.first; i < a.size(); ++i) {
            if (real(image, a.places[i]) &&
                unit(tokens_.row(image, a.places[i], scratch_), C, lane + static_cast<int64_t>(lanes_.size()) * C))
                lanes_.push_back(i);
            if (!lanes_.empty() && (static_cast<int64_t>(lanes_.size()) == kernel_.panel || i + 1 == a.size())) {
                compare(lane, row);
                lanes_.clear();
            }
        }
    }

    void compare(const T* lane, const T* row) {
        constexpr int64_t kBlock = 16; // of channels, so that what is written stays in the first-level cache
        const int64_t C = tokens_.width, lanes = static_cast<int64_t>(lanes_.size()),
                      padded = (lanes + kernel_.lane - 1) / kernel_.lane * kernel_.lane;
        T* const panel = panel_.get(padded * C);
        for (int64_t start = 0; start < C; start += kBlock) {
            const int64_t end = std::min(C, start + kBlock);
            for (int64_t l = 0; l < padded; ++l) {
                for (int64_t c = start; c < end; ++c)
                    panel[c * padded + l] = l < lanes ? lane[l * C + c] : T(0);
            }
        }
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
        const auto before = [&](int64_t i, int64_t j) { return keys_[i] != keys_[j] ? keys_[i] > keys_[j] : i < j; };
        for (int64_t i = 0; i < a.size(); ++i)
            order_[i] = i;
        const auto begin = order_.begin() + a.first, split = begin + r_;
        std::nth_element(begin, split, order_.end(), before);
        std::sort(begin, split, before);
        if (by_score_)
            std::sort(split, order_.end(), before);
        else
            std::sort(split, order_.end());

        int64_t place = 0;
        const auto keep = [&](int64_t token) {
            out.kept[place] = token;
            out.index[token] = place++;
        };
        for (int64_t token = 0; token < protect_; ++token)
            keep(token);
        for (auto i = split; i != order_.end(); ++i)
            keep(a.places[*i]);
        for (int64_t j = b.first; j < b.size(); ++j)
            keep(b.places[j]);

        int64_t turn = b.first; // of B, for those that have no partner
        for (int64_t k = 0; k < r_; ++k) {
            const int64_t i = begin[k];
            const bool alone = keys_[i] == kNoPartner;
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
    std::vector<int64_t> order_;        // of A
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
