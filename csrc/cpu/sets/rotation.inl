// The gradient that a rotation passes back, in float. Included by kernels.inl. Vectors of sixteen gained 5 % in many
// dimensions and took twice as long in eight (AMD EPYC, Zen 4): sets that have them take those of eight.
template <class Set>
struct Rotating {
    typedef typename Set::Vector Vector;
    typedef typename Set::UnalignedVector UnalignedVector;
    static constexpr int kWidth = Set::kWidth;

    // Values from i on, zeros behind the last.
    VQOPS_INLINE Vector part(const float* p, int64_t i, int64_t D) {
        return i + kWidth <= D ? Set::load(p + i) : Set::load_some(p + i, D - i);
    }

    VQOPS_INLINE void put(Vector v, float* p, int64_t i, int64_t D) {
        if (i + kWidth <= D) *reinterpret_cast<UnalignedVector*>(p + i) = v;
        else Set::store_some(v, p + i, D - i);
    }

    VQOPS_INLINE float sum_of(Vector v) {
        float lane[kWidth];
        *reinterpret_cast<UnalignedVector*>(lane) = v;
        VQOPS_UNROLL_ALL
        for (int half = kWidth / 2; half > 0; half /= 2) {
            VQOPS_UNROLL_ALL
            for (int j = 0; j < half; j++) lane[j] += lane[j + half];
        }
        return lane[0];
    }

    // A row in the first cache: its norms, then the products with u, v and w of row_gradient.h, then the result.
    static void turn_back(const float* x, const float* q, const float* g, const float* error, int64_t D,
                          float* sum, float* left) {
        const float smallest = float(kSmallestNorm);
        Vector xx = {}, qq = {};
        for (int64_t i = 0; i < D; i += kWidth) {
            const Vector x_i = part(x, i, D), q_i = part(q, i, D);
            xx += x_i * x_i;
            qq += q_i * q_i;
        }
        const Norms norms = {__builtin_sqrtf(sum_of(xx)), __builtin_sqrtf(sum_of(qq))};
        if (norms.x <= smallest || norms.q <= smallest)
            return add<Direction::none>({}, norms, x, q, g, error, D, sum, left);
        const Products quick = multiply<Direction::by_inverse>(norms, x, q, g, D);
        if (quick.ww >= kOpposite) return add<Direction::by_inverse>(quick, norms, x, q, g, error, D, sum, left);
        const Products exact = multiply<Direction::by_quotient>(norms, x, q, g, D);
        add<Direction::by_quotient>(exact, norms, x, q, g, error, D, sum, left);
    }

private:
    // Of u = x / |x| and v = q / |q|. Where these are nearly opposite, w = u + v is what their rounding leaves, and an
    // inverse would round each once more.
    enum class Direction { none, by_inverse, by_quotient };
    static constexpr float kOpposite = 0.25f;  // |w|^2 below

    struct Norms {
        float x, q;
    };
    struct Products {
        float ww, wg, vg;
    };

    template <Direction way>
    VQOPS_INLINE Vector unit(Vector value, float norm) {
        if (way == Direction::none) return Vector{};
        if (way == Direction::by_quotient) return value / Set::broadcast(norm);
        return value * Set::broadcast(1 / norm);
    }

    template <Direction way>
    VQOPS_INLINE Products multiply(Norms norms, const float* x, const float* q, const float* g, int64_t D) {
        Vector ww = {}, wg = {}, vg = {};
        for (int64_t i = 0; i < D; i += kWidth) {
            const Vector g_i = part(g, i, D), v = unit<way>(part(q, i, D), norms.q);
            const Vector w = unit<way>(part(x, i, D), norms.x) + v;
            ww += w * w;
            wg += w * g_i;
            vg += v * g_i;
        }
        return {sum_of(ww), sum_of(wg), sum_of(vg)};
    }

    template <Direction way>
    VQOPS_INLINE void add(Products products, Norms norms, const float* x, const float* q, const float* g,
                          const float* error, int64_t D, float* sum, float* left) {
        const float least = float(kSmallestNorm * kSmallestNorm), largest = float(kLargestScale);
        const float ratio = way == Direction::none ? 1 : norms.q / norms.x;
        const Vector along_w = Set::broadcast(2 * products.wg / (products.ww < least ? least : products.ww));
        const Vector along_v = Set::broadcast(2 * products.vg), two = Set::broadcast(2);
        const Vector factor = Set::broadcast(ratio > largest ? largest : ratio);
        const Vector from_error = Set::broadcast(error ? *error : 0);
        for (int64_t i = 0; i < D; i += kWidth) {
            const Vector x_i = part(x, i, D), q_i = part(q, i, D);
            const Vector u = unit<way>(x_i, norms.x), w = u + unit<way>(q_i, norms.q);
            const Vector turned = (part(g, i, D) - along_w * w + along_v * u) * factor;
            const Vector passed = part(sum, i, D) + turned;
            put(error ? passed + two * (x_i - q_i) * from_error : passed, sum, i, D);
            if (left) put(x_i - q_i, left, i, D);
        }
    }
};
