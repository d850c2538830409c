// sample_hard_negatives on the CPU. See vlpfast/ops/contrastive/sample.py for what it draws, reference.py beside it for
// the keys, and vlpfast/ops/_schemas.py for the arguments.
//
// The logits S = scale x y^T [M, N] exist one tile at a time, and within a tile one thread makes a strip of rows: the
// product by torch's BLAS, then passes over it that make random bits and look for keys among the row's `count` best so
// far. Few are: after j columns one in j / count. So a block of columns is first asked by one cheap exponential each
// whether it can hold such a key at all, and only where it can keys are made, in double.
//
// The uniform part of the distribution has keys of its own, which need no logits, and the softmax's normaliser is
// needed only where the two are merged, after the last column: one product. What a row draws depends on nothing but the
// row, the columns and the seed.

#include "common/panels.h"
#include "contrastive/problem.h"
#include "contrastive/sample_rows.h"

namespace vlpfast::contrastive {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Draw {
    double key;
    int64_t column;

    bool before(const Draw& other) const { return key != other.key ? key > other.key : column < other.column; }
};
const auto kBefore = [](const Draw& a, const Draw& b) { return a.before(b); };

// The best of the draws that it was given, at most `most` of them; the worst of these is at the front.
class Best {
  public:
    explicit Best(int64_t most) : most_(most) {}

    // Keys that are not above it are not taken.
    double least() const { return static_cast<int64_t>(heap_.size()) < most_ ? -kInfinity : heap_.front().key; }

    // In the order of columns: of equal keys the first stays.
    void add(Draw draw) {
        if (!(draw.key > least()))
            return;
        if (static_cast<int64_t>(heap_.size()) == most_) {
            std::pop_heap(heap_.begin(), heap_.end(), kBefore);
            heap_.pop_back();
        }
        heap_.push_back(draw);
        std::push_heap(heap_.begin(), heap_.end(), kBefore);
    }
    const std::vector<Draw>& draws() const { return heap_; }

  private:
    int64_t most_;
    std::vector<Draw> heap_;
};

// The sum of exp(logit) of a row's columns without the own one.
template <class T> struct ExpSum {
    double sum = 0;
    T shift = -std::numeric_limits<T>::infinity();

    void add(const T* s, int64_t n, T largest) {
        if (largest > shift) {
            sum *= std::exp(static_cast<double>(shift) - largest);
            shift = largest;
        }
        if (std::isfinite(shift))
            sum += exp_sum(s, n, shift);
    }
    double logsumexp() const { return std::isfinite(shift) ? std::log(sum) + shift : static_cast<double>(shift); }
};

double logaddexp(double a, double b) {
    const double larger = std::max(a, b);
    return std::isfinite(larger) ? larger + std::log(std::exp(a - larger) + std::exp(b - larger)) : larger;
}

// What one row has drawn so far.
template <class T> struct Row {
    Best softmax, uniform; // keys logit + gumbel, and gumbel alone
    ExpSum<T> others;

    Row(int64_t count, bool has_uniform) : softmax(count), uniform(has_uniform ? count : 0) {}

    // s: the products of row i with columns [begin, begin + n)
    void see(const Problem<T>& p, T* s, int64_t n, int64_t i, int64_t begin, uint64_t seed, bool has_uniform) {
        constexpr T kOut = -std::numeric_limits<T>::infinity();
        scale_logits(s, n, p.scale);
        const int64_t own = p.own_column.empty() ? -1 : p.own_column[i] - begin;
        if (own >= 0 && own < n)
            s[own] = kOut;
        if (has_uniform)
            others.add(s, n, largest_of(s, n));
        p.leave_out(s, n, i, begin, kOut);
        uint32_t bits[kBlock];
        for (int64_t start = 0; start < n; start += kBlock) {
            const int64_t length = std::min(kBlock, n - start), first = begin + start;
            random_bits(first, i, 0, seed, bits);
            add_softmax(s + start, bits, length, first);
            if (has_uniform) {
                random_bits(first, i, 1, seed, bits);
                add_uniform(p, bits, length, i, first);
            }
        }
    }

    void add_softmax(const T* s, const uint32_t* bits, int64_t n, int64_t first) {
        const T least = static_cast<T>(std::clamp(softmax.least(), -1e30, 1e30)); // finite: -inf - (-inf) is no number
        int32_t may[kBlock];
        if (!may_exceed(s, bits, n, least, T(1e-5) + T(1e-6) * std::abs(least), may))
            return;
        for (int64_t j = 0; j < n; ++j) {
            if (may[j] && s[j] > -std::numeric_limits<T>::infinity())
                softmax.add({s[j] + gumbel(bits[j]), first + j});
        }
    }

    void add_uniform(const Problem<T>& p, const uint32_t* bits, int64_t n, int64_t i, int64_t first) {
        const double limit = std::exp(-uniform.least()) * 0x1p32 * (1 + 1e-9);
        const uint32_t most = static_cast<uint32_t>(std::min(limit, 0x1p32 - 1));
        if (!any_at_most(bits, n, most))
            return;
        for (int64_t j = 0; j < n; ++j) {
            const bool own = !p.own_column.empty() && p.own_column[i] == first + j;
            const bool out = !p.row_ids.empty() && p.row_ids[i] == p.column_ids[first + j];
            if (bits[j] <= most && !own && !out)
                uniform.add({gumbel(bits[j]), first + j});
        }
    }

    // The draws of both in order, keys relative to the logarithm of the row's sum of exponentials.
    std::vector<Draw> merged(double logsumexp, double log_uniform) const {
        std::vector<Draw> draws;
        for (const Draw& d : softmax.draws())
            draws.push_back({d.key == kInfinity ? d.key : d.key - logsumexp, d.column});
        for (const Draw& d : uniform.draws())
            draws.push_back({d.key + log_uniform, d.column});
        std::sort(draws.begin(), draws.end(), [](const Draw& a, const Draw& b) {
            return a.column != b.column ? a.column < b.column : a.key > b.key;
        });
        const auto same = [](const Draw& a, const Draw& b) { return a.column == b.column; };
        draws.erase(std::unique(draws.begin(), draws.end(), same), draws.end()); // of a column's two keys the larger
        std::sort(draws.begin(), draws.end(), kBefore);
        while (!draws.empty() && draws.back().key == -kInfinity)
            draws.pop_back();
        return draws;
    }
};

template <class T> Tensor sample(const Problem<T>& p, int64_t count, double uniform, uint64_t seed) {
    const Tensor out = empty({p.M(), count}, ScalarType::Long);
    int64_t* const columns = out.mutable_data_ptr<int64_t>();
    std::fill_n(columns, p.M() * count, -1);
    Panels<T> y_columns;
    Buffer<T> x_copy, y_copy, scratch;
    for (int64_t I = 0; I < p.row_tiles.count; ++I) {
        const int64_t i0 = p.row_tiles.begin(I), m = p.row_tiles.length(I);
        const View<const T> x = p.x.rows(i0, m, x_copy);
        std::vector<Row<T>> rows(m, Row<T>(count, uniform > 0));
        for (int64_t J = 0; J < p.column_tiles.count; ++J) {
            const int64_t j0 = p.column_tiles.begin(J), n = p.column_tiles.length(J);
            y_columns.set(p.y.rows(j0, n, y_copy).transposed(), p.D(), n);
            const View<T> tile{scratch.get(m * (n + kPad)), n + kPad, 1};
            strips(m).each([&](int64_t, int64_t begin, int64_t length) {
                y_columns.product(tile.from(begin), x.from(begin), length, false);
                for (int64_t r = begin; r < begin + length; ++r)
                    rows[r].see(p, tile.data + r * tile.row, n, i0 + r, j0, seed, uniform > 0);
            });
        }
        parallel_for(0, m, 32, [&](int64_t from, int64_t to) {
            std::vector<T> x_row(p.D()), y_row(p.D());
            for (int64_t r = from; r < to; ++r) {
                double logsumexp = 0;
                if (uniform > 0) {
                    logsumexp = rows[r].others.logsumexp();
                    if (!p.own_column.empty()) { // beside the product, which sums that in less precision
                        const int64_t i = i0 + r, j = p.own_column[i];
                        const double own = p.scale * dot(p.x.row(i, x_row.data()), p.y.row(j, y_row.data()), p.D());
                        logsumexp = logaddexp(logsumexp, std::isnan(own) ? kInfinity : own);
                    }
                }
                const std::vector<Draw> draws = rows[r].merged(logsumexp, std::log(uniform));
                const int64_t drawn = std::min(count, static_cast<int64_t>(draws.size()));
                for (int64_t k = 0; k < drawn; ++k)
                    columns[(i0 + r) * count + k] = draws[k].column;
            }
        });
    }
    return out;
}

Tensor sample_hard_negatives(const Tensor& x, const Tensor& y, const Tensor& scale, const std::optional<Tensor>& own,
                             std::optional<int64_t> own_offset, const std::optional<Tensor>& row_ids,
                             const std::optional<Tensor>& column_ids, int64_t count, double uniform,
                             const Tensor& seed) {
    STD_TORCH_CHECK(count >= 1, "count: expected >= 1, got ", count);
    const auto key = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
    const auto run = [&]<class T>(T) {
        return sample(Problem<T>(x, y, scale, std::nullopt, own, own_offset, row_ids, column_ids, true, false), count,
                      uniform, key);
    };
    return x.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

} // namespace
} // namespace vlpfast::contrastive

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
    m.impl("sample_hard_negatives", TORCH_BOX(&vlpfast::contrastive::sample_hard_negatives));
}
