// What the host asks of the CUDA runtime in a search (stand_in.cpp), one line a case: name, kernels, fills; kernels
// whose attributes are set in the first call on a GPU, in the next one, and on another GPU. With an argument, the
// nanoseconds of a call: median, of a runtime that takes no time.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include "../../../csrc/cuda/launch.h"
#include "../../../csrc/cuda/search.h"
#include "stand_in.h"

using namespace vqops;
using namespace vqops::cuda;

struct Case {
    const char* name;
    int64_t N, K, D, k;
    bool fast, prepared;
};

static void search_once(const Case& c, int device) {
    const Abilities able = {c.fast ? size_t(limits_of(device).shared_bytes) : 0, Wgmma::alone, 132};
    alignas(256) static char memory[256];  // nothing reads or writes
    auto* const place = static_cast<void*>(memory);
    const SearchInputs<float> in = {{1, c.N, c.K, c.D, false}, {}, {}, {}};
    SearchOutputs out = {};
    out.k = c.k, out.distances = c.k > 1 ? place : nullptr, out.queued = static_cast<int32_t*>(place);
    Preparation packed = {1, c.K, c.D, {}, false, c.fast ? memory : nullptr, Packed::bytes(c.K, c.D), nullptr,
                          slots_of(c.K)};
    search(Stream(nullptr, device), in, out, packed, c.prepared, able);
}

int main(int count, char**) {
    const Case cases[] = {
        {"nearest", 1 << 20, 1024, 64, 1, true, false},   {"nearest, prepared", 1 << 20, 1024, 64, 1, true, true},
        {"few rows", 64, 1 << 16, 128, 1, true, false},   {"few rows, prepared", 64, 1 << 16, 128, 1, true, true},
        {"topk", 1 << 20, 1024, 256, 5, true, false},     {"topk, prepared", 1 << 20, 1024, 256, 5, true, true},
        {"no fast pass", 1 << 20, 1024, 64, 1, false, false},
    };
    for (const Case& c : cases) {
        int attributes[3] = {};
        for (int call = 0; call < 3; call++) {
            stand_in.launches = stand_in.fills = stand_in.attributes = 0;
            search_once(c, call / 2);
            attributes[call] = stand_in.attributes / 2;
        }
        std::printf("%s: %d %d %d %d %d", c.name, int(stand_in.launches), int(stand_in.fills), attributes[0],
                    attributes[1], attributes[2]);
        if (count > 1) {
            std::vector<double> found;
            for (int i = 0; i < 10001; i++) {
                const auto start = std::chrono::steady_clock::now();
                search_once(c, 0);
                const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - start;
                found.push_back(taken.count());
            }
            std::nth_element(found.begin(), found.begin() + 5000, found.end());
            std::printf(" %.0f", found[5000]);
        }
        std::printf("\n");
    }
    std::printf("questions: %d\n", int(stand_in.questions));
}
