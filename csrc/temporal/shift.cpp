// frame_shift on the CPU: rows of x [B, F, R, E] with parts of them taken from the frames beside. See
// vlpfast/ops/temporal/reference.py for what it computes and vlpfast/ops/_schemas.py for the arguments.
//
// Elements are copied as they are, whatever they mean, a row in at most five pieces. In place a part of a row goes
// through the frames in the order in which none is read after it was written.

#include "common/simd.h"
#include "common/tensors.h"

namespace vlpfast::temporal {
namespace {

constexpr int64_t kTaskBytes = 1 << 16;

// Elements [begin, end) of a row of frame t, in bytes, come from frame t + step.
struct Piece {
    int64_t begin, end;
    int step;
};

struct Layout {
    int64_t B, F, R, E;
    int64_t clip, frame, row; // strides in bytes

    explicit Layout(const Tensor& x)
        : B(x.size(0)), F(x.size(1)), R(x.size(2)), E(x.size(3)), clip(x.stride(0) * x.element_size()),
          frame(x.stride(1) * x.element_size()), row(x.stride(2) * x.element_size()) {
        STD_TORCH_CHECK(E <= 1 || x.stride(3) == 1, "x: expected rows of consecutive elements, got stride ",
                        x.stride(3));
    }
    bool empty() const { return B * F * R * E == 0; }
};

// Those that move, in order.
std::vector<Piece> moving(const Layout& x, int64_t size, int64_t back_begin, int64_t back_end, int64_t ahead_begin,
                          int64_t ahead_end) {
    STD_TORCH_CHECK(0 <= back_begin && back_begin <= back_end && back_end <= x.E, "back: expected a part of ", x.E,
                    " elements, got ", back_begin, " to ", back_end);
    STD_TORCH_CHECK(0 <= ahead_begin && ahead_begin <= ahead_end && ahead_end <= x.E, "ahead: expected a part of ", x.E,
                    " elements, got ", ahead_begin, " to ", ahead_end);
    std::vector<Piece> pieces;
    for (const Piece& p : {Piece{back_begin, back_end, -1}, Piece{ahead_begin, ahead_end, 1}}) {
        if (p.begin < p.end)
            pieces.push_back({p.begin * size, p.end * size, p.step});
    }
    if (pieces.size() == 2 && pieces[1].begin < pieces[0].begin)
        std::swap(pieces[0], pieces[1]);
    STD_TORCH_CHECK(pieces.size() < 2 || pieces[0].end <= pieces[1].begin,
                    "back and ahead: expected parts that do not overlap");
    return pieces;
}

// A whole row.
std::vector<Piece> with_those_that_stay(const std::vector<Piece>& moving, int64_t bytes) {
    std::vector<Piece> pieces;
    int64_t at = 0;
    const auto stay = [&](int64_t end) {
        if (at < end)
            pieces.push_back({at, end, 0});
    };
    for (const Piece& p : moving) {
        stay(p.begin);
        pieces.push_back(p);
        at = p.end;
    }
    stay(bytes);
    return pieces;
}

Tensor frame_shift(const Tensor& x, int64_t back_begin, int64_t back_end, int64_t ahead_begin, int64_t ahead_end,
                   bool cyclic) {
    const Layout from(x);
    const int64_t size = x.element_size(), bytes = from.E * size;
    const std::vector<Piece> pieces =
        with_those_that_stay(moving(from, size, back_begin, back_end, ahead_begin, ahead_end), bytes);
    const Tensor out = empty({from.B, from.F, from.R, from.E}, x.scalar_type());
    if (from.empty())
        return out;
    const auto* const data = static_cast<const char*>(x.const_data_ptr());
    auto* const result = static_cast<char*>(out.mutable_data_ptr());
    const int64_t rows = from.B * from.F * from.R;
    parallel_for(0, rows, std::max<int64_t>(1, kTaskBytes / bytes), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t r = i % from.R, t = i / from.R % from.F, b = i / from.R / from.F;
            const char* const row = data + b * from.clip + r * from.row;
            for (const Piece& p : pieces) {
                int64_t source = t + p.step;
                char* const to = result + i * bytes + p.begin;
                if (!cyclic && (source < 0 || source == from.F)) {
                    std::memset(to, 0, p.end - p.begin);
                    continue;
                }
                source = (source + from.F) % from.F;
                copy_bytes(to, row + source * from.frame + p.begin, p.end - p.begin);
            }
        }
    });
    return out;
}

void frame_shift_(const Tensor& x, int64_t back_begin, int64_t back_end, int64_t ahead_begin, int64_t ahead_end) {
    const Layout at(x);
    const std::vector<Piece> pieces = moving(at, x.element_size(), back_begin, back_end, ahead_begin, ahead_end);
    if (at.empty())
        return;
    auto* const data = static_cast<char*>(x.mutable_data_ptr());
    for (const Piece& p : pieces) {
        constexpr int64_t kChunk = 4096; // stays in the first-level cache from one frame to the next
        const int64_t chunks = (p.end - p.begin + kChunk - 1) / kChunk;
        const int64_t grain = std::max<int64_t>(1, kTaskBytes / (std::min(kChunk, p.end - p.begin) * at.F));
        parallel_for(0, at.B * at.R * chunks, grain, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t chunk = p.begin + i % chunks * kChunk, r = i / chunks % at.R, b = i / chunks / at.R;
                const int64_t bytes = std::min(kChunk, p.end - chunk);
                char* const first = data + b * at.clip + r * at.row + chunk;
                const int64_t last = p.step > 0 ? at.F - 1 : 0; // the frame that has no source
                for (int64_t t = p.step > 0 ? 0 : at.F - 1; t != last; t += p.step)
                    copy_bytes(first + t * at.frame, first + (t + p.step) * at.frame, bytes);
                std::memset(first + last * at.frame, 0, bytes);
            }
        });
    }
}

} // namespace
} // namespace vlpfast::temporal

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
    m.impl("frame_shift", TORCH_BOX(&vlpfast::temporal::frame_shift));
    m.impl("frame_shift_", TORCH_BOX(&vlpfast::temporal::frame_shift_));
}
