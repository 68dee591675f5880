// AVX-512 with vdpbf16ps, which multiplies and adds two dimensions at once; registers as in avx512.cpp.

#include "target.h"

#if defined(__x86_64__)
VQOPS_TARGET("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

namespace vqops {
namespace {

#include "floats16.inl"
#include "kernels.inl"

struct Avx512Bf16 : PairWords<Floats16> {
    static constexpr const char* kName = "avx512_bf16";
    static constexpr int kTile = 14, kCodes = 32, kLayout = 33, kDirect = 2;

    VQOPS_INLINE Vector step(Vector sum, Words x, Words c) { return _mm512_dpbf16_ps(sum, __m512bh(x), __m512bh(c)); }

    static Squares place(const float* x, const float* centre, float scale, int64_t D, Word* out) {
        HalfWord* to = reinterpret_cast<HalfWord*>(out);
        Vector sum = {}, lost = {};
        for (int64_t i = 0; i < D; i += 16) {
            const __mmask16 some = D - i < 16 ? __mmask16((1u << (D - i)) - 1) : __mmask16(0xffff);
            const Vector value =
                (_mm512_maskz_loadu_ps(some, centre + i) - _mm512_maskz_loadu_ps(some, x + i)) * broadcast(scale);
            const __m256i half = __m256i(_mm512_cvtneps_pbh(value));  // to nearest; what is denormal becomes zero
            _mm256_mask_storeu_epi16(to + i, some, half);
            const Vector rest = value - Vector(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
            sum += value * value;
            lost += rest * rest;
        }
        return {_mm512_reduce_add_ps(sum), _mm512_reduce_add_ps(lost)};
    }
};

}  // namespace

constexpr Instructions avx512_bf16 = Kernels<Avx512Bf16>::table(unprepared_avx2, kGroupOfAvx2, turn_back_avx2, &avx512);

}  // namespace vqops

VQOPS_TARGET_END
#endif
