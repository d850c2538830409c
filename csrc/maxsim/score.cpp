// score_ce_fwd on the CPU. See vlpfast/ops/maxsim/losses.py (score_contrastive_loss) for what it computes and
// vlpfast/ops/_schemas.py for the arguments.
//
// A line is a row of x_to_y or a column of y_to_x. Its scores are taken relative to the own one, which stays out of the
// sum of exponentials: with d = s - s_own the loss is softplus(log sum exp(scale d)), exact however near zero it is.
// Lines are independent and their losses are added in order: the number of threads changes no bit of any result.

#include "common/tensors.h"
#include "maxsim/score_lines.h"

#include <cmath>
#include <optional>
#include <tuple>

namespace vlpfast::maxsim {
namespace {

constexpr int64_t kBlock = 16; // lines to a part: of columns, a whole cache line of floats

// What each line's loss counts in the whole: its weight's part of a direction's weight.
std::vector<double> shares(const std::optional<Tensor>& weights, const char* name, int64_t lines, double direction) {
    std::vector<double> out(lines, 1.0);
    if (weights) {
        STD_TORCH_CHECK(weights->numel() == lines, name, ": expected ", lines, " numbers, got ", weights->numel());
        out = read_vector<double>(*weights, lines);
    }
    double total = 0;
    for (const double w : out)
        total += w;
    for (double& w : out)
        w *= direction / (total == 0 ? 1.0 : total);
    return out;
}

// One direction: the sums of its lines' losses and of their derivatives by the scale; the gradients [M, N] if asked
// for.
template <class T> class Side {
  public:
    Side(const Tensor& scores, bool columns, int64_t own, double scale, std::vector<double> share,
         const std::optional<Tensor>& smoothing, double label_smoothing, T* gradient)
        : dtype_(scores.scalar_type()), data_(static_cast<const T*>(scores.const_data_ptr())),
          lines_(scores.size(columns ? 1 : 0)), length_(scores.size(columns ? 0 : 1)),
          line_(scores.stride(columns ? 1 : 0)), other_(scores.stride(columns ? 0 : 1)), columns_(columns), own_(own),
          scale_(scale), share_(std::move(share)), smooth_(lines_, label_smoothing), gradient_(gradient),
          loss_(lines_, 0.0), dscale_(lines_, 0.0) {
        STD_TORCH_CHECK(dtype_ == kScalarType<T>, "expected scores of dtype ",
                        torch::headeronly::toString(kScalarType<T>), ", got ", torch::headeronly::toString(dtype_));
        STD_TORCH_CHECK(own >= 0 && own <= length_ - lines_, "own: expected an offset in [0, ", length_ - lines_,
                        "], got ", own);
        if (smoothing) {
            STD_TORCH_CHECK(smoothing->dim() == 0 || smoothing->size(0) == lines_, "smoothing: expected ", lines_,
                            " numbers, got ", smoothing->numel());
            smooth_ = read_vector<double>(*smoothing, lines_);
        }
        smoothed_ = smoothing || label_smoothing != 0;
    }

    void run() {
        parallel_for(0, (lines_ + kBlock - 1) / kBlock, 1, [&](int64_t from, int64_t to) {
            std::vector<T> block(kBlock * length_);
            for (int64_t b = from; b < to; ++b)
                run(b * kBlock, std::min(lines_, (b + 1) * kBlock), block.data());
        });
    }
    double loss() const { return sum(loss_); }
    double dscale() const { return sum(dscale_); }

  private:
    void run(int64_t begin, int64_t end, T* block) {
        const auto each = [&](const auto& f) { // in the order of a row-major matrix
            if (columns_) {
                for (int64_t j = 0; j < length_; ++j)
                    for (int64_t i = begin; i < end; ++i)
                        f(i, j);
            } else {
                for (int64_t i = begin; i < end; ++i)
                    for (int64_t j = 0; j < length_; ++j)
                        f(i, j);
            }
        };
        each([&](int64_t i, int64_t j) { block[(i - begin) * length_ + j] = data_[i * line_ + j * other_]; });
        for (int64_t i = begin; i < end; ++i)
            line(i, block + (i - begin) * length_);
        if (gradient_)
            each([&](int64_t i, int64_t j) {
                gradient_[columns_ ? j * lines_ + i : i * length_ + j] = block[(i - begin) * length_ + j];
            });
    }

    // The scores s [length] of line i become their gradient.
    void line(int64_t i, T* s) {
        const int64_t own = i + own_, after = length_ - own - 1;
        T* const rest = s + own + 1;
        const T origin = s[own], scale = static_cast<T>(scale_);
        subtract(s, own, origin);
        subtract(rest, after, origin);
        double shift = std::max(largest(s, own, scale), largest(rest, after, scale));
        const bool infinite = shift == std::numeric_limits<double>::infinity();
        if (std::isinf(shift))
            shift = 0;
        Sums sums = exponentials(s, own, scale, static_cast<T>(shift));
        sums += exponentials(rest, after, scale, static_cast<T>(shift));
        if (infinite)
            sums.total = std::numeric_limits<double>::infinity();
        const double negatives = shift + std::log(sums.total);
        const double loss = std::max(negatives, 0.0) + std::log1p(std::exp(-std::abs(negatives)));
        const double weight = 1 / (sums.total + std::exp(-shift)); // softmax's, whose denominator has the own pair's 1
        const double smooth = smooth_[i] / length_;
        loss_[i] = share_[i] * loss;
        dscale_[i] = share_[i] * weight * sums.weighted;
        if (smoothed_) {
            loss_[i] -= share_[i] * scale_ * smooth * sums.plain;
            dscale_[i] -= share_[i] * smooth * sums.plain;
        }
        if (!gradient_)
            return;
        const double slope = share_[i] * scale_, a = slope * weight, b = slope * smooth;
        affine(s, own, static_cast<T>(a), static_cast<T>(-b));
        affine(rest, after, static_cast<T>(a), static_cast<T>(-b));
        s[own] = static_cast<T>(b * (length_ - 1) - a * sums.total);
    }

    static double sum(const std::vector<double>& v) {
        double total = 0;
        for (const double value : v)
            total += value;
        return total;
    }

    const ScalarType dtype_;
    const T* const data_;
    const int64_t lines_, length_, line_, other_;
    const bool columns_;
    const int64_t own_;
    const double scale_;
    const std::vector<double> share_;
    std::vector<double> smooth_;
    bool smoothed_ = false;
    T* const gradient_;
    std::vector<double> loss_, dscale_;
};

template <class T>
std::tuple<Tensor, Tensor> forward(const std::optional<Tensor>& x_to_y, const std::optional<Tensor>& y_to_x,
                                   const Tensor& scale, const std::optional<Tensor>& smoothing,
                                   const std::optional<Tensor>& row_weights, const std::optional<Tensor>& col_weights,
                                   int64_t own, double label_smoothing, double row_weight, double col_weight,
                                   bool need_x_to_y, bool need_y_to_x, bool need_scale) {
    STD_TORCH_CHECK(x_to_y || y_to_x, "expected x_to_y or y_to_x, got neither");
    const Tensor& some = x_to_y ? *x_to_y : *y_to_x;
    const int64_t size = some.size(0) * some.size(1);
    const Tensor loss = empty({}, kScalarType<T>),
                 gradients = empty({(need_x_to_y + need_y_to_x) * size + need_scale}, kScalarType<T>);
    T* at = gradients.mutable_data_ptr<T>();
    double total = 0, dscale = 0;
    const double factor = read_vector<double>(scale, 1)[0];
    for (const bool columns : {false, true}) {
        const std::optional<Tensor>& scores = columns ? y_to_x : x_to_y;
        if (!scores)
            continue;
        const bool need = columns ? need_y_to_x : need_x_to_y;
        auto share = columns ? shares(col_weights, "col_weights", scores->size(1), col_weight)
                             : shares(row_weights, "row_weights", scores->size(0), row_weight);
        Side<T> side(*scores, columns, own, factor, std::move(share), smoothing, label_smoothing, need ? at : nullptr);
        side.run();
        total += side.loss();
        dscale += side.dscale();
        at += need ? size : 0;
    }
    *loss.mutable_data_ptr<T>() = static_cast<T>(total);
    if (need_scale)
        *at = static_cast<T>(dscale);
    return {loss, gradients};
}

std::tuple<Tensor, Tensor> score_ce_fwd(const std::optional<Tensor>& x_to_y, const std::optional<Tensor>& y_to_x,
                                        const Tensor& scale, const std::optional<Tensor>& smoothing,
                                        const std::optional<Tensor>& row_weights,
                                        const std::optional<Tensor>& col_weights, int64_t own, double label_smoothing,
                                        double row_weight, double col_weight, bool need_x_to_y, bool need_y_to_x,
                                        bool need_scale) {
    const auto run = [&]<class T>(T) {
        return forward<T>(x_to_y, y_to_x, scale, smoothing, row_weights, col_weights, own, label_smoothing, row_weight,
                          col_weight, need_x_to_y, need_y_to_x, need_scale);
    };
    return scale.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

} // namespace
} // namespace vlpfast::maxsim

STABLE_TORCH_LIBRARY_IMPL(vlpfast, CPU, m) {
    m.impl("score_ce_fwd", TORCH_BOX(&vlpfast::maxsim::score_ce_fwd));
}
