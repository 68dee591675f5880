// For tests on any processor: the screening pass of avx512_bf16 with a scalar model of its instruction.

#if defined(VQOPS_BF16_MODEL)
#include "bf16_model.h"

#include "target.h"

namespace vqops {
namespace {

#include "floats4.inl"
#include "kernels.inl"

struct Bf16Model : PairWords<Floats4> {
    static constexpr const char* kName = "bf16_model";
    static constexpr int kTile = 3, kCodes = 16, kLayout = 17, kDirect = 1;

    VQOPS_INLINE Vector step(Vector sum, Words x, Words c) {
        for (int i = 0; i < kWidth; i++) sum[i] = add_pair(sum[i], x[i], c[i]);
        return sum;
    }

    static Squares place(const float* x, const float* centre, float scale, int64_t D, Word* out) {
        HalfWord* to = reinterpret_cast<HalfWord*>(out);
        float sum = 0, lost = 0;
        for (int64_t i = 0; i < D; i++) {
            const float value = (centre[i] - x[i]) * scale;
            to[i] = to_pair(value);
            const float rest = value - __builtin_bit_cast(float, uint32_t(to[i]) << 16);
            sum += value * value;
            lost += rest * rest;
        }
        return {sum, lost};
    }
};

}  // namespace

constexpr Instructions bf16_model =
    Kernels<Bf16Model>::table(unprepared_portable, kGroupOfPortable, turn_back_portable, &portable);

}  // namespace vqops
#endif
