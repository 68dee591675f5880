// AMX: eight tiles of 16 lines of 64 bytes, and tdpbf16ps. What is not tiles is as in avx512.cpp.
//
// The tiles are written in assembly: GCC's functions for loads and stores don't say that they touch memory.

#include "target.h"

#if defined(VQOPS_AMX)
#include <sys/syscall.h>
#include <unistd.h>

namespace vqops {

// Tiles need the kernel's permission, for the process and what it forks. It refuses where a thread has too small a
// stack for signals, and so may a sandbox.
bool amx_is_permitted() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace vqops

#if defined(__clang__)  // whose assembler must be told
VQOPS_TARGET("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16")
#else
VQOPS_TARGET("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

namespace vqops {
namespace {

#include "floats16.inl"
#include "kernels.inl"
#include "tiles.inl"

struct AmxBf16 : Floats16 {
    static constexpr const char* kName = "amx_bf16";
    static constexpr int kLayout = 48;
    // Of the rate of float32 multiply-adds. A Xeon of 2023 has 13 times that; what follows the products takes the rest.
    static constexpr double kWorth = 4;

    VQOPS_INLINE void store(float* to, Vector v) { _mm512_storeu_ps(to, v); }
    VQOPS_INLINE unsigned not_above(Vector a, Vector b) { return less_equal(a, b); }
    VQOPS_INLINE Vector square_root(Vector v) { return _mm512_sqrt_ps(v); }

    // To nearest; what is denormal becomes zero. Returns what is stored.
    VQOPS_INLINE Vector halves(Vector value, uint16_t* to) {
        const __m256i half = __m256i(_mm512_cvtneps_pbh(value));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
        return Vector(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }

    VQOPS_INLINE Vector widened(const uint16_t* halves) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves));
        return Vector(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }

    // 16 lines of 16 words, which may be the same memory.
    VQOPS_INLINE void transpose(const void* from, void* to) {
        __m512i a[16], b[16];
        char* const line = static_cast<char*>(to);
        VQOPS_UNROLL_ALL
        for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(static_cast<const char*>(from) + 64 * i);
        VQOPS_UNROLL_ALL
        for (int i = 0; i < 16; i += 2) {
            b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        }
        VQOPS_UNROLL_ALL
        for (int i = 0; i < 16; i += 4)
            VQOPS_UNROLL_ALL
            for (int j = 0; j < 2; j++) {
                a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + 2 + j]);
                a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + 2 + j]);
            }
        // a[i + j]: of lines i to i + 3, words j, j + 4, j + 8, j + 12, four side by side.
        VQOPS_UNROLL_ALL
        for (int j = 0; j < 4; j++) {
            const __m512i even_low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
            const __m512i even_high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
            const __m512i odd_low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
            const __m512i odd_high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
            _mm512_storeu_si512(line + 64 * j, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
            _mm512_storeu_si512(line + 64 * (4 + j), _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
            _mm512_storeu_si512(line + 64 * (8 + j), _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
            _mm512_storeu_si512(line + 64 * (12 + j), _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
        }
    }

    struct Configuration {
        uint8_t palette = 1, start_line = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };

    VQOPS_INLINE void configure() {
        alignas(64) static constexpr Configuration eight;
        asm volatile("ldtilecfg %0" : : "m"(eight));
    }
    VQOPS_INLINE void release() { asm volatile("tilerelease"); }

    template <int i>
    VQOPS_INLINE void zero() {
        asm volatile("tilezero %%tmm%c0" : : "i"(i));
    }
    template <int i>
    VQOPS_INLINE void load(const void* from) {
        asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(i), "r"(from), "r"(int64_t(64)) : "memory");
    }
    template <int i>
    VQOPS_INLINE void store(void* to) {
        asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(i), "r"(to), "r"(int64_t(64)) : "memory");
    }
    template <int i, int a, int b>
    VQOPS_INLINE void multiply() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(i), "i"(a), "i"(b));
    }
    using Floats16::load;
};

struct Others : FloatWords<Floats16> {
    static constexpr const char* kName = "";
    static constexpr int kTile = 14, kCodes = 32, kLayout = 0, kDirect = 0;
};

}  // namespace

constexpr Instructions amx_bf16 = TileKernels<AmxBf16>::table(
    Kernels<Others>::table(unprepared_avx2, kGroupOfAvx2, turn_back_avx2), &avx512);

}  // namespace vqops

VQOPS_TARGET_END
#endif
