// Vectorised loops: the widest instruction set is chosen at run time, nothing is compiled for the building machine.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

// Put on a function (templates too): the compiler makes one copy for each instruction set and the loader picks one.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define VLPFAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VLPFAST_CLONES
#endif
#define VLPFAST_INLINE inline __attribute__((always_inline))

namespace vlpfast {

// As std::memcpy, for rows of a few kilobytes: there that takes the processor's instruction for strings, which was
// slower by a third here. (Stores past the caches were slower still: the system has just cleared a large result through
// them.)
void copy_bytes(void* to, const void* from, int64_t bytes);

constexpr int kLanes =
    16; // independent partial sums of a reduction: fills the registers, and fixes the order of summation

// exp(t), vectorisable, error below 2 ulp. Results under the smallest normal number are 0, NaN stays NaN; t must not
// exceed 88.
VLPFAST_INLINE float exponential(float t) {
    constexpr float kRound = 0x1.8p23f; // adding it leaves the nearest integer in the low bits of the mantissa
    const float shifted = t * 1.44269504089f + kRound;
    const float n = shifted - kRound;
    const float r =
        (t - n * 0x1.63p-1f) - n * -2.12194440e-4f; // t - n ln 2, with ln 2 in two parts, the first times n exact
    // exp(r) = 1 + r + r^2 q(r) on |r| <= ln(2) / 2; q fitted for the least relative error, 3e-9
    float q = 1.381453988e-3f;
    q = q * r + 8.368745127e-3f;
    q = q * r + 4.166838979e-2f;
    q = q * r + 1.666652040e-1f;
    q = q * r + 4.999999343e-1f;
    const float mantissa = q * (r * r) + r + 1.0f;
    const uint32_t exponent = (std::bit_cast<uint32_t>(shifted) + 127u) << 23;
    return t < -87.3f ? 0.0f : mantissa * std::bit_cast<float>(exponent);
}

inline double exponential(double t) {
    return std::exp(t);
}

// log(1 + e) for 0 <= e <= 1, vectorisable, error below 2.5 ulp however small e is. NaN stays NaN.
// It is e (1 + e q(e)), with q of degree 8 fitted for the least relative error of the whole: 5.1e-9, a twelfth of the
// rounding of one operation. e q lies in [ln 2 - 1, 0], so that the bracket, at least ln 2, has its own rounding and at
// most 0.45 of q's relative error; the last product adds one rounding more. For tiny e the bracket is 1, the result e.
VLPFAST_INLINE float log1p_unit(float e) {
    float q = -3.318468533e-3f;
    q = q * e + 2.020456797e-2f;
    q = q * e - 5.766441459e-2f;
    q = q * e + 1.068055275e-1f;
    q = q * e - 1.535539483e-1f;
    q = q * e + 1.969540010e-1f;
    q = q * e - 2.495858735e-1f;
    q = q * e + 3.333051132e-1f;
    q = q * e - 4.999993276e-1f;
    return e * (q * e + 1.0f);
}

inline double log1p_unit(double e) {
    return std::log1p(e);
}

} // namespace vlpfast
