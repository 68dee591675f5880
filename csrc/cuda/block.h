// One thread block on a GPU. emulated_block.h of tests/cuda_emulated is the same on the CPU: a kernel's body is written
// once, and tests run it there.
//
// A kernel is a struct: its members are the arguments, `Shared` is its shared memory, `operator()(block, shared)` its
// body: a sequence of steps, between which only values that all threads agree on may steer it.
//     for_threads(f)           f(threadIdx.x), for registers and the thread's own memory alone
//     for_threads_sync(f)      the same, then __syncthreads()
//     for_threads_syncwarp(f)  the same, then __syncwarp(), for shared memory that one warp alone touches
//     if_any_in_warp(v, f)     f() for warps with a thread whose v is not 0 (__any_sync); no __syncthreads() in it
//     any_in_block(v)          whether any thread's v is not 0 (__syncthreads_or), which all agree on
//     registers<T>()           one T per thread, that lives across steps: r[thread]
//     shuffle_sum<L>(r)        the sum over groups of L neighbours by __shfl_xor_sync, a fixed tree, given to each of
//                              them; L = 8: distance.h's tree. shuffle_reduce<L>(r, f): with any function of two
//     shuffle_sum_each(r, s)   the same for r of L values, of which each of the neighbours is given one: s
//     cp_async                 16 bytes from global to shared memory, in a step; cp_async_commit() ends a group,
//                              cp_async_wait_sync<n>() waits for all groups but the last n, then __syncthreads()
//     ldmatrix                 four matrices of 8 x 8 float16 per warp, by the addresses of its lanes
//     mma_m16n8k16             mma.sync of each warp, by tiles of rows and codes
//     wgmma_start, wgmma_wait<n>
//                              wgmma of 64 x 128 x 64 per warpgroup and row tile, from shared memory; all but the last
//                              n are done
//     atomic_add, atomic_min, atomic_max
//     last_to_arrive(p, n)     whether this block is the last of n to come here, by a counter that starts at 0: it sees
//                              what the others wrote to global memory before
// Shared memory that another thread reads or writes in the same step must not be touched.
//
// A block may have a loader, one thread beside its workers, which are what is a block above; on sm_90a. They meet at
// barriers of shared memory (mbarrier), each with a phase that flips when all arrivals and bytes it expects are there:
//     with_loader(load, work)  load(loader) and work(workers), each by its own threads
//     each_group(f)            f(group) by each warpgroup of the workers; in it only steps that sync a warp
//     barrier_start(b, n)      n arrivals a phase. barriers_started() before any_in_block(), in which the loader takes
//                              part
//     barrier_wait(b, phase)   until this phase is over; barrier_arrive(b) by each warp of a group
//     bulk_copy(to, from, n, b), expect_bytes(b, n)
//                              by the loader: n bytes, which count as an arrival at b when all have landed
//     take_turn, give_turn     of the two groups in turn
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
//     FragmentB     code g at depths 2t, 2t + 8 of a tile, and at the same of the next
//     Accumulators  row g at codes 2t and 2t + 1, row g + 8 at the same
template <int tiles>
struct FragmentA {
    uint32_t v[tiles][4];
};
template <int tiles>
struct FragmentB {
    uint32_t v[tiles / 2][4];
};
template <int rows, int codes>
struct Accumulators {
    float v[rows][codes][4];
};

// In shared memory; between a loader and its workers.
struct Barrier {
    uint64_t state;
};

#ifdef __CUDACC__

// The bodies are empty for the host, which never calls them. workers: of a block with a loader, else 0.
template <int workers>
struct BlockOf {
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

    VQOPS_HOST_DEVICE void sync() const {
#ifdef __CUDA_ARCH__
        if constexpr (workers == 0) __syncthreads();
        else asm volatile("barrier.cta.sync.aligned 1, %0;" ::"n"(workers) : "memory");
#endif
    }

    template <class F>
    VQOPS_HOST_DEVICE void for_threads_sync(F f) const {
#ifdef __CUDA_ARCH__
        f(int(threadIdx.x));
        sync();
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

    template <class R>
    VQOPS_HOST_DEVICE bool any_in_block(R& wanted) const {
#ifdef __CUDA_ARCH__
        return __syncthreads_or(wanted.value);
#else
        return false;
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
        sync();
#endif
    }

    // c[row_tile] = or += a(group, row_tile) b^T over 64 dimensions. a and b: 64 and 128 rows of 64 float16, swizzled.
    template <int rows, class RowsOf>
    VQOPS_HOST_DEVICE void wgmma_start(Registers<Accumulators<rows, 16>>& c, RowsOf a, const uint16_t* b,
                                       bool accumulate) const {
#ifdef __CUDA_ARCH__
        wgmma_fence();
        const int g = group();
        const uint64_t codes = matrix_descriptor(uint32_t(__cvta_generic_to_shared(b)));
#pragma unroll
        for (int step = 0; step < 4; step++)
#pragma unroll
            for (int i = 0; i < rows; i++) {
                const uint32_t place = uint32_t(__cvta_generic_to_shared(a(g, i)));
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

    // words(thread)[m]: a thread's two elements of matrix m, as fragments have them. place(lane 8 m + r): row r of it.
    template <class PlaceOf, class WordsOf>
    VQOPS_HOST_DEVICE void ldmatrix(PlaceOf place, WordsOf words) const {
#ifdef __CUDA_ARCH__
        uint32_t* const w = words(int(threadIdx.x));
        const uint32_t row = uint32_t(__cvta_generic_to_shared(place(int(threadIdx.x))));
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                     : "r"(row));
#endif
    }

    // c[row_tile][code_tile] = or += a[row_tile] b[code_tile]^T, all in float16 but the sum.
    template <int rows, int codes>
    VQOPS_HOST_DEVICE void mma_m16n8k16(Registers<Accumulators<rows, codes>>& c, Registers<FragmentA<rows>>& a,
                                        Registers<FragmentB<codes>>& b, bool accumulate) const {
#ifdef __CUDA_ARCH__
        const auto each = [&](auto multiply) {
#pragma unroll
            for (int i = 0; i < rows; i++)
#pragma unroll
                for (int j = 0; j < codes; j++) multiply(c.value.v[i][j], a.value.v[i], b.value.v[j / 2] + j % 2 * 2);
        };
        if (accumulate)
            each([](float* d, const uint32_t* x, const uint32_t* y) {
                asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                    "{%0, %1, %2, %3};"
                    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                    : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
            });
        else
            each([](float* d, const uint32_t* x, const uint32_t* y) {
                asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                    "{%10, %10, %10, %10};"
                    : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                    : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]), "f"(0.0f));
            });
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

    // The loader is a warpgroup of which one thread works: registers are handed from it to the workers by warpgroups.
    template <int n, class Load, class Work>
    VQOPS_HOST_DEVICE void with_loader(Load load, Work work) const {
#ifdef __CUDA_ARCH__
        BlockOf<n> part = {index};
        if (threadIdx.x >= n) {
            registers_of_loader();
            load(part);
        } else {
            registers_of_workers();
            work(part);
        }
#endif
    }

    VQOPS_HOST_DEVICE bool is_loader() const {
#ifdef __CUDA_ARCH__
        return threadIdx.x == workers;
#else
        return false;
#endif
    }

    // Of the loader, which has no thread that wants anything.
    VQOPS_HOST_DEVICE bool any_in_block() const {
#ifdef __CUDA_ARCH__
        return __syncthreads_or(0);
#else
        return false;
#endif
    }

    template <class F>
    VQOPS_HOST_DEVICE void each_group(F f) const {
        f(*this);
    }

    VQOPS_HOST_DEVICE int group() const {
#ifdef __CUDA_ARCH__
        return __shfl_sync(0xffffffff, int(threadIdx.x) / 128, 0);  // which the compiler knows to be one for a warp
#else
        return 0;
#endif
    }

    VQOPS_HOST_DEVICE void barrier_start(Barrier& barrier, int arrivals) const {
#ifdef __CUDA_ARCH__
        if (threadIdx.x == 0) mbarrier_init(&barrier.state, arrivals);
#endif
    }

    // What threads wrote to shared memory before is visible to copies and products after the next barrier of the block.
    VQOPS_HOST_DEVICE void barriers_started() const {
#ifdef __CUDA_ARCH__
        fence_mbarrier_init();
        fence_proxy_async();
#endif
    }

    VQOPS_HOST_DEVICE void barrier_wait(Barrier& barrier, int phase) const {
#ifdef __CUDA_ARCH__
        while (!mbarrier_try_wait(&barrier.state, phase)) {
        }
#endif
    }

    VQOPS_HOST_DEVICE void barrier_arrive(Barrier& barrier) const {
#ifdef __CUDA_ARCH__
        __syncwarp();
        if (threadIdx.x % 32 == 0) mbarrier_arrive(&barrier.state);
#endif
    }

    VQOPS_HOST_DEVICE void expect_bytes(Barrier& barrier, int bytes) const {
#ifdef __CUDA_ARCH__
        mbarrier_expect(&barrier.state, bytes);
#endif
    }

    VQOPS_HOST_DEVICE void bulk_copy(void* to, const void* from, int bytes, Barrier& barrier) const {
#ifdef __CUDA_ARCH__
        cp_async_bulk(to, from, bytes, &barrier.state);
#endif
    }

    VQOPS_HOST_DEVICE void take_turn() const {
#ifdef __CUDA_ARCH__
        asm volatile("barrier.cta.sync.aligned %0, 256;" ::"r"(2 + group()) : "memory");
#endif
    }

    VQOPS_HOST_DEVICE void give_turn() const {
#ifdef __CUDA_ARCH__
        asm volatile("barrier.cta.arrive.aligned %0, 256;" ::"r"(3 - group()) : "memory");
#endif
    }
};
typedef BlockOf<0> DeviceBlock;

#endif

}  // namespace vqops::cuda
