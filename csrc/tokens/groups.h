// Which tokens of images come together, and what each has of their mean.
#pragma once

#include "tokens/tokens.h"

namespace vlpfast::tokens {

constexpr int64_t kGrain = 32; // rows of a task

// Which tokens come together: those of place i, ascending, are tokens()[first(i)] to tokens()[first(i + 1)], in each
// image.
class Groups {
  public:
    const int64_t batch, count, places;

    // index(image, out): writes the place of each token, -1 for none.
    template <class F>
    Groups(int64_t batch, int64_t count, int64_t places, const F& index)
        : batch(batch), count(count), places(places), first_(batch * (places + 1)), tokens_(batch * count) {
        std::vector<char> wrong(batch, false);
        parallel_for(0, batch, 8, [&](int64_t from, int64_t to) {
            std::vector<int64_t> place(count), next(places);
            for (int64_t image = from; image < to; ++image) {
                std::fill(place.begin(), place.end(), -1);
                index(image, place.data());
                wrong[image] = !sort(image, place, next);
            }
        });
        for (int64_t image = 0; image < batch; ++image)
            STD_TORCH_CHECK(!wrong[image], "expected the tokens of image ", image, " to have places from 0 to ",
                            places - 1);
    }

    // The tokens of one place.
    const int32_t* begin(int64_t image, int64_t place) const {
        return tokens_.data() + image * count + first_[image * (places + 1) + place];
    }
    const int32_t* end(int64_t image, int64_t place) const { return begin(image, place + 1); }

  private:
    bool sort(int64_t image, const std::vector<int64_t>& place, std::vector<int64_t>& next) {
        int32_t* const first = first_.data() + image * (places + 1);
        for (const int64_t p : place) {
            if (p < 0 || p >= places)
                return false;
            ++first[p + 1];
        }
        for (int64_t p = 0; p < places; ++p) {
            next[p] = first[p];
            first[p + 1] += first[p];
        }
        for (int64_t i = 0; i < count; ++i)
            tokens_[image * count + next[place[i]]++] = static_cast<int32_t>(i);
        return true;
    }

    std::vector<int32_t> first_, tokens_;
};

// The tokens that the places of the result have: those that stay, kept [B, M], and those that merge, source and target
// [B, r].
inline Groups groups_of(int64_t B, int64_t count, const Tensor& kept, const Tensor& source, const Tensor& target) {
    STD_TORCH_CHECK(kept.dim() == 2 && source.dim() == 2, "expected kept and source [B, ...]");
    const int64_t M = kept.size(1), r = source.size(1);
    STD_TORCH_CHECK(M + r == count && count <= INT32_MAX, "kept, source: expected the ", count, " tokens of x, got ", M,
                    " and ", r);
    const Table<int64_t> stays("kept", kept, B, M), from("source", source, B, r), to("target", target, B, r);
    return Groups(B, count, M, [&](int64_t image, int64_t* place) {
        const auto put = [&](int64_t token, int64_t at) {
            if (token >= 0 && token < count)
                place[token] = at;
        };
        for (int64_t i = 0; i < M; ++i)
            put(stays.at(image, i), i);
        for (int64_t i = 0; i < r; ++i)
            put(from.at(image, i), to.at(image, i));
    });
}

// The same from the place of each token, index [B, N].
inline Groups groups_of(const Tensor& index, int64_t places) {
    const int64_t B = index.size(0), N = index.size(1);
    STD_TORCH_CHECK(N <= INT32_MAX, "index: expected less than 2^31 tokens, got ", N);
    const Table<int64_t> table("index", index, B, N);
    return Groups(B, N, places, [&](int64_t image, int64_t* place) {
        for (int64_t i = 0; i < N; ++i)
            place[i] = table.at(image, i);
    });
}

// f(image, place) for all, in parallel.
template <class F> void each_place(const Groups& groups, const F& make) {
    parallel_for(0, groups.batch * groups.places, kGrain, [&](int64_t from, int64_t to) {
        auto f = make();
        for (int64_t i = from; i < to; ++i)
            f(i / groups.places, i % groups.places);
    });
}

// What a token of `weight` has of a mean under weights that add up to `total`.
template <class T> T share_of(T weight, T total) {
    return total == 0 ? T(0) : weight / total;
}

} // namespace vlpfast::tokens
