// The pass over all codes that draws one for each row (csrc/cpu/sample.cpp): the products of the screening pass, with
// the noise of their pairs. Included by kernels.inl.

template <class Set>
struct Kernels;

template <class Set>
struct Drawing {
    typedef typename Set::Vector Vector;
    typedef typename Set::UnalignedVector UnalignedVector;
    typedef typename Set::LaneMask LaneMask;
    typedef typename Set::Word Word;
    typedef typename Set::Halves Halves;
    typedef typename Set::Bits Bits;
    typedef typename Set::Whole Whole;
    static constexpr int kWidth = Set::kWidth, kTile = Set::kTile, kCodes = Set::kCodes, kVectors = kCodes / kWidth;

    // Philox of `lanes` fours of codes, the even ones and the odd ones: a word in the low half of each 64 bits, and
    // anything in the high half, which no multiplication reads.
    VQOPS_INLINE void philox_lanes(uint64_t key, uint64_t row, Halves four, uint32_t head, Halves* words) {
        Halves c0 = Halves{} + uint32_t(row), c1 = Halves{} + uint32_t(row >> 32), c2 = four, c3 = Halves{} + head;
        uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
        VQOPS_UNROLL_ALL
        for (int round = 0; round < kPhiloxRounds; round++) {
            const Halves a = Set::multiply_low(c0, Halves{} + kFirstMultiplier);
            const Halves b = Set::multiply_low(c2, Halves{} + kSecondMultiplier);
            c0 = b >> 32 ^ c1 ^ (Halves{} + k0);
            c1 = b;
            c2 = a >> 32 ^ c3 ^ (Halves{} + k1);
            c3 = a;
            k0 += kFirstStep;
            k1 += kSecondStep;
        }
        words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
    }

    // At least T g of a row and 4 kWidth codes, word by word of their fours.
    VQOPS_INLINE void noise_above(const Draws& draws, int64_t row, uint32_t four, float* to) {
        Halves even, odd_words[4], even_words[4];
        for (int i = 0; i < kWidth / 2; i++) even[i] = four + 2 * i;
        philox_lanes(draws.key, draws.number[row], even, draws.head, even_words);
        philox_lanes(draws.key, draws.number[row], even + 1, draws.head, odd_words);
        const Vector step = Set::broadcast(draws.step[row]), most = Set::broadcast(draws.most[row]);
        VQOPS_UNROLL_ALL
        for (int j = 0; j < 4; j++) {
            const Bits words = (Bits)((even_words[j] & 0xffffffff) | odd_words[j] << 32);
            const Vector halved = __builtin_convertvector((Whole)(~words >> 1), Vector);
            const Vector bits = __builtin_convertvector((Whole)halved, Vector);
            *reinterpret_cast<UnalignedVector*>(to + j * kWidth) = most - step * bits;
        }
    }

    // Lanes whose key may reach the threshold: -sqrt(offset + 2 L) + noise, or offset - L + noise.
    template <bool cosine>
    VQOPS_INLINE LaneMask may_reach(Vector lower, Vector offset, Vector noise, Vector threshold) {
        const Vector room = noise - threshold, size = room < -room ? -room : room;
        return cosine ? Set::less_equal(lower, room + offset) : Set::less_equal(lower + lower + offset, room * size);
    }

    // The candidates of a row in a tile, by descending bound of their keys.
    template <bool cosine>
    static void draw_row(const Vector* lower, const float* noise, int64_t place, int64_t row, const Draws& draws) {
        const float offset = draws.offset[row];
        unsigned lanes = 0;
        VQOPS_UNROLL_ALL
        for (int v = 0; v < kVectors; v++)
            lanes |= unsigned(Set::bits(may_reach<cosine>(lower[v], Set::broadcast(offset),
                                                          Set::load(noise + v * kWidth),
                                                          Set::broadcast(draws.threshold[row]))))
                     << (v * kWidth);
        float above[kCodes];
        const float* bound = reinterpret_cast<const float*>(lower);
        for (unsigned left = lanes; left; left &= left - 1) {
            const int j = __builtin_ctz(left);
            const float square = offset + 2 * bound[j];
            above[j] = noise[j] + (cosine ? offset - bound[j] : -__builtin_sqrtf(square > 0 ? square : 0));
        }
        while (lanes) {
            int best = __builtin_ctz(lanes);
            for (unsigned left = lanes; left; left &= left - 1) {
                const int j = __builtin_ctz(left);
                if (above[j] > above[best]) best = j;
            }
            if (!(above[best] >= draws.threshold[row])) return;
            draws.consider(draws.owner, row, place + best);
            lanes &= ~(1u << best);
        }
    }

    template <bool cosine>
    static __attribute__((noinline)) void draw_rows(const Vector (*lower)[kVectors], const float* noise, int64_t place,
                                                    int64_t row, const Draws& draws) {
        for (int r = 0; r < kTile; r++)
            draw_row<cosine>(lower[r], noise + r * 4 * kWidth, place, row + r, draws);
    }

    template <bool cosine>
    static void draw_tile(const Word* x, int64_t stride, const Word* panel, const float* start, int64_t depth,
                          const float* noise, int64_t place, int64_t row, const Draws& draws) {
        Vector sum[kTile][kVectors];
        Kernels<Set>::lower_bounds(x, stride, panel, start, depth, sum);
        LaneMask reach = {};
        VQOPS_UNROLL_ALL
        for (int r = 0; r < kTile; r++) {
            VQOPS_UNROLL_ALL
            for (int v = 0; v < kVectors; v++)
                reach |= may_reach<cosine>(sum[r][v], Set::broadcast(draws.offset[row + r]),
                                           Set::load(noise + r * 4 * kWidth + v * kWidth),
                                           Set::broadcast(draws.threshold[row + r]));
        }
        if (!Set::any(reach)) return;
        Vector lower[kTile][kVectors];
        VQOPS_UNROLL_ALL
        for (int r = 0; r < kTile; r++) {
            VQOPS_UNROLL_ALL
            for (int v = 0; v < kVectors; v++) lower[r][v] = sum[r][v];
        }
        draw_rows<cosine>(lower, noise, place, row, draws);
    }

    // The noise of all rows and 4 kWidth codes, then the panels of these.
    template <bool cosine>
    static void draw_all(const Word* x, int64_t rows, const Panels& panels, const Draws& draws) {
        const int64_t depth = Kernels<Set>::depth_of(panels.D), stride = Kernels<Set>::stride_of(panels.D);
        const Word* panel = static_cast<const Word*>(panels.words);
        for (int64_t p = 0; p < panels.count; p++, panel += depth * kCodes) {
            const int64_t place = p * kCodes, within = place % (4 * kWidth);
            for (int64_t r = 0; within == 0 && r < rows; r++)
                noise_above(draws, r, uint32_t(place / 4), draws.noise + r * 4 * kWidth);
            for (int64_t r = 0; r < rows; r += kTile)
                draw_tile<cosine>(x + r * stride, stride, panel, panels.start + place, depth,
                                  draws.noise + r * 4 * kWidth + within, place, r, draws);
        }
    }

    static void draw(const void* block, int64_t rows, const Panels& panels, const Draws& draws) {
        const Word* x = static_cast<const Word*>(block);
        draws.cosine ? draw_all<true>(x, rows, panels, draws) : draw_all<false>(x, rows, panels, draws);
    }
};
