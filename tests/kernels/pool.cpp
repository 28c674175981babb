// Each item is done once, whatever the threads; errors come out; threads stay where they are bound.
#include "runtime/pool.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <stdexcept>
#include <thread>
#include <vector>

#include "runtime/processors.h"

using namespace amalgam;

namespace {

int num_failures = 0;

void check(bool condition, const char* what, int threads) {
    if (condition) return;
    std::printf("%s, %d threads\n", what, threads);
    ++num_failures;
}

void check_items(int threads) {
    for (int count = 0; count < 400; ++count) {
        std::vector<int> done(static_cast<size_t>(count), 0);  // no atomics: nobody shares an item
        parallel_for(count, threads, [&](int64_t item) { done[static_cast<size_t>(item)]++; });
        check(done == std::vector<int>(static_cast<size_t>(count), 1), "an item is not done once", threads);
        // Long enough that all fall asleep.
        if (count % 100 == 99) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

void check_errors(int threads) {
    for (int thrower = 0; thrower < 100; ++thrower) {
        bool has_come_out = false;
        try {
            parallel_for(100, threads, [&](int64_t item) {
                if (item == thrower) throw std::runtime_error("expected");
            });
        } catch (const std::runtime_error&) {
            has_come_out = true;
        }
        check(has_come_out, "an error is lost", threads);
    }
}

void check_callers(int threads) {
    std::atomic<int64_t> total{0};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 4; ++caller) {
        callers.emplace_back([&] {
            for (int round = 0; round < 200; ++round) {
                parallel_for(50, threads, [&](int64_t item) {
                    if (item == 7) parallel_for(3, threads, [&](int64_t inner) { total += inner; });
                    total += item;
                });
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
    check(total == 4 * 200 * (50 * 49 / 2 + 3), "several callers' items are not all done", threads);
}

void check_binding() {
    const std::vector<int> home = allowed_processors();
    if (home.empty()) return;
    std::vector<std::vector<int>> processors;
    for (int thread = 0; thread < 8; ++thread) {
        processors.push_back({home[static_cast<size_t>(thread) % home.size()]});
    }
    bind_threads(processors);
    bind_caller();
    check(allowed_processors() == processors.front(), "the caller is not where it was bound", 8);
    std::atomic<int> num_wrong{0};
    parallel_for(64, 8, [&](int64_t) { num_wrong += allowed_processors().size() != 1; });
    check(num_wrong == 0, "a thread is not where it was bound", 8);
    bind_threads({});
    bind_caller();
    check(allowed_processors() == home, "the caller is still bound", 8);
    parallel_for(64, 8, [&](int64_t) { num_wrong += allowed_processors() != home; });
    check(num_wrong == 0, "a thread is still bound", 8);
}

}  // namespace

int main() {
    for (const int most : {0, 64}) {  // as many as there are processors, and all that are asked for
        limit_threads(most);
        for (const int threads : {1, 2, 3, 8, 16, 64}) {
            check_items(threads);
            check_errors(threads);
            check_callers(threads);
        }
        check_binding();
    }
    return num_failures == 0 ? 0 : 1;
}
