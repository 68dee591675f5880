// What the ops promise on both devices, in numbers; vqops/ops has the words.
#pragma once

#include <cstdint>

namespace vqops {

// How rows were decided, as vqops.search_statistics counts them.
enum Tier { kCertified, kDecided, kScanned, kNoCode, kTiers };

constexpr int kLargestK = 32;  // of nearest_topk

constexpr int kRun = 256;  // rows of a code that are summed in order, before the runs are

// What stands for the gradient of the quantizer's step in its backward.
enum class Passing { none, straight_through, rotation };

}  // namespace vqops
