// Random bits that are a function of their place and a seed.
#pragma once

#include "common/simd.h"

namespace vlpfast {
namespace { // each copy's dispatcher would otherwise be exported

// Random bits are made for this many columns at a time, from kBlock / 4 counters.
constexpr int64_t kBlock = 64;

// Random bits of columns [begin, begin + kBlock) of a row, `begin` a multiple of 4: Philox4x32-10 at the counters
// (column / 4, row, stream, 0), four words each. See vlpfast/ops/contrastive/reference.py.
VLPFAST_CLONES void random_bits(uint32_t begin, uint32_t row, uint32_t stream, uint64_t seed, uint32_t* out) {
    constexpr int kCounters = kBlock / 4;
    uint32_t words[4][kCounters]; // written one counter after the other, which the compiler makes vectors of
    for (int l = 0; l < kCounters; ++l) {
        uint32_t c0 = begin / 4 + l, c1 = row, c2 = stream, c3 = 0;
        uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
        for (int round = 0; round < 10; ++round) {
            const uint64_t p = uint64_t{0xD2511F53} * c0, q = uint64_t{0xCD9E8D57} * c2;
            c0 = static_cast<uint32_t>(q >> 32) ^ c1 ^ k0;
            c1 = static_cast<uint32_t>(q);
            c2 = static_cast<uint32_t>(p >> 32) ^ c3 ^ k1;
            c3 = static_cast<uint32_t>(p);
            k0 += 0x9E3779B9;
            k1 += 0xBB67AE85;
        }
        words[0][l] = c0;
        words[1][l] = c1;
        words[2][l] = c2;
        words[3][l] = c3;
    }
    for (int l = 0; l < kCounters; ++l) {
        for (int w = 0; w < 4; ++w)
            out[4 * l + w] = words[w][l];
    }
}

} // namespace
} // namespace vlpfast
