#include "instructions.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define VQOPS_INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define VQOPS_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define VQOPS_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Mask{__VA_ARGS__})
#endif

namespace vqops {

// SSE2, NEON or whatever the platform's baseline is: three rows of 16 codes are twelve vectors.
namespace portable {
#define VQOPS_NAME "portable"
#define VQOPS_WIDTH 4
#define VQOPS_TILE 3
#define VQOPS_BROADCAST(value) (Vector{value, value, value, value})
#define VQOPS_ANY(mask) ((mask)[0] | (mask)[1] | (mask)[2] | (mask)[3])
#define VQOPS_BITS(mask) (((mask)[0] & 1) | ((mask)[1] & 2) | ((mask)[2] & 4) | ((mask)[3] & 8))
#define VQOPS_SUBTRACT_PRODUCT(sum, a, b) ((sum) - (a) * (b))
#include "instructions.inl"
#undef VQOPS_NAME
#undef VQOPS_WIDTH
#undef VQOPS_TILE
#undef VQOPS_BROADCAST
#undef VQOPS_ANY
#undef VQOPS_BITS
#undef VQOPS_SUBTRACT_PRODUCT
}  // namespace portable

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
// Sixteen registers of eight floats: six rows of 16 codes are twelve sums, two are codes, one a value of x.
namespace avx2 {
#define VQOPS_NAME "avx2"
#define VQOPS_WIDTH 8
#define VQOPS_TILE 6
#define VQOPS_BROADCAST(value) _mm256_set1_ps(value)
#define VQOPS_ANY(mask) (!_mm256_testz_si256(__m256i(mask), __m256i(mask)))
#define VQOPS_BITS(mask) _mm256_movemask_ps(__m256(mask))
#define VQOPS_SUBTRACT_PRODUCT(sum, a, b) _mm256_fnmadd_ps(a, b, sum)
#include "instructions.inl"
#undef VQOPS_NAME
#undef VQOPS_WIDTH
#undef VQOPS_TILE
#undef VQOPS_BROADCAST
#undef VQOPS_ANY
#undef VQOPS_BITS
#undef VQOPS_SUBTRACT_PRODUCT
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace {

struct Choice {
    const Instructions* set;
    bool supported;
};

const Instructions& choose() {
    const Choice choices[] = {
#if defined(__x86_64__)
        {&avx2::instructions, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
        {&portable::instructions, true},
    };
    const char* wanted = std::getenv("VQOPS_CPU");
    for (const Choice& choice : choices)
        if (choice.supported && wanted && std::strcmp(wanted, choice.set->name) == 0) return *choice.set;
    for (const Choice& choice : choices)
        if (choice.supported) return *choice.set;
    return portable::instructions;
}

}  // namespace

const Instructions& instructions() {
    static const Instructions& chosen = choose();
    return chosen;
}

const char* compiled_instructions() {
#if defined(__x86_64__)
    return "avx2 portable";
#else
    return "portable";
#endif
}

#if defined(__x86_64__)
DefaultFloatMode::DefaultFloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
DefaultFloatMode::~DefaultFloatMode() { _mm_setcsr(saved_); }
#elif defined(__aarch64__)
DefaultFloatMode::DefaultFloatMode() {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    saved_ = unsigned(mode);
    asm volatile("msr fpcr, %0" : : "r"(uint64_t(0)));
}
DefaultFloatMode::~DefaultFloatMode() { asm volatile("msr fpcr, %0" : : "r"(uint64_t(saved_))); }
#else
DefaultFloatMode::DefaultFloatMode() : saved_(0) {}
DefaultFloatMode::~DefaultFloatMode() {}
#endif

}  // namespace vqops

extern "C" const char* vqops_cpu_instruction_set() { return vqops::instructions().name; }
extern "C" const char* vqops_cpu_compiled() { return vqops::compiled_instructions(); }
