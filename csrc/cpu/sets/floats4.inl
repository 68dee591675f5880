// Vectors of four floats, by the compiler's own operations.
struct Floats4 {
    static constexpr int kWidth = 4;
    typedef float Vector __attribute__((vector_size(16)));
    typedef float UnalignedVector __attribute__((vector_size(16), aligned(4), may_alias));
    typedef uint32_t Pairs __attribute__((vector_size(16)));
    typedef uint32_t UnalignedPairs __attribute__((vector_size(16), aligned(4), may_alias));
    typedef int32_t Mask __attribute__((vector_size(16)));
    typedef uint64_t Halves __attribute__((vector_size(16)));
    typedef uint32_t Bits __attribute__((vector_size(16)));
    typedef int32_t Whole __attribute__((vector_size(16)));
    typedef Mask LaneMask;

    VQOPS_INLINE Vector load(const float* p) { return *reinterpret_cast<const UnalignedVector*>(p); }
    VQOPS_INLINE Vector broadcast(float value) { return Vector{value, value, value, value}; }
    VQOPS_INLINE LaneMask less_equal(Vector a, Vector b) { return a <= b; }
    VQOPS_INLINE int any(LaneMask lanes) { return lanes[0] | lanes[1] | lanes[2] | lanes[3]; }
    VQOPS_INLINE unsigned bits(LaneMask lanes) {
        return unsigned((lanes[0] & 1) | (lanes[1] & 2) | (lanes[2] & 4) | (lanes[3] & 8));
    }
    VQOPS_INLINE Vector subtract_product(Vector sum, Vector a, Vector b) { return sum - a * b; }
    VQOPS_INLINE Halves multiply_low(Halves a, Halves b) { return (a & 0xffffffff) * (b & 0xffffffff); }
    VQOPS_INLINE Vector load_some(const float* p, int64_t n) {
        return Vector{p[0], n > 1 ? p[1] : 0, n > 2 ? p[2] : 0, 0};
    }
    VQOPS_INLINE void store_some(Vector v, float* p, int64_t n) {
        p[0] = v[0];
        if (n > 1) p[1] = v[1];
        if (n > 2) p[2] = v[2];
    }

    VQOPS_INLINE Vector sum_each(const Vector* v) {
        const Vector ab = VQOPS_SHUFFLE(v[0], v[1], 0, 4, 2, 6) + VQOPS_SHUFFLE(v[0], v[1], 1, 5, 3, 7);
        const Vector cd = VQOPS_SHUFFLE(v[2], v[3], 0, 4, 2, 6) + VQOPS_SHUFFLE(v[2], v[3], 1, 5, 3, 7);
        return VQOPS_SHUFFLE(ab, cd, 0, 1, 4, 5) + VQOPS_SHUFFLE(ab, cd, 2, 3, 6, 7);
    }
};
