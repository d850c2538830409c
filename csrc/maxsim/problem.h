// The sets of tokens on both sides, which pairs of them are scored, and where a pair's score and winners are.
#pragma once

#include "common/tensors.h"

#include <cmath>
#include <optional>

namespace vlpfast::maxsim {

// Consecutive tokens, dense: row r at data + r * stride.
template <class T> struct Rows {
    const T* data;
    int64_t stride;
};

// What int8 tokens are to be multiplied by: [tokens]. unit: to unit length instead, and only their signs count.
struct Scale {
    const Tensor& of_tokens;
    bool unit;
};

template <class T> struct Side {
    const Matrix<T> tokens;
    const std::vector<int64_t> start;  // [count + 1] set i is the tokens start[i] to start[i + 1]
    std::vector<int64_t> kept;         // the kept tokens, set by set; empty: all are
    std::vector<int64_t> first;        // [count + 1] set i has the kept tokens first[i] to first[i + 1]
    std::vector<int64_t> first_masked; // [count] place in the set; -1: none is masked
    std::vector<char> flags;           // [tokens] whether each is kept; empty: all are
    const std::vector<T> scale;        // [tokens] as Scale has it; empty: tokens are not int8
    const bool unit;

    Side(const char* name, const Tensor& tokens, const Tensor& start, const std::optional<Tensor>& keep,
         int64_t longest, const std::optional<Scale>& scale = std::nullopt)
        : tokens(tokens, scale.has_value()), start(read_integers(start)), first(this->start),
          first_masked(std::max<int64_t>(0, static_cast<int64_t>(this->start.size()) - 1), -1),
          scale(scale ? read_vector<T>(scale->of_tokens, this->tokens.count) : std::vector<T>()),
          unit(scale && scale->unit) {
        STD_TORCH_CHECK(!this->start.empty() && this->start.front() == 0 && this->start.back() == this->tokens.count,
                        name, "_start: expected numbers from 0 to ", this->tokens.count, " tokens");
        for (int64_t i = 0; i < count(); ++i)
            STD_TORCH_CHECK(length(i) >= 0 && length(i) <= longest, name, "_start: expected 0 to ", longest,
                            " tokens in a set, got ", length(i));
        if (!keep)
            return;
        STD_TORCH_CHECK(keep->numel() == this->tokens.count, name, "_keep: expected ", this->tokens.count,
                        " values, got ", keep->numel());
        const bool* data = keep->const_data_ptr<bool>();
        const int64_t step = keep->stride(0);
        flags.resize(this->tokens.count);
        for (int64_t i = 0; i < count(); ++i) {
            first[i] = static_cast<int64_t>(kept.size());
            for (int64_t t = this->start[i]; t < this->start[i + 1]; ++t) {
                flags[t] = data[t * step];
                if (flags[t])
                    kept.push_back(t);
                else if (first_masked[i] < 0)
                    first_masked[i] = t - this->start[i];
            }
        }
        first[count()] = static_cast<int64_t>(kept.size());
        if (first[count()] == this->tokens.count) {
            kept.clear();
            flags.clear();
        }
    }

    int64_t count() const { return static_cast<int64_t>(start.size()) - 1; }
    int64_t length(int64_t i) const { return start[i + 1] - start[i]; }
    int64_t kept_in(int64_t i) const { return first[i + 1] - first[i]; }
    // The token that is the k-th kept one.
    int64_t token(int64_t k) const { return kept.empty() ? k : kept[k]; }

    bool masked(int64_t i, int64_t place) const { return !flags.empty() && !flags[start[i] + place]; }

    // Kept tokens [begin, end): where they are if they can be read there, else in `copy`.
    Rows<T> kept_rows(int64_t begin, int64_t end, Buffer<T>& copy) const {
        if (kept.empty())
            return rows(begin, end, copy);
        return copied(begin, end, copy, [&](int64_t k) { return kept[k]; });
    }
    // Tokens [begin, end), likewise.
    Rows<T> rows(int64_t begin, int64_t end, Buffer<T>& copy) const {
        if (tokens.in_place())
            return {tokens.row(begin, nullptr), tokens.stride()};
        return copied(begin, end, copy, [](int64_t t) { return t; });
    }
    // What the products of kept tokens [begin, ...), which `rows` holds, are multiplied by; null: nothing. A scale that
    // is no finite number is NaN: an infinite one could lose every comparison and not be seen.
    const T* scales(int64_t begin, int64_t end, const Rows<T>& rows, Buffer<T>& copy) const {
        if (scale.empty() || tokens.width == 0)
            return nullptr;
        T* const to = copy.get(end - begin);
        for (int64_t k = begin; k < end; ++k) {
            const T value = scale[token(k)];
            T factor = value;
            if (unit) {
                const double square = sum_of_squares(rows.data + (k - begin) * rows.stride, tokens.width);
                factor = value == 0 || square == 0 ? T(0) : static_cast<T>(std::copysign(1 / std::sqrt(square), value));
            }
            to[k - begin] = std::isfinite(value) ? factor : std::numeric_limits<T>::quiet_NaN();
        }
        return to;
    }

  private:
    template <class F> Rows<T> copied(int64_t begin, int64_t end, Buffer<T>& copy, const F& token) const {
        T* const to = copy.get((end - begin) * tokens.width);
        for (int64_t k = begin; k < end; ++k) {
            T* const row = to + (k - begin) * tokens.width;
            const T* const from = tokens.row(token(k), row);
            if (from != row)
                std::copy_n(from, tokens.width, row);
        }
        return {to, tokens.width};
    }
};

// Winners: the place of each token's nearest in the set where that is, as unsigned numbers (an int16 tensor too).
struct Winners {
    void* data; // [any number, width]; null: they are not kept
    ScalarType dtype;
    int64_t width;

    explicit Winners(const Tensor& t)
        : data(t.numel() ? t.mutable_data_ptr() : nullptr), dtype(t.scalar_type()), width(t.size(1)) {}

    // Calls f with a pointer to numbers of the right type.
    template <class F> void with_pointer(const F& f) const {
        if (dtype == ScalarType::Byte)
            return f(static_cast<uint8_t*>(data));
        if (dtype == ScalarType::Short)
            return f(static_cast<uint16_t*>(data));
        return f(static_cast<uint32_t*>(data));
    }
};

inline ScalarType index_type(int64_t longest) {
    return longest <= 1 << 8 ? ScalarType::Byte : longest <= 1 << 16 ? ScalarType::Short : ScalarType::Int;
}

template <class T> struct Problem {
    const Side<T> x, y;
    const int64_t candidates; // of each set of x; -1: all sets of y
    const bool mean, zero;

    Problem(const Tensor& x, const Tensor& y, const Tensor& x_start, const Tensor& y_start,
            const std::optional<Tensor>& x_keep, const std::optional<Tensor>& y_keep, int64_t x_longest,
            int64_t y_longest, std::optional<int64_t> candidates, bool mean, bool zero,
            const std::optional<Scale>& y_scale = std::nullopt)
        : x("x", x, x_start, x_keep, x_longest), y("y", y, y_start, y_keep, y_longest, y_scale),
          candidates(candidates.value_or(-1)), mean(mean), zero(zero) {
        STD_TORCH_CHECK(this->x.tokens.width == this->y.tokens.width, "x and y differ in width: ", this->x.tokens.width,
                        " and ", this->y.tokens.width);
        STD_TORCH_CHECK(!candidates || (*candidates >= 0 && this->y.count() == this->x.count() * *candidates),
                        "candidates: expected ", this->y.count(), " sets of y for ", this->x.count(),
                        " sets of x, got ", candidates.value_or(0), " each");
        STD_TORCH_CHECK(x_longest <= INT32_MAX && y_longest <= INT32_MAX,
                        "expected sets of less than 2^31 tokens, got ", x_longest, " and ", y_longest);
    }

    bool all() const { return candidates < 0; }
    int64_t D() const { return x.tokens.width; }
    int64_t columns() const { return all() ? y.count() : candidates; }
    // Where the score of the sets m of x and n of y is in [M, columns], and the row of y_of_x where its winners are.
    int64_t column(int64_t m, int64_t n) const { return all() ? n : n - m * candidates; }
    int64_t pair(int64_t m, int64_t n) const { return m * columns() + column(m, n); }
    T weight(int64_t kept) const { return mean ? T(1) / static_cast<T>(kept) : T(1); }
};

} // namespace vlpfast::maxsim
