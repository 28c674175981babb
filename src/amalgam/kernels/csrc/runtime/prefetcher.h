// Software prefetch of a paged cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "isa/isa.h"
#include "product/matrix.h"

namespace amalgam {
namespace {

// Software prefetch of the next tile into L2 while this one is computed, a few cache lines at each call: a core has few
// fill buffers and stalls when all are taken. Not into L1, which is full of the current tile.
class Prefetcher {
 public:
    // A key's or value's bytes, all of an item's heads together: in memory they are neighbours.
    struct Source {
        const uint8_t* data = nullptr;
        int64_t slot_bytes = 0, row_bytes = 0;

        int64_t pieces() const { return (row_bytes + kPieceBytes - 1) / kPieceBytes; }
    };

    Prefetcher() = default;  // fetches nothing
    Prefetcher(const int64_t* slots, int64_t num_keys, const Source& keys, const Source& values, int64_t num_advances)
        : slots_(slots),
          num_keys_(num_keys),
          source_(keys),
          values_(values),
          num_pieces_(num_keys * (keys.pieces() + values.pieces())),
          num_advances_(num_advances) {}

    void advance() {
        for (credit_ += num_pieces_; credit_ >= num_advances_ && slots_ != nullptr; credit_ -= num_advances_) fetch();
    }

 private:
    static constexpr int64_t kPieceBytes = 4 * kLineBytes;

    void fetch() {
        if (slots_[key_] >= 0) {
            const uint8_t* piece = source_.data + slots_[key_] * source_.slot_bytes + at_;
            const int64_t bytes = std::min(kPieceBytes, source_.row_bytes - at_);
            for (int64_t line = 0; line < bytes; line += kLineBytes) prefetch_far(piece + line);
        }
        at_ += kPieceBytes;
        if (at_ < source_.row_bytes) return;
        at_ = 0;
        if (++key_ < num_keys_) return;
        key_ = 0;
        if (is_at_values_) slots_ = nullptr;
        source_ = values_;
        is_at_values_ = true;
    }

    const int64_t* slots_ = nullptr;
    int64_t num_keys_ = 0;
    Source source_, values_;
    bool is_at_values_ = false;
    int64_t num_pieces_ = 0, num_advances_ = 1;
    int64_t credit_ = 0, key_ = 0, at_ = 0;
};

}  // namespace
}  // namespace amalgam
