// The kernels that the search of float32 takes on a GPU, a line for each and each depth as stored, of what their machine
// code does not tell. Arguments: shared memory of a block, and how wgmma is used, 0 for not at all.
#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <typeinfo>

#include "../../csrc/cuda/search.h"

using namespace vqops::cuda;

int main(int, char** arguments) {
    Abilities abilities = {};
    abilities.shared_bytes = size_t(std::atoll(arguments[1])), abilities.multiprocessors = 1;
    abilities.wgmma = decltype(abilities.wgmma)(std::atoi(arguments[2]));
    const auto line = [](int64_t depths, const auto& kernel) {
        typedef std::decay_t<decltype(kernel)> Kernel;
        const char* const symbol = typeid(Kernel).name();
        char* const name = abi::__cxa_demangle(symbol, nullptr, nullptr, nullptr);
        const size_t scores = sizeof(typename Kernel::Scores::Products) / sizeof(float);  // of a thread and tile
        std::printf("%s\t%s\t%d\t%d\t%zu\t%zu\n", symbol, name, int(depths), Kernel::kThreads, scores,
                    kernel.shared_bytes());
        std::free(name);
    };
    const auto each = [&](const auto& take) {
        for (int64_t depths = 16, found = true; found; depths = padded(depths + 1)) {
            SearchInputs<float> in = {};
            in.N = in.K = 1, in.D = depths;
            found = take(in, [&](const auto& kernel) { line(depths, kernel); });
        }
    };
    each([&](const auto& in, const auto& body) { return with_nearest_screen(in, {}, {}, abilities, body); });
    each([&](const auto& in, const auto& body) { return with_topk_screen(in, {}, {}, abilities, body); });
}
