// The roles of a block with a loader, on the CPU: each runs until it waits for another one, then the next does.
// Ascending, the loader goes first and a copy lands at once; descending, it goes last, and a copy lands when all wait:
// the last one first, since copies have no order.
#pragma once

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#include "../../../csrc/cuda/block.h"

namespace vqops::cuda {

[[noreturn]] inline void fail(const char* why) {
    std::fprintf(stderr, "emulated block: %s\n", why);
    std::abort();
}

// What is in the 8 bytes of a barrier.
struct EmulatedBarrier {
    uint8_t expected, missing;  // arrivals
    uint16_t phase;
    int32_t bytes;  // missing

    static void start(Barrier& barrier, int arrivals) {
        put(barrier, {uint8_t(arrivals), uint8_t(arrivals), 0, 0});
    }
    static void arrive(Barrier& barrier, int arrivals, int bytes) {
        EmulatedBarrier state = get(barrier);
        if (arrivals > state.missing) fail("more arrivals than a barrier expects");
        state.missing = uint8_t(state.missing - arrivals), state.bytes += bytes;
        put(barrier, state);
    }
    static bool is_over(const Barrier& barrier, int phase) { return get(barrier).phase % 2 != phase; }

private:
    static EmulatedBarrier get(const Barrier& barrier) {
        EmulatedBarrier state;
        memcpy(&state, &barrier, sizeof(Barrier));
        return state;
    }
    static void put(Barrier& barrier, EmulatedBarrier state) {
        if (state.missing == 0 && state.bytes == 0) state.missing = state.expected, state.phase ^= 1;
        memcpy(&barrier, &state, sizeof(Barrier));
    }
};
static_assert(sizeof(EmulatedBarrier) == sizeof(Barrier));

class Roles {
public:
    explicit Roles(bool descending) : descending_(descending) {}

    void add(std::function<void()> body) { fibers_.push_back(std::make_unique<Fiber>(std::move(body))); }

    // All of them, to the end.
    void run() {
        while (any_left()) {
            bool moved = false;
            for (size_t i = 0; i < fibers_.size(); i++) {
                Fiber& fiber = *fibers_[descending_ ? fibers_.size() - 1 - i : i];
                if (fiber.done || (fiber.until && !fiber.until())) continue;
                moved = true;
                resume(fiber);
            }
            if (moved) continue;
            if (copies_.empty()) fail("all threads of a block wait for each other");
            land(copies_.back());
            copies_.pop_back();
        }
        if (!copies_.empty()) fail("a copy is under way when its block ends");
        if (turns_[0] || turns_[1]) fail("a turn is given that nobody takes");
    }

    // Others that a role starts and waits for.
    void run_beside(const std::vector<std::function<void()>>& bodies) {
        const size_t first = fibers_.size();
        for (const auto& body : bodies) add(body);
        wait([&] {
            for (size_t i = first; i < first + bodies.size(); i++)
                if (!fibers_[i]->done) return false;
            return true;
        });
    }

    void wait(std::function<bool()> until) {
        if (until()) return;
        Fiber& fiber = *running_;
        fiber.until = std::move(until);
        swapcontext(&fiber.context, &main_);
        fiber.until = nullptr;
    }

    bool any_of_all(bool any) {  // of two roles
        any_ = any_ || any;
        arrived_++;
        wait([this] { return arrived_ % 2 == 0; });
        return any_;
    }

    void take_turn(int group) {
        wait([this, group] { return turns_[group] > 0; });
        turns_[group]--;
    }
    void give_turn(int group) {
        if (turns_[group]++) fail("a turn is given that the group has already");
    }

    void copy(void* to, const void* from, int bytes, Barrier& barrier) {
        if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16)
            fail("a copy is not of 16 bytes");
        const Copy copy = {to, from, bytes, &barrier};
        memset(to, 0xff, size_t(bytes));
        if (descending_) copies_.push_back(copy);
        else land(copy);
    }

private:
    struct Fiber {
        explicit Fiber(std::function<void()> f) : body(std::move(f)), stack(1 << 20) {}
        std::function<void()> body;
        std::function<bool()> until;
        std::vector<char> stack;
        ucontext_t context;
        bool begun = false, done = false;
    };
    struct Copy {
        void* to;
        const void* from;
        int bytes;
        Barrier* barrier;
    };

    static void land(const Copy& copy) {
        memcpy(copy.to, copy.from, size_t(copy.bytes));
        EmulatedBarrier::arrive(*copy.barrier, 0, -copy.bytes);
    }

    void resume(Fiber& fiber) {
        running_ = &fiber;
        if (!fiber.begun) {
            fiber.begun = true;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = fiber.stack.size();
            fiber.context.uc_link = &main_;
            const uintptr_t self = reinterpret_cast<uintptr_t>(&fiber);
            makecontext(&fiber.context, reinterpret_cast<void (*)()>(enter), 2, unsigned(self >> 32), unsigned(self));
        }
        swapcontext(&main_, &fiber.context);
    }

    static void enter(unsigned high, unsigned low) {
        Fiber& fiber = *reinterpret_cast<Fiber*>(uintptr_t(high) << 32 | low);
        fiber.body();
        fiber.done = true;
    }

    bool any_left() const {
        for (const auto& fiber : fibers_)
            if (!fiber->done) return true;
        return false;
    }

    bool descending_, any_ = false;
    int arrived_ = 0, turns_[2] = {0, 0};
    std::vector<std::unique_ptr<Fiber>> fibers_;
    std::vector<Copy> copies_;
    Fiber* running_ = nullptr;
    ucontext_t main_;
};

}  // namespace vqops::cuda
