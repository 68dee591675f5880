#include "../launch.h"
#include "../passes.h"

namespace vqops::cuda {

template void scan(const Stream&, const SearchInputs<float>&, const SearchOutputs&, bool, int64_t);
template void scan(const Stream&, const SearchInputs<double>&, const SearchOutputs&, bool, int64_t);
template void scan(const Stream&, const SearchInputs<Float16>&, const SearchOutputs&, bool, int64_t);
template void scan(const Stream&, const SearchInputs<BFloat16>&, const SearchOutputs&, bool, int64_t);

}  // namespace vqops::cuda
