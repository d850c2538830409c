// temporal_attention on the CPU. See vlpfast/ops/temporal/attention.py for what it computes and vlpfast/ops/_schemas.py
// for the arguments.
//
// One position of one clip at a time: its few rows of queries, keys and values are copied together, and everything
// between them and the results stays in the cache. Frames that may not be seen are
// left out when rows are copied. The backward makes the weights again. A result has one owner and every sum one order.

#include "temporal/rows.h"

#include <limits>
#include <tuple>

namespace vlpfast::temporal {
namespace {

constexpr int64_t kMost = 32, kSquare = kMost * kMost; // frames
constexpr int64_t kGrain = 1 << 15;                    // elements that are worth a thread

// kLanes elements, and half as many; read and written by memcpy, which asks for no alignment.
template <class T> struct Vector {
    typedef T Whole __attribute__((vector_size(kLanes * sizeof(T))));
    typedef T Half __attribute__((vector_size(kLanes / 2 * sizeof(T))));
};

// out [m, kMost] = a [m, width] @ b [n, width].T; width a multiple of kLanes. Made in blocks of 2 x 4: a and b have
// rows up to even m and n a multiple of 4, whatever they hold, and what of `out` belongs to them is overwritten.
template <class T> VLPFAST_CLONES void dots(const T* a, int64_t m, const T* b, int64_t n, int64_t width, T* out) {
    using V = typename Vector<T>::Whole;
    using H = typename Vector<T>::Half;
    for (int64_t i = 0; i < m; i += 2) {
        for (int64_t j = 0; j < n; j += 4) {
            V sum[8] = {};
            for (int64_t d = 0; d < width; d += kLanes) {
                V left[2], right[4];
#pragma GCC unroll 2
                for (int r = 0; r < 2; ++r)
                    __builtin_memcpy(&left[r], a + (i + r) * width + d, sizeof(V));
#pragma GCC unroll 4
                for (int r = 0; r < 4; ++r)
                    __builtin_memcpy(&right[r], b + (j + r) * width + d, sizeof(V));
#pragma GCC unroll 8
                for (int r = 0; r < 8; ++r)
                    sum[r] += left[r / 4] * right[r % 4];
            }
            H t[8];
#pragma GCC unroll 8
            for (int r = 0; r < 8; ++r)
                t[r] = __builtin_shufflevector(sum[r], sum[r], 0, 1, 2, 3, 4, 5, 6, 7) +
                       __builtin_shufflevector(sum[r], sum[r], 8, 9, 10, 11, 12, 13, 14, 15);
            // the lanes of 8 vectors, added up side by side
#pragma GCC unroll 4
            for (int r = 0; r < 4; ++r)
                t[r] = __builtin_shufflevector(t[r], t[r + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
                       __builtin_shufflevector(t[r], t[r + 4], 4, 5, 6, 7, 12, 13, 14, 15);
#pragma GCC unroll 2
            for (int r = 0; r < 2; ++r)
                t[r] = __builtin_shufflevector(t[r], t[r + 2], 0, 1, 8, 9, 4, 5, 12, 13) +
                       __builtin_shufflevector(t[r], t[r + 2], 2, 3, 10, 11, 6, 7, 14, 15);
            t[0] = __builtin_shufflevector(t[0], t[1], 0, 8, 2, 10, 4, 12, 6, 14) +
                   __builtin_shufflevector(t[0], t[1], 1, 9, 3, 11, 5, 13, 7, 15);
            __builtin_memcpy(out + i * kMost + j, &t[0], sizeof(H) / 2);
            __builtin_memcpy(out + (i + 1) * kMost + j, reinterpret_cast<const T*>(&t[0]) + 4, sizeof(H) / 2);
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
    using V = typename Vector<T>::Whole;
    for (int64_t i = 0; i < m; ++i) {
        const T* const weight = weights + i * row;
        int64_t d = 0;
        for (; d + 4 * kLanes <= width; d += 4 * kLanes) {
            V sum[4] = {};
            for (int64_t j = spans.begin[i]; j < spans.end[i]; ++j) {
#pragma GCC unroll 4
                for (int r = 0; r < 4; ++r) {
                    V from;
                    __builtin_memcpy(&from, rows + j * width + d + r * kLanes, sizeof(V));
                    sum[r] += weight[j * column] * from;
                }
            }
            __builtin_memcpy(out + i * width + d, sum, sizeof(sum));
        }
        for (; d < width; d += kLanes) {
            V sum = {};
            for (int64_t j = spans.begin[i]; j < spans.end[i]; ++j) {
                V from;
                __builtin_memcpy(&from, rows + j * width + d, sizeof(V));
                sum += weight[j * column] * from;
            }
            __builtin_memcpy(out + i * width + d, &sum, sizeof(V));
        }
    }
}

// s [m, kMost] = softmax of scale * s over each row's span; what lies beyond it is not used.
template <class T> VLPFAST_CLONES void softmax(T* s, int64_t m, const Spans& spans, T scale) {
    for (int64_t i = 0; i < m; ++i) {
        T* const row = s + i * kMost;
        const int64_t n = spans.end[i];
        T largest = -std::numeric_limits<T>::infinity(), total = 0;
        for (int64_t j = 0; j < n; ++j) {
            row[j] *= scale;
            largest = row[j] <= largest ? largest : row[j]; // a NaN shows in the sum
        }
        for (int64_t j = 0; j < n; j += kLanes) {
            for (int l = 0; l < kLanes; ++l)
                row[j + l] = exponential(row[j + l] - largest);
        }
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

// [B, T, P, H * D], of which all that belongs to one position of one clip is read or written at once, frame by frame:
// each frame's heads lie in one piece. In the cache they are apart, [H][rows, width], rows of a head below each other.
struct Layout {
    int64_t heads, clip, frame, position, depth, width, head; // strides, and the length of a head's row

    Layout(const Tensor& t, int64_t n)
        : heads(n), clip(t.stride(0)), frame(t.stride(1)), position(t.stride(2)), depth(t.size(3) / heads),
          width((depth + kLanes - 1) / kLanes * kLanes), head((t.size(1) + 3) / 4 * 4 * width + kLanes) {}
    int64_t at(int64_t b, int64_t p) const { return b * clip + p * position; }
    int64_t size() const { return heads * head; }
};

template <class T> struct Input : Layout {
    Reader<T> data;

    Input(const Tensor& t, int64_t heads) : Layout(t, heads), data(t) {}
    // Rows of the frames in `frames`, with zeros behind `depth`.
    void rows(int64_t at, const int64_t* frames, int64_t count, T* out) const {
        for (int64_t i = 0; i < count; ++i) {
            data.copy(at + frames[i] * frame, heads, depth, out + i * width, head);
            for (int64_t h = 0; depth < width && h < heads; ++h)
                std::fill_n(out + h * head + i * width + depth, width - depth, T(0));
        }
    }
};

template <class T> struct Output : Layout {
    Writer<T> data;

    Output(const Tensor& t, int64_t heads) : Layout(t, heads), data(t) {}
    void rows(int64_t at, const int64_t* frames, int64_t count, const T* in) const {
        for (int64_t i = 0; i < count; ++i)
            data.write(at + frames[i] * frame, heads, depth, in + i * width, head);
    }
    void zeros(int64_t at, const int64_t* frames, int64_t count, T* scratch) const {
        std::fill_n(scratch, depth, T(0));
        for (int64_t i = 0; i < count; ++i)
            data.write(at + frames[i] * frame, heads, depth, scratch, 0);
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
    const int64_t count = in_q.size() + in_k.size() + in_v.size() + result.size() + kSquare;
    each_position<T>(
        q, k, keep, causal, q.size(3) + v.size(3), count, [&](const Clip& clip, int64_t b, int64_t p, T* scratch) {
            T *const weights = scratch, *const all_q = weights + kSquare, *const all_k = all_q + in_q.size(),
                     *const all_v = all_k + in_k.size(), *const all_out = all_v + in_v.size();
            in_q.rows(in_q.at(b, p), clip.query, clip.queries, all_q);
            in_k.rows(in_k.at(b, p), clip.key, clip.keys, all_k);
            in_v.rows(in_v.at(b, p), clip.key, clip.keys, all_v);
            for (int64_t h = 0; h < heads; ++h) {
                dots(all_q + h * in_q.head, clip.queries, all_k + h * in_k.head, clip.keys, in_q.width, weights);
                softmax(weights, clip.queries, clip.seen, static_cast<T>(scale));
                combine(weights, kMost, 1, clip.seen, clip.queries, all_v + h * in_v.head, in_v.width,
                        all_out + h * result.head);
            }
            result.rows(result.at(b, p), clip.query, clip.queries, all_out);
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
    const int64_t count = 2 * (in_q.size() + in_k.size() + in_v.size()) + in_grad.size() + 2 * kSquare;
    each_position<T>(q, k, keep, causal, 2 * (q.size(3) + v.size(3)), count,
                     [&](const Clip& clip, int64_t b, int64_t p, T* scratch) {
                         T *const weights = scratch, *const slopes = weights + kSquare, *const all_q = slopes + kSquare,
                                  *const all_dq = all_q + in_q.size(), *const all_k = all_dq + in_q.size(),
                                  *const all_dk = all_k + in_k.size(), *const all_v = all_dk + in_k.size(),
                                  *const all_dv = all_v + in_v.size(), *const all_grad = all_dv + in_v.size();
                         in_q.rows(in_q.at(b, p), clip.query, clip.queries, all_q);
                         in_k.rows(in_k.at(b, p), clip.key, clip.keys, all_k);
                         in_v.rows(in_v.at(b, p), clip.key, clip.keys, all_v);
                         in_grad.rows(in_grad.at(b, p), clip.query, clip.queries, all_grad);
                         for (int64_t h = 0; h < heads; ++h) {
                             const int64_t of_q = h * in_q.head, of_k = h * in_k.head, of_v = h * in_v.head;
                             const T* const rows = all_grad + h * in_grad.head;
                             dots(all_q + of_q, clip.queries, all_k + of_k, clip.keys, in_q.width, weights);
                             softmax(weights, clip.queries, clip.seen, static_cast<T>(scale));
                             combine(weights, 1, kMost, clip.seeing, clip.keys, rows, in_v.width, all_dv + of_v);
                             dots(rows, clip.queries, all_v + of_v, clip.keys, in_v.width, slopes);
                             softmax_gradient(slopes, weights, clip.queries, clip.seen, static_cast<T>(scale));
                             combine(slopes, kMost, 1, clip.seen, clip.queries, all_k + of_k, in_q.width,
                                     all_dq + of_q);
                             combine(slopes, 1, kMost, clip.seeing, clip.keys, all_q + of_q, in_q.width, all_dk + of_k);
                         }
                         out_q.rows(out_q.at(b, p), clip.query, clip.queries, all_dq);
                         out_k.rows(out_k.at(b, p), clip.key, clip.keys, all_dk);
                         out_v.rows(out_v.at(b, p), clip.key, clip.keys, all_dv);
                         if (clip.keys < clip.frames) {
                             out_k.zeros(out_k.at(b, p), clip.hidden, clip.frames - clip.keys, all_dk);
                             out_v.zeros(out_v.at(b, p), clip.hidden, clip.frames - clip.keys, all_dv);
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
