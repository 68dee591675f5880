#include "../launch.h"
#include "../passes.h"

namespace vqops::cuda {

template bool screen_topk(const Stream&, const SearchInputs<BFloat16>&, const SearchOutputs&, const Preparation&,
                          const Abilities&);

}  // namespace vqops::cuda
