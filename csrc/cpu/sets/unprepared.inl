// The search without preparation, of sets that have sum_each: lane i of it is the sum of the lanes of v[i]. Included by
// kernels.inl.
template <class Set>
struct Unprepared {
    typedef typename Set::Vector Vector;
    static constexpr int kWidth = Set::kWidth;

    // Minus the sums over the dimensions of (x - c)^2, of x.c or, without x, of c^2, one lane per code.
    enum class Term { distance, product, square };

    template <Term term>
    VQOPS_INLINE Vector to_codes(const float* x, const float* const* codes, int64_t D) {
        Vector sum[kWidth] = {};
        const auto add = [&](int i, Vector value, Vector c) __attribute__((always_inline)) {
            const Vector left = term == Term::distance ? value - c : term == Term::square ? c : value;
            sum[i] = Set::subtract_product(sum[i], left, (term == Term::distance ? left : c));
        };
        int64_t d = 0;
        for (; d + kWidth <= D; d += kWidth) {
            const Vector value = term == Term::square ? Vector{} : Set::load(x + d);
            VQOPS_UNROLL_ALL
            for (int i = 0; i < kWidth; i++) add(i, value, Set::load(codes[i] + d));
        }
        if (d < D) {
            const Vector value = term == Term::square ? Vector{} : Set::load_some(x + d, D - d);
            VQOPS_UNROLL_ALL
            for (int i = 0; i < kWidth; i++) add(i, value, Set::load_some(codes[i] + d, D - d));
        }
        return Set::sum_each(sum);
    }

    // Rows against codes [first, first + count), count at most kWidth, all as they lie in memory: |x - c|^2, for cosine
    // -x.c / |c|. Values whose `factor`-fold does not exceed their row's threshold are offered. A code whose norm
    // float32 can't hold is offered to all rows as NaN.
    static void compare(const float* x, int64_t rows, int64_t D, const float* code, int64_t code_stride, int64_t count,
                        bool cosine, float factor, const float* threshold, int64_t first, const Offer& offer) {
        const float* codes[kWidth];
        for (int64_t i = 0; i < kWidth; i++) codes[i] = code + (i < count ? i : count - 1) * code_stride;
        unsigned usable = (1u << count) - 1;
        Vector scale = Set::broadcast(1);
        if (cosine) {
            const Vector square = -to_codes<Term::square>(nullptr, codes, D);
            for (unsigned left = usable; left; left &= left - 1) {
                const int i = __builtin_ctz(left);
                scale[i] = 1 / __builtin_sqrtf(square[i]);
                if (square[i] > 0x1p-100f && square[i] < 0x1p100f) continue;
                usable &= ~(1u << i);
                for (int64_t r = 0; r < rows; r++) offer.candidate(offer.lists, r, first + i, __builtin_nanf(""));
            }
        }
        for (int64_t r = 0; r < rows; r++) {
            const float* row = x + r * D;
            const Vector value =
                cosine ? to_codes<Term::product>(row, codes, D) * scale : -to_codes<Term::distance>(row, codes, D);
            const Vector limit = Set::broadcast(threshold[r]);
            unsigned lanes = unsigned(Set::bits(Set::less_equal(value * Set::broadcast(factor), limit))) & usable;
            for (; lanes; lanes &= lanes - 1) {
                const int i = __builtin_ctz(lanes);
                offer.candidate(offer.lists, r, first + i, value[i]);
            }
        }
    }
};
