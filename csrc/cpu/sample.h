// Codes drawn by the largest of noisy logits on the CPU, without torch.
#pragma once

#include <cstdint>

#include "../contract.h"
#include "parallel.h"
#include "rows.h"

namespace vqops {

// indices [H, N], -1 where there is no code. The temperature is positive and finite: at 0 it is a search. seed: the key
// of the noise, and the number of the first row.
void draw_codes(const SearchShape& shape, const Rows& x, const Rows& codebook, const RowMask& mask,
                double temperature, const int64_t* seed, int64_t* indices, const Parallel& parallel);

}  // namespace vqops
