// The forward pass: products of panels of tokens with sets of tokens, the largest of each token, the scores.
#pragma once

#include "maxsim/kernel.h"
#include "maxsim/problem.h"

namespace vlpfast::maxsim {

struct Range {
    int64_t begin, end;
    bool operator==(const Range&) const = default;
    int64_t size() const { return end - begin; }
};

// Which side's tokens lie in the lanes of panels; the other side's are rows.
template <class T> struct Roles {
    const Problem<T>& p;
    const Range x_sets; // those of x that take part
    const bool swapped; // lanes are y's

    const Side<T>& lanes() const { return swapped ? p.y : p.x; }
    const Side<T>& rows() const { return swapped ? p.x : p.y; }
    Range sets() const { // of the lanes' side that take part
        if (!swapped)
            return x_sets;
        return p.all() ? Range{0, p.y.count()} : Range{x_sets.begin * p.candidates, x_sets.end * p.candidates};
    }
    Range partners(int64_t i) const { // the rows' sets that set i of the lanes' side meets
        if (p.all())
            return swapped ? x_sets : Range{0, p.y.count()};
        return swapped ? Range{i / p.candidates, i / p.candidates + 1}
                       : Range{i * p.candidates, (i + 1) * p.candidates};
    }
    int64_t pair(int64_t i, int64_t j) const { return swapped ? p.pair(j, i) : p.pair(i, j); }

    // Neighbouring sets of the lanes' side that have the same partners, at most `most` tokens (or one set).
    std::vector<Range> chunks(Range of, int64_t most) const {
        std::vector<Range> out;
        for (int64_t i = of.begin; i < of.end; ++i) {
            if (!out.empty() && partners(out.back().begin) == partners(i) &&
                lanes().start[i + 1] - lanes().start[out.back().begin] <= most)
                out.back().end = i + 1;
            else
                out.push_back({i, i + 1});
        }
        return out;
    }
};

// Neighbouring sets of one side with at most `most` tokens together (or one set).
template <class T> std::vector<Range> blocks(const Side<T>& side, Range of, int64_t most) {
    std::vector<Range> out;
    for (int64_t j = of.begin; j < of.end; ++j) {
        if (!out.empty() && side.start[j + 1] - side.start[out.back().begin] <= most)
            out.back().end = j + 1;
        else
            out.push_back({j, j + 1});
    }
    return out;
}

// Where the results for sets `x_sets` of x go; null scores and winners are not wanted.
template <class T> struct Output {
    T *x_to_y, *y_to_x; // [M, columns]
    Winners y_of_x;     // [columns, tokens of x_sets]
    Winners x_of_y;     // [x_sets or 1, Ly]
    Range x_sets;

    int64_t y_of_x_at(const Problem<T>& p, int64_t m, int64_t n) const {
        return p.column(m, n) * y_of_x.width + p.x.start[m] - p.x.start[x_sets.begin];
    }
    int64_t x_of_y_at(const Problem<T>& p, int64_t m, int64_t n) const {
        return (p.all() ? m - x_sets.begin : 0) * x_of_y.width + p.y.start[n];
    }
};

constexpr int64_t kPanelBytes = 32 << 20;                           // of panels that are there at once
constexpr int64_t kChunkBytes = 256 << 10, kBlockBytes = 256 << 10; // of lanes and rows of one task: half a cache each

template <class T> class Sweep {
  public:
    Sweep(const Problem<T>& p, const Output<T>& out, const Kernel<T>& kernel)
        : kernel_(kernel), out_(out), p_(p), roles_{p, out.x_sets, swap(p, out)},
          want_lanes_(roles_.swapped ? wanted(out.y_to_x, out.x_of_y) : wanted(out.x_to_y, out.y_of_x)),
          want_rows_(roles_.swapped ? wanted(out.x_to_y, out.y_of_x) : wanted(out.y_to_x, out.x_of_y)) {}

    void run() {
        for (const Range& group : blocks(roles_.lanes(), roles_.sets(), tokens_in(kPanelBytes))) {
            panels_.clear();
            tasks_.clear();
            int64_t size = 0;
            for (const Range& chunk : roles_.chunks(group, tokens_in(kChunkBytes)))
                add(chunk, size);
            T* const data = data_.get(size);
            parallel_for(0, static_cast<int64_t>(panels_.size()), 1, [&](int64_t from, int64_t to) {
                Buffer<T> copy;
                for (int64_t i = from; i < to; ++i)
                    pack(panels_[i], data + panels_[i].at, copy);
            });
            parallel_for(0, static_cast<int64_t>(tasks_.size()), 1, [&](int64_t from, int64_t to) {
                Scratch scratch;
                for (int64_t i = from; i < to; ++i)
                    score(tasks_[i], data, scratch);
            });
        }
    }

  private:
    struct Panel {
        int64_t begin, lanes, padded, set, at; // kept tokens from `begin` on; the first one's set; place in data_
    };
    struct Task {
        Range sets, partners, panels;
    };
    struct Scratch {
        Buffer<T> copy, scale, lane_best, row_best;
        Buffer<int32_t> lane_place, row_place;
    };

    static bool wanted(const T* scores, const Winners& winners) { return scores || winners.data; }

    // What a choice of lanes costs, in products of a full panel with one number: sets that begin a panel of their own
    // leave lanes empty, the largest of a row takes some more steps, and panels must be packed.
    static double cost(const Problem<T>& p, const Side<T>& lanes, const Side<T>& rows, bool want_rows) {
        double padded = 0;
        for (int64_t i = 0; i < lanes.count(); ++i)
            padded += want_rows ? static_cast<double>((lanes.kept_in(i) + 15) / 16 * 16) : lanes.kept_in(i);
        const double pairs = padded * rows.first.back() / (p.all() ? 1 : std::max<int64_t>(1, p.x.count()));
        return pairs / 32 * (p.D() + (want_rows ? 13 : 0)) + 2.0 * lanes.first.back() * p.D();
    }
    static bool swap(const Problem<T>& p, const Output<T>& out) {
        if (!p.y.scale.empty()) // what scales belong to are rows
            return false;
        return cost(p, p.y, p.x, wanted(out.x_to_y, out.y_of_x)) < cost(p, p.x, p.y, wanted(out.y_to_x, out.x_of_y));
    }

    int64_t tokens_in(int64_t bytes) const {
        return bytes / static_cast<int64_t>(sizeof(T)) / std::max<int64_t>(1, p_.D());
    }

    void add(const Range& chunk, int64_t& size) {
        const Side<T>& lanes = roles_.lanes();
        const auto begin = static_cast<int64_t>(panels_.size());
        // rows want the largest of one set: then every set has panels of its own
        const int64_t step = want_rows_ ? 1 : chunk.size();
        for (int64_t i = chunk.begin; i < chunk.end; i += step) {
            int64_t set = i;
            for (int64_t k = lanes.first[i]; k < lanes.first[i + step]; k += kernel_.panel) {
                const int64_t count = std::min(kernel_.panel, lanes.first[i + step] - k),
                              padded = (count + kernel_.lane - 1) / kernel_.lane * kernel_.lane;
                while (lanes.first[set + 1] <= k)
                    ++set;
                panels_.push_back({k, count, padded, set, size});
                size += padded * p_.D();
            }
        }
        const Range panels{begin, static_cast<int64_t>(panels_.size())};
        for (const Range& partners : blocks(roles_.rows(), roles_.partners(chunk.begin), tokens_in(kBlockBytes)))
            tasks_.push_back({chunk, partners, panels});
    }

    void pack(const Panel& panel, T* out, Buffer<T>& copy) const {
        constexpr int64_t kBlock = 16; // of columns, so that what is written stays in the first-level cache
        const Rows<T> rows = roles_.lanes().kept_rows(panel.begin, panel.begin + panel.lanes, copy);
        for (int64_t start = 0; start < p_.D(); start += kBlock) {
            const int64_t end = std::min(p_.D(), start + kBlock);
            for (int64_t l = 0; l < panel.padded; ++l) {
                for (int64_t d = start; d < end; ++d)
                    out[d * panel.padded + l] = l < panel.lanes ? rows.data[l * rows.stride + d] : T(0);
            }
        }
    }

    void score(const Task& task, const T* data, Scratch& scratch) const {
        const Side<T>&lanes = roles_.lanes(), &rows = roles_.rows();
        const int64_t first_row = rows.first[task.partners.begin], count = rows.first[task.partners.end] - first_row;
        const Rows<T> row = rows.kept_rows(first_row, first_row + count, scratch.copy);
        const T* const scale = rows.scales(first_row, first_row + count, row, scratch.scale);
        T* const lane_best = scratch.lane_best.get(kernel_.panel);
        int32_t* const lane_place = scratch.lane_place.get(kernel_.panel);
        T* const row_best = scratch.row_best.get(count);
        int32_t* const row_place = scratch.row_place.get(count);
        const int64_t columns = task.partners.size();
        std::vector<double> lane_sum(task.sets.size() * columns, 0.0), row_sum(lane_sum);
        const auto cell = [&](int64_t i, int64_t j) {
            return (i - task.sets.begin) * columns + j - task.partners.begin;
        };
        for (int64_t q = task.panels.begin; q < task.panels.end; ++q) {
            const Panel& panel = panels_[q];
            const int64_t end = panel.begin + panel.lanes;
            if (want_rows_ && panel.begin == lanes.first[panel.set]) {
                std::fill_n(row_best, count, -std::numeric_limits<T>::infinity());
                std::fill_n(row_place, count, 0);
            }
            for (int64_t j = task.partners.begin; j < task.partners.end; ++j) {
                if (rows.kept_in(j) == 0)
                    continue;
                const int64_t at = rows.first[j] - first_row;
                kernel_.run({data + panel.at, panel.lanes, row.data + at * row.stride, row.stride, rows.kept_in(j),
                             p_.D(), scale ? scale + at : nullptr, lane_best, lane_place,
                             want_rows_ ? row_best + at : nullptr, row_place + at,
                             static_cast<int32_t>(panel.begin - lanes.first[panel.set])});
                if (!want_lanes_)
                    continue;
                for (int64_t i = panel.set; i < task.sets.end && lanes.first[i] < end; ++i) {
                    const int64_t from = std::max(panel.begin, lanes.first[i]), to = std::min(end, lanes.first[i + 1]);
                    lane_sum[cell(i, j)] +=
                        finish(rows, j, lane_best + from - panel.begin, lane_place + from - panel.begin, to - from);
                    keep(roles_.swapped, i, j, lanes, from, to, lane_place + from - panel.begin);
                }
            }
            if (!want_rows_ || end < lanes.first[panel.set + 1])
                continue;
            for (int64_t j = task.partners.begin; j < task.partners.end; ++j) {
                const int64_t at = rows.first[j] - first_row;
                row_sum[cell(panel.set, j)] += finish(lanes, panel.set, row_best + at, row_place + at, rows.kept_in(j));
                keep(!roles_.swapped, panel.set, j, rows, rows.first[j], rows.first[j + 1], row_place + at);
            }
        }
        T *lane_out = out_.x_to_y, *row_out = out_.y_to_x;
        if (roles_.swapped)
            std::swap(lane_out, row_out);
        for (int64_t i = task.sets.begin; i < task.sets.end; ++i) {
            for (int64_t j = task.partners.begin; j < task.partners.end; ++j) {
                if (lane_out)
                    lane_out[roles_.pair(i, j)] = mean(lane_sum[cell(i, j)], lanes.kept_in(i));
                if (row_out)
                    row_out[roles_.pair(i, j)] = mean(row_sum[cell(i, j)], rows.kept_in(j));
            }
        }
    }

    T mean(double sum, int64_t count) const {
        return static_cast<T>(p_.mean ? sum / static_cast<double>(std::max<int64_t>(1, count)) : sum);
    }

    // Turns winners among the kept tokens of set i into places in it, lets zeros of masked tokens win, sums.
    double finish(const Side<T>& side, int64_t i, T* best, int32_t* place, int64_t count) const {
        const int64_t masked = side.first_masked[i];
        double sum = 0;
        for (int64_t k = 0; k < count; ++k) {
            if (masked >= 0)
                place[k] = static_cast<int32_t>(side.token(side.first[i] + place[k]) - side.start[i]);
            if (p_.zero && masked >= 0 && (best[k] < 0 || (best[k] == 0 && masked < place[k]))) {
                best[k] = 0;
                place[k] = static_cast<int32_t>(masked);
            }
            sum += best[k];
        }
        return sum;
    }

    // Stores the winners of the kept tokens [begin, end) of `side`, which is y if `of_y`.
    void keep(bool of_y, int64_t i, int64_t j, const Side<T>& side, int64_t begin, int64_t end,
              const int32_t* place) const {
        const Winners& winners = of_y ? out_.x_of_y : out_.y_of_x;
        if (!winners.data || begin == end)
            return;
        const int64_t m = roles_.swapped ? j : i, n = roles_.swapped ? i : j;
        const int64_t at = of_y ? out_.x_of_y_at(p_, m, n) - p_.y.start[n] : out_.y_of_x_at(p_, m, n) - p_.x.start[m];
        winners.with_pointer([&](auto* to) {
            for (int64_t k = begin; k < end; ++k)
                to[at + side.token(k)] = static_cast<std::remove_pointer_t<decltype(to)>>(place[k - begin]);
        });
    }

    const Kernel<T>& kernel_;
    const Output<T>& out_;
    const Problem<T>& p_;
    const Roles<T> roles_;
    const bool want_lanes_, want_rows_;
    std::vector<Panel> panels_;
    std::vector<Task> tasks_;
    Buffer<T> data_;
};

} // namespace vlpfast::maxsim
