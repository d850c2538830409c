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

} // namespace vlpfast
