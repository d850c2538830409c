// Random masking and gathering of tokens on the CPU. See vlpfast/ops/tokens/masking.py for what is computed,
// reference_selection.py beside it for the random bits, and vlpfast/ops/_schemas.py for the arguments.
//
// A gather is a copy of rows, and its gradient is one more gather, so that every row has one owner. A mask is a partial
// selection among the random bits of an image's tokens. What an image gets depends on nothing but it and its seed.

#include "common/philox.h"
#include "tokens/take.h"

#include <tuple>

namespace vlpfast::tokens {
namespace {

constexpr uint32_t kMaskStream = 2;
constexpr int64_t kGrain = 1 << 15; // numbers that are copied by one thread at least
constexpr int64_t kImages = 16;     // whose rows are summed one after the other

Tensor gather_rows(const Tensor& x, const Tensor& indices, const std::optional<Tensor>& fill) {
    return with_floating_type(x.scalar_type(), [&]<class E>(E) {
        const Images<E> images("x", x);
        const Table<int64_t> from = read_indices(indices, images.B, images.N, true);
        const int64_t K = indices.size(1), C = images.C;
        std::vector<E> filling(C, E(0));
        if (fill) {
            STD_TORCH_CHECK(fill->dim() == 1 && fill->size(0) == C, "fill: expected ", C, " numbers");
            const std::vector<Wide<E>> numbers = read_vector<Wide<E>>(*fill, C);
            for (int64_t c = 0; c < C; ++c)
                filling[c] = static_cast<E>(numbers[c]);
        }
        const Tensor out = empty({images.B, K, C}, x.scalar_type());
        E* const rows = out.template mutable_data_ptr<E>();
        parallel_for(0, images.B * K, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, C)),
                     [&](int64_t begin, int64_t end) {
                         for (int64_t i = begin; i < end; ++i) {
                             const int64_t n = from.at(i / K, i % K);
                             copy_row(n < 0 ? Row<E>{filling.data(), 1} : images.row(i / K, n), C, rows + i * C);
                         }
                     });
        return out;
    });
}

Tensor filled_rows_sum(const Tensor& x, const Tensor& indices) {
    return with_floating_type(x.scalar_type(), [&]<class E>(E) {
        using T = Wide<E>;
        const Images<E> images("x", x);
        const Table<int64_t> from("indices", indices, images.B, images.N);
        const int64_t C = images.C, parts = (images.B + kImages - 1) / kImages;
        std::vector<T> sums(parts * C, T(0));
        parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
            for (int64_t b = begin * kImages; b < std::min(images.B, end * kImages); ++b) {
                for (int64_t n = 0; n < images.N; ++n) {
                    if (from.at(b, n) < 0)
                        add_row(T(1), images.row(b, n), C, sums.data() + b / kImages * C);
                }
            }
        });
        const Tensor out = empty({C}, kScalarType<T>);
        T* const sum = out.template mutable_data_ptr<T>();
        std::fill_n(sum, C, T(0));
        for (int64_t part = 0; part < parts; ++part)
            add_row(T(1), Row<T>{sums.data() + part * C, 1}, C, sum);
        return out;
    });
}

std::tuple<Tensor, Tensor> random_keep(const Tensor& seed, int64_t batch, int64_t tokens, int64_t keep, int64_t protect,
                                       bool shuffled) {
    const bool own = seed.dim() == 1;
    STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && (own ? seed.size(0) == batch : seed.dim() == 0),
                    "seed: expected int64, one number or one for each of ", batch, " samples");
    STD_TORCH_CHECK(batch >= 0 && protect >= 0 && keep >= 0 && keep <= tokens - protect,
                    "expected at most as many tokens to keep as there are, got ", keep, " and ", protect, " of ",
                    tokens);
    STD_TORCH_CHECK(batch < int64_t{1} << 32 && tokens < int64_t{1} << 32,
                    "expected less than 2^32 samples and tokens, got ", batch, " and ", tokens);
    const int64_t kept = protect + keep;
    const int64_t *const seeds = seed.const_data_ptr<int64_t>(), step = own ? seed.stride(0) : 0;
    const Tensor indices = empty({batch, kept}, ScalarType::Long), inverse = empty({batch, tokens}, ScalarType::Long);
    int64_t* const all_indices = indices.mutable_data_ptr<int64_t>();
    int64_t* const all_places = inverse.mutable_data_ptr<int64_t>();
    parallel_for(0, batch, std::max<int64_t>(1, 4096 / std::max<int64_t>(1, tokens)), [&](int64_t begin, int64_t end) {
        std::vector<uint64_t> keys(tokens); // random bits, and below them the token's number: no two are equal
        for (int64_t b = begin; b < end; ++b) {
            for (int64_t first = 0; first < tokens; first += kBlock) {
                uint32_t bits[kBlock];
                random_bits(first, own ? 0 : b, kMaskStream, seeds[b * step], bits);
                for (int64_t n = first; n < std::min(tokens, first + kBlock); ++n)
                    keys[n] = uint64_t{bits[n - first]} << 32 | static_cast<uint64_t>(n);
            }
            const auto from = keys.begin() + protect, to = from + keep;
            if (to != keys.end())
                std::nth_element(from, to, keys.end());
            if (shuffled)
                std::sort(from, to);
            int64_t *const index = all_indices + b * kept, *const place = all_places + b * tokens;
            std::fill_n(place, tokens, -1);
            int64_t next = 0;
            for (; next < protect; ++next)
                place[next] = index[next] = next;
            for (auto key = from; key != to; ++key)
                place[static_cast<uint32_t>(*key)] = next++;
            if (!shuffled) { // marked above, numbered here
                next = protect;
                for (int64_t n = protect; n < tokens; ++n)
                    place[n] = place[n] < 0 ? -1 : next++;
            }
            for (int64_t n = protect; n < tokens; ++n) {
                if (place[n] >= 0)
                    index[place[n]] = n;
            }
        }
    });
    return {indices, inverse};
}

} // namespace
} // namespace vlpfast::tokens

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
    m.impl("gather_rows", TORCH_BOX(&vlpfast::tokens::gather_rows));
    m.impl("filled_rows_sum", TORCH_BOX(&vlpfast::tokens::filled_rows_sum));
    m.impl("random_keep", TORCH_BOX(&vlpfast::tokens::random_keep));
}
