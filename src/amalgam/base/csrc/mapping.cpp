// Mapped files that shrink. Reading a page of a mapping that its file has no more, or that cannot be read from the
// disk, ends a process with SIGBUS. In ranges that are watched, zeros take the place of such pages instead, and the
// range remembers it; whoever reads it asks afterwards whether what it has read was the file's.

#include <nanobind/nanobind.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <mutex>

#if defined(__unix__) || defined(__APPLE__)
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>
#define HAS_SIGNALS 1
#endif

namespace nb = nanobind;

namespace {

// The handler walks them without a lock: they are never freed, those that nobody watches are used again.
struct Range {
    std::atomic<uintptr_t> begin{0};  // 0: free
    std::atomic<uintptr_t> end{0};
    std::atomic<bool> has_lost{false};
    Range* next = nullptr;
};

std::atomic<Range*> ranges{nullptr};
std::atomic<uint64_t> num_lost{0};
std::mutex mutex;

Range* find(uintptr_t address) {
    for (Range* range = ranges.load(std::memory_order_acquire); range != nullptr; range = range->next) {
        const uintptr_t begin = range->begin.load(std::memory_order_acquire);
        const uintptr_t end = range->end.load(std::memory_order_acquire);
        // Once more: the end may be that of other memory, which the range has been given to meanwhile.
        const bool is_one = begin != 0 && range->begin.load(std::memory_order_relaxed) == begin;
        if (is_one && begin <= address && address < end) return range;
    }
    return nullptr;
}

#if HAS_SIGNALS
static_assert(std::atomic<uintptr_t>::is_always_lock_free && std::atomic<bool>::is_always_lock_free);

uintptr_t page_bytes = 4096;
struct sigaction previous;

// Calls nothing but mmap(2): a system call, though POSIX does not list it among those that a handler may call.
void on_bus_error(int number, siginfo_t* info, void* context) {
    const int saved = errno;
    const uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
    Range* range = info->si_code == BUS_ADRERR ? find(address) : nullptr;
    if (range != nullptr) {
        // All behind it too: a file that has shrunk has lost its end, and each page would be a signal of its own.
        const uintptr_t first = address / page_bytes * page_bytes;
        const size_t bytes = range->end.load(std::memory_order_relaxed) - first;
        void* zeros = mmap(reinterpret_cast<void*>(first), bytes, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
        if (zeros != MAP_FAILED) {
            range->has_lost.store(true, std::memory_order_release);
            num_lost.fetch_add(1, std::memory_order_release);
            errno = saved;
            return;
        }
    }
    errno = saved;
    if (previous.sa_flags & SA_SIGINFO) {
        previous.sa_sigaction(number, info, context);
    } else if (previous.sa_handler == SIG_DFL || previous.sa_handler == SIG_IGN) {
        if (info->si_code <= 0 && previous.sa_handler == SIG_IGN) return;
        sigaction(number, &previous, nullptr);  // what faulted runs again, and ends as it would have
        if (info->si_code <= 0) raise(number);  // unless somebody has sent it
    } else {
        previous.sa_handler(number);
    }
}

void install() {
    page_bytes = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    struct sigaction action = {};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &previous);
}
#endif

// `pages`: anything with a buffer. Its memory is watched until `forget`, which has to come before it is unmapped.
uintptr_t watch(nb::handle pages) {
    Py_buffer view;
    if (PyObject_GetBuffer(pages.ptr(), &view, PyBUF_SIMPLE) != 0) throw nb::python_error();
    const uintptr_t begin = reinterpret_cast<uintptr_t>(view.buf), end = begin + static_cast<uintptr_t>(view.len);
    PyBuffer_Release(&view);
    std::lock_guard<std::mutex> lock(mutex);
#if HAS_SIGNALS
    if (ranges.load(std::memory_order_relaxed) == nullptr) install();
#endif
    Range* range = ranges.load(std::memory_order_relaxed);
    while (range != nullptr && range->begin.load(std::memory_order_relaxed) != 0) range = range->next;
    const bool is_new = range == nullptr;
    if (is_new) range = new Range;
    range->has_lost.store(false, std::memory_order_relaxed);
    range->end.store(end, std::memory_order_release);
    range->begin.store(begin, std::memory_order_release);
    if (is_new) {
        range->next = ranges.load(std::memory_order_relaxed);
        ranges.store(range, std::memory_order_release);
    }
    return reinterpret_cast<uintptr_t>(range);
}

Range* range_of(uintptr_t watched) { return reinterpret_cast<Range*>(watched); }

}  // namespace

NB_MODULE(_mapping, module) {
    module.def("watch", &watch, nb::arg("pages"));
    module.def("has_lost",
               [](uintptr_t watched) { return range_of(watched)->has_lost.load(std::memory_order_acquire); });
    module.def("has_lost_at", [](uintptr_t address) {
        const Range* range = find(address);
        return range != nullptr && range->has_lost.load(std::memory_order_acquire);
    });
    module.def("forget", [](uintptr_t watched) {
        std::lock_guard<std::mutex> lock(mutex);
        range_of(watched)->begin.store(0, std::memory_order_release);
    });
    module.def("num_lost", [] { return num_lost.load(std::memory_order_acquire); });
}
