// Residual quantization: levels one by one, sums, gradients.

#include <algorithm>
#include <vector>

#include "../../../csrc/cpu/codebook.h"
#include "../../../csrc/cpu/residual.h"
#include "../../../csrc/cpu/residual_backward.h"
#include "../../../csrc/cpu/unprepared.h"
#include "checks.h"

namespace vqops {

// Three levels, of which the second has the codes of the first in the other order, and half of them: prepared or not,
// against the arithmetic one by one; then sums and gradients.
void levels(const Case& test, const SearchShape& shape, const Rows& x, const Rows& codebook, const RowMask& mask,
            const void* memory, const Parallel& parallel) {
    const int64_t H = shape.H, N = shape.N, K = shape.K, D = shape.D, half = (K + 1) / 2, Q = 3;
    Rows reversed = codebook;
    reversed.data = codebook.floats(0, K - 1);
    reversed.row_stride = -D;
    std::vector<char> packed(H * Packed::bytes(half, D) + 64);
    char* other = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(packed.data()) + 63) / 64 * 64);
    for (int64_t h = 0; h < H; h++)
        pack_codebook(reversed, h, half, D, shape.cosine, other + h * Packed::bytes(half, D), parallel);
    const std::vector<Level> all = {{codebook, K, memory}, {reversed, half, other}, {codebook, K, memory}};
    std::vector<int64_t> indices(H * N * Q), before, counts(H * (2 * K + half));
    std::vector<float> quantized(H * N * D), error(H * Q), sums(counts.size() * D), grad_x(H * N * D);
    const ResidualResult result = {quantized.data(), indices.data(), error.data()};
    for (const bool prepared : {true, false}) {
        if (!prepared && N > kUnpreparedRows) continue;
        ResidualInputs in = {H, N, D, x, mask, all, Q, shape.cosine, shape.cosine};
        for (Level& level : in.levels)
            if (!prepared) level.packed = nullptr;
        quantize_levels(in, result, parallel);
        expect(prepared || indices == before, "levels without preparation", test.name, 0);
        before = indices;
        sum_levels(in, indices.data(), counts.data(), sums.data(), parallel);
    }
    for (int64_t h = 0; h < H; h++) {
        for (int64_t n = 0; n < N; n++) {
            std::vector<float> rest(x.floats(h, n), x.floats(h, n) + D);
            for (int64_t l = 0; l < Q; l++) {
                int64_t best = -1;
                double least = INFINITY;
                for (int64_t k = 0; mask.keeps(h, n) && finite(rest.data(), D) && k < all[l].K; k++) {
                    const float* code = all[l].codebook.floats(h, k);
                    if (!finite(code, D)) continue;
                    const double value = cost(rest.data(), code, D, shape.cosine);
                    if (best < 0 || value < least) best = k, least = value;
                }
                expect(indices[(h * N + n) * Q + l] == best, "wrong index of a level", test.name, n);
                for (int64_t i = 0; i < D; i++) rest[i] = best < 0 ? NAN : rest[i] - all[l].codebook.floats(h, best)[i];
            }
        }
    }
    std::vector<float> codes(H * (2 * K + half) * D), grad_codes(codes.size());
    for (int64_t h = 0; h < H; h++) {
        float* to = &codes[h * (2 * K + half) * D];
        for (const Level& level : all)
            for (int64_t k = 0; k < level.K; k++, to += D) std::copy_n(level.codebook.floats(h, k), D, to);
    }
    const Rows g = {quantized.data(), DType::float32, N * D, D, 1}, e = {error.data(), DType::float32, Q, 1, 1};
    const Rows joined = {codes.data(), DType::float32, (2 * K + half) * D, D, 1};
    for (const Passing passing : {Passing::straight_through, Passing::rotation})
        for (const bool per_level : {true, false})
            levels_backward({H, N, D, &g, &e, x, joined, {K, half, K}, indices.data(), mask, 2, passing, per_level, 1.0,
                             shape.cosine}, grad_x.data(), grad_codes.data(), parallel);
}

}  // namespace vqops
