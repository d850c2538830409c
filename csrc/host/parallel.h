#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace vlpfast::host {

// Calls work(0) .. work(count - 1) on up to `threads` threads, the caller's among them. Of the exceptions thrown, that
// of the lowest number goes on.
template <class Work> void parallel(int64_t count, int threads, const Work& work) {
    std::atomic<int64_t> next{0};
    std::mutex guard;
    int64_t failed = count;
    std::exception_ptr error;
    const auto run = [&] {
        for (int64_t i = next++; i < count; i = next++) {
            try {
                work(i);
            } catch (...) {
                const std::lock_guard lock(guard);
                if (i < failed) {
                    failed = i;
                    error = std::current_exception();
                }
            }
        }
    };
    {
        std::vector<std::jthread> others;
        for (int64_t i = 1; i < std::min<int64_t>(threads, count); ++i)
            others.emplace_back(run);
        run();
    }
    if (error)
        std::rethrow_exception(error);
}

} // namespace vlpfast::host
