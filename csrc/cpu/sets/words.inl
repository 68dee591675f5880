// The words of rows and codes that the screening pass multiplies, float or pairs of bfloat16, with the coefficients of
// their bounds. Included by kernels.inl.

// Of the bound, causes in docs/exactness.md.
constexpr double kRoom = 1.02;           // a row's coefficients: their own share of the accumulation
constexpr double kUpward = 1 + 0x1p-20;  // a radius, to float32

// At least the norm whose square was summed in float.
VQOPS_INLINE double norm_of(float square, int64_t D) {
    return __builtin_sqrt(double(square)) * (1 + 1e-5 + double(D) * 0x1p-23) + double(D) * 0x1p-70;
}

// Squares of a placed vector, and of what its rounding to bfloat16 took away.
struct Squares {
    float all, lost;
};

// The screening pass in float: a word is one dimension.
template <class Floats>
struct FloatWords : Floats {
    static constexpr double kWorth = 0;
    static constexpr int kPerWord = 1;
    typedef typename Floats::Vector Vector;
    typedef typename Floats::UnalignedVector UnalignedVector;
    typedef float Word;
    typedef Vector Words;

    VQOPS_INLINE Words broadcast_word(Word value) { return Floats::broadcast(value); }
    VQOPS_INLINE Words load_words(const Word* p) { return Floats::load(p); }
    VQOPS_INLINE Vector step(Vector sum, Words x, Words c) { return Floats::subtract_product(sum, x, c); }
    // From the lower to the upper bound, for the codes of a vector: 2.02 times the product of the last words of row and
    // codes, the coefficients of the bound, which the lower one has subtracted once.
    VQOPS_INLINE Vector spread_of(Word row, Words codes) { return codes * Floats::broadcast(2.02f * row); }

    VQOPS_INLINE void bound_row(Squares, double norm, int64_t D, Word* to) {
        to[D] = __builtin_nextafterf(float(kRoom * double(D + 5) * kUnit * norm), __builtin_inff());
    }

    VQOPS_INLINE void bound_code(Squares, double radius, int64_t D, Word* to) { to[D] = float(radius * kUpward); }

    static Squares place(const float* x, const float* centre, float scale, int64_t D, Word* to) {
        Vector sum = {};
        const Vector factor = Floats::broadcast(scale);
        int64_t i = 0;
        for (; i + Floats::kWidth <= D; i += Floats::kWidth) {
            const Vector value = (Floats::load(x + i) - Floats::load(centre + i)) * factor;
            *reinterpret_cast<UnalignedVector*>(to + i) = value;
            sum += value * value;
        }
        float total = 0;
        for (int lane = 0; lane < Floats::kWidth; lane++) total += sum[lane];
        for (; i < D; i++) {
            to[i] = (x[i] - centre[i]) * scale;
            total += to[i] * to[i];
        }
        return {total, 0};
    }
};

// The screening pass in bfloat16: a word is two dimensions, and rows are negated, since the instruction can only add. A
// set says `step` and `place`.
template <class Floats>
struct PairWords : Floats {
    // Some processors have one such unit, or a slow one.
    static constexpr double kWorth = 1.6;
    static constexpr int kPerWord = 2;
    typedef typename Floats::Vector Vector;
    typedef uint32_t Word;
    typedef uint16_t HalfWord __attribute__((may_alias));
    typedef typename Floats::Pairs Words;
    static constexpr Word kSigns = 0x80008000;

    VQOPS_INLINE Words broadcast_word(Word value) { return Words{} + value; }
    VQOPS_INLINE Words load_words(const Word* p) {
        return *reinterpret_cast<const typename Floats::UnalignedPairs*>(p);
    }
    VQOPS_INLINE Vector spread_of(Word row, Words codes) {
        const Word both = row ^ kSigns;
        const Words radius = broadcast_word(both << 16), lost = broadcast_word(both & 0xffff0000);
        return (Vector(codes << 16) * Vector(radius) + Vector(codes & 0xffff0000) * Vector(lost)) *
               Floats::broadcast(2.02f);
    }

    // Radius and what rounding took away, as one word of two bfloat16. Each is rounded up, and at least the smallest
    // that vdpbf16ps doesn't take for 0.
    VQOPS_INLINE Word up_to_pair(double radius, double lost) {
        const float low = float(radius) > 0x1p-126f ? float(radius) : 0x1p-126f;
        const float high = float(lost) > 0x1p-126f ? float(lost) : 0x1p-126f;
        return (__builtin_bit_cast(Word, low) + 0xffff) >> 16 |
               ((__builtin_bit_cast(Word, high) + 0xffff) & 0xffff0000);
    }

    VQOPS_INLINE void bound_row(Squares squares, double norm, int64_t D, Word* to) {
        const double lost = norm_of(squares.lost, D) + 1.01 * kUnit * norm;
        const double held = norm + lost;  // at least the norm of the rounded row
        if (D % 2) to[D / 2] &= 0xffff;
        to[(D + 1) / 2] = up_to_pair(kRoom * (lost + double(D + 6) * kUnit * held), kRoom * held) ^ kSigns;
    }

    VQOPS_INLINE void bound_code(Squares squares, double radius, int64_t D, Word* to) {
        if (D % 2) to[D / 2] &= 0xffff;
        for (int64_t i = 0; i < (D + 1) / 2; i++) to[i] ^= kSigns;  // `place` negates
        // Rounding error of the code: to bfloat16, and before that to float.
        to[(D + 1) / 2] = up_to_pair(radius * kUpward, norm_of(squares.lost, D) + 1.01 * kUnit * radius);
    }
};
