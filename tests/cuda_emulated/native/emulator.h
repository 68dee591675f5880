// Runs kernels of csrc/cuda on the CPU, block by block and thread by thread (emulated_block.h).
#pragma once

#include <algorithm>
#include <numeric>

#include "../../../csrc/cuda/runs.h"
#include "emulated_block.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace vqops::cuda {

struct Emulator {
    bool descending;  // blocks and threads
    int adder = 16;
    int64_t* additions = nullptr;
    int64_t* calls = nullptr;  // counts kernels and fills

    template <class Kernel>
    void launch(const Kernel& kernel) const {
        // Shared memory starts with what the last block left; here with what shows.
        const size_t bytes = std::max<size_t>(kernel.shared_bytes(), sizeof(typename Kernel::Shared));
        struct alignas(1024) Unit {
            double poison[128];
        };
        std::vector<Unit> memory((bytes + 1023) / 1024);
        auto* const shared = reinterpret_cast<unsigned char*>(memory.data());
        const int64_t blocks = kernel.blocks();
        if (calls && blocks > 0) ++*calls;
        for (int64_t i = 0; i < blocks; i++) {
            for (Unit& unit : memory) std::fill_n(unit.poison, 128, NAN);
            const int64_t index = descending ? blocks - 1 - i : i;
            EmulatedBlock block = {index, Kernel::kThreads, descending, adder, shared, additions};
            kernel(block, *reinterpret_cast<typename Kernel::Shared*>(shared));
        }
    }

    void fill(void* data, int byte, int64_t bytes) const {
        if (calls) ++*calls;
        memset(data, byte, bytes);
    }

    void sort(const RowsByCode& s) const {
        std::vector<uint32_t> place(s.rows());
        std::iota(place.begin(), place.end(), 0);
        std::stable_sort(place.begin(), place.end(), [&](uint32_t a, uint32_t b) { return s.key[a] < s.key[b]; });
        for (int64_t i = 0; i < s.rows(); i++) s.keys[i] = s.key[place[i]], s.order[i] = s.row[place[i]];
    }
};

}  // namespace vqops::cuda
