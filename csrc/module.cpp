// The Python module `vqops._C`: importing it registers the kernels, its attributes say how they were built.

#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <string>

extern "C" const char* vqops_cpu_compiled();         // the instruction sets in this binary, widest first
extern "C" const char* vqops_cpu_instruction_set();  // the one that this process uses

PYBIND11_MODULE(_C, m) {
    m.attr("instruction_sets") = vqops_cpu_compiled();
    m.def("instruction_set", &vqops_cpu_instruction_set);
    m.attr("cuda") = bool(VQOPS_CUDA);
    m.attr("cuda_note") = VQOPS_CUDA_NOTE;
#if defined(__clang__)
    m.attr("compiler") = __VERSION__;
#else
    m.attr("compiler") = "GCC " __VERSION__;
#endif
    m.attr("torch_built_with") = TORCH_VERSION;
    m.attr("torch_needed") =
        std::to_string(TORCH_TARGET_VERSION >> 56) + "." + std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff);
}
