// The Python module `vqops._C`: importing it registers the kernels, its attributes say how they were built.

#include <cstdint>
#include <stdexcept>
#include <string>

static const std::string oldest_torch =
    std::to_string(TORCH_TARGET_VERSION >> 56) + "." + std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff);
#undef TORCH_TARGET_VERSION  // torch 2.10 lets nobody who has it include its pybind11; no tensor passes through here

#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

extern "C" const char* vqops_cpu_compiled();         // the instruction sets in this binary, fastest first
extern "C" const char* vqops_cpu_instruction_set();  // the one that this process uses
extern "C" bool vqops_cpu_rounds();                  // whether it screens in bfloat16
extern "C" double vqops_cpu_multiply_add_rate();     // per second, without loads: its ceiling, measured now

// Bytes of a prepared head; that of CUDA is null in a binary without CUDA.
extern "C" int64_t vqops_cpu_packed_bytes(int64_t K, int64_t D);
extern "C" __attribute__((weak)) int64_t vqops_cuda_packed_bytes(int64_t K, int64_t D);

PYBIND11_MODULE(_C, m) {
    m.attr("instruction_sets") = vqops_cpu_compiled();
    m.def("instruction_set", &vqops_cpu_instruction_set);
    m.def("screens_in_bfloat16", &vqops_cpu_rounds);
    m.def("multiply_add_rate", &vqops_cpu_multiply_add_rate);
    m.def("packed_bytes", [](const std::string& device, int64_t H, int64_t K, int64_t D) {
        const auto bytes = device == "cuda" ? vqops_cuda_packed_bytes : vqops_cpu_packed_bytes;
        if (!bytes) throw std::invalid_argument("packed_bytes: vqops is built without CUDA");
        return H * bytes(K, D);
    });
    m.attr("cuda") = VQOPS_CUDA_BUILD;  // toolkit and architectures, or why it is left out
    m.attr("cuda_sources") = VQOPS_CUDA_SOURCES;  // a hash of them, empty without CUDA
#if defined(__clang__)
    m.attr("compiler") = __VERSION__;
#else
    m.attr("compiler") = "GCC " __VERSION__;
#endif
    m.attr("torch") = TORCH_VERSION;
    m.attr("oldest_torch") = oldest_torch;
}
