// The Python module `vqops._C`: importing it registers the kernels, its attributes say how they were built.

#include <string>

static const std::string oldest_torch =
    std::to_string(TORCH_TARGET_VERSION >> 56) + "." + std::to_string(TORCH_TARGET_VERSION >> 48 & 0xff);
#undef TORCH_TARGET_VERSION  // torch 2.10 lets nobody who has it include its pybind11; no tensor passes through here

#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

extern "C" const char* vqops_cpu_compiled();         // the instruction sets in this binary, fastest first
extern "C" const char* vqops_cpu_instruction_set();  // the one that this process uses
extern "C" bool vqops_cpu_pairs();                   // whether it screens in bfloat16
extern "C" double vqops_cpu_multiply_add_rate();     // a second, without loads: its ceiling, measured now

PYBIND11_MODULE(_C, m) {
    m.attr("instruction_sets") = vqops_cpu_compiled();
    m.def("instruction_set", &vqops_cpu_instruction_set);
    m.def("screens_in_bfloat16", &vqops_cpu_pairs);
    m.def("multiply_add_rate", &vqops_cpu_multiply_add_rate);
    m.attr("cuda") = VQOPS_CUDA_BUILD;  // toolkit and architectures, or why it is left out
#if defined(__clang__)
    m.attr("compiler") = __VERSION__;
#else
    m.attr("compiler") = "GCC " __VERSION__;
#endif
    m.attr("torch") = TORCH_VERSION;
    m.attr("oldest_torch") = oldest_torch;
}
