// The kernels' own threads. They never outnumber PyTorch's: the two are not busy at the same time, because whoever
// calls a kernel waits for it.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

namespace amalgam {

constexpr int kMaxThreads = 1024;

using PoolTask = void (*)(void* context, int64_t item);

// Runs task(context, item) for every item in [0, num_items): the caller and up to num_threads - 1 others have equal
// shares of items that follow each other, the caller the first, and whoever is done takes from the others. Returns when
// all are done. No more threads run than there are processors. A call while another one is running does its items
// alone.
void run_parallel(int64_t num_items, int num_threads, PoolTask task, void* context);

// The processors that each thread may use, thread 0 first; threads beyond these may use all that the process may.
// Threads that run already move. Throws std::system_error where the system refuses; then none is bound.
void bind_threads(const std::vector<std::vector<int>>& processors);

// Makes the calling thread thread 0 of the last `bind_threads`, if there was one. For whoever runs steps.
void bind_caller();

// The most threads that run at the same time. 0: as many as there are processors, above which they only wait for each
// other.
void limit_threads(int most);

template <class Function>
void parallel_for(int64_t num_items, int num_threads, Function&& function) {
    auto task = [](void* context, int64_t item) { (*static_cast<std::remove_reference_t<Function>*>(context))(item); };
    run_parallel(num_items, num_threads, task, &function);
}

// [0, count) cut into ranges of `step`, each one item.
template <class Function>
void parallel_ranges(int64_t count, int64_t step, int num_threads, Function&& function) {
    parallel_for((count + step - 1) / step, num_threads, [&](int64_t item) {
        const int64_t first = item * step;
        function(first, first + step < count ? first + step : count);
    });
}

}  // namespace amalgam
