// The steps of a hash (hash.h), on all its lanes side by side. A lane loses nothing of the word it takes. Two words that
// differ may leave it as it was with a chance of 2^-32, and the sum with it of another 2^-32.
// Included by kernels.inl.
template <class Set>
struct Hashing {
    typedef typename Set::Bits Bits;
    static constexpr int kWidth = Set::kWidth, kVectors = kHashLanes / kWidth;
    static_assert(kHashLanes % kWidth == 0);

    static void absorb(const void* memory, int64_t steps, HashLanes& lanes) {
        Bits value[kVectors], sum[kVectors];
        __builtin_memcpy(value, lanes.value, sizeof(value));
        __builtin_memcpy(sum, lanes.sum, sizeof(sum));
        for (const float* p = static_cast<const float*>(memory); steps > 0; p += kHashLanes, steps--) {
            VQOPS_UNROLL_ALL
            for (int i = 0; i < kVectors; i++) {
                value[i] = (value[i] ^ Bits(Set::load(p + i * kWidth))) * 0x9e3779b1;
                value[i] ^= value[i] >> 15;  // or high bits would stay high: two signs that change would cancel
                sum[i] += value[i];
            }
        }
        __builtin_memcpy(lanes.value, value, sizeof(value));
        __builtin_memcpy(lanes.sum, sum, sizeof(sum));
    }
};
