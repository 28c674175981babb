// Processors that a thread may use.
#pragma once

#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstddef>
#endif

namespace amalgam {

// A thread, as the system numbers it; 0: the calling one.
using ThreadId = int;

inline ThreadId this_thread_id() {
#if defined(__linux__)
    return static_cast<ThreadId>(syscall(SYS_gettid));
#else
    return 0;
#endif
}

// In ascending order; empty where the system does not say.
inline std::vector<int> allowed_processors() {
    std::vector<int> found;
#if defined(__linux__)
    constexpr int kMost = 1 << 14, kBits = sizeof(unsigned long) * CHAR_BIT;
    std::vector<unsigned long> mask(kMost / kBits);
    if (syscall(SYS_sched_getaffinity, 0, mask.size() * sizeof(unsigned long), mask.data()) < 0) return found;
    for (int i = 0; i < kMost; ++i) {
        if (mask[static_cast<size_t>(i / kBits)] >> (i % kBits) & 1) found.push_back(i);
    }
#endif
    return found;
}

// Throws std::system_error where the system refuses, as it does if there is none of these processors.
inline void bind(ThreadId thread, const std::vector<int>& processors) {
#if defined(__linux__)
    constexpr int kMost = 1 << 14, kBits = sizeof(unsigned long) * CHAR_BIT;
    std::vector<unsigned long> mask(kMost / kBits);
    for (const int i : processors) {
        if (i >= 0 && i < kMost) mask[static_cast<size_t>(i / kBits)] |= 1ul << (i % kBits);
    }
    if (syscall(SYS_sched_setaffinity, thread, mask.size() * sizeof(unsigned long), mask.data()) < 0) {
        throw std::system_error(errno, std::generic_category(), "a thread cannot be bound to processors");
    }
#else
    (void)thread;
    (void)processors;
    throw std::system_error(std::make_error_code(std::errc::function_not_supported), "binding threads needs Linux");
#endif
}

}  // namespace amalgam
