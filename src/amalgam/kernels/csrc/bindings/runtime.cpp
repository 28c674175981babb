// Threads, where weights lie, and what is measured of either.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/tensor.h"
#include "runtime/placement.h"
#include "runtime/pool.h"
#include "runtime/recording.h"

namespace nb = nanobind;

namespace amalgam {
namespace {

// Nodes by id, with their processors.
void place(Placement placement, const std::vector<std::pair<int, std::vector<int>>>& nodes) {
    std::vector<Node> found;
    for (const auto& [id, processors] : nodes) found.push_back({id, processors});
    place_weights(placement, found);
}

// --- What a step is made of, for a simulation ---

// Kernel, and of each item: bytes, operations in int8, bfloat16 and float32, elements.
using ItemTuple = std::tuple<double, double, double, double, double>;
using PhaseTuple = std::pair<std::string, std::vector<ItemTuple>>;

// What the calls of run_parallel within `work` consist of.
std::vector<PhaseTuple> record(const nb::callable& work) {
    Recording recording;
    work();
    std::vector<PhaseTuple> phases;
    for (const Phase& phase : recording.phases) {
        phases.emplace_back(phase.kernel, std::vector<ItemTuple>());
        for (const Cost& cost : phase.items) {
            phases.back().second.emplace_back(cost.bytes, cost.int8_operations, cost.bfloat16_operations,
                                              cost.float32_operations, cost.elements);
        }
    }
    return phases;
}

// --- Read bandwidth, for benchmarks: every byte once, as fast as a plain loop can ---

uint64_t sum_words(const std::vector<std::pair<const uint8_t*, int64_t>>& pieces, int threads) {
    std::atomic<uint64_t> total{0};
    parallel_for(static_cast<int64_t>(pieces.size()), threads, [&](int64_t i) {
        const auto& [data, bytes] = pieces[static_cast<size_t>(i)];
        const auto* words = reinterpret_cast<const uint64_t*>(data);
        uint64_t sums[8] = {};
        for (int64_t line = 0; line < bytes / kLineBytes; ++line, words += 8) {
#pragma GCC unroll 8
            for (int lane = 0; lane < 8; ++lane) sums[lane] += words[lane];
        }
        for (const uint64_t sum : sums) total += sum;
    });
    return total;
}

void add_pieces(const uint8_t* data, int64_t bytes, std::vector<std::pair<const uint8_t*, int64_t>>& pieces) {
    constexpr int64_t kPieceBytes = 1 << 18;
    for (int64_t at = 0; at < bytes; at += kPieceBytes) {
        pieces.emplace_back(data + at, std::min(kPieceBytes, bytes - at));
    }
}

uint64_t checksum(const std::vector<MatrixPointer>& weights, int threads) {
    std::vector<std::pair<const uint8_t*, int64_t>> pieces;
    for (const auto& weight : weights) {
        require(weight != nullptr, "a weight is not in panels");
        add_pieces(weight->memory(), weight->nbytes(), pieces);
    }
    return sum_words(pieces, threads);
}

uint64_t read_memory(const Tensor& memory, int threads) {
    memory.dense("memory", kAnyKind);
    std::vector<std::pair<const uint8_t*, int64_t>> pieces;
    add_pieces(memory.data<const uint8_t>(), memory.size() * memory.item_bits() / 8, pieces);
    return sum_words(pieces, threads);
}

}  // namespace

void bind_runtime(nb::module_& module) {
    using namespace nb::literals;
    nb::enum_<Placement>(module, "Placement")
        .value("anywhere", Placement::kAnywhere)
        .value("interleaved", Placement::kInterleaved)
        .value("local", Placement::kLocal);
    module.def("place_weights", &place, "placement"_a, "nodes"_a);
    module.def("bind_threads", &bind_threads, "processors"_a);
    module.def("limit_threads", &limit_threads, "most"_a);
    module.def("record", &record, "work"_a);
    module.def("checksum", &checksum, Unlocked());
    module.def("read_memory", &read_memory, Unlocked());
}

}  // namespace amalgam
