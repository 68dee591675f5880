// In place of the CPU kernels: what csrc/module.cpp asks them, so that a build takes seconds.
#include <cstdint>

extern "C" const char* vqops_cpu_compiled() { return "stub"; }
extern "C" const char* vqops_cpu_instruction_set() { return "stub"; }
extern "C" bool vqops_cpu_rounds() { return false; }
extern "C" double vqops_cpu_multiply_add_rate() { return 0; }
extern "C" int64_t vqops_cpu_packed_bytes(int64_t, int64_t) { return 0; }
