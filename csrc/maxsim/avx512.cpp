// The kernel for AVX-512: 12 rows x 2 vectors, 24 sums in 32 registers.

#include "maxsim/kernel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#if !defined(__clang__) // GCC 12 takes its own header's undefined operands for a mistake
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define VLPFAST_TARGET __attribute__((target("avx512f")))
#include "maxsim/tile.h"

#define VLPFAST_LANES VLPFAST_TARGET static inline __attribute__((always_inline))

namespace vlpfast::maxsim {
namespace {

struct Avx512 {
    using Scalar = float;
    using V = __m512;
    using Places = __m512i;
    using Mask = __mmask16;
    static constexpr int width = 16, most = 2;
    static constexpr int rows(int) { return 12; }

    VLPFAST_LANES V set(float value) { return _mm512_set1_ps(value); }
    VLPFAST_LANES V load(const float* from) { return _mm512_loadu_ps(from); }
    VLPFAST_LANES void store(float* to, V value) { _mm512_storeu_ps(to, value); }
    VLPFAST_LANES V multiply_add(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
    VLPFAST_LANES V multiply(V a, V b) { return _mm512_mul_ps(a, b); }
    VLPFAST_LANES V add(V a, V b) { return _mm512_add_ps(a, b); }
    VLPFAST_LANES V max(V a, V b) { return _mm512_max_ps(a, b); }
    VLPFAST_LANES Places set_place(int32_t place) { return _mm512_set1_epi32(place); }
    VLPFAST_LANES Places load_places(const int32_t* from) { return _mm512_loadu_si512(from); }
    VLPFAST_LANES void store_places(int32_t* to, Places places) { _mm512_storeu_si512(to, places); }
    VLPFAST_LANES Mask larger(V value, V old) {
        return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(old, old, _CMP_ORD_Q), value, old, _CMP_NLE_UQ);
    }
    VLPFAST_LANES V select(Mask mask, V yes, V no) { return _mm512_mask_mov_ps(no, mask, yes); }
    VLPFAST_LANES Places select(Mask mask, Places yes, Places no) { return _mm512_mask_mov_epi32(no, mask, yes); }
    VLPFAST_LANES V first(V value, int64_t count, float rest) {
        return _mm512_mask_mov_ps(set(rest), static_cast<Mask>((1u << count) - 1), value);
    }
    VLPFAST_LANES float max_lane(V value) { return _mm512_reduce_max_ps(value); }
    VLPFAST_LANES uint64_t is_nan(V value) { return _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q); }
    VLPFAST_LANES uint64_t equal(V a, V b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
};

} // namespace

const Kernel<float>* avx512_kernel() {
    static constexpr Kernel<float> kernel{Avx512::width, Avx512::width * Avx512::most, run<Avx512>};
    return __builtin_cpu_supports("avx512f") ? &kernel : nullptr;
}

} // namespace vlpfast::maxsim
#else
const vlpfast::maxsim::Kernel<float>* vlpfast::maxsim::avx512_kernel() {
    return nullptr;
}
#endif
