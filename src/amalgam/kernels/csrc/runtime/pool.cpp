#include "runtime/pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#include "runtime/futex.h"
#include "runtime/processors.h"
#include "runtime/recording.h"

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
bool spin(Ready&& ready) {
    const auto end = std::chrono::steady_clock::now() + kSpinTime;
    for (;;) {
        for (int i = 0; i < 64; ++i) {
            if (ready()) return true;
            pause();
        }
        if (std::chrono::steady_clock::now() >= end) return ready();
    }
}

// No word is written by all threads: each has a seat with words of its own, and only the job's number is read by all.
//
// A worker enters a job by saying so in its seat, then looking whether the job is still open; the caller closes it,
// then looks who is inside (Dekker's algorithm, which needs sequential consistency). So nobody waits for a worker that
// comes late, and what a job consists of is written only while nobody reads it.
//
// Sleepers are woken along a binary tree: a worker that enters wakes the two below it.
class Pool {
 public:
    Pool() : home_(allowed_processors()), num_processors_(static_cast<int>(home_.size())) {
        if (num_processors_ == 0)
            num_processors_ = std::max<int>(1, static_cast<int>(std::thread::hardware_concurrency()));
    }

    void run(int64_t num_items, int num_threads, PoolTask task, void* context) {
        const int most = most_ > 0 ? most_.load() : num_processors_;
        const auto team = static_cast<int>(std::min<int64_t>({num_items, num_threads, most, kMaxThreads}));
        if (team > 1 && num_items / team < kMostTaken && !is_busy_.exchange(true, std::memory_order_acquire)) {
            const Busy busy{is_busy_};
            if (const auto error = share(num_items, 1 + start_workers(team - 1), task, context)) {
                std::rethrow_exception(error);
            }
        } else {
            for (int64_t item = 0; item < num_items; ++item) task(context, item);
        }
    }

    void bind_threads(const std::vector<std::vector<int>>& processors) {
        std::lock_guard<std::mutex> lock(workers_mutex_);
        num_bindings_++;
        try {
            processors_ = processors;
            for (int i = 1; i <= num_workers_; ++i) bind(seats_[i].thread, processors_of(i));
        } catch (const std::system_error&) {
            processors_.clear();
            for (int i = 1; i <= num_workers_; ++i) bind(seats_[i].thread, home_);
            throw;
        }
    }

    void bind_caller() {
        static thread_local int bound = 0;
        if (bound == num_bindings_) return;
        std::lock_guard<std::mutex> lock(workers_mutex_);
        bound = num_bindings_;
        bind(0, processors_of(0));
    }

    void limit_threads(int most) { most_ = most; }

 private:
    using Job = uint64_t;  // its number, and how many threads may enter: none once it is closed
    static constexpr int kTeamBits = 16, kTakenBits = 24;
    static constexpr int64_t kMostTaken = (int64_t{1} << kTakenBits) - 1;
    // kAbsent: not begun; kAwaited: inside, and the caller sleeps until it is out.
    enum State : uint32_t { kAbsent, kOut, kInside, kAwaited };

    struct alignas(128) Seat {           // processors fetch lines in pairs
        std::atomic<uint64_t> taken{0};  // of this thread's share of a job: the job's number, and how many items
        std::atomic<uint32_t> state{kAbsent};
        std::atomic<uint32_t> is_asleep{0};
        ThreadId thread = 0;
    };

    // Whoever has set the flag holds the pool.
    struct Busy {
        std::atomic<bool>& flag;
        ~Busy() { flag.store(false, std::memory_order_release); }
    };

    // Returns the first error of a task.
    std::exception_ptr share(int64_t num_items, int team, PoolTask task, void* context) {
        task_ = task;
        context_ = context;
        num_items_ = num_items;
        if (const bool spins = team <= num_processors_; spins_ != spins) spins_ = spins;
        if (has_failed_) has_failed_ = false;
        const uint64_t number = (job_ >> kTeamBits) + 1;
        const Job job = number << kTeamBits | static_cast<Job>(team);
        job_ = job;
        wake_below(0, team);
        take_items(0, job);
        job_ = number << kTeamBits;
        for (int i = 1; i < team; ++i) wait_until_out(seats_[i]);
        return std::exchange(error_, nullptr);
    }

    // Returns how many there are, `count` unless the system has no more threads or no more memory for them.
    int start_workers(int count) {
        if (num_workers_ >= count) return count;
        std::lock_guard<std::mutex> lock(workers_mutex_);
        try {
            while (num_workers_ < count) start_worker(num_workers_ + 1);
        } catch (const std::exception&) {  // fewer do the job
        }
        return num_workers_;
    }

    void start_worker(int number) {
        Seat& seat = seats_[number];
        std::thread worker([this, number, &seat] {
            seat.thread = this_thread_id();
            seat.state = kOut;
            wake(seat.state);
            work(number);
        });
        worker.detach();
        while (seat.state == kAbsent) sleep_while(seat.state, kAbsent);
        num_workers_ = number;
        if (num_bindings_ > 0) bind(seat.thread, processors_of(number));
    }

    const std::vector<int>& processors_of(int thread) const {
        return static_cast<size_t>(thread) < processors_.size() ? processors_[static_cast<size_t>(thread)] : home_;
    }

    void work(int seat) {
        uint64_t seen = 0;
        for (;;) {
            const Job job = wait_for_job(seats_[seat], seen);
            seen = job >> kTeamBits;
            const int team = team_of(job);
            if (seat >= team) continue;
            seats_[seat].state = kInside;
            if (job_ == job) {
                wake_below(seat, team);
                take_items(seat, job);
            }
            if (seats_[seat].state.exchange(kOut) == kAwaited) wake(seats_[seat].state);
        }
    }

    Job wait_for_job(Seat& seat, uint64_t seen) {
        const auto has_news = [&] { return job_ >> kTeamBits != seen; };
        if (!spins_ || !spin(has_news)) {
            seat.is_asleep = 1;
            while (!has_news() && seat.is_asleep == 1) sleep_while(seat.is_asleep, 1);
            seat.is_asleep = 0;
        }
        return job_;
    }

    void wake_below(int seat, int team) {
        for (int below = 2 * seat + 1; below <= 2 * seat + 2 && below < team; ++below) {
            std::atomic<uint32_t>& is_asleep = seats_[below].is_asleep;
            if (is_asleep == 1 && is_asleep.exchange(0) == 1) wake(is_asleep);
        }
    }

    void wait_until_out(Seat& seat) {
        if (seat.state == kOut) return;
        if (spins_ && spin([&] { return seat.state == kOut; })) return;
        uint32_t expected = kInside;
        if (!seat.state.compare_exchange_strong(expected, kAwaited)) return;  // out by now
        while (seat.state == kAwaited) sleep_while(seat.state, kAwaited);
    }

    void take_items(int seat, Job job) {
        const int team = team_of(job);
        for (int i = 0; i < team; ++i) {
            const int owner = seat + i < team ? seat + i : seat + i - team;
            for (int64_t item; (item = take(owner, job, team)) >= 0;) {
                if (has_failed_) return;
                try {
                    task_(context_, item);
                } catch (...) {
                    std::lock_guard<std::mutex> lock(error_mutex_);
                    if (!error_) error_ = std::current_exception();
                    has_failed_ = true;
                }
            }
        }
    }

    // The next item of somebody's share, -1 if there is none. Shares begin by themselves: what a seat says of another
    // job means that nothing is taken.
    int64_t take(int owner, Job job, int team) {
        const int64_t first = num_items_ * owner / team, size = num_items_ * (owner + 1) / team - first;
        const uint64_t number = (job >> kTeamBits) << kTakenBits;
        std::atomic<uint64_t>& word = seats_[owner].taken;
        uint64_t found = word.load(std::memory_order_relaxed);
        for (;;) {
            const bool is_begun = (found ^ number) >> kTakenBits == 0;
            const int64_t taken = is_begun ? static_cast<int64_t>(found & kMostTaken) : 0;
            if (taken >= size) return -1;
            const uint64_t next = number | static_cast<uint64_t>(taken + 1);
            if (word.compare_exchange_weak(found, next, std::memory_order_relaxed)) return first + taken;
        }
    }

    static int team_of(Job job) { return static_cast<int>(job & ((1u << kTeamBits) - 1)); }

    const std::vector<int> home_;  // where threads run that nobody binds
    int num_processors_;
    std::atomic<int> most_{0};
    std::atomic<bool> is_busy_{false};
    std::mutex error_mutex_;
    std::exception_ptr error_;  // the first that a task has thrown
    // What all threads read: which job there is, and what it consists of.
    alignas(128) std::atomic<Job> job_{0};
    PoolTask task_ = nullptr;
    void* context_ = nullptr;
    int64_t num_items_ = 0;
    std::atomic<bool> has_failed_{false}, spins_{true};
    alignas(128) std::unique_ptr<Seat[]> seats_{new Seat[kMaxThreads]};
    std::mutex workers_mutex_;  // of those that are started or bound
    std::atomic<int> num_workers_{0};
    std::vector<std::vector<int>> processors_;
    std::atomic<int> num_bindings_{0};
};

Pool& pool() {
    static Pool* instance = new Pool;  // never destroyed: its threads may outlive the interpreter's teardown
    return *instance;
}

}  // namespace

void run_parallel(int64_t num_items, int num_threads, PoolTask task, void* context) {
    if (Recording* recording = Recording::current()) {
        recording->begin_phase();
        for (int64_t item = 0; item < num_items; ++item) {
            recording->begin_item();
            task(context, item);
        }
        return;
    }
    pool().run(num_items, num_threads, task, context);
}

void bind_threads(const std::vector<std::vector<int>>& processors) { pool().bind_threads(processors); }

void bind_caller() { pool().bind_caller(); }

void limit_threads(int most) { pool().limit_threads(most); }

}  // namespace amalgam
