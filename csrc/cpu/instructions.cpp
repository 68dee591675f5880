#include "instructions.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)  // GCC 12 says so of what its own header leaves undefined on purpose
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
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
#define VQOPS_CODES 16
#define VQOPS_PAIRS 0
#define VQOPS_BROADCAST(value) (Vector{value, value, value, value})
#define VQOPS_LANES Mask
#define VQOPS_LESS_EQUAL(a, b) ((a) <= (b))
#define VQOPS_ANY(lanes) ((lanes)[0] | (lanes)[1] | (lanes)[2] | (lanes)[3])
#define VQOPS_BITS(lanes) \
    (((lanes)[0] & 1) | ((lanes)[1] & 2) | ((lanes)[2] & 4) | ((lanes)[3] & 8))
#define VQOPS_SUBTRACT_PRODUCT(sum, a, b) ((sum) - (a) * (b))
#define VQOPS_LOAD_SOME(p, n) (Vector{(p)[0], (n) > 1 ? (p)[1] : 0, (n) > 2 ? (p)[2] : 0, 0})
#define VQOPS_DIRECT direct
#define VQOPS_GROUP 4
#include "instructions.inl"
#include "undefine.inl"
}  // namespace portable

#if defined(VQOPS_BF16_MODEL)
// For tests on any processor: the screening pass of avx512_bf16 with a scalar model of its instruction.
namespace bf16_model {
#include "bf16_model.inl"
#define VQOPS_NAME "bf16_model"
#define VQOPS_WIDTH 4
#define VQOPS_TILE 3
#define VQOPS_CODES 16
#define VQOPS_PAIRS 1
#define VQOPS_ADD_PAIRS(sum, x, c) add_pairs(sum, x, c)
#define VQOPS_BROADCAST(value) (Vector{value, value, value, value})
#define VQOPS_LANES Mask
#define VQOPS_LESS_EQUAL(a, b) ((a) <= (b))
#define VQOPS_ANY(lanes) ((lanes)[0] | (lanes)[1] | (lanes)[2] | (lanes)[3])
#define VQOPS_BITS(lanes) \
    (((lanes)[0] & 1) | ((lanes)[1] & 2) | ((lanes)[2] & 4) | ((lanes)[3] & 8))
#define VQOPS_SUBTRACT_PRODUCT(sum, a, b) ((sum) - (a) * (b))
#define VQOPS_DIRECT portable::direct
#define VQOPS_GROUP 4
#include "instructions.inl"
#include "undefine.inl"
}  // namespace bf16_model
#endif

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
#define VQOPS_CODES 16
#define VQOPS_PAIRS 0
#define VQOPS_BROADCAST(value) _mm256_set1_ps(value)
#define VQOPS_LANES Mask
#define VQOPS_LESS_EQUAL(a, b) ((a) <= (b))
#define VQOPS_ANY(lanes) (!_mm256_testz_si256(__m256i(lanes), __m256i(lanes)))
#define VQOPS_BITS(lanes) _mm256_movemask_ps(__m256(lanes))
#define VQOPS_SUBTRACT_PRODUCT(sum, a, b) _mm256_fnmadd_ps(a, b, sum)
#define VQOPS_LOAD_SOME(p, n) \
    _mm256_maskload_ps(p, __m256i(Mask{0, 1, 2, 3, 4, 5, 6, 7} < int32_t(n)))
#define VQOPS_DIRECT direct
#define VQOPS_GROUP 8
#include "instructions.inl"
#include "undefine.inl"
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif
// 32 registers of sixteen floats: 14 rows of 32 codes are 28 sums, two are codes, one a value of x.
namespace avx512 {
#define VQOPS_NAME "avx512"
#define VQOPS_WIDTH 16
#define VQOPS_TILE 14
#define VQOPS_CODES 32
#define VQOPS_PAIRS 0
#define VQOPS_BROADCAST(value) _mm512_set1_ps(value)
#define VQOPS_LANES __mmask16
#define VQOPS_LESS_EQUAL(a, b) _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ)
#define VQOPS_ANY(lanes) (lanes)
#define VQOPS_BITS(lanes) (lanes)
#define VQOPS_SUBTRACT_PRODUCT(sum, a, b) _mm512_fnmadd_ps(a, b, sum)
#define VQOPS_DIRECT avx2::direct
#define VQOPS_GROUP 8
#include "instructions.inl"
#include "undefine.inl"
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif
// The same with vdpbf16ps, which multiplies and adds two dimensions at once.
namespace avx512_bf16 {
#define VQOPS_ADD_PAIRS(sum, x, c) _mm512_dpbf16_ps(sum, __m512bh(x), __m512bh(c))
#define VQOPS_NAME "avx512_bf16"
#define VQOPS_WIDTH 16
#define VQOPS_TILE 14
#define VQOPS_CODES 32
#define VQOPS_PAIRS 1
#define VQOPS_BROADCAST(value) _mm512_set1_ps(value)
#define VQOPS_LANES __mmask16
#define VQOPS_LESS_EQUAL(a, b) _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ)
#define VQOPS_ANY(lanes) (lanes)
#define VQOPS_BITS(lanes) (lanes)
#define VQOPS_SUBTRACT_PRODUCT(sum, a, b) _mm512_fnmadd_ps(a, b, sum)
#define VQOPS_DIRECT avx2::direct
#define VQOPS_GROUP 8
#include "instructions.inl"
#include "undefine.inl"
}  // namespace avx512_bf16
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

constexpr int64_t kSpinSteps = 256;  // some microseconds: long against the clock, short against a time slice
constexpr int kSpinRepeats = 40;

// Where bfloat16 is not clearly faster (some processors have one such unit, or a slow one), its wider bounds only cost.
constexpr double kWorthPairs = 1.6;

double spin_seconds(const Instructions& set, int repeats) {
    double least = INFINITY;
    volatile float sink = 0;
    for (int i = 0; i < repeats; i++) {
        const auto start = std::chrono::steady_clock::now();
        sink = sink + set.spin(kSpinSteps, 0);
        const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
        least = std::min(least, passed.count());
    }
    return least;
}

#if defined(__x86_64__)
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") &&
           __builtin_cpu_supports("fma");
}
#endif

std::vector<Choice> compiled() {
    return {
#if defined(__x86_64__)
        {&avx512_bf16::instructions, has_avx512() && __builtin_cpu_supports("avx512bf16")},
        {&avx512::instructions, has_avx512()},
        {&avx2::instructions, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
        {&portable::instructions, true},
#if defined(VQOPS_BF16_MODEL)
        {&bf16_model::instructions, std::getenv("VQOPS_CPU") != nullptr},  // only by name
#endif
    };
}

const Instructions& choose() {
    const std::vector<Choice> choices = compiled();
    if (const char* wanted = std::getenv("VQOPS_CPU"); wanted && *wanted) {
        const std::string given = std::string("VQOPS_CPU=") + wanted;
        for (const Choice& choice : choices) {
            if (std::strcmp(wanted, choice.set->name) != 0) continue;
            if (choice.supported) return *choice.set;
            throw std::runtime_error(given + ", but this processor has no such instructions");
        }
        throw std::runtime_error(given + ", but it must be one of: " + compiled_instructions());
    }
    const Instructions* best = &portable::instructions;
    for (auto choice = choices.rbegin(); choice != choices.rend(); choice++) {
        const Instructions& set = *choice->set;
        if (!choice->supported) continue;
        if (!set.pairs || multiply_add_rate(set) > kWorthPairs * multiply_add_rate(*best)) best = &set;
    }
    return *best;
}

}  // namespace

const Instructions& instructions() {
    static const Instructions& chosen = choose();
    return chosen;
}

double multiply_add_rate(const Instructions& set) {
    return double(set.spin_products * kSpinSteps) / spin_seconds(set, kSpinRepeats);
}

const char* compiled_instructions() {
#if defined(__x86_64__)
    return "avx512_bf16 avx512 avx2 portable";
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
extern "C" double vqops_cpu_multiply_add_rate() { return vqops::multiply_add_rate(vqops::instructions()); }
extern "C" bool vqops_cpu_pairs() { return vqops::instructions().pairs; }
extern "C" const char* vqops_cpu_compiled() { return vqops::compiled_instructions(); }
