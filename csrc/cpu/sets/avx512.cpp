// AVX-512, 32 registers of sixteen floats: 14 rows of 32 codes are 28 sums, two are codes, one a value of x.

#include "target.h"

#if defined(__x86_64__)
VQOPS_TARGET("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")

namespace vqops {
namespace {

#include "floats16.inl"
#include "kernels.inl"

struct Avx512 : FloatWords<Floats16> {
    static constexpr const char* kName = "avx512";
    static constexpr int kTile = 14, kCodes = 32, kLayout = 32, kDirect = 5;
};

}  // namespace

constexpr Instructions avx512 = Kernels<Avx512>::table(unprepared_avx2, kGroupOfAvx2, turn_back_avx2);

}  // namespace vqops

VQOPS_TARGET_END
#endif
