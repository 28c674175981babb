#include "runtime/arena.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <new>

#include "runtime/placement.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace amalgam {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kPage = 4096;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kRegionBytes = size_t{64} << 20;

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

class Arena {
 public:
    uint8_t* allocate(size_t bytes) {
        // Pages that are placed one by one have one owner.
        bytes = round_up(std::max<size_t>(bytes, 1), is_placed_by_touch() ? kPage : kAlignment);
        std::lock_guard<std::mutex> lock(mutex_);
        auto found = std::find_if(free_.begin(), free_.end(), [&](const auto& range) { return range.second >= bytes; });
        if (found == free_.end()) found = add_region(bytes);
        uint8_t* data = found->first;
        const size_t left = found->second - bytes;
        free_.erase(found);
        if (left > 0) free_.emplace(data + bytes, left);
        used_.emplace(data, bytes);
        return data;
    }

    void free(uint8_t* data) {
        std::lock_guard<std::mutex> lock(mutex_);
        const auto used = used_.find(data);
        const size_t bytes = used->second;
        auto range = free_.emplace(data, bytes).first;
        used_.erase(used);
        const auto region = std::prev(regions_.upper_bound(data));
        // Two regions may touch by chance; ranges of different regions must stay apart.
        const auto next = std::next(range);
        if (next != free_.end() && range->first + range->second == next->first && !regions_.count(next->first)) {
            range->second += next->second;
            free_.erase(next);
        }
        if (range != free_.begin() && !regions_.count(data)) {
            const auto previous = std::prev(range);
            if (previous->first + previous->second == data) {
                previous->second += range->second;
                free_.erase(range);
                range = previous;
            }
        }
        if (range->first == region->first && range->second == region->second) {
            free_.erase(range);
            std::free(region->first);
            regions_.erase(region);
            return;
        }
        give_back(data, bytes, *range);
    }

 private:
    using Ranges = std::map<uint8_t*, size_t>;

    Ranges::iterator add_region(size_t bytes) {
        const size_t size = round_up(std::max(bytes, kRegionBytes), kHugePage);
        // aligned_alloc of this size is a mapping of its own; its pages are not touched before they are used.
        void* data = std::aligned_alloc(kHugePage, size);
        if (data == nullptr) throw std::bad_alloc();
        place_region(static_cast<uint8_t*>(data), size);
        regions_.emplace(static_cast<uint8_t*>(data), size);
        return free_.emplace(static_cast<uint8_t*>(data), size).first;
    }

    // Pages of a block that has become free go back to the system where nothing else lies on them: a region with one
    // weight left would keep 64 MB otherwise. And whoever places pages by touch has to find them untouched.
    static void give_back(uint8_t* data, size_t bytes, const Ranges::value_type& range) {
#if defined(__linux__)
        const auto address = [](const uint8_t* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
        const uintptr_t first = std::max(round_up(address(range.first), kPage), address(data) / kPage * kPage);
        const uintptr_t end =
            std::min(address(range.first + range.second) / kPage * kPage, round_up(address(data + bytes), kPage));
        if (first < end) madvise(range.first + (first - address(range.first)), end - first, MADV_DONTNEED);
#endif
    }

    std::mutex mutex_;
    Ranges regions_, free_, used_;
};

Arena& arena() {
    static Arena* instance = new Arena;  // never destroyed: tensors may outlive static objects
    return *instance;
}

}  // namespace

uint8_t* allocate_weight(size_t bytes) { return arena().allocate(bytes); }

void free_weight(uint8_t* data) { arena().free(data); }

}  // namespace amalgam
