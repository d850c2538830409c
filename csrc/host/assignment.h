// The linear assignment problem. Its definition in numpy: vlpfast/ops/maxsim/assignment.py.
#pragma once

#include <cstdint>

namespace vlpfast::host {

// For each of `count` problems the row of each column in the one-to-one matching of the largest sum, -1 for none; -1
// throughout where something that takes part is not finite. All of the side with fewer are matched.
// similarity [count, rows, columns], row_kept [count, rows], column_kept [count, columns], partner [count, columns].
template <class T>
void assign(int64_t count, int64_t rows, int64_t columns, const T* similarity, const bool* row_kept,
            const bool* column_kept, int64_t* partner, int threads);

} // namespace vlpfast::host
