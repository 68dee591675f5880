// The gradients that meet at a row and its code.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "../distance.h"
#include "instructions.h"
#include "quantize_backward.h"

namespace vqops {

template <class T>
static inline T dot(const T* a, const T* b, int64_t D) {
    T sum[8] = {};
    int64_t i = 0;
    for (; i + 8 <= D; i += 8)
        for (int j = 0; j < 8; j++) sum[j] += a[i + j] * b[i + j];
    for (; i < D; i++) sum[i % 8] += a[i] * b[i];
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
}

// One row with its code, and the gradients that meet there. T is the type that everything is computed in.
template <class T>
class RowGradient {
public:
    RowGradient(const SearchShape& shape, const BackwardInputs& in, int64_t h)
        : in_(in), shape_(shape), D(shape.D), h(h), x(D), q(D), g(D), from_error(D), u(D), v(D), w(D) {}

    // Reads row n. x becomes what the quantizer worked on: x itself or its unit.
    void read(int64_t n) {
        const int64_t k = in_.indices.given(h, n);
        read_row(in_.x, h, n, D, x.data());
        if (in_.units) {
            length = std::sqrt(dot(x.data(), x.data(), D));
            norm = std::max(length, T(kSmallestNorm));
            for (int64_t i = 0; i < D; i++) x[i] /= norm;
        }
        if (k >= 0) read_row(in_.codebook, h, k, D, q.data());
        else std::fill(q.begin(), q.end(), T(NAN));
        if (in_.error) {
            const T factor = read_value<T>(*in_.error, h, n);
            for (int64_t i = 0; i < D; i++) from_error[i] = 2 * (x[i] - q[i]) * factor;
        }
    }

    // The gradient of the input, in g.
    void to_x(int64_t n) {
        pass_back(n);
        if (in_.error)
            for (int64_t i = 0; i < D; i++) g[i] += from_error[i];
        if (!in_.units) return;
        const T along = length > T(kSmallestNorm) ? dot(x.data(), g.data(), D) : T(0);
        for (int64_t i = 0; i < D; i++) g[i] = (g[i] - along * x[i]) / norm;
    }

    // The gradient of quantized as it passes from q to x, in g.
    void pass_back(int64_t n) {
        if (!in_.quantized || in_.passing == Passing::none) return std::fill(g.begin(), g.end(), T(0));
        read_row(*in_.quantized, h, n, D, g.data());
        if (in_.passing == Passing::rotation) rotate_back();
    }

    // The row's share of the gradient of its code.
    const T* operator()(int64_t n) {
        read(n);
        for (int64_t i = 0; i < D; i++) from_error[i] *= T(-in_.codebook_error_scale);
        return from_error.data();
    }

    const BackwardInputs& in_;
    const SearchShape& shape_;
    const int64_t D, h;
    T length = INFINITY, norm = 1;  // |x| as given where x is a unit of it, and what that was divided by
    std::vector<T> x, q, g, from_error, u, v, w;

private:
    // g = (|q| / |x|) (g - 2 w (w.g) + 2 u (v.g)), u = x / |x|, v = q / |q|, w = (u + v) / |u + v|: the transpose of
    // the rotation and scaling that takes x to q (arXiv 2410.06424, section 4.2). Without a direction, g itself.
    void rotate_back() {
        const T smallest = T(kSmallestNorm);
        if (length <= smallest) return;
        if constexpr (std::is_same_v<T, float>) {
            std::fill(u.begin(), u.end(), 0.0f);
            instructions().turn_back(x.data(), q.data(), g.data(), nullptr, D, u.data(), nullptr);
            return g.swap(u);
        }
        const T x_norm = std::sqrt(dot(x.data(), x.data(), D)), q_norm = std::sqrt(dot(q.data(), q.data(), D));
        if (x_norm <= smallest || q_norm <= smallest) return;
        for (int64_t i = 0; i < D; i++) {
            u[i] = x[i] / x_norm;
            v[i] = q[i] / q_norm;
            w[i] = u[i] + v[i];
        }
        const T w_norm = std::max(std::sqrt(dot(w.data(), w.data(), D)), smallest);
        const T along_w = 2 * dot(w.data(), g.data(), D) / (w_norm * w_norm), along_v = 2 * dot(v.data(), g.data(), D);
        const T factor = std::min(q_norm / x_norm, T(kLargestScale));
        for (int64_t i = 0; i < D; i++) g[i] = (g[i] - along_w * w[i] + along_v * u[i]) * factor;
    }
};

}  // namespace vqops
