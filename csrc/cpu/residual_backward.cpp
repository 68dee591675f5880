// Gradient: one pass over the rows, each of which walks through the levels by itself: what is left of it and the sum of
// its gradients stay in the first cache. Read: the gradient and x once, codes from cache. Written: grad_x once.
// The codebooks' gradients take a copy of the rows from level to level.

#include "residual_backward.h"

#include "residual_rows.h"
#include "row_gradient.h"

namespace vqops {
namespace {

// A row with its codes, level after level. T is the type that everything is computed in, R that of what is left.
template <class T, class R>
class LevelsGradient {
public:
    LevelsGradient(const LevelGradients& in, int64_t h)
        : in_(in), h_(h), D(in.D), rest_(D), total_(D), sum_(D), shape_{1, 1, 0, D, false},
          step_(first_step()), row_(shape_, step_, 0) {}

    // The gradient of row n.
    const T* operator()(int64_t n) {
        std::fill(sum_.begin(), sum_.end(), T(0));
        if (!in_.mask.keeps(h_, n)) return sum_.data();
        read_row(in_.x, h_, n, D, rest_.data());
        std::fill(total_.begin(), total_.end(), R(0));
        if (in_.quantized) quantized_ = in_.quantized->from(h_, n);
        step_.passing = in_.per_level ? in_.passing : Passing::none;
        int64_t first = 0;
        for (int64_t l = 0; l < in_.running; first += in_.sizes[l++]) {
            step_.codebook = in_.codebooks.from(h_, first);
            step_.indices = {in_.indices + (h_ * in_.N + n) * in_.Q() + l, 0, 0, in_.sizes[l]};
            if (in_.error) error_ = in_.error->from(h_, l);
            row_.read(0);
            row_.to_x(0);
            for (int64_t i = 0; i < D; i++) sum_[i] += row_.g[i];
            for (int64_t i = 0; i < D; i++) total_[i] += R(row_.q[i]);
            subtract(rest_.data(), row_.q.data(), D);
        }
        if (!in_.per_level) pass_once(n);
        return sum_.data();
    }

private:
    BackwardInputs first_step() const {
        const DType real = std::is_same_v<R, double> ? DType::float64 : DType::float32;
        return {in_.quantized ? &quantized_ : nullptr,
                in_.error ? &error_ : nullptr,
                {rest_.data(), real, 0, D, 1},
                in_.codebooks,
                {},
                {},
                in_.passing,
                in_.codebook_error_scale,
                in_.units};
    }

    // Turned as x onto the sum of its codes.
    void pass_once(int64_t n) {
        step_.passing = in_.passing;
        read_row(in_.x, h_, n, D, row_.x.data());
        row_.length = INFINITY;
        std::copy(total_.begin(), total_.end(), row_.q.begin());
        row_.pass_back(0);
        for (int64_t i = 0; i < D; i++) sum_[i] += row_.g[i];
    }

    const LevelGradients& in_;
    const int64_t h_, D;
    std::vector<R> rest_, total_;
    std::vector<T> sum_;
    SearchShape shape_;
    Rows quantized_ = {}, error_ = {};
    BackwardInputs step_;  // as RowGradient sees a level
    RowGradient<T> row_;
};

// The same of float rows and codes: with nothing copied but the row.
class FloatGradient {
public:
    FloatGradient(const LevelGradients& in, int64_t h)
        : in_(in), h_(h), D(in.D), rotates_(in.passing == Passing::rotation && in.quantized), g_(D), rest_(D), sum_(D),
          none_(D, NAN),
          times_(!in.quantized || in.passing != Passing::straight_through ? 0 : in.per_level ? in.running : 1) {}

    static bool takes(const LevelGradients& in) {
        const bool once = in.passing == Passing::rotation && !in.per_level;
        return !once && !in.units && in.codebooks.has_float_rows() && in.x.dtype != DType::float64;
    }

    const float* operator()(int64_t n) {
        std::fill(sum_.begin(), sum_.end(), 0.0f);
        if (!in_.mask.keeps(h_, n)) return sum_.data();
        const float* g = in_.quantized ? float_row(*in_.quantized, h_, n, D, g_.data()) : nullptr;
        for (int64_t time = 0; time < times_; time++)
            for (int64_t i = 0; i < D; i++) sum_[i] += g[i];
        if (!in_.error && !rotates_) return sum_.data();
        read_row(in_.x, h_, n, D, rest_.data());
        const int64_t* chosen = in_.indices + (h_ * in_.N + n) * in_.Q();
        int64_t first = 0;
        for (int64_t l = 0; l < in_.running; first += in_.sizes[l++]) {
            const float* code = chosen[l] < 0 ? none_.data() : in_.codebooks.floats(h_, first + chosen[l]);
            const float factor = in_.error ? read_value<float>(*in_.error, h_, l) : 0;
            const float* error = in_.error ? &factor : nullptr;
            if (rotates_) set_.turn_back(rest_.data(), code, g, error, D, sum_.data(), rest_.data());
            else add_error(rest_.data(), code, factor, sum_.data());
        }
        return sum_.data();
    }

private:
    void add_error(float* __restrict rest, const float* __restrict code, float factor, float* __restrict sum) const {
        for (int64_t i = 0; i < D; i++) {
            rest[i] -= code[i];
            sum[i] += 2 * rest[i] * factor;
        }
    }

    const LevelGradients& in_;
    const Instructions& set_ = instructions();
    const int64_t h_, D;
    const bool rotates_;
    std::vector<float> g_, rest_, sum_;
    const std::vector<float> none_;  // in the place of a code
    const int64_t times_;
};

template <class Gradient>
void to_x(const LevelGradients& in, void* grad_x, const Parallel& parallel) {
    for (int64_t h = 0; h < in.H; h++)
        parallel.over(in.N, [&](int64_t begin, int64_t end) {
            const DefaultFloatMode mode;
            Gradient gradient(in, h);
            for (int64_t n = begin; n < end; n++)
                write_row(grad_x, in.x.dtype, h * in.N + n, in.D, gradient(n));
        });
}

template <class T, class R>
void to_codebooks(const LevelGradients& in, void* grad, const Parallel& parallel) {
    const DType real = std::is_same_v<R, double> ? DType::float64 : DType::float32;
    int64_t written = 0;
    std::vector<T> sums;
    std::vector<int64_t> counts;
    for (int64_t h = 0; h < in.H; h++) {
        Rest<R> rest(in.x.from(h, 0), real, in.N, in.D);
        for (int64_t l = 0, first = 0; l < in.Q(); first += in.sizes[l++]) {
            const int64_t K = in.sizes[l];
            const Indices chosen = {in.indices + h * in.N * in.Q() + l, 0, in.Q(), K};
            sums.assign(K * in.D, T(0));
            if (in.error && l < in.running) {
                Rows error = in.error->from(h, l);
                error.row_stride = 0;
                const SearchShape shape = {1, in.N, K, in.D, false};
                const BackwardInputs step = {nullptr, &error, rest.rows(), in.codebooks.from(h, first), chosen, {},
                                             Passing::none, in.codebook_error_scale, in.units};
                CodeCounts codes;
                counts.resize(K);
                codes.count(chosen, 0, in.N, counts.data());
                codes.sum(in.D, sums.data(), [&] { return RowGradient<T>(shape, step, 0); }, parallel);
                if (l + 1 < in.running) rest.take_off(step.codebook, chosen, parallel);
            }
            for (int64_t k = 0; k < K; k++) write_row(grad, in.codebooks.dtype, written++, in.D, &sums[k * in.D]);
        }
    }
}

template <class T, class R>
void run(const LevelGradients& in, void* grad_x, void* grad_codebooks, const Parallel& parallel) {
    if (grad_x && FloatGradient::takes(in)) to_x<FloatGradient>(in, grad_x, parallel);
    else if (grad_x) to_x<LevelsGradient<T, R>>(in, grad_x, parallel);
    if (grad_codebooks) to_codebooks<T, R>(in, grad_codebooks, parallel);
}

}  // namespace

void levels_backward(const LevelGradients& in, void* grad_x, void* grad_codebooks, const Parallel& parallel) {
    if (in.x.dtype == DType::float64) run<double, double>(in, grad_x, grad_codebooks, parallel);
    else if (in.codebooks.dtype == DType::float64) run<double, float>(in, grad_x, grad_codebooks, parallel);
    else run<float, float>(in, grad_x, grad_codebooks, parallel);
}

}  // namespace vqops
