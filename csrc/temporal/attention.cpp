// temporal_attention on the CPU. See vlpfast/ops/temporal/attention.py for what it computes and vlpfast/ops/_schemas.py
// for the arguments.
//
// One position of one clip at a time, head by head: its few rows of queries, keys and values are copied side by side,
// into the first-level cache, and everything between them and the results stays there. Frames that may not be seen are
// left out when rows are copied. The backward makes the weights again. A result has one owner and every sum one order.

#include "temporal/rows.h"

#include <limits>
#include <tuple>

namespace vlpfast::temporal {
namespace {

constexpr int64_t kMost = 32; // frames
constexpr int64_t kChunk = 4 * kLanes;
constexpr int64_t kGrain = 1 << 15; // elements that are worth a thread

// out [m, kMost] = a [m, width] @ b [n, width].T; width a multiple of kLanes.
template <class T> VLPFAST_CLONES void dots(const T* a, int64_t m, const T* b, int64_t n, int64_t width, T* out) {
    for (int64_t i = 0; i < m; ++i) {
        const T* const left = a + i * width;
        for (int64_t j = 0; j < n; ++j) {
            const T* const right = b + j * width;
            T lanes[kLanes] = {};
            for (int64_t d = 0; d < width; d += kLanes) {
                for (int l = 0; l < kLanes; ++l)
                    lanes[l] += left[d + l] * right[d + l];
            }
#pragma GCC unroll 4
            for (int half = kLanes / 2; half > 0; half /= 2) {
                for (int l = 0; l < half; ++l)
                    lanes[l] += lanes[l + half];
            }
            out[i * kMost + j] = lanes[0];
        }
    }
}

// A range of the other side's frames for each frame.
struct Spans {
    int64_t begin[kMost], end[kMost];
};

// out [m, width] = weights @ rows [n, width], row i from those in its span; weight (i, j) is weights[i * row + j *
// column].
template <class T>
VLPFAST_CLONES void combine(const T* weights, int64_t row, int64_t column, const Spans& spans, int64_t m, const T* rows,
                            int64_t width, T* out) {
    for (int64_t i = 0; i < m; ++i) {
        const T* const weight = weights + i * row;
        const int64_t begin = spans.begin[i], end = spans.end[i];
        int64_t d = 0;
        for (; d + kChunk <= width; d += kChunk) {
            T sum[kChunk] = {};
            for (int64_t j = begin; j < end; ++j) {
                const T w = weight[j * column];
                const T* const from = rows + j * width + d;
                for (int l = 0; l < kChunk; ++l)
                    sum[l] += w * from[l];
            }
            for (int l = 0; l < kChunk; ++l)
                out[i * width + d + l] = sum[l];
        }
        for (; d < width; d += kLanes) {
            T sum[kLanes] = {};
            for (int64_t j = begin; j < end; ++j) {
                const T w = weight[j * column];
                const T* const from = rows + j * width + d;
                for (int l = 0; l < kLanes; ++l)
                    sum[l] += w * from[l];
            }
            for (int l = 0; l < kLanes; ++l)
                out[i * width + d + l] = sum[l];
        }
    }
}

// s [m, kMost] = softmax of scale * s over each row's span, 0 beyond it.
template <class T> VLPFAST_CLONES void softmax(T* s, int64_t m, const Spans& spans, T scale) {
    for (int64_t i = 0; i < m; ++i) {
        T* const row = s + i * kMost;
        const int64_t n = spans.end[i];
        T largest = -std::numeric_limits<T>::infinity(), total = 0;
        for (int64_t j = 0; j < n; ++j) {
            row[j] *= scale;
            largest = row[j] <= largest ? largest : row[j]; // a NaN shows in the sum
        }
        for (int64_t j = 0; j < kMost; ++j)
            row[j] = j < n ? exponential(row[j] - largest) : T(0);
        for (int64_t j = 0; j < n; ++j)
            total += row[j];
        for (int64_t j = 0; j < n; ++j)
            row[j] /= total;
    }
}

// d = scale * w * (d - <w, d>): the gradient of the products from that of the weights, row by row.
template <class T> VLPFAST_CLONES void softmax_gradient(T* d, const T* w, int64_t m, const Spans& spans, T scale) {
    for (int64_t i = 0; i < m; ++i) {
        T mean = 0;
        for (int64_t j = 0; j < spans.end[i]; ++j)
            mean += w[i * kMost + j] * d[i * kMost + j];
        for (int64_t j = 0; j < spans.end[i]; ++j)
            d[i * kMost + j] = scale * w[i * kMost + j] * (d[i * kMost + j] - mean);
    }
}

// [B, T, P, H * D], read or written head by head.
struct Layout {
    int64_t clip, frame, position, depth, width; // strides; of a head, and the same padded

    Layout(const Tensor& t, int64_t heads)
        : clip(t.stride(0)), frame(t.stride(1)), position(t.stride(2)), depth(t.size(3) / heads),
          width((depth + kLanes - 1) / kLanes * kLanes) {}
    int64_t at(int64_t b, int64_t p, int64_t h) const { return b * clip + p * position + h * depth; }
};

template <class T> struct Input : Layout {
    Reader<T> data;

    Input(const Tensor& t, int64_t heads) : Layout(t, heads), data(t) {}
    // Rows of the frames in `frames`, [count, width], with zeros behind `depth`.
    void rows(int64_t at, const int64_t* frames, int64_t count, T* out) const {
        for (int64_t i = 0; i < count; ++i) {
            data.copy(at + frames[i] * frame, depth, out + i * width);
            std::fill(out + i * width + depth, out + (i + 1) * width, T(0));
        }
    }
};

template <class T> struct Output : Layout {
    Writer<T> data;

    Output(const Tensor& t, int64_t heads) : Layout(t, heads), data(t) {}
    void rows(int64_t at, const int64_t* frames, int64_t count, const T* in) const {
        for (int64_t i = 0; i < count; ++i)
            data.write(at + frames[i] * frame, depth, in + i * width);
    }
};

// Which frames see which, in one clip.
struct Clip {
    int64_t queries, keys = 0, frames; // keys: those that may be seen, in order
    int64_t query[kMost], key[kMost], hidden[kMost];
    Spans seen, seeing; // of each query the keys, of each key the queries

    Clip(int64_t Tq, int64_t T, const bool* keep, int64_t stride, bool causal) : queries(Tq), frames(T) {
        for (int64_t j = 0; j < T; ++j) {
            if (!keep || keep[j * stride])
                key[keys++] = j;
            else
                hidden[j - keys] = j;
        }
        for (int64_t i = 0; i < Tq; ++i) {
            query[i] = i;
            seen.begin[i] = 0;
            seen.end[i] = causal ? std::upper_bound(key, key + keys, i) - key : keys;
        }
        for (int64_t j = 0; j < keys; ++j) {
            seeing.begin[j] = causal ? key[j] : 0;
            seeing.end[j] = Tq;
        }
    }
};

// f(clip, b, p, scratch) for every position of every clip, in parallel; scratch: `count` elements.
template <class T, class F>
void each_position(const Tensor& q, const Tensor& k, const std::optional<Tensor>& keep, bool causal, int64_t width,
                   int64_t count, const F& f) {
    const int64_t B = q.size(0), Tq = q.size(1), P = q.size(2), frames = k.size(1);
    STD_TORCH_CHECK(Tq <= kMost && frames <= kMost, "expected at most 32 frames");
    const bool* const kept = keep ? keep->const_data_ptr<bool>() : nullptr;
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, (Tq + frames) * width));
    parallel_for(0, B * P, grain, [&](int64_t from, int64_t to) {
        Buffer<T> buffer;
        T* const scratch = buffer.get(count);
        while (from < to) {
            const int64_t b = from / P;
            const Clip clip(Tq, frames, kept ? kept + b * keep->stride(0) : nullptr, keep ? keep->stride(1) : 0,
                            causal);
            for (; from < std::min(to, (b + 1) * P); ++from)
                f(clip, b, from - b * P, scratch);
        }
    });
}

template <class T>
Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& keep, int64_t heads,
               double scale, bool causal) {
    const Tensor out = empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.scalar_type());
    const Input<T> in_q(q, heads), in_k(k, heads), in_v(v, heads);
    const Output<T> result(out, heads);
    const int64_t narrow = kMost * in_q.width, wide = kMost * in_v.width;
    each_position<T>(q, k, keep, causal, q.size(3) + v.size(3), 2 * narrow + 2 * wide + kMost * kMost,
                     [&](const Clip& clip, int64_t b, int64_t p, T* scratch) {
                         T *const at_q = scratch, *const at_k = at_q + narrow, *const at_v = at_k + narrow,
                                  *const at_out = at_v + wide, *const weights = at_out + wide;
                         for (int64_t h = 0; h < heads; ++h) {
                             in_q.rows(in_q.at(b, p, h), clip.query, clip.queries, at_q);
                             in_k.rows(in_k.at(b, p, h), clip.key, clip.keys, at_k);
                             in_v.rows(in_v.at(b, p, h), clip.key, clip.keys, at_v);
                             dots(at_q, clip.queries, at_k, clip.keys, in_q.width, weights);
                             softmax(weights, clip.queries, clip.seen, static_cast<T>(scale));
                             combine(weights, kMost, 1, clip.seen, clip.queries, at_v, in_v.width, at_out);
                             result.rows(result.at(b, p, h), clip.query, clip.queries, at_out);
                         }
                     });
    return out;
}

using Backward = std::tuple<Tensor, Tensor, Tensor>; // dq, dk, dv

template <class T>
Backward backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                  const std::optional<Tensor>& keep, int64_t heads, double scale, bool causal) {
    const auto like = [](const Tensor& t) {
        return empty({t.size(0), t.size(1), t.size(2), t.size(3)}, t.scalar_type());
    };
    const Tensor dq = like(q), dk = like(k), dv = like(v);
    const Input<T> in_q(q, heads), in_k(k, heads), in_v(v, heads), in_grad(grad, heads);
    const Output<T> out_q(dq, heads), out_k(dk, heads), out_v(dv, heads);
    const int64_t narrow = kMost * in_q.width, wide = kMost * in_v.width;
    each_position<T>(q, k, keep, causal, 2 * (q.size(3) + v.size(3)), 3 * narrow + 3 * wide + 2 * kMost * kMost,
                     [&](const Clip& clip, int64_t b, int64_t p, T* scratch) {
                         T *const at_q = scratch, *const at_k = at_q + narrow, *const made_narrow = at_k + narrow,
                                  *const at_v = made_narrow + narrow, *const at_grad = at_v + wide,
                                  *const made_wide = at_grad + wide, *const weights = made_wide + wide,
                                  *const slopes = weights + kMost * kMost;
                         const int64_t hidden = clip.frames - clip.keys;
                         for (int64_t h = 0; h < heads; ++h) {
                             in_q.rows(in_q.at(b, p, h), clip.query, clip.queries, at_q);
                             in_k.rows(in_k.at(b, p, h), clip.key, clip.keys, at_k);
                             in_v.rows(in_v.at(b, p, h), clip.key, clip.keys, at_v);
                             in_grad.rows(in_grad.at(b, p, h), clip.query, clip.queries, at_grad);
                             dots(at_q, clip.queries, at_k, clip.keys, in_q.width, weights);
                             softmax(weights, clip.queries, clip.seen, static_cast<T>(scale));
                             combine(weights, 1, kMost, clip.seeing, clip.keys, at_grad, in_v.width, made_wide);
                             out_v.rows(out_v.at(b, p, h), clip.key, clip.keys, made_wide);
                             dots(at_grad, clip.queries, at_v, clip.keys, in_v.width, slopes);
                             softmax_gradient(slopes, weights, clip.queries, clip.seen, static_cast<T>(scale));
                             combine(slopes, kMost, 1, clip.seen, clip.queries, at_k, in_q.width, made_narrow);
                             out_q.rows(out_q.at(b, p, h), clip.query, clip.queries, made_narrow);
                             combine(slopes, 1, kMost, clip.seeing, clip.keys, at_q, in_q.width, made_narrow);
                             out_k.rows(out_k.at(b, p, h), clip.key, clip.keys, made_narrow);
                             if (hidden > 0) {
                                 std::fill_n(made_narrow, hidden * in_q.width, T(0));
                                 std::fill_n(made_wide, hidden * in_v.width, T(0));
                                 out_k.rows(out_k.at(b, p, h), clip.hidden, hidden, made_narrow);
                                 out_v.rows(out_v.at(b, p, h), clip.hidden, hidden, made_wide);
                             }
                         }
                     });
    return {dq, dk, dv};
}

Tensor temporal_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& keep,
                              int64_t heads, double scale, bool causal) {
    const auto run = [&]<class T>(T) { return forward<T>(q, k, v, keep, heads, scale, causal); };
    return q.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

Backward temporal_attention_bwd(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                const std::optional<Tensor>& keep, int64_t heads, double scale, bool causal) {
    const auto run = [&]<class T>(T) { return backward<T>(grad, q, k, v, keep, heads, scale, causal); };
    return q.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

} // namespace
} // namespace vlpfast::temporal

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
    m.impl("temporal_attention_fwd", TORCH_BOX(&vlpfast::temporal::temporal_attention_fwd));
    m.impl("temporal_attention_bwd", TORCH_BOX(&vlpfast::temporal::temporal_attention_bwd));
}
