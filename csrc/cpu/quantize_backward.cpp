// Gradient: one pass over the rows, each of which needs only itself and its code. Read: the gradient and x once, codes
// from cache. Written: grad_x once. Nothing of size N x K, and no rotation matrix is built.

#include "quantize_backward.h"

#include <cmath>

#include "row_gradient.h"

namespace vqops {
namespace {

// grad_x of rows [begin, end) that need no copy: all of them float rows side by side.
void run_in_place(const SearchShape& shape, const BackwardInputs& in, float* grad_x, int64_t h, int64_t begin,
                  int64_t end) {
    const int64_t D = shape.D;
    const bool rotates = in.passing == Passing::rotation;
    float* const first = grad_x + (h * shape.N + begin) * D;
    if (!in.error && !rotates && !in.mask.data && in.quantized->row_stride == D) {
        const float* g = in.quantized->floats(h, begin);
        std::copy(g, g + (end - begin) * D, first);
        return;
    }
    const Instructions& set = instructions();
    const std::vector<float> none(D, NAN);  // in the place of a code
    for (int64_t n = begin; n < end; n++) {
        float* out = first + (n - begin) * D;
        if (!in.mask.keeps(h, n)) {
            std::fill(out, out + D, 0.0f);
            continue;
        }
        const int64_t k = in.indices.given(h, n);
        const float *x = in.x.floats(h, n), *g = in.quantized->floats(h, n);
        if (!in.error && !rotates) {
            std::copy(g, g + D, out);
            continue;
        }
        const float factor = in.error ? read_value<float>(*in.error, h, n) : 0;
        const float* q = k < 0 ? none.data() : in.codebook.floats(h, k);
        if (rotates) {
            std::fill(out, out + D, 0.0f);
            set.turn_back(x, q, g, in.error ? &factor : nullptr, D, out, nullptr);
        } else {
            set.add_error(x, q, g, factor, D, out);
        }
    }
}

template <class T>
int64_t run(const SearchShape& shape, const BackwardInputs& in, void* grad_x, void* grad_codebook,
            const Parallel& parallel) {
    const int64_t H = shape.H, N = shape.N, K = shape.K, D = shape.D;
    for (int64_t h = 0; h < H; h++)
        for (int64_t n = 0; n < N; n++) {
            const int64_t k = in.indices.given(h, n);
            if (k < -1 || k >= K) return h * N + n;
        }
    const bool in_place = in.passing != Passing::none && in.quantized && in.quantized->has_float_rows() &&
                          in.x.has_float_rows() && in.codebook.has_float_rows() && !in.units;
    for (int64_t h = 0; h < H && grad_x; h++) {
        parallel.over(N, [&](int64_t begin, int64_t end) {
            if (in_place) return run_in_place(shape, in, static_cast<float*>(grad_x), h, begin, end);
            RowGradient<T> row(shape, in, h);
            for (int64_t n = begin; n < end; n++) {
                if (in.mask.keeps(h, n)) {
                    row.read(n);
                    row.to_x(n);
                } else {
                    std::fill(row.g.begin(), row.g.end(), T(0));
                }
                write_row(grad_x, in.x.dtype, h * N + n, D, row.g.data());
            }
        });
    }
    if (!grad_codebook) return -1;
    // The sums are the gradient where they have its type.
    const bool same = in.codebook.dtype == (std::is_same_v<T, double> ? DType::float64 : DType::float32);
    std::vector<T> own(same ? 0 : K * D);
    std::vector<int64_t> counts(K);
    for (int64_t h = 0; h < H; h++) {
        T* sums = same ? static_cast<T*>(grad_codebook) + h * K * D : own.data();
        if (in.error) {
            CodeCounts codes;
            codes.count(in.indices, h, N, counts.data());
            codes.sum(D, sums, [&] { return RowGradient<T>(shape, in, h); }, parallel);
        } else {
            std::fill(sums, sums + K * D, T(0));
        }
        for (int64_t k = 0; k < K && !same; k++)
            write_row(grad_codebook, in.codebook.dtype, h * K + k, D, sums + k * D);
    }
    return -1;
}

}  // namespace

int64_t backward(const SearchShape& shape, const BackwardInputs& in, void* grad_x, void* grad_codebook,
                 const Parallel& parallel) {
    const bool wide = in.x.dtype == DType::float64 || in.codebook.dtype == DType::float64;
    return wide ? run<double>(shape, in, grad_x, grad_codebook, parallel)
                : run<float>(shape, in, grad_x, grad_codebook, parallel);
}

}  // namespace vqops
