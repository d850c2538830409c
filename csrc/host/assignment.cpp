// Shortest augmenting paths (Jonker and Volgenant 1987), each of the side with fewer in turn, O(n * n * m).
#include "assignment.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "parallel.h"

namespace vlpfast::host {

namespace {

constexpr int64_t problems_at_once = 32; // what one thread takes
constexpr double infinity = std::numeric_limits<double>::infinity();

// Memory of one problem after the other.
class Solver {
  public:
    // cost [n, m], n <= m -> taken_by()[j]: the row of column j, or -1.
    void solve(int64_t n, int64_t m) {
        u_.assign(n, 0);
        v_.assign(m, 0);
        taken_by_.assign(m, -1);
        for (int64_t start = 0; start < n; ++start)
            augment(start, m);
    }

    std::vector<double>& cost() { return cost_; }
    const std::vector<int64_t>& taken_by() const { return taken_by_; }

  private:
    void augment(int64_t start, int64_t m) {
        distance_.assign(m, infinity);
        before_.assign(m, -1);
        open_.resize(m);
        std::iota(open_.begin(), open_.end(), int64_t{0});
        int64_t row = start, last = -1;
        double length = 0;
        while (row >= 0) { // Dijkstra over the columns until one is free
            const double* of_row = cost_.data() + row * m;
            const double shift = length - u_[row];
            size_t nearest = 0;
            for (size_t k = 0; k < open_.size(); ++k) { // in rising order: of equal distances the lowest index
                const int64_t j = open_[k];
                const double reduced = shift + of_row[j] - v_[j];
                if (reduced < distance_[j]) {
                    distance_[j] = reduced;
                    before_[j] = last;
                }
                if (distance_[j] < distance_[open_[nearest]])
                    nearest = k;
            }
            last = open_[nearest];
            length = distance_[last];
            done_.push_back(last);
            open_.erase(open_.begin() + nearest);
            row = taken_by_[last];
        }
        done_.pop_back(); // the free column, at the end of the path
        for (const int64_t j : done_) {
            u_[taken_by_[j]] += length - distance_[j];
            v_[j] -= length - distance_[j];
        }
        done_.clear();
        u_[start] += length;
        while (last >= 0) { // turn the path around
            const int64_t previous = before_[last];
            taken_by_[last] = previous < 0 ? start : taken_by_[previous];
            last = previous;
        }
    }

    std::vector<double> cost_, u_, v_; // potentials: cost - u - v >= 0, and 0 for those matched
    std::vector<int64_t> taken_by_;    // [m]
    std::vector<int64_t> before_;      // [m] the column before it on the shortest path, -1: none
    std::vector<double> distance_;     // [m]
    std::vector<int64_t> open_, done_; // columns
};

void kept(const bool* mask, int64_t count, std::vector<int64_t>& out) {
    out.clear();
    for (int64_t i = 0; i < count; ++i)
        if (mask[i])
            out.push_back(i);
}

} // namespace

template <class T>
void assign(int64_t count, int64_t rows, int64_t columns, const T* similarity, const bool* row_kept,
            const bool* column_kept, int64_t* partner, int threads) {
    std::fill_n(partner, count * columns, int64_t{-1});
    parallel((count + problems_at_once - 1) / problems_at_once, threads, [&](int64_t part) {
        Solver solver;
        std::vector<int64_t> of_rows, of_columns;
        for (int64_t i = part * problems_at_once; i < std::min(count, (part + 1) * problems_at_once); ++i) {
            kept(row_kept + i * rows, rows, of_rows);
            kept(column_kept + i * columns, columns, of_columns);
            const bool transposed = of_rows.size() > of_columns.size();
            const auto& fewer = transposed ? of_columns : of_rows;
            const auto& more = transposed ? of_rows : of_columns;
            auto& cost = solver.cost();
            cost.clear();
            for (const int64_t a : fewer)
                for (const int64_t b : more)
                    cost.push_back(
                        -double{similarity[i * rows * columns + (transposed ? b * columns + a : a * columns + b)]});
            if (!std::all_of(cost.begin(), cost.end(), [](double c) { return std::isfinite(c); }))
                continue;
            solver.solve(static_cast<int64_t>(fewer.size()), static_cast<int64_t>(more.size()));
            for (size_t j = 0; j < more.size() && !fewer.empty(); ++j)
                if (const int64_t k = solver.taken_by()[j]; k >= 0)
                    partner[i * columns + (transposed ? fewer[k] : more[j])] = transposed ? more[j] : fewer[k];
        }
    });
}

template void assign(int64_t, int64_t, int64_t, const float*, const bool*, const bool*, int64_t*, int);
template void assign(int64_t, int64_t, int64_t, const double*, const bool*, const bool*, int64_t*, int);

} // namespace vlpfast::host
