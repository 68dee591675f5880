// The models of bfloat16 instructions, on which the tests of other processors rest, are the instructions, bit for bit.

#include <cmath>
#include <cstring>
#include <random>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../../../csrc/cpu/instructions.h"
#include "../../../csrc/cpu/sets/bf16_model.h"
#include "checks.h"

namespace vqops {

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512bf16"))) static float hardware_pair(float sum, uint32_t x, uint32_t c) {
    const __m512 added =
        _mm512_dpbf16_ps(_mm512_set1_ps(sum), __m512bh(_mm512_set1_epi32(int(x))), __m512bh(_mm512_set1_epi32(int(c))));
    return _mm512_cvtss_f32(added);
}
#endif

// The model of vdpbf16ps is the instruction, bit for bit, where there is one.
static void pairs() {
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx512bf16")) return;
    std::mt19937 random(3);
    for (int64_t n = 0; n < 200000; n++) {
        // Exponents close together, so that sums round; some denormal, some of extreme exponents.
        const auto half = [&] {
            const uint32_t exponent = n % 4 ? 120 + random() % 16 : n % 8 ? random() % 4 : 60 + random() % 8;
            return (random() & 1) << 15 | exponent << 7 | (random() & 127);
        };
        const uint32_t x = half() | half() << 16, c = half() | half() << 16;
        float sum = real(BFloat16{uint16_t(half())}) * (1 + float(random() % 65536) * 0x1p-24f);
        if (n % 16 == 5) sum = std::ldexp(sum, -60);
        const float modelled = add_pair(sum, x, c), found = hardware_pair(sum, x, c);
        expect(std::memcmp(&modelled, &found, 4) == 0, "vdpbf16ps", "model", n);
    }
#endif
}

#if defined(VQOPS_AMX)
#if defined(__clang__)
__attribute__((target("amx-tile,amx-bf16")))
#endif
static void multiply_in_hardware(ModelTile& to, const ModelTile& codes, const ModelTile& rows) {
    struct {
        uint8_t palette = 1, start_line = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64};
        uint8_t lines[16] = {16, 16, 16};
    } const three;
    asm volatile(
        "ldtilecfg %0\n tileloadd (%1,%4,1), %%tmm0\n tileloadd (%2,%4,1), %%tmm1\n tileloadd (%3,%4,1), %%tmm2\n"
        "tdpbf16ps %%tmm2, %%tmm1, %%tmm0\n tilestored %%tmm0, (%1,%4,1)\n tilerelease"
        :
        : "m"(three), "r"(&to), "r"(&codes), "r"(&rows), "r"(int64_t(64))
        : "memory");
}
#endif

// The same of tdpbf16ps and a whole tile.
static void tiles() {
#if defined(VQOPS_AMX)
    if (std::strcmp(instructions().name, "amx_bf16") != 0) return;
    std::mt19937 random(4);
    for (int n = 0; n < 3000; n++) {
        // Exponents close together, so that sums round; some denormal, some of extreme exponents.
        const auto half = [&] {
            const uint32_t exponent = n % 4 ? 120 + random() % 16 : n % 8 ? random() % 4 : 60 + random() % 8;
            return (random() & 1) << 15 | exponent << 7 | (random() & 127);
        };
        ModelTile codes, rows, modelled, found;
        for (int i = 0; i < 16; i++)
            for (int j = 0; j < 16; j++) {
                codes.pair[i][j] = half() | half() << 16;
                rows.pair[i][j] = half() | half() << 16;
                modelled.sum[i][j] = std::ldexp(float(int32_t(random())), n % 16 == 5 ? -150 : -31);
            }
        found = modelled;
        multiply_tiles(modelled, codes, rows);
        multiply_in_hardware(found, codes, rows);
        bool same = true;
        for (int i = 0; i < 256; i++) {
            const float a = modelled.sum[i / 16][i % 16], b = found.sum[i / 16][i % 16];
            same = same && (std::memcmp(&a, &b, 4) == 0 || (a == 0 && b == 0));
        }
        expect(same, "tdpbf16ps", "tiles", n);
    }
#endif
}

void models() {
    pairs();
    tiles();
}

}  // namespace vqops
