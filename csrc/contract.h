// Common to the ops of both devices: shapes, and promises in numbers; vqops/ops has the words.
#pragma once

#include <cstdint>

namespace vqops {

// H codebooks of K codes, N rows for each, D dimensions.
struct SearchShape {
    int64_t H, N, K, D;
    bool cosine;  // else Euclidean
};

// Ways in which a row is decided, as vqops.search_statistics counts them.
enum Tier { kCertified, kDecided, kScanned, kNoCode, kTiers };

constexpr int kLargestK = 32;  // of nearest_topk

constexpr int kRun = 256;  // rows of a code that are summed in order, before the runs are

// Of the noise: Philox4x32-10 (noise.h).
constexpr int kPhiloxRounds = 10;
constexpr uint32_t kFirstMultiplier = 0xD2511F53, kSecondMultiplier = 0xCD9E8D57;
constexpr uint32_t kFirstStep = 0x9E3779B9, kSecondStep = 0xBB67AE85;  // of the key, between rounds

// Ways of the gradient past the step of the quantizer.
enum class Passing { none, straight_through, rotation };

constexpr double kSmallestNorm = 1e-6;  // that a vector is divided by
constexpr double kLargestScale = 1000;  // of a gradient that is turned

}  // namespace vqops
