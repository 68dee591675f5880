// AVX2 and FMA, sixteen registers of eight floats: 6 rows of 16 codes are 12 sums, two are codes, one a value of x.

#include "target.h"

#if defined(__x86_64__)
VQOPS_TARGET("avx2,fma")

namespace vqops {
namespace {

struct Floats8 {
    static constexpr int kWidth = 8;
    typedef float Vector __attribute__((vector_size(32)));
    typedef float UnalignedVector __attribute__((vector_size(32), aligned(4), may_alias));
    typedef int32_t Mask __attribute__((vector_size(32)));
    typedef uint64_t Halves __attribute__((vector_size(32)));
    typedef uint32_t Bits __attribute__((vector_size(32)));
    typedef int32_t Whole __attribute__((vector_size(32)));
    typedef Mask LaneMask;

    VQOPS_INLINE Vector load(const float* p) { return *reinterpret_cast<const UnalignedVector*>(p); }
    VQOPS_INLINE Vector broadcast(float value) { return _mm256_set1_ps(value); }
    VQOPS_INLINE LaneMask less_equal(Vector a, Vector b) { return a <= b; }
    VQOPS_INLINE int any(LaneMask lanes) { return !_mm256_testz_si256(__m256i(lanes), __m256i(lanes)); }
    VQOPS_INLINE unsigned bits(LaneMask lanes) { return unsigned(_mm256_movemask_ps(__m256(lanes))); }
    VQOPS_INLINE Vector subtract_product(Vector sum, Vector a, Vector b) { return _mm256_fnmadd_ps(a, b, sum); }
    VQOPS_INLINE Halves multiply_low(Halves a, Halves b) { return Halves(_mm256_mul_epu32(__m256i(a), __m256i(b))); }
    VQOPS_INLINE Vector load_some(const float* p, int64_t n) {
        return _mm256_maskload_ps(p, __m256i(Mask{0, 1, 2, 3, 4, 5, 6, 7} < int32_t(n)));
    }
    VQOPS_INLINE void store_some(Vector v, float* p, int64_t n) {
        _mm256_maskstore_ps(p, __m256i(Mask{0, 1, 2, 3, 4, 5, 6, 7} < int32_t(n)), v);
    }

    VQOPS_INLINE Vector sum_each(const Vector* v) {
        Vector half[2];
        _Pragma("GCC unroll 16")
        for (int i = 0; i < 2; i++) {
            const Vector *a = v + 4 * i, *b = a + 2;
            const Vector ab = VQOPS_SHUFFLE(a[0], a[1], 0, 8, 2, 10, 4, 12, 6, 14) +
                              VQOPS_SHUFFLE(a[0], a[1], 1, 9, 3, 11, 5, 13, 7, 15);
            const Vector cd = VQOPS_SHUFFLE(b[0], b[1], 0, 8, 2, 10, 4, 12, 6, 14) +
                              VQOPS_SHUFFLE(b[0], b[1], 1, 9, 3, 11, 5, 13, 7, 15);
            half[i] =
                VQOPS_SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + VQOPS_SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
        }
        return VQOPS_SHUFFLE(half[0], half[1], 0, 1, 2, 3, 8, 9, 10, 11) +
               VQOPS_SHUFFLE(half[0], half[1], 4, 5, 6, 7, 12, 13, 14, 15);
    }
};

#include "kernels.inl"

struct Avx2 : FloatWords<Floats8> {
    static constexpr const char* kName = "avx2";
    static constexpr int kTile = 6, kCodes = 16, kLayout = 16, kDirect = 2;
};

}  // namespace

void unprepared_avx2(const float* x, int64_t rows, int64_t D, const float* code, int64_t code_stride, int64_t count,
                     bool cosine, float factor, const float* threshold, int64_t first, const Offer& offer) {
    Unprepared<Avx2>::compare(x, rows, D, code, code_stride, count, cosine, factor, threshold, first, offer);
}

void turn_back_avx2(const float* x, const float* q, const float* g, const float* error, int64_t D, float* sum,
                    float* left) {
    Rotating<Avx2>::turn_back(x, q, g, error, D, sum, left);
}

constexpr Instructions avx2 = Kernels<Avx2>::table(unprepared_avx2, kGroupOfAvx2, turn_back_avx2);

}  // namespace vqops

VQOPS_TARGET_END
#endif
