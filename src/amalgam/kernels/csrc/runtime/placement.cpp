#include "runtime/placement.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <memory>
#include <mutex>
#include <system_error>
#include <utility>

#include "runtime/processors.h"

#if defined(__linux__)
#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace amalgam {
namespace {

constexpr size_t kPage = 4096;

struct Setting {
    Placement placement = Placement::kAnywhere;
    std::vector<Node> nodes;
};

std::mutex mutex;
std::shared_ptr<const Setting> setting = std::make_shared<Setting>();
std::atomic<int> parts{1};

std::shared_ptr<const Setting> current() {
    std::lock_guard<std::mutex> lock(mutex);
    return setting;
}

// mbind(2) by its number: libnuma would be one more library for one call.
void interleave(void* data, size_t bytes, const std::vector<Node>& nodes) {
#if defined(__linux__)
    constexpr int kBits = sizeof(unsigned long) * 8;
    std::vector<unsigned long> mask(16);
    for (const Node& node : nodes) {
        if (node.id >= 0 && node.id < static_cast<int>(mask.size()) * kBits) {
            mask[static_cast<size_t>(node.id / kBits)] |= 1ul << (node.id % kBits);
        }
    }
    if (syscall(SYS_mbind, data, bytes, MPOL_INTERLEAVE, mask.data(), mask.size() * kBits, 0) < 0) {
        throw std::system_error(errno, std::generic_category(), "mbind");
    }
#else
    (void)data;
    (void)bytes;
    (void)nodes;
    throw std::system_error(std::make_error_code(std::errc::function_not_supported), "placing memory needs Linux");
#endif
}

// Moves the calling thread, and back at the end.
class Excursion {
 public:
    Excursion() : home_(allowed_processors()) {}
    ~Excursion() {
        try {
            bind(0, home_);
        } catch (const std::system_error&) {  // they are gone: the thread runs where it can
        }
    }
    Excursion(const Excursion&) = delete;
    Excursion& operator=(const Excursion&) = delete;

    void go_to(const std::vector<int>& processors) { bind(0, processors); }

 private:
    std::vector<int> home_;
};

}  // namespace

void place_weights(Placement placement, const std::vector<Node>& nodes) {
    if (placement == Placement::kInterleaved) {
#if defined(__linux__)
        void* probe = mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (probe == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
        const std::unique_ptr<void, void (*)(void*)> owner(probe, [](void* page) { munmap(page, kPage); });
        interleave(probe, kPage, nodes);
#else
        interleave(nullptr, 0, nodes);
#endif
    }
    if (placement == Placement::kLocal) {
        Excursion excursion;
        for (const Node& node : nodes) excursion.go_to(node.processors);
    }
    std::lock_guard<std::mutex> lock(mutex);
    setting = std::make_shared<Setting>(Setting{placement, nodes});
    parts = placement == Placement::kLocal && !nodes.empty() ? static_cast<int>(nodes.size()) : 1;
}

int num_node_parts() { return parts; }

void place_region(uint8_t* data, size_t bytes) {
    const auto found = current();
    if (found->placement == Placement::kInterleaved) {
        try {
            interleave(data, bytes, found->nodes);
        } catch (const std::system_error&) {  // it was possible when it was asked for: not worth to fail a load
        }
    }
#if defined(__linux__)
    // A huge page would be of one node, and hold parts of several.
    madvise(data, bytes, found->placement == Placement::kLocal ? MADV_NOHUGEPAGE : MADV_HUGEPAGE);
#endif
}

bool is_placed_by_touch() { return num_node_parts() > 1; }

void touch_by_node(uint8_t* data, int64_t count, int64_t row_bytes) {
    const auto found = current();
    const auto num_parts = static_cast<int>(found->nodes.size());
    if (found->placement != Placement::kLocal || num_parts < 2) return;
    Excursion excursion;
    for (int part = 0; part < num_parts; ++part) {
        const auto at = [&](int which) {
            return reinterpret_cast<uintptr_t>(data) +
                   static_cast<uintptr_t>(part_start(count, which, num_parts) * row_bytes);
        };
        try {
            excursion.go_to(found->nodes[static_cast<size_t>(part)].processors);
        } catch (const std::system_error&) {
            continue;  // gone since: these pages are touched by whoever writes them
        }
        // A page with the end of one part and the beginning of the next belongs to the first, which is there already.
        const uintptr_t first = (at(part) + kPage - 1) / kPage * kPage;
        for (uintptr_t page = part == 0 ? at(0) / kPage * kPage : first; page < at(part + 1); page += kPage) {
            *reinterpret_cast<volatile uint8_t*>(std::max(page, reinterpret_cast<uintptr_t>(data))) = 0;
        }
    }
}

}  // namespace amalgam
