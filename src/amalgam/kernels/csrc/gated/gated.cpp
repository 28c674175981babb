#include "gated/gated.h"

#include <algorithm>
#include <memory>

#include "runtime/pool.h"

namespace amalgam {
namespace {

constexpr int64_t kChannelsPerItem = 256;
constexpr int64_t kColumnsPerItem = 32;  // at least
constexpr int64_t kItemsPerThread = 4;
constexpr int64_t kElementsPerItem = 1 << 13;

// 64-byte aligned memory that is kept by its thread for the next call.
float* scratch(int64_t count) {
    constexpr int64_t kLineFloats = 16;
    static thread_local std::unique_ptr<float[]> memory;
    static thread_local int64_t size = 0;
    if (size < count) {
        memory.reset(new float[static_cast<size_t>(count + kLineFloats)]);
        size = count;
    }
    const auto address = reinterpret_cast<uintptr_t>(memory.get());
    return memory.get() + (64 - address % 64) % 64 / sizeof(float);
}

}  // namespace

void convolve(const GatedKernels& kernels, const std::vector<StateSequence>& sequences, const ConvolveArgs& args,
              int num_threads) {
    const int64_t parts = (args.channels + kChannelsPerItem - 1) / kChannelsPerItem;
    const int64_t size = kConvolvedChannels * (args.taps - 1 + kConvolvedRows);
    parallel_for(static_cast<int64_t>(sequences.size()) * parts, num_threads, [&](int64_t item) {
        const int64_t first = item % parts * kChannelsPerItem;
        kernels.convolve(args, sequences[static_cast<size_t>(item / parts)], first,
                         std::min(first + kChannelsPerItem, args.channels), scratch(size));
    });
}

void delta_rule(const GatedKernels& kernels, const std::vector<StateSequence>& sequences, const DeltaArgs& args,
                int num_threads) {
    // Columns of a head do not depend on each other. They lie side by side in memory, so that a head is cut only where
    // a thread would be idle.
    const int64_t heads = static_cast<int64_t>(sequences.size()) * args.value_heads;
    const int64_t most = (args.value_dim + kColumnsPerItem - 1) / kColumnsPerItem;
    const int64_t wanted = num_threads > 1 ? num_threads * kItemsPerThread : 1;
    const int64_t parts = std::clamp<int64_t>((wanted + heads - 1) / std::max<int64_t>(1, heads), 1, most);
    const int64_t columns = (most + parts - 1) / parts * kColumnsPerItem;
    const int64_t size = kernels.delta_scratch(args);
    parallel_for(heads * parts, num_threads, [&](int64_t item) {
        const int64_t first = item % parts * columns, end = std::min(first + columns, args.value_dim);
        if (first >= end) return;
        const int64_t head = item / parts;
        kernels.delta_rule(args, sequences[static_cast<size_t>(head / args.value_heads)], head % args.value_heads,
                           first, end, scratch(size));
    });
}

void gate(const GatedKernels& kernels, const GateArgs& args, int64_t rows, int num_threads) {
    parallel_ranges(rows, std::max<int64_t>(1, kElementsPerItem / std::max<int64_t>(1, args.width)), num_threads,
                    [&](int64_t first, int64_t end) { kernels.gate(args, first, end); });
}

}  // namespace amalgam
