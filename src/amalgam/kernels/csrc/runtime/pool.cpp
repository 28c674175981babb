#include "runtime/pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace amalgam {
namespace {

// Long enough for the gap between two kernels of one layer, short enough not to slow PyTorch's threads down.
constexpr auto kSpinTime = std::chrono::microseconds(60);

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins until `ready` or until the time is over; says which.
template <class Ready>
bool spin(Ready&& ready, std::chrono::microseconds limit) {
    const auto end = std::chrono::steady_clock::now() + limit;
    for (;;) {
        for (int i = 0; i < 64; ++i) {
            if (ready()) return true;
            pause();
        }
        if (std::chrono::steady_clock::now() >= end) return ready();
    }
}

class Pool {
 public:
    void run(int64_t num_items, int num_threads, PoolTask task, void* context) {
        std::unique_lock<std::mutex> running(run_mutex_, std::try_to_lock);
        if (num_threads <= 1 || num_items <= 1 || !running.owns_lock()) {
            for (int64_t item = 0; item < num_items; ++item) task(context, item);
            return;
        }
        while (static_cast<int>(workers_.size()) < num_threads - 1) {
            workers_.emplace_back([this, worker = static_cast<int>(workers_.size())] { work(worker); });
        }
        task_ = task;
        context_ = context;
        num_items_ = num_items;
        num_helpers_ = num_threads - 1;
        next_item_ = 0;
        is_open_ = true;
        generation_++;
        if (num_sleepers_ > 0) {
            std::lock_guard<std::mutex> lock(sleep_mutex_);
            wake_.notify_all();
        }
        take_items();
        // A worker that comes later finds the job closed, so that nobody waits for one that is still waking up.
        is_open_ = false;
        while (!spin([this] { return num_inside_ == 0; }, kSpinTime)) std::this_thread::yield();
        if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    }

 private:
    void work(int worker) {
        uint64_t seen = 0;
        for (;;) {
            const auto has_news = [&] { return generation_ != seen; };
            if (!spin(has_news, kSpinTime)) {
                std::unique_lock<std::mutex> lock(sleep_mutex_);
                num_sleepers_++;
                wake_.wait(lock, has_news);
                num_sleepers_--;
            }
            seen = generation_;
            num_inside_++;
            if (is_open_ && worker < num_helpers_) take_items();
            num_inside_--;
        }
    }

    void take_items() {
        for (;;) {
            const int64_t item = next_item_.fetch_add(1, std::memory_order_relaxed);
            if (item >= num_items_) return;
            try {
                task_(context_, item);
            } catch (...) {
                std::lock_guard<std::mutex> lock(error_mutex_);
                if (!error_) error_ = std::current_exception();
                next_item_ = num_items_;
            }
        }
    }

    std::mutex run_mutex_;
    std::vector<std::thread> workers_;
    // The job; written only while it is closed and nobody is inside. is_open_ and num_inside_ are the two flags of
    // Dekker's algorithm and need sequential consistency, which is the default.
    PoolTask task_ = nullptr;
    void* context_ = nullptr;
    int64_t num_items_ = 0;
    int num_helpers_ = 0;
    std::atomic<bool> is_open_{false};
    std::atomic<uint64_t> generation_{0};
    alignas(64) std::atomic<int64_t> next_item_{0};
    alignas(64) std::atomic<int> num_inside_{0};
    std::mutex error_mutex_;
    std::exception_ptr error_;  // the first that a task has thrown
    std::mutex sleep_mutex_;
    std::condition_variable wake_;
    std::atomic<int> num_sleepers_{0};
};

}  // namespace

void run_parallel(int64_t num_items, int num_threads, PoolTask task, void* context) {
    // Never destroyed: its threads may outlive the interpreter's teardown.
    static Pool* pool = new Pool;
    pool->run(num_items, num_threads, task, context);
}

}  // namespace amalgam
