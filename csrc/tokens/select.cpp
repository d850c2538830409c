// select on the CPU. See vlpfast/ops/tokens/selection.py for what it computes and vlpfast/ops/_schemas.py for the
// arguments.
//
// An image is one thread's: a partial selection among its scores, then one pass over its tokens in order that copies
// those that are kept to their places and adds up the others. So the bits do not depend on the number of threads.

#include "tokens/take.h"

#include <tuple>

namespace vlpfast::tokens {
namespace {

// Orders tokens: the highest score first, then those that are NaN, then padding; of equal ones the lower number.
struct Ranked {
    uint64_t key;
    int64_t token;

    bool operator<(const Ranked& other) const { return key != other.key ? key < other.key : token < other.token; }
};
constexpr uint64_t kPadding = ~uint64_t{0}, kNan = kPadding - 1; // -inf comes long before them

uint64_t descending(double score) {
    if (score != score)
        return kNan;
    constexpr uint64_t kSign = uint64_t{1} << 63;
    const auto bits = std::bit_cast<uint64_t>(score == 0 ? 0.0 : score); // one zero
    return bits & kSign ? bits : ~(bits | kSign);
}

// Scores and mask, [B, N], and for one image at a time what of it is fused.
class Scores {
  public:
    const int64_t B, N;

    Scores(const Tensor& score, const std::optional<Tensor>& mask)
        : B(checked(score).size(0)), N(score.size(1)), data_(score.const_data_ptr()), dtype_(score.scalar_type()),
          row_(score.stride(0)), column_(score.stride(1)) {
        with_floating_pointer(data_, dtype_, [](auto*) {}); // raises here: nothing may be thrown in parallel_for
        if (mask) {
            STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "mask: expected bool");
            mask_.emplace("mask", *mask, B, N);
        }
    }
    bool padding(int64_t b, int64_t n) const { return mask_ && !mask_->at(b, n); }

    void read(int64_t b, std::vector<double>& out) const {
        out.resize(N);
        with_floating_pointer(data_, dtype_, [&](auto* data) {
            for (int64_t n = 0; n < N; ++n)
                out[n] = static_cast<double>(data[b * row_ + n * column_]);
        });
    }

  private:
    static const Tensor& checked(const Tensor& score) {
        STD_TORCH_CHECK(score.dim() == 2, "score: expected 2 dimensions, got ", score.dim());
        return score;
    }

    const void* const data_;
    const ScalarType dtype_;
    const int64_t row_, column_;
    std::optional<Table<bool>> mask_;
};

// The sum of the scores, rounded to T, of what is fused: what is neither kept nor padding.
template <class T>
double total_of(const Scores& scores, int64_t b, const std::vector<double>& score, const std::vector<int64_t>& place) {
    double total = 0;
    for (int64_t n = 0; n < scores.N; ++n) {
        if (place[n] < 0 && !scores.padding(b, n))
            total += static_cast<T>(score[n]);
    }
    return total;
}

std::tuple<Tensor, Tensor> select_fwd(const Tensor& x, const Tensor& score, const std::optional<Tensor>& mask,
                                      int64_t k, int64_t protect, bool by_score, bool fuse, bool normalize) {
    return with_floating_type(x.scalar_type(), [&]<class E>(E) -> std::tuple<Tensor, Tensor> {
        using T = Wide<E>;
        const Images<E> images("x", x);
        const Scores scores(score, mask);
        const int64_t B = images.B, N = images.N, C = images.C, K = protect + k;
        STD_TORCH_CHECK(scores.B == B && scores.N == N, "score: expected shape [", B, ", ", N, "]");
        STD_TORCH_CHECK(k >= 0 && protect >= 0 && K <= N, "k: expected 0 to ", N, " with what is protected, got ", k,
                        " and ", protect);
        const Tensor kept = empty({B, K + fuse, C}, x.scalar_type()), indices = empty({B, K}, ScalarType::Long);
        E* const all_rows = kept.template mutable_data_ptr<E>();
        int64_t* const all_indices = indices.mutable_data_ptr<int64_t>();
        parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
            std::vector<double> values;
            std::vector<Ranked> ranked(N - protect);
            std::vector<int64_t> place(N); // of every token among those that are kept; -1: none
            std::vector<T> sum(C);
            for (int64_t b = begin; b < end; ++b) {
                scores.read(b, values);
                for (int64_t n = protect; n < N; ++n)
                    ranked[n - protect] = {scores.padding(b, n) ? kPadding : descending(values[n]), n};
                if (k < N - protect)
                    std::nth_element(ranked.begin(), ranked.begin() + k, ranked.end());
                if (by_score)
                    std::sort(ranked.begin(), ranked.begin() + k);
                std::fill(place.begin(), place.end(), -1);
                int64_t next = 0;
                for (; next < protect; ++next)
                    place[next] = next;
                for (int64_t i = 0; i < k; ++i)
                    place[ranked[i].token] = next++;
                next = protect;
                std::fill(sum.begin(), sum.end(), T(0));
                E* const rows = all_rows + b * (K + fuse) * C;
                for (int64_t n = 0; n < N; ++n) {
                    if (place[n] >= 0) {
                        if (!by_score && n >= protect)
                            place[n] = next++; // marked above, numbered here
                        all_indices[b * K + place[n]] = n;
                        copy_row(images.row(b, n), C, rows + place[n] * C);
                    } else if (fuse && !scores.padding(b, n)) {
                        add_row(static_cast<T>(values[n]), images.row(b, n), C, sum.data());
                    }
                }
                if (!fuse)
                    continue;
                const double total = normalize ? total_of<T>(scores, b, values, place) : 1;
                if (total == 0)
                    std::fill(sum.begin(), sum.end(), T(0));
                scale_row(static_cast<T>(total == 0 ? 0 : 1 / total), sum.data(), C, rows + K * C);
            }
        });
        return {kept, indices};
    });
}

// dx, dscore: no rows where not needed
std::tuple<Tensor, Tensor> select_bwd(const Tensor& grad, const std::optional<Tensor>& x, const Tensor& score,
                                      const std::optional<Tensor>& mask, const Tensor& indices, bool fuse,
                                      bool normalize, bool need_x, bool need_score) {
    return with_floating_type(grad.scalar_type(), [&]<class E>(E) -> std::tuple<Tensor, Tensor> {
        using T = Wide<E>;
        const Images<E> gradients("grad", grad);
        const Scores scores(score, mask);
        const int64_t B = scores.B, N = scores.N, C = gradients.C;
        const Table<int64_t> from = read_indices(indices, B, N, false);
        const int64_t K = indices.size(1);
        STD_TORCH_CHECK(gradients.B == B && gradients.N == K + fuse, "grad: expected shape [", B, ", ", K + fuse,
                        ", any]");
        std::optional<Images<E>> images;
        if (need_score && fuse) {
            STD_TORCH_CHECK(x && x->scalar_type() == grad.scalar_type(), "x: expected tokens in the dtype of grad");
            images.emplace("x", *x);
            STD_TORCH_CHECK(images->B == B && images->N == N && images->C == C, "x: expected shape [", B, ", ", N, ", ",
                            C, "]");
        }
        const Tensor dx = empty({need_x ? B : 0, N, C}, grad.scalar_type()),
                     dscore = empty({need_score ? B : 0, N}, score.scalar_type());
        E* const all_dx = dx.template mutable_data_ptr<E>();
        parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
            std::vector<double> values, slopes(N);
            std::vector<int64_t> place(N);
            std::vector<E> fused(C);
            std::vector<T> wide(C); // the gradient of the fused token
            for (int64_t b = begin; b < end; ++b) {
                scores.read(b, values);
                std::fill(place.begin(), place.end(), -1);
                for (int64_t j = 0; j < K; ++j)
                    place[from.at(b, j)] = j;
                if (fuse) {
                    copy_row(gradients.row(b, K), C, fused.data());
                    std::copy(fused.begin(), fused.end(), wide.begin());
                }
                const double total = fuse && normalize ? total_of<T>(scores, b, values, place) : 1,
                             inverse = total == 0 ? 0 : 1 / total;
                const auto in_fused = [&](int64_t n) { return fuse && place[n] < 0 && !scores.padding(b, n); };
                for (int64_t n = 0; n < (need_x ? N : 0); ++n) {
                    E* const row = all_dx + (b * N + n) * C;
                    if (place[n] >= 0)
                        copy_row(gradients.row(b, place[n]), C, row);
                    else if (in_fused(n) && total != 0)
                        scale_row(static_cast<T>(static_cast<T>(values[n]) * inverse), wide.data(), C, row);
                    else
                        std::fill_n(row, C, E(0));
                }
                if (!need_score)
                    continue;
                double mean = 0; // of the slopes by the weights of the fused token
                for (int64_t n = 0; n < N; ++n) {
                    slopes[n] = in_fused(n) && total != 0 ? dot(images->row(b, n), wide.data(), C) : 0;
                    if (normalize && in_fused(n) && total != 0)
                        mean += static_cast<T>(values[n]) * inverse * slopes[n];
                }
                with_floating_pointer(dscore.mutable_data_ptr(), dscore.scalar_type(), [&](auto* data) {
                    using S = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
                    S* const row = const_cast<S*>(data) + b * N;
                    for (int64_t n = 0; n < N; ++n)
                        row[n] = static_cast<S>(in_fused(n) && total != 0 ? (slopes[n] - mean) * inverse : 0.0);
                });
            }
        });
        return {dx, dscore};
    });
}

} // namespace
} // namespace vlpfast::tokens

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
    m.impl("select_fwd", TORCH_BOX(&vlpfast::tokens::select_fwd));
    m.impl("select_bwd", TORCH_BOX(&vlpfast::tokens::select_bwd));
}
