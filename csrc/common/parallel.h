// Cutting work into parts for threads, in a way that does not depend on their number.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace vlpfast {

using torch::stable::parallel_for;

// [0, total) in equal parts of at most `most`, each but the last a multiple of 16 long.
struct Parts {
    int64_t total, count, size;

    Parts(int64_t n, int64_t most) : total(n), count((n + most - 1) / most), size(0) {
        if (count > 0)
            size = ((n + count - 1) / count + 15) / 16 * 16;
        if (count > 0)
            count = (n + size - 1) / size;
    }
    int64_t begin(int64_t i) const { return std::min(total, i * size); }
    int64_t length(int64_t i) const { return begin(i + 1) - begin(i); }

    // f(part, begin, length) for every part, in parallel. A single part brings an empty companion: parallel_for would
    // run it outside of a parallel region, where products take several threads.
    template <class F> void each(const F& f) const {
        parallel_for(0, std::max<int64_t>(count, 2), 1, [&](int64_t from, int64_t to) {
            for (int64_t i = from; i < std::min(to, count); ++i)
                f(i, begin(i), length(i));
        });
    }
};

} // namespace vlpfast
