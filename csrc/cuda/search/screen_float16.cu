#include "../launch.h"
#include "../passes.h"

namespace vqops::cuda {

template bool screen(const Stream&, const SearchInputs<Float16>&, const SearchOutputs&, const Preparation&,
                     const Abilities&);

}  // namespace vqops::cuda
