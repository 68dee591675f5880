// What sm_90a alone has: the products of a warpgroup, names and layouts as in the PTX manual, "Asynchronous Warpgroup
// Level Matrix Instructions"; and what a block with a loader needs, "Parallel Synchronization and Communication
// Instructions: mbarrier", "cp.async.bulk" and "setmaxnreg".
#pragma once

#include "../host_device.h"

namespace vqops::cuda {

// A matrix in shared memory: rows of 128 bytes with the 128-byte swizzle, K-major. Bits 0 to 13: address,
// 16 to 29: leading offset, of no meaning with this swizzle; 32 to 45: from 8 rows to the next 8; 62 and 63: swizzle.
// Addresses and offsets in units of 16 bytes; the first row lies at a multiple of 1024.
VQOPS_HOST_DEVICE uint64_t matrix_descriptor(uint32_t address) {
    return uint64_t(address >> 4 & 0x3fff) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
constexpr uint64_t kDescriptorStep = 2;  // the next 16 dimensions, 32 bytes on

#if VQOPS_WGMMA && defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "sm_90 beside or in place of sm_90a: a Hopper GPU would run kernels without wgmma"
#endif

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr bool kHasWgmma = true;

__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int n>
__device__ __forceinline__ void wgmma_wait_group() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
}

#define VQOPS_FLOATS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define VQOPS_FLOATS_16(d, i) \
    VQOPS_FLOATS_4(d, i), VQOPS_FLOATS_4(d, i + 4), VQOPS_FLOATS_4(d, i + 8), VQOPS_FLOATS_4(d, i + 12)
#define VQOPS_FLOATS_64(d) \
    VQOPS_FLOATS_16(d, 0), VQOPS_FLOATS_16(d, 16), VQOPS_FLOATS_16(d, 32), VQOPS_FLOATS_16(d, 48)

// d = or += a b^T for 64 rows, 128 codes and 16 dimensions; d as Accumulators<1, 16>.
__device__ __forceinline__ void wgmma_m64n128k16(float* d, uint64_t a, uint64_t b, bool accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1, 0, 0;\n"
        "}\n"
        : VQOPS_FLOATS_64(d)
        : "l"(a), "l"(b), "r"(int32_t(accumulate)));
}

// Nobody reads the sums before this.
__device__ __forceinline__ void hold_registers(float* d) { asm volatile("" : VQOPS_FLOATS_64(d)::"memory"); }

#undef VQOPS_FLOATS_4
#undef VQOPS_FLOATS_16
#undef VQOPS_FLOATS_64

// 384 threads begin with 168 registers each: 128 of them keep 24, 256 have 240.
__device__ __forceinline__ void registers_of_loader() { asm volatile("setmaxnreg.dec.sync.aligned.u32 24;"); }
__device__ __forceinline__ void registers_of_workers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 240;"); }

__device__ __forceinline__ uint32_t in_shared(const void* place) { return uint32_t(__cvta_generic_to_shared(place)); }

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(in_shared(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, int phase) {
    uint32_t over;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(over)
        : "r"(in_shared(barrier)), "r"(phase)
        : "memory");
    return over != 0;
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(in_shared(barrier)) : "memory");
}
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(in_shared(barrier)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void cp_async_bulk(void* to, const void* from, int bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     in_shared(to)),
                 "l"(from), "r"(bytes), "r"(in_shared(barrier))
                 : "memory");
}

#elif defined(__CUDACC__)

constexpr bool kHasWgmma = false;

__device__ __forceinline__ void fence_proxy_async() {}
__device__ __forceinline__ void wgmma_fence() {}
__device__ __forceinline__ void wgmma_commit_group() {}
template <int n>
__device__ __forceinline__ void wgmma_wait_group() {}
__device__ __forceinline__ void wgmma_m64n128k16(float*, uint64_t, uint64_t, bool) {}
__device__ __forceinline__ void hold_registers(float*) {}
__device__ __forceinline__ void registers_of_loader() {}
__device__ __forceinline__ void registers_of_workers() {}
__device__ __forceinline__ void mbarrier_init(uint64_t*, int) {}
__device__ __forceinline__ void fence_mbarrier_init() {}
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t*, int) { return true; }
__device__ __forceinline__ void mbarrier_arrive(uint64_t*) {}
__device__ __forceinline__ void mbarrier_expect(uint64_t*, int) {}
__device__ __forceinline__ void cp_async_bulk(void*, const void*, int, uint64_t*) {}

#endif

}  // namespace vqops::cuda
