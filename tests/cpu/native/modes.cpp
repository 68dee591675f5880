// The float mode of the threads that call: with denormals off or another rounding results are the same to the last bit,
// and the mode is afterwards what it was.

#include <random>
#include <tuple>
#include <utility>
#include <vector>

#include "../../../csrc/cpu/codebook.h"
#include "../../../csrc/cpu/gather.h"
#include "../../../csrc/cpu/residual.h"
#include "../../../csrc/cpu/residual_backward.h"
#include "../../../csrc/cpu/sample.h"
#include "../../../csrc/cpu/search.h"
#include "../../../csrc/cpu/unprepared.h"
#include "checks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vqops {
namespace {

#if defined(__x86_64__)
unsigned mode() { return _mm_getcsr() & ~0x3fu; }  // less what has occurred since
void set_mode(unsigned value) { _mm_setcsr(value); }
constexpr unsigned kDefault = 0x1f80, kFlush = 0x8040, kUp = 0x4000, kDown = 0x2000;
#elif defined(__aarch64__)
unsigned mode() {
    uint64_t value;
    asm volatile("mrs %0, fpcr" : "=r"(value));
    return unsigned(value);
}
void set_mode(unsigned value) { asm volatile("msr fpcr, %0" : : "r"(uint64_t(value))); }
constexpr unsigned kDefault = 0, kFlush = 1 << 24, kUp = 1 << 22, kDown = 2 << 22;
#else
#error "How are denormals switched off here?"
#endif

struct Inputs {
    const char* name;
    SearchShape shape;
    double temperature;
    std::vector<float> x, codebook;
};

typedef std::tuple<std::vector<int64_t>, std::vector<float>> Results;

// All that the kernels find, called by threads of a mode.
Results found(const Inputs& in, unsigned given) {
    const SearchShape& shape = in.shape;
    const int64_t N = shape.N, K = shape.K, D = shape.D, Q = 2, most = 3;
    const Rows x = {in.x.data(), DType::float32, N * D, D, 1};
    const Rows codes = {in.codebook.data(), DType::float32, K * D, D, 1};
    const RowMask all = {nullptr, 0, 0};
    const auto check = [&] { expect(mode() == given, "another mode afterwards", in.name, given); };
    const Parallel parallel = {2, [&](int64_t size, const std::function<void(int64_t, int64_t)>& body) {
                                   const int64_t half = (size + 1) / 2;
                                   bool kept = true;
                                   std::thread other([&] {
                                       set_mode(given);
                                       if (half < size) body(half, size);
                                       kept = mode() == given;
                                   });
                                   body(0, half);
                                   other.join();
                                   expect(kept, "another mode of a thread afterwards", in.name, given);
                               }};
    std::vector<int64_t> indices(N * (most + 2 + Q));
    std::vector<float> values(N * (most + 1 + 3 * D) + Q), both(in.codebook);
    int64_t* index = indices.data();
    float* value = values.data();
    const auto next = [](auto*& from, int64_t count) { return std::exchange(from, from + count); };
    std::vector<char> packed(Packed::bytes(K, D) + 64);
    void* memory = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(packed.data()) + 63) / 64 * 64);

    set_mode(given);
    pack_codebook(codes, 0, K, D, shape.cosine, memory, parallel);
    check();
    if (N <= kUnpreparedRows) memory = nullptr;
    search(shape, x, codes, all, memory, {next(index, N * most), most, next(value, N * most), nullptr}, parallel);
    check();
    search_and_gather(shape, x, codes, all, memory, next(index, N), {next(value, N * D), next(value, N), shape.cosine},
                      parallel);
    check();
    const std::vector<Level> levels(Q, {codes, K, memory});
    const ResidualResult result = {next(value, N * D), next(index, N * Q), next(value, Q)};
    quantize_levels({1, N, D, x, all, levels, Q, shape.cosine, shape.cosine}, result, parallel);
    check();
    both.insert(both.end(), in.codebook.begin(), in.codebook.end());
    const Rows joined = {both.data(), DType::float32, Q * K * D, D, 1};
    levels_backward({1, N, D, &x, nullptr, x, joined, {K, K}, result.indices, all, Q, Passing::rotation, true, 1.0,
                     shape.cosine}, next(value, N * D), nullptr, parallel);
    check();
    const int64_t seed[] = {3, 4};
    draw_codes(shape, x, codes, all, in.temperature, seed, index, parallel);
    check();
    set_mode(kDefault);
    return {indices, values};
}

}  // namespace

void modes() {
    std::mt19937 random(11);
    std::normal_distribution<float> normal;
    const std::pair<int64_t, int64_t> sizes[] = {{40, 600}, {131, 70}};  // few rows, of two threads, and many
    for (const float scale : {1.0f, 1e-41f})  // which is denormal
        for (const auto& [N, K] : sizes)
            for (const bool cosine : {false, true}) {
                const SearchShape shape = {1, N, K, 13, cosine};
                Inputs in = {"float mode", shape, scale, std::vector<float>(N * 13), std::vector<float>(K * 13)};
                for (float& each : in.x) each = normal(random) * scale;
                for (float& each : in.codebook) each = normal(random) * scale;
                const Results expected = found(in, kDefault);
                for (const unsigned other : {kFlush, kUp, kDown, kFlush | kUp})
                    expect(found(in, kDefault | other) == expected, "other results", in.name, other);
            }
}

}  // namespace vqops
