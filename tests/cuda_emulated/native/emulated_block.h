// A block of csrc/cuda/block.h on the CPU. The threads of a step run one after another, in ascending or in descending
// order: a result that depends on the order is a race.
#pragma once

#include <functional>
#include <type_traits>
#include <vector>

#include "../../../csrc/cuda/block.h"
#include "emulated_roles.h"

namespace vqops::cuda {

struct EmulatedBlock {
    int64_t index;
    int threads;
    bool descending;
    int adder;  // products that the tensor cores add at once
    const unsigned char* shared;  // address 0 of shared memory
    int64_t* additions = nullptr;  // counts the atomic ones
    std::vector<bool> idle = std::vector<bool>(threads / 32 + 1);  // warps, in if_any_in_warp()
    // Copies and products that are not waited for: a copy lands, and a product of a descending block is made, as late
    // as possible; what is read before or overwritten after shows.
    struct Copy {
        void* to;
        const void* from;
    };
    std::vector<std::vector<Copy>> copies = {{}};
    std::vector<std::function<void()>> products = {};
    // Of a block with a loader: these threads are meant, of a group or of all workers.
    int begin = 0, end = threads;
    Roles* roles = nullptr;

    template <class T>
    struct Registers {
        std::vector<T> values;
        T& operator[](int thread) { return values[thread]; }
    };

    template <class T>
    Registers<T> registers() const {
        return {std::vector<T>(threads)};
    }

    template <class F>
    void for_threads_sync(F f) const {
        for (int i = 0; i < end - begin; i++) {
            const int t = descending ? end - 1 - i : begin + i;
            if (!idle[t / 32]) f(t);
        }
    }

    template <class F>
    void for_threads(F f) const {
        for_threads_sync(f);
    }

    template <class F>
    void for_threads_syncwarp(F f) const {
        for_threads_sync(f);
    }

    template <class F>
    void if_any_in_warp(const Registers<int32_t>& wanted, F f) {
        const std::vector<bool> before = idle;
        idle.assign(idle.size(), true);
        for (int t = begin; t < end; t++)
            if (wanted.values[t] && !before[t / 32]) idle[t / 32] = false;
        f();
        idle = before;
    }

    bool any_in_block(const Registers<int32_t>& wanted) const {
        bool any = false;
        for (const int32_t value : wanted.values) any = any || value;
        return roles ? roles->any_of_all(any) : any;
    }

    // The loader's.
    bool any_in_block() const { return roles->any_of_all(false); }
    bool is_loader() const { return true; }

    // A copy lands, in a descending block, when nobody can go on without it.
    template <int n, class Load, class Work>
    void with_loader(Load load, Work work) {
        Roles together(descending);
        EmulatedBlock workers = *this, loader = *this;
        workers.roles = loader.roles = &together;
        loader.begin = loader.end = 0;
        together.add([&] { load(loader); });
        together.add([&] { work(workers); });
        together.run();
    }

    template <class F>
    void each_group(F f) {
        std::vector<EmulatedBlock> groups((end - begin) / 128, *this);
        std::vector<std::function<void()>> bodies;
        for (size_t g = 0; g < groups.size(); g++) {
            groups[g].begin = begin + int(g) * 128, groups[g].end = groups[g].begin + 128;
            bodies.push_back([&f, &group = groups[g]] { f(group); });
        }
        roles->run_beside(bodies);
    }

    int group() const { return begin / 128; }
    void barrier_start(Barrier& barrier, int arrivals) const { EmulatedBarrier::start(barrier, arrivals); }
    void barriers_started() const {}
    void barrier_wait(Barrier& barrier, int phase) const {
        roles->wait([&] { return EmulatedBarrier::is_over(barrier, phase); });
    }
    void barrier_arrive(Barrier& barrier) const { EmulatedBarrier::arrive(barrier, (end - begin) / 32, 0); }
    void expect_bytes(Barrier& barrier, int bytes) const { EmulatedBarrier::arrive(barrier, 1, bytes); }
    void bulk_copy(void* to, const void* from, int bytes, Barrier& barrier) const {
        roles->copy(to, from, bytes, barrier);
    }
    void take_turn() const { roles->take_turn(group()); }
    void give_turn() const { roles->give_turn(1 - group()); }

    void cp_async(void* to, const void* from) {
        memset(to, 0xff, 16);
        copies.back().push_back({to, from});
    }

    void cp_async_commit() { copies.emplace_back(); }

    template <int n, bool for_wgmma>
    void cp_async_wait_sync() {
        while (copies.size() > n + 1) {
            for (const Copy& copy : copies.front()) memcpy(copy.to, copy.from, 16);
            copies.erase(copies.begin());
        }
    }

    // Row r of a matrix as the tensor cores find it by its descriptor, 16 dimensions.
    void take_row(uint64_t descriptor, int r, double* row) const {
        const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
        for (int i = 0; i < 16; i++) {
            const uint32_t address = start + r / 8 * stride + r % 8 * 128 + 2 * i;
            const uint32_t swizzle = descriptor >> 62 == 1 ? address >> 7 & 7 : 0;
            uint16_t bits;
            memcpy(&bits, shared + (address ^ swizzle << 4), 2);
            row[i] = real(Float16{bits});
        }
    }

    template <int rows, class RowsOf>
    void wgmma_start(Registers<Accumulators<rows, 16>>& c, RowsOf a, const uint16_t* b, bool accumulate) {
        const auto address = [&](const void* p) { return uint32_t(static_cast<const unsigned char*>(p) - shared); };
        std::vector<uint32_t> places;
        for (int t = begin; t < end; t += 128)
            for (int i = 0; i < rows; i++) places.push_back(address(a(t / 128, i)));
        const uint64_t codes = matrix_descriptor(address(b));
        const auto product = [this, first = begin, &c, places, codes, accumulate] {
            for (size_t p = 0; p < places.size(); p++)
                for (int step = 0; step < 4; step++) {
                    const uint64_t lefts = matrix_descriptor(places[p]) + step * kDescriptorStep;
                    double left[64][16], right[128][16];
                    for (int r = 0; r < 64; r++) take_row(lefts, r, left[r]);
                    for (int r = 0; r < 128; r++) take_row(codes + step * kDescriptorStep, r, right[r]);
                    for (int t = 0; t < 128; t++) {
                        auto& v = c.values[first + p / rows * 128 + t].v[p % rows];
                        for (int j = 0; j < 16; j++)
                            for (int e = 0; e < 4; e++) {
                                const double* const x = left[t / 32 * 16 + t % 32 / 4 + 8 * (e / 2)];
                                const double* const y = right[8 * j + 2 * (t % 4) + e % 2];
                                float sum = accumulate || step > 0 ? v[j][e] : 0;
                                for (int d = 0; d < 16; d += adder) sum = add_truncated(sum, x + d, y + d);
                                v[j][e] = sum;
                            }
                    }
                }
        };
        if (descending) products.push_back(product);
        else product();
    }

    template <int n, int rows>
    void wgmma_wait(Registers<Accumulators<rows, 16>>&) {
        while (products.size() > n) {
            products.front()();
            products.erase(products.begin());
        }
    }

    // A step of the block and not of its threads. Blocks run one after another.
    bool last_to_arrive(int32_t* arrived, int32_t blocks) const { return ++*arrived == blocks; }

    template <int L, class T>
    void shuffle_sum(Registers<T>& r) const {
        shuffle_reduce<L>(r, [](auto a, auto b) { return a + b; });
    }

    template <int L, class T, class F>
    void shuffle_reduce(Registers<T>& r, F f) const {
        for (int offset = L / 2; offset > 0; offset /= 2) {
            const std::vector<T> old = r.values;
            for (int t = begin; t < end; t++) r.values[t] = f(old[t], old[t ^ offset]);
        }
    }

    template <class T, int L>
    void shuffle_sum_each(Registers<Many<T, L>>& r, Registers<T>& sum) const {
        for (int offset = L / 2; offset > 0; offset /= 2) {
            const std::vector<Many<T, L>> old = r.values;
            for (int t = begin; t < end; t++)
                for (int i = 0; i < offset; i++) {
                    const int own = t & offset ? i + offset : i;  // what a partner keeps the other thread gives away
                    r.values[t].v[i] = old[t].v[own] + old[t ^ offset].v[own];
                }
        }
        for (int t = begin; t < end; t++) sum.values[t] = r.values[t].v[0];
    }

    template <int L, class T, int n, class F>
    void shuffle_reduce(Registers<Many<T, n>>& r, F f) const {
        for (int offset = L / 2; offset > 0; offset /= 2) {
            const std::vector<Many<T, n>> old = r.values;
            for (int t = begin; t < end; t++)
                for (int i = 0; i < n; i++) r.values[t].v[i] = f(old[t].v[i], old[t ^ offset].v[i]);
        }
    }

    // As the PTX manual has it: lane 8 m + r gives the place of row r of matrix m, a multiple of 16; lane 4 r + w takes
    // elements 2 w and 2 w + 1 of row r.
    template <class PlaceOf, class WordsOf>
    void ldmatrix(PlaceOf place, WordsOf words) const {
        for (int warp = begin; warp < end; warp += 32) {
            uint16_t given[32][8];
            for (int lane = 0; lane < 32; lane++) {
                const void* const row = place(warp + lane);
                if (reinterpret_cast<uintptr_t>(row) % 16 == 0) memcpy(given[lane], row, 16);
                else memset(given[lane], 0xff, 16);
            }
            for (int lane = 0; lane < 32; lane++)
                for (int m = 0; m < 4; m++) memcpy(words(warp + lane) + m, given[8 * m + lane / 4] + lane % 4 * 2, 4);
        }
    }

    template <int rows, int codes>
    void mma_m16n8k16(Registers<Accumulators<rows, codes>>& c, const Registers<FragmentA<rows>>& a,
                      const Registers<FragmentB<codes>>& b, bool accumulate) const {
        const auto half = [](uint32_t word, int place) { return double(real(Float16{uint16_t(word >> 16 * place)})); };
        for (int warp = begin; warp < end; warp += 32)
            for (int i = 0; i < rows; i++)
                for (int j = 0; j < codes; j++) {
                    double left[16][16], right[8][16];
                    for (int lane = 0; lane < 32; lane++)
                        for (int place = 0; place < 2; place++) {
                            const int g = lane / 4, t = 2 * (lane % 4) + place;
                            const uint32_t* const x = a.values[warp + lane].v[i];
                            const uint32_t* const y = b.values[warp + lane].v[j / 2] + j % 2 * 2;
                            left[g][t] = half(x[0], place), left[g + 8][t] = half(x[1], place);
                            left[g][t + 8] = half(x[2], place), left[g + 8][t + 8] = half(x[3], place);
                            right[g][t] = half(y[0], place), right[g][t + 8] = half(y[1], place);
                        }
                    for (int lane = 0; lane < 32; lane++)
                        for (int e = 0; e < 4; e++) {
                            float& sum = c.values[warp + lane].v[i][j][e];
                            const double *x = left[lane / 4 + 8 * (e / 2)], *y = right[2 * (lane % 4) + e % 2];
                            if (!accumulate) sum = 0;
                            for (int d = 0; d < 16; d += adder) sum = add_truncated(sum, x + d, y + d);
                        }
                }
    }

    // sum + x.y as tensor cores are modelled in exactness.md: every term is cut to the last bit of a float32 as large
    // as the largest one, and the sum of what is left is cut to float32.
    float add_truncated(float sum, const double* x, const double* y) const {
        double largest = std::fabs(double(sum));
        for (int d = 0; d < adder; d++) largest = std::fmax(largest, std::fabs(x[d] * y[d]));
        if (!(largest > 0 && std::isfinite(largest))) return float(sum + 0.0);
        const double unit = std::ldexp(1.0, std::ilogb(largest) - 23);
        double total = std::trunc(sum / unit);
        for (int d = 0; d < adder; d++) total += std::trunc(x[d] * y[d] / unit);
        total *= unit;
        float cut = float(total);
        if (std::fabs(double(cut)) > std::fabs(total)) cut = std::nextafter(cut, 0.0f);
        return cut;
    }

    // atomicAdd in a GPU's memory takes float32 below 2^-126 for 0 (PTX manual, "atom").
    template <class T>
    static T flushed(T value) {
        if constexpr (std::is_same_v<T, float>)
            if (std::fabs(value) < 0x1p-126f) return 0;
        return value;
    }

    template <class T>
    T atomic_add(T* place, T value) const {
        const T old = *place;
        *place = flushed(flushed(old) + flushed(value));
        if (additions) ++*additions;
        return old;
    }

    void atomic_min(int32_t* place, int32_t value) const { *place = *place < value ? *place : value; }
    void atomic_max(int32_t* place, int32_t value) const { *place = *place > value ? *place : value; }
};

}  // namespace vqops::cuda
