#include "hash.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "instructions.h"

namespace vqops {
namespace {

constexpr int64_t kStep = kHashLanes * sizeof(uint32_t);
constexpr int64_t kChunk = 1 << 18;  // bytes: a unit of work, beside which joining the lanes takes no time

uint64_t mixed(uint64_t h) {  // the finalizer of SplitMix64
    h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9;
    h = (h ^ (h >> 27)) * 0x94d049bb133111eb;
    return h ^ (h >> 31);
}

uint64_t joined(uint64_t h, uint64_t more) {  // loses nothing of either alone, since the factor is odd
    return mixed(h * 0x9e3779b97f4a7c15 + more);
}

uint64_t hash_chunk(const char* p, int64_t bytes) {
    HashLanes lanes{};
    for (int j = 0; j < kHashLanes; j++) lanes.value[j] = j;
    const int64_t steps = bytes / kStep, rest = bytes % kStep;
    instructions().absorb(p, steps, lanes);
    if (rest > 0) {
        alignas(64) char last[kStep] = {};
        std::memcpy(last, p + steps * kStep, rest);
        instructions().absorb(last, 1, lanes);
    }
    uint64_t h = 0;
    for (int j = 0; j < kHashLanes; j++) h = joined(h, uint64_t(lanes.sum[j]) << 32 | lanes.value[j]);
    return h;
}

}  // namespace

uint64_t hash_of(const void* memory, int64_t bytes, uint64_t seed, const Parallel& parallel) {
    const int64_t chunks = (bytes + kChunk - 1) / kChunk;
    std::vector<uint64_t> hashes(chunks);
    parallel.over(chunks, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++)
            hashes[i] = hash_chunk(static_cast<const char*>(memory) + i * kChunk, std::min(kChunk, bytes - i * kChunk));
    });
    uint64_t h = mixed(seed + uint64_t(bytes));
    for (uint64_t chunk : hashes) h = joined(h, chunk);
    return h;
}

}  // namespace vqops
