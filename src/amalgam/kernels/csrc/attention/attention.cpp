#include "attention/attention.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

#include "isa/float_types.h"
#include "runtime/pool.h"

namespace amalgam {
namespace {

constexpr int64_t kRowsPerItem = 64;  // enough to make packing a tile cheap next to using it
constexpr int64_t kItemsPerThread = 4;
constexpr int64_t kWholePerThread = 8;  // of so many equal items no thread is left with much more than others
constexpr int64_t kElementsPerWrite = int64_t{1} << 17;
constexpr int64_t kScoredKeys = 16 * kTileKeys;  // of an item

// 64-byte aligned memory that grows and is kept by its thread for the next call.
class Buffer {
 public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    float* get(int64_t count) {
        if (count > size_) {
            std::free(data_);
            size_ = 0;
            const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 4095) / 4096 * 4096;
            data_ = static_cast<float*>(std::aligned_alloc(4096, bytes));
            if (data_ == nullptr) throw std::bad_alloc();
            size_ = static_cast<int64_t>(bytes / sizeof(float));
        }
        return data_;
    }

 private:
    float* data_ = nullptr;
    int64_t size_ = 0;
};

thread_local Buffer scratch_buffer, partial_buffer;

// Several items that differ in their ranges of keys only; their results lie `stride` floats apart from `first.partial`.
struct Merge {
    AttentionItem first;
    int64_t num_ranges;
    int64_t stride;
};

struct Work {
    std::vector<AttentionItem> items;
    std::vector<Merge> merges;
};

int64_t num_ranges(const AttentionItem& item) {
    return (item.end_key - 1) / kRangeKeys - item.first_key / kRangeKeys + 1;
}

// How a sequence is cut: positions and KV heads per item.
struct Cut {
    int64_t positions;
    int64_t heads;
};

template <class Function>
void for_each_item(const AttentionPlan& plan, const AttentionArgs& args, const AttentionPlan::Sequence& sequence,
                   Cut cut, Function&& function) {
    for (int64_t token = 0; token < sequence.num_tokens; token += cut.positions) {
        for (int64_t head = 0; head < args.kv_heads; head += cut.heads) {
            AttentionItem item{};
            item.block_ids = sequence.block_ids;
            item.block_size = plan.block_size();
            item.first_token = sequence.first_token + token;
            item.first_position = sequence.first_position + token;
            item.num_positions = std::min(cut.positions, sequence.num_tokens - token);
            item.first_kv_head = head;
            item.num_kv_heads = std::min(cut.heads, args.kv_heads - head);
            item.first_key = first_visible(args, item.first_position);
            item.end_key = item.first_position + item.num_positions;
            function(item);
        }
    }
}

Cut cut_sequence(const AttentionArgs& args, const AttentionPlan::Sequence& sequence) {
    const int64_t shared = args.heads / args.kv_heads;
    const int64_t positions = std::clamp<int64_t>(kRowsPerItem / shared, 1, std::max<int64_t>(1, sequence.num_tokens));
    // All KV heads of a key lie side by side; few rows are bound by memory and read them together.
    const int64_t heads = std::clamp<int64_t>(kRowsPerItem / (positions * shared), 1, args.kv_heads);
    return {positions, heads};
}

Work divide(const AttentionPlan& plan, const AttentionArgs& args, int num_threads) {
    const int64_t wanted = num_threads > 1 ? num_threads * kItemsPerThread : 1;
    int64_t whole = 0, split = 0;  // items without and with cuts between ranges of keys
    for (const auto& sequence : plan.sequences()) {
        for_each_item(plan, args, sequence, cut_sequence(args, sequence), [&](const AttentionItem& item) {
            ++whole;
            split += num_ranges(item);
        });
    }
    const bool splits_all = whole < wanted && num_threads > 1;
    Work work;
    for (const auto& sequence : plan.sequences()) {
        Cut cut = cut_sequence(args, sequence);
        const bool is_alone = num_threads > 1 && sequence.num_tokens <= cut.positions;
        // One head alone is read in small pieces, so that heads are kept apart only where a thread would be idle.
        for (int64_t count = splits_all ? split : whole; count < num_threads && cut.heads > 1; count *= 2) {
            cut.heads = (cut.heads + 1) / 2;
        }
        for_each_item(plan, args, sequence, cut, [&](const AttentionItem& item) {
            const int64_t ranges = num_ranges(item);
            // A sequence's only tile is split where others are much shorter: one thread would be left with it. What is
            // split has partial results in memory, which many tokens that choose their keys would fill.
            const bool splits = splits_all || (is_alone && ranges * num_threads * kWholePerThread > split);
            if (!splits || ranges == 1) {
                work.items.push_back(item);
                return;
            }
            work.merges.push_back({item, ranges, partial_floats(args, item)});
        });
    }
    return work;
}

// Cuts what is to be merged later into items of their own. Longer ones first, so that the threads end together.
void add_ranges(Work& work) {
    int64_t total = 0;
    for (const Merge& merge : work.merges) total += merge.num_ranges * merge.stride;
    float* partial = total > 0 ? partial_buffer.get(total) : nullptr;
    for (Merge& merge : work.merges) {
        merge.first.partial = partial;
        for (int64_t first = merge.first.first_key; first < merge.first.end_key; partial += merge.stride) {
            AttentionItem item = merge.first;
            item.first_key = first;
            item.end_key = std::min(first / kRangeKeys * kRangeKeys + kRangeKeys, item.end_key);
            item.partial = partial;
            work.items.push_back(item);
            first = item.end_key;
        }
    }
    const auto cost = [&](const AttentionItem& item) {
        return (item.end_key - item.first_key) * item.num_kv_heads * (16 + item.num_positions);
    };
    std::stable_sort(work.items.begin(), work.items.end(),
                     [&](const AttentionItem& a, const AttentionItem& b) { return cost(a) > cost(b); });
}

template <class T>
void store_floats(const float* row, int64_t dim, void* out) {
    for (int64_t i = 0; i < dim; ++i) narrow(row[i], static_cast<T*>(out) + i);
}

template <class Code>
float store_codes(const float* row, int64_t dim, void* out) {
    auto* codes = static_cast<Code*>(out);
    uint32_t highest = 0;  // of the magnitudes' bits: a NaN is above infinity
    for (int64_t i = 0; i < dim; ++i) highest = std::max(highest, as_bits(row[i]) & 0x7fffffff);
    if (highest >= 0x7f800000) {
        std::memset(out, 0, static_cast<size_t>(dim));
        return std::numeric_limits<float>::quiet_NaN();
    }
    constexpr float kLargest = largest_code(Code{});
    const float scale = as_float(highest) / kLargest, divisor = scale > 0.0f ? scale : 1.0f;
    for (int64_t i = 0; i < dim; ++i) {
        // A scale that is no normal number may be so inexact that a code would not fit.
        narrow(std::min(std::max(row[i] / divisor, -kLargest), kLargest), codes + i);
    }
    return scale;
}

}  // namespace

void store_row(const void* row, DType dtype, const CacheView& cache, int64_t heads, int64_t slot, int64_t head) {
    static thread_local std::vector<float> wide;
    void* out = advance(cache.data, cache.dtype, slot * cache.slot_stride + head * cache.head_stride);
    if (dtype == cache.dtype) {
        std::memcpy(out, row, static_cast<size_t>(cache.dim * dtype_bytes(dtype)));
        return;
    }
    if (wide.size() < static_cast<size_t>(cache.dim)) wide.resize(static_cast<size_t>(cache.dim));
    widen_all(row, dtype, cache.dim, wide.data());
    switch (cache.dtype) {
        case DType::kFloat32:
            return store_floats<float>(wide.data(), cache.dim, out);
        case DType::kBfloat16:
            return store_floats<Bfloat16>(wide.data(), cache.dim, out);
        case DType::kFloat16:
            return store_floats<Float16>(wide.data(), cache.dim, out);
        case DType::kInt8:
        case DType::kFp8:
            if (cache.dim == 0) return;
            cache.scales[slot * heads + head] = cache.dtype == DType::kInt8
                                                    ? store_codes<Int8Code>(wide.data(), cache.dim, out)
                                                    : store_codes<Fp8Code>(wide.data(), cache.dim, out);
            return;
        case DType::kE8m0:
            return;  // no type of a cache
    }
}

AttentionPlan::AttentionPlan(const int64_t* query_starts, const int64_t* context_lengths, int64_t num_sequences,
                             const int64_t* block_tables, int64_t table_stride, int64_t num_blocks, int64_t block_size)
    : block_size_(block_size), num_tokens_(query_starts[num_sequences]) {
    if (block_size <= 0) throw std::invalid_argument("the block size must be at least 1");
    if (query_starts[0] != 0) throw std::invalid_argument("the first sequence must start at row 0");
    std::vector<size_t> offsets;
    for (int64_t i = 0; i < num_sequences; ++i) {
        const int64_t length = query_starts[i + 1] - query_starts[i], context = context_lengths[i];
        const int64_t used = (context + block_size - 1) / block_size;
        if (length < 0 || context < length || used > num_blocks) {
            throw std::invalid_argument("rows, context length and block table of a sequence contradict each other");
        }
        sequences_.push_back({query_starts[i], length, context - length, nullptr});
        offsets.push_back(block_ids_.size());
        for (int64_t block = 0; block < used; ++block) {
            const int64_t id = block_tables[i * table_stride + block];
            if (id < 0 || id > std::numeric_limits<int32_t>::max()) {
                throw std::invalid_argument("a block id is out of range");
            }
            block_ids_.push_back(static_cast<int32_t>(id));
            const int64_t slots = std::min(block_size, context - block * block_size);
            num_slots_ = std::max(num_slots_, id * block_size + slots);
        }
    }
    for (size_t i = 0; i < sequences_.size(); ++i) sequences_[i].block_ids = block_ids_.data() + offsets[i];
}

void paged_attention(const AttentionKernels& kernels, const AttentionPlan& plan, const AttentionArgs& args,
                     int num_threads) {
    Work work = divide(plan, args, num_threads);
    add_ranges(work);
    const size_t num_items = work.items.size();
    const int num_workers = static_cast<int>(std::min<size_t>(static_cast<size_t>(num_threads), num_items));
    std::atomic<size_t> num_taken{static_cast<size_t>(num_workers)};
    parallel_for(num_workers, num_workers, [&](int64_t worker) {
        const AttentionItem* guess = nullptr;
        for (auto i = static_cast<size_t>(worker); i < num_items;
             i = num_taken.fetch_add(1, std::memory_order_relaxed)) {
            const AttentionItem& item = work.items[i];
            const bool is_fetched = &item == guess;
            // While this one is computed, every other thread takes one.
            const size_t next = num_taken.load(std::memory_order_relaxed) + static_cast<size_t>(num_workers) - 1;
            guess = next < num_items ? &work.items[next] : nullptr;
            kernels.attend(args, item, guess, !is_fetched, scratch_buffer.get(kernels.scratch_floats(args, item)));
        }
    });
    parallel_for(static_cast<int64_t>(work.merges.size()), num_threads, [&](int64_t i) {
        const Merge& merge = work.merges[static_cast<size_t>(i)];
        float* scratch = scratch_buffer.get(kernels.scratch_floats(args, merge.first));
        kernels.merge(args, merge.first, merge.num_ranges, merge.stride, scratch);
    });
}

void index_scores(const AttentionKernels& kernels, const AttentionPlan& plan, const AttentionArgs& args,
                  const float* weights, float* out, int64_t stride, int num_threads) {
    std::vector<AttentionItem> items;
    for (const auto& sequence : plan.sequences()) {
        for_each_item(plan, args, sequence, cut_sequence(args, sequence), [&](AttentionItem item) {
            const int64_t end = item.end_key;
            for (int64_t first = 0; first < end; first += kScoredKeys) {
                item.first_key = first;
                item.end_key = std::min(first + kScoredKeys, end);
                items.push_back(item);
            }
        });
    }
    parallel_for(static_cast<int64_t>(items.size()), num_threads, [&](int64_t i) {
        const AttentionItem& item = items[static_cast<size_t>(i)];
        kernels.score(args, item, weights, out, stride, scratch_buffer.get(kernels.scratch_floats(args, item)));
    });
    for (const auto& sequence : plan.sequences()) {
        for (int64_t i = 0; i < sequence.num_tokens; ++i) {
            float* row = out + (sequence.first_token + i) * stride;
            std::fill(row + sequence.first_position + i + 1, row + stride, -std::numeric_limits<float>::infinity());
        }
    }
}

void check_slots(const int64_t* slot_ids, int64_t num_tokens, int64_t num_slots) {
    for (int64_t token = 0; token < num_tokens; ++token) {
        if (slot_ids[token] < 0 || slot_ids[token] >= num_slots) {
            throw std::out_of_range("slot " + std::to_string(slot_ids[token]) + " is not in the cache of " +
                                    std::to_string(num_slots) + " slots");
        }
    }
}

void write_kv(const WriteArgs& keys, const WriteArgs& values, const int64_t* slot_ids, int64_t num_tokens,
              int64_t num_slots, int num_threads) {
    check_slots(slot_ids, num_tokens, num_slots);
    const auto row_elements = [](const WriteArgs& args) { return args.heads * args.cache.dim; };
    const int64_t elements = std::max<int64_t>(1, row_elements(keys) + row_elements(values));
    parallel_ranges(num_tokens, std::max<int64_t>(1, kElementsPerWrite / elements), num_threads,
                    [&](int64_t first, int64_t end) {
                        for (const WriteArgs* args : {&keys, &values}) {
                            const int64_t row_bytes = row_elements(*args) * dtype_bytes(args->dtype);
                            for (int64_t token = first; token < end; ++token) {
                                if (args->dtype == args->cache.dtype) {
                                    std::memcpy(static_cast<char*>(args->cache.data) + slot_ids[token] * row_bytes,
                                                static_cast<const char*>(args->rows) + token * row_bytes,
                                                static_cast<size_t>(row_bytes));
                                    continue;
                                }
                                for (int64_t head = 0; head < args->heads; ++head) {
                                    const int64_t at = (token * args->heads + head) * args->cache.dim;
                                    store_row(advance(args->rows, args->dtype, at), args->dtype, args->cache,
                                              args->heads, slot_ids[token], head);
                                }
                            }
                        }
                    });
}

}  // namespace amalgam
