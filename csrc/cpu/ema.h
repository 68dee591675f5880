// The exponential moving average of a codebook, one head.
#pragma once

#include "instructions.h"
#include "parallel.h"

namespace vqops {

void ema_update(const EmaHead& head, const Parallel& parallel);

}  // namespace vqops
