// Parallel loops, independent of who runs the threads.
#pragma once

#include <cstdint>
#include <functional>

namespace vqops {

struct Parallel {
    int threads;
    // Calls body(begin, end) on ranges that cover [0, count), at most one range per thread.
    std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>& body)> run;

    // A range at a time, for equal work.
    void over(int64_t count, const std::function<void(int64_t, int64_t)>& body) const {
        if (count > 0) run(count, body);
    }
};

}  // namespace vqops
