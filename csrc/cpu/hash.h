// A hash of memory, by which a codebook is known again.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace vqops {

// The same for equal bytes, whatever the threads and the instruction set. A difference in one word always shows; chance
// collisions are of 2^-64.
uint64_t hash_of(const void* memory, int64_t bytes, uint64_t seed, const Parallel& parallel);

}  // namespace vqops
