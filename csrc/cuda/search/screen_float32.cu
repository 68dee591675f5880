#include "../launch.h"
#include "../passes.h"

namespace vqops::cuda {

template bool screen(const Stream&, const SearchInputs<float>&, const SearchOutputs&, const Preparation&,
                     const Abilities&);

}  // namespace vqops::cuda
