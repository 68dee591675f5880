// Vectors of sixteen floats, with mask registers.
struct Floats16 {
    static constexpr int kWidth = 16;
    typedef float Vector __attribute__((vector_size(64)));
    typedef float UnalignedVector __attribute__((vector_size(64), aligned(4), may_alias));
    typedef uint32_t Pairs __attribute__((vector_size(64)));
    typedef uint32_t UnalignedPairs __attribute__((vector_size(64), aligned(4), may_alias));
    typedef uint64_t Halves __attribute__((vector_size(64)));
    typedef uint32_t Bits __attribute__((vector_size(64)));
    typedef int32_t Whole __attribute__((vector_size(64)));
    typedef __mmask16 LaneMask;

    VQOPS_INLINE Vector load(const float* p) { return *reinterpret_cast<const UnalignedVector*>(p); }
    VQOPS_INLINE Vector broadcast(float value) { return _mm512_set1_ps(value); }
    VQOPS_INLINE LaneMask less_equal(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
    VQOPS_INLINE int any(LaneMask lanes) { return lanes; }
    VQOPS_INLINE unsigned bits(LaneMask lanes) { return lanes; }
    VQOPS_INLINE Vector subtract_product(Vector sum, Vector a, Vector b) { return _mm512_fnmadd_ps(a, b, sum); }
    VQOPS_INLINE Halves multiply_low(Halves a, Halves b) { return Halves(_mm512_mul_epu32(__m512i(a), __m512i(b))); }
    VQOPS_INLINE float least(Vector v) { return _mm512_reduce_min_ps(v); }
};
