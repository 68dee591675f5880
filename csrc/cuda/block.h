// One thread block on a GPU. emulated_block.h of tests/cuda_emulated is the same on the CPU: a kernel's body is written
// once, and tests run it there.
//
// A kernel is a struct: its members are the arguments, `Shared` is its shared memory, `operator()(block, shared)` its
// body: a sequence of steps, between which only values that all threads agree on may steer it.
//     for_threads(f)           f(threadIdx.x), for registers and the thread's own memory alone
//     for_threads_sync(f)      the same, then __syncthreads()
//     for_threads_syncwarp(f)  the same, then __syncwarp(), for shared memory that one warp alone touches
//     if_any_in_warp(v, f)     f() for warps with a thread whose v is not 0 (__any_sync); no __syncthreads() in it
//     registers<T>()           one T per thread, that lives across steps: r[thread]
//     shuffle_sum<L>(r)        the sum over groups of L neighbours by __shfl_xor_sync, a fixed tree, given to each of
//                              them; L = 8: distance.h's tree. shuffle_reduce<L>(r, f): with any function of two
//     shuffle_sum_each(r, s)   the same for r of L values, of which each of the neighbours is given one: s
//     cp_async                 16 bytes from global to shared memory, in a step; cp_async_commit() ends a group,
//                              cp_async_wait_sync<n>() waits for all groups but the last n, then __syncthreads()
//     mma_m16n8k16             mma.sync of each warp, by tiles of rows and codes
//     wgmma_start, wgmma_wait<n>
//                              wgmma of 64 x 128 x 64 per warpgroup and row tile, from shared memory; all but the last
//                              n are done
//     atomic_add, atomic_min, atomic_max
//     last_to_arrive(p, n)     whether this block is the last of n to come here, by a counter that starts at 0: it sees
//                              what the others wrote to global memory before
// Shared memory that another thread reads or writes in the same step must not be touched.
#pragma once

#include "../tensors.h"
#include "wgmma.h"

namespace vqops::cuda {

typedef unsigned long long Count;  // type of atomic counts

template <class T, int n>
struct Many {
    T v[n];
};
template <int n>
using Doubles = Many<double, n>;
template <int n>
using Floats = Many<float, n>;

// A thread's fragments of mma.m16n8k16, A of rows and B of codes. With g = lane / 4 and t = lane mod 4, two float16 per
// word, the lower one first (PTX manual, "Matrix Fragments for mma.m16n8k16"):
//     FragmentA     rows g, g + 8, g, g + 8 at depths 2t, 2t, 2t + 8, 2t + 8
//     FragmentB     code g at depths 2t, 2t + 8
//     Accumulators  row g at codes 2t and 2t + 1, row g + 8 at the same
template <int tiles>
struct FragmentA {
    uint32_t v[tiles][4];
};
template <int tiles>
struct FragmentB {
    uint32_t v[tiles][2];
};
template <int rows, int codes>
struct Accumulators {
    float v[rows][codes][4];
};

#ifdef __CUDACC__

// The bodies are empty for the host, which never calls them.
struct DeviceBlock {
    int64_t index;

    template <class T>
    struct Registers {
        T value;
        __host__ __device__ __forceinline__ T& operator[](int) { return value; }
    };

    template <class T>
    VQOPS_HOST_DEVICE Registers<T> registers() const {
        return {};
    }

    template <class F>
    VQOPS_HOST_DEVICE void for_threads_sync(F f) const {
#ifdef __CUDA_ARCH__
        f(int(threadIdx.x));
        __syncthreads();
#endif
    }

    template <class F>
    VQOPS_HOST_DEVICE void for_threads(F f) const {
#ifdef __CUDA_ARCH__
        f(int(threadIdx.x));
#endif
    }

    template <int L, class T>
    VQOPS_HOST_DEVICE void shuffle_sum(Registers<T>& r) const {
        shuffle_reduce<L>(r, [](auto a, auto b) { return a + b; });
    }

    template <int L, class T, class F>
    VQOPS_HOST_DEVICE void shuffle_reduce(Registers<T>& r, F f) const {
#ifdef __CUDA_ARCH__
#pragma unroll
        for (int offset = L / 2; offset > 0; offset /= 2)
            r.value = f(r.value, __shfl_xor_sync(0xffffffff, r.value, offset));
#endif
    }

    template <int L, class T, int n, class F>
    VQOPS_HOST_DEVICE void shuffle_reduce(Registers<Many<T, n>>& r, F f) const {
#ifdef __CUDA_ARCH__
#pragma unroll
        for (int i = 0; i < n; i++)
#pragma unroll
            for (int offset = L / 2; offset > 0; offset /= 2)
                r.value.v[i] = f(r.value.v[i], __shfl_xor_sync(0xffffffff, r.value.v[i], offset));
#endif
    }

    // At each step a thread gives away the half of its sums that others of its group are to have.
    template <class T, int L>
    VQOPS_HOST_DEVICE void shuffle_sum_each(Registers<Many<T, L>>& r, Registers<T>& sum) const {
#ifdef __CUDA_ARCH__
#pragma unroll
        for (int offset = L / 2; offset > 0; offset /= 2)
#pragma unroll
            for (int i = 0; i < offset; i++) {
                T &low = r.value.v[i], &high = r.value.v[i + offset];
                const bool upper = threadIdx.x & offset;
                const T given = upper ? low : high, kept = upper ? high : low;
                low = kept + __shfl_xor_sync(0xffffffff, given, offset);
            }
        sum.value = r.value.v[0];
#endif
    }

    template <class F>
    VQOPS_HOST_DEVICE void for_threads_syncwarp(F f) const {
#ifdef __CUDA_ARCH__
        f(int(threadIdx.x));
        __syncwarp();
#endif
    }

    template <class F>
    VQOPS_HOST_DEVICE void if_any_in_warp(Registers<int32_t>& wanted, F f) const {
#ifdef __CUDA_ARCH__
        if (__any_sync(0xffffffff, wanted.value)) f();
#endif
    }

    VQOPS_HOST_DEVICE void cp_async(void* to, const void* from) const {
#ifdef __CUDA_ARCH__
        const uint32_t place = uint32_t(__cvta_generic_to_shared(to));
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(from) : "memory");
#endif
    }

    VQOPS_HOST_DEVICE void cp_async_commit() const {
#ifdef __CUDA_ARCH__
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    }

    // for_wgmma: what threads wrote to shared memory before is visible to the wgmma_start that follows.
    template <int n, bool for_wgmma>
    VQOPS_HOST_DEVICE void cp_async_wait_sync() const {
#ifdef __CUDA_ARCH__
        asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
        if constexpr (for_wgmma) fence_proxy_async();
        __syncthreads();
#endif
    }

    // c[row_tile] = or += a(thread, row_tile) b^T over 64 dimensions. a and b: 64 and 128 rows of 64 float16, swizzled.
    template <int rows, class RowsOf>
    VQOPS_HOST_DEVICE void wgmma_start(Registers<Accumulators<rows, 16>>& c, RowsOf a, const uint16_t* b,
                                       bool accumulate) const {
#ifdef __CUDA_ARCH__
        wgmma_fence();
        const uint64_t codes = matrix_descriptor(uint32_t(__cvta_generic_to_shared(b)));
#pragma unroll
        for (int step = 0; step < 4; step++)
#pragma unroll
            for (int i = 0; i < rows; i++) {
                const uint32_t place = uint32_t(__cvta_generic_to_shared(a(int(threadIdx.x), i)));
                wgmma_m64n128k16(&c.value.v[i][0][0], matrix_descriptor(place) + step * kDescriptorStep,
                                 codes + step * kDescriptorStep, accumulate || step > 0);
            }
        wgmma_commit_group();
#endif
    }

    template <int n, int rows>
    VQOPS_HOST_DEVICE void wgmma_wait(Registers<Accumulators<rows, 16>>& c) const {
#ifdef __CUDA_ARCH__
        wgmma_wait_group<n>();
        if constexpr (n == 0) {
#pragma unroll
            for (int i = 0; i < rows; i++) hold_registers(&c.value.v[i][0][0]);
        }
#endif
    }

    // c[row_tile][code_tile] += a[row_tile] b[code_tile]^T, all in float16 but the sum.
    template <int rows, int codes>
    VQOPS_HOST_DEVICE void mma_m16n8k16(Registers<Accumulators<rows, codes>>& c, Registers<FragmentA<rows>>& a,
                                        Registers<FragmentB<codes>>& b) const {
#ifdef __CUDA_ARCH__
#pragma unroll
        for (int i = 0; i < rows; i++)
#pragma unroll
            for (int j = 0; j < codes; j++) {
                float* const d = c.value.v[i][j];
                const uint32_t *const x = a.value.v[i], *const y = b.value.v[j];
                asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                    "{%0, %1, %2, %3};"
                    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                    : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
            }
#endif
    }

    template <class T>
    VQOPS_HOST_DEVICE T atomic_add(T* place, T value) const {
#ifdef __CUDA_ARCH__
        return atomicAdd(place, value);
#else
        return value;
#endif
    }

    VQOPS_HOST_DEVICE void atomic_min(int32_t* place, int32_t value) const {
#ifdef __CUDA_ARCH__
        atomicMin(place, value);
#endif
    }

    VQOPS_HOST_DEVICE void atomic_max(int32_t* place, int32_t value) const {
#ifdef __CUDA_ARCH__
        atomicMax(place, value);
#endif
    }

    VQOPS_HOST_DEVICE bool last_to_arrive(int32_t* arrived, int32_t blocks) const {
#ifdef __CUDA_ARCH__
        __syncthreads();
        bool last = false;
        if (threadIdx.x == 0) {
            __threadfence();
            last = atomicAdd(arrived, 1) == blocks - 1;
            __threadfence();
        }
        return __syncthreads_or(last);
#else
        return false;
#endif
    }
};

#endif

}  // namespace vqops::cuda
