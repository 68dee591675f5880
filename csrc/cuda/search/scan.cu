#include "../launch.h"
#include "../passes.h"

namespace vqops::cuda {

template void scan(const Stream&, const SearchInputs<float>&, const SearchOutputs&, bool);
template void scan(const Stream&, const SearchInputs<double>&, const SearchOutputs&, bool);
template void scan(const Stream&, const SearchInputs<Float16>&, const SearchOutputs&, bool);
template void scan(const Stream&, const SearchInputs<BFloat16>&, const SearchOutputs&, bool);

}  // namespace vqops::cuda
