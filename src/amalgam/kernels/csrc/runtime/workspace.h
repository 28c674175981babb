// Memory for one call's intermediate results, kept by the calling thread for its next call.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace amalgam {

// Hands out 64-byte aligned pieces; all are free again when the next Workspace of this thread begins.
class Workspace {
 public:
    Workspace() : blocks_(blocks()) {
        // What was scattered over several blocks last time fits one now.
        if (blocks_.size() > 1) {
            size_t total = 0;
            for (const Block& block : blocks_) total += block.size;
            release();
            add(total);
        }
    }

    template <class T>
    T* take(int64_t count) {
        const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
        if (blocks_.empty() || used_ + bytes > blocks_.back().size) {
            add(std::max(bytes, size_t{1} << 20));
            used_ = 0;
        }
        void* data = blocks_.back().data + used_;
        used_ += bytes;
        return static_cast<T*>(data);
    }

 private:
    struct Block {
        char* data;
        size_t size;
    };
    struct Blocks : std::vector<Block> {
        ~Blocks() {
            for (const Block& block : *this) std::free(block.data);
        }
    };

    static Blocks& blocks() {
        static thread_local Blocks kept;
        return kept;
    }

    void add(size_t bytes) {
        bytes = (bytes + 63) / 64 * 64;
        void* data = std::aligned_alloc(64, bytes);
        if (data == nullptr) throw std::bad_alloc();
        blocks_.push_back({static_cast<char*>(data), bytes});
    }

    void release() {
        for (const Block& block : blocks_) std::free(block.data);
        blocks_.clear();
    }

    Blocks& blocks_;
    size_t used_ = 0;
};

}  // namespace amalgam
