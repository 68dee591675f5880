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

// Ways of the gradient past the step of the quantizer.
enum class Passing { none, straight_through, rotation };

constexpr double kLargestScale = 1000;  // of a gradient that is turned

}  // namespace vqops
