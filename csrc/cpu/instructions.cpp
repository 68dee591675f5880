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
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace vqops {
namespace {

struct Choice {
    const Instructions* set;
    bool (*supported)();
};

constexpr int64_t kSpinSteps = 256;  // some microseconds: long against the clock, short against a time slice
constexpr int kSpinRepeats = 40;

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

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

#if defined(VQOPS_AMX)
bool has_amx() {
    unsigned a, b, c, d;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const unsigned bf16 = 1u << 22, tile = 1u << 24;
    return (d & bf16) && (d & tile) && amx_is_permitted();
}
#endif

bool always() { return true; }

#if defined(VQOPS_BF16_MODEL)
bool by_name() { return std::getenv("VQOPS_CPU") != nullptr; }
#endif

std::vector<Choice> compiled() {
    return {
#if defined(VQOPS_AMX)
        {&amx_bf16, has_amx},
#endif
#if defined(__x86_64__)
        {&avx512_bf16, has_avx512_bf16},
        {&avx512, has_avx512},
        {&avx2, has_avx2},
#endif
        {&portable, always},
#if defined(VQOPS_BF16_MODEL)
        {&bf16_model, by_name},
        {&amx_model, by_name},
#endif
    };
}

const Instructions& choose() {
    const std::vector<Choice> choices = compiled();
    if (const char* wanted = std::getenv("VQOPS_CPU"); wanted && *wanted) {
        const std::string given = std::string("VQOPS_CPU=") + wanted;
        for (const Choice& choice : choices) {
            if (std::strcmp(wanted, choice.set->name) != 0) continue;
            if (choice.supported()) return *choice.set;
            throw std::runtime_error(given + ", but this processor has no such instructions, or the system keeps them");
        }
        throw std::runtime_error(given + ", but it must be one of: " + compiled_instructions());
    }
    const Instructions *best = &portable, *floats = best;
    for (auto choice = choices.rbegin(); choice != choices.rend(); choice++) {
        const Instructions& set = *choice->set;
        if (!choice->supported()) continue;
        if (set.worth == 0) best = floats = &set;
        else if (multiply_add_rate(set) > set.worth * multiply_add_rate(*floats)) best = &set;
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
#if defined(VQOPS_AMX)
    return "amx_bf16 avx512_bf16 avx512 avx2 portable";
#elif defined(__x86_64__)
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
extern "C" bool vqops_cpu_rounds() { return vqops::instructions().worth > 0; }
extern "C" const char* vqops_cpu_compiled() { return vqops::compiled_instructions(); }
