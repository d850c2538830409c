// The kernel for AVX2: 3 rows x 4 vectors, 12 sums in 16 registers.

#include "maxsim/kernel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define VLPFAST_TARGET __attribute__((target("avx2,fma")))
#include "maxsim/tile.h"

#define VLPFAST_LANES VLPFAST_TARGET static inline __attribute__((always_inline))

namespace vlpfast::maxsim {
namespace {

struct Avx2 {
    using Scalar = float;
    using V = __m256;
    using Places = __m256i;
    static constexpr int width = 8, most = 4;
    static constexpr int rows(int vectors) { return 12 / vectors; }

    VLPFAST_LANES V set(float value) { return _mm256_set1_ps(value); }
    VLPFAST_LANES V load(const float* from) { return _mm256_loadu_ps(from); }
    VLPFAST_LANES void store(float* to, V value) { _mm256_storeu_ps(to, value); }
    VLPFAST_LANES V multiply_add(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
    VLPFAST_LANES V multiply(V a, V b) { return _mm256_mul_ps(a, b); }
    VLPFAST_LANES V add(V a, V b) { return _mm256_add_ps(a, b); }
    VLPFAST_LANES V max(V a, V b) { return _mm256_max_ps(a, b); }
    VLPFAST_LANES Places set_place(int32_t place) { return _mm256_set1_epi32(place); }
    VLPFAST_LANES Places load_places(const int32_t* from) {
        return _mm256_loadu_si256(reinterpret_cast<const Places*>(from));
    }
    VLPFAST_LANES void store_places(int32_t* to, Places places) {
        _mm256_storeu_si256(reinterpret_cast<Places*>(to), places);
    }
    VLPFAST_LANES V larger(V value, V old) {
        return _mm256_and_ps(_mm256_cmp_ps(old, old, _CMP_ORD_Q), _mm256_cmp_ps(value, old, _CMP_NLE_UQ));
    }
    VLPFAST_LANES V select(V mask, V yes, V no) { return _mm256_blendv_ps(no, yes, mask); }
    VLPFAST_LANES Places select(V mask, Places yes, Places no) {
        return _mm256_blendv_epi8(no, yes, _mm256_castps_si256(mask));
    }
    VLPFAST_LANES V first(V value, int64_t count, float rest) {
        const Places lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        const Places inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int32_t>(count)), lanes);
        return _mm256_blendv_ps(set(rest), value, _mm256_castsi256_ps(inside));
    }
    VLPFAST_LANES float max_lane(V value) {
        __m128 half = _mm_max_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
        half = _mm_max_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
    }
    VLPFAST_LANES uint64_t is_nan(V value) {
        return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(value, value, _CMP_UNORD_Q)));
    }
    VLPFAST_LANES uint64_t equal(V a, V b) {
        return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ)));
    }
};

} // namespace

const Kernel<float>* avx2_kernel() {
    static constexpr Kernel<float> kernel{Avx2::width, Avx2::width * Avx2::most, run<Avx2>};
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kernel : nullptr;
}

} // namespace vlpfast::maxsim
#else
const vlpfast::maxsim::Kernel<float>* vlpfast::maxsim::avx2_kernel() {
    return nullptr;
}
#endif
