// SSE2, NEON or whatever the platform's baseline is: three rows of 16 codes are twelve vectors.

#include "target.h"

namespace vqops {
namespace {

#include "floats4.inl"
#include "kernels.inl"

struct Portable : FloatWords<Floats4> {
    static constexpr const char* kName = "portable";
    static constexpr int kTile = 3, kCodes = 16, kLayout = 16, kDirect = 1;
};

}  // namespace

void unprepared_portable(const float* x, int64_t rows, int64_t D, const float* code, int64_t code_stride, int64_t count,
                         bool cosine, float factor, const float* threshold, int64_t first, const Offer& offer) {
    Unprepared<Portable>::compare(x, rows, D, code, code_stride, count, cosine, factor, threshold, first, offer);
}

void turn_back_portable(const float* x, const float* q, const float* g, const float* error, int64_t D, float* sum,
                        float* left) {
    Rotating<Portable>::turn_back(x, q, g, error, D, sum, left);
}

constexpr Instructions portable = Kernels<Portable>::table(unprepared_portable, kGroupOfPortable, turn_back_portable);

}  // namespace vqops
