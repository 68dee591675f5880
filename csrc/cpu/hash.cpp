#include "hash.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace vqops {
namespace {

constexpr int64_t kChunk = 1 << 16;        // bytes: a unit of work that stays in L2
constexpr int kLanes = 8;                  // independent products, enough to hide a multiplier's latency
constexpr uint64_t kOdd = 0x9e3779b97f4a7c15;  // odd, so that a product by it loses nothing

uint64_t mixed(uint64_t h) {  // the finalizer of SplitMix64
    h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9;
    h = (h ^ (h >> 27)) * 0x94d049bb133111eb;
    return h ^ (h >> 31);
}

// Each lane takes every eighth word of 8 bytes, by steps that lose nothing of it.
uint64_t hash_chunk(const char* p, int64_t bytes) {
    uint64_t lane[kLanes], word[kLanes];
    for (int j = 0; j < kLanes; j++) lane[j] = j;
    for (; bytes > 0; p += sizeof(word), bytes -= sizeof(word)) {
        if (bytes >= int64_t(sizeof(word))) {
            std::memcpy(word, p, sizeof(word));
        } else {
            std::memset(word, 0, sizeof(word));
            std::memcpy(word, p, bytes);
        }
        for (int j = 0; j < kLanes; j++) {
            lane[j] = (lane[j] ^ word[j]) * kOdd;
            lane[j] ^= lane[j] >> 32;  // or high bits would stay high: two signs that change would cancel
        }
    }
    uint64_t h = 0;
    for (int j = 0; j < kLanes; j++) h = mixed(h * kOdd + lane[j]);
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
    for (uint64_t chunk : hashes) h = mixed(h * kOdd + chunk);
    return h;
}

}  // namespace vqops
