// The kernels' own threads. They never outnumber PyTorch's: the two are not busy at the same time, because whoever
// calls a kernel waits for it.
#pragma once

#include <cstdint>
#include <type_traits>

namespace amalgam {

using PoolTask = void (*)(void* context, int64_t item);

// Runs task(context, item) for every item in [0, num_items), the caller and up to num_threads - 1 others taking the
// next one as they come free. Returns when all are done. A call while another thread's is running does its items alone.
void run_parallel(int64_t num_items, int num_threads, PoolTask task, void* context);

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
