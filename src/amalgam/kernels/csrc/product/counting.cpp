// Kernels that compute nothing and say what they would have cost (runtime/recording.h).
#include <algorithm>
#include <cstring>

#include "attention/attention.h"
#include "gated/gated.h"
#include "isa/float_types.h"
#include "isa/table.h"
#include "product/kernels.h"
#include "runtime/recording.h"

namespace amalgam {
namespace {

int64_t one_panel(const ProductArgs&) { return 1; }

void note(const char* kernel, const Cost& cost) {
    if (Recording* recording = Recording::current()) recording->add(kernel, cost);
}

void note_elements(const char* kernel, int64_t count) {
    Cost cost;
    cost.elements = static_cast<double>(count);
    note(kernel, cost);
}

// Numbers that are all different, so that a router's scores choose other experts for each token.
float noise() {
    static thread_local uint64_t state = 0;
    uint64_t x = state += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return static_cast<float>((x ^ x >> 31) >> 40) * 0x1p-24f;
}

Cost cost_of(const ProductArgs& args, int64_t rows, int64_t panels) {
    const Matrix& w = *args.weight;
    const int64_t scale = w.num_groups * w.scale_lanes * dtype_bytes(w.scale_dtype);
    const int64_t zero = w.zero != nullptr ? w.num_groups * kPanelRows : 0;
    const int64_t offset = w.offset != nullptr ? w.num_groups * kPanelRows * dtype_bytes(w.scale_dtype) : 0;
    const int64_t parts = w.part > 0 ? w.num_pairs() * w.pair_bytes : 0;
    Cost cost;
    cost.bytes = static_cast<double>(panels * (w.panel_bytes() + scale + zero + offset + parts));
    const double operations = 2.0 * static_cast<double>(rows * panels * kPanelRows) * static_cast<double>(w.columns);
    switch (args.x.kind) {
        case Operand::kInt8:
            cost.int8_operations = operations;
            break;
        case Operand::kBfloat16:
            cost.bfloat16_operations = operations;
            break;
        case Operand::kFloat32:
            cost.float32_operations = operations;
            break;
    }
    return cost;
}

void convert(const ConvertArgs& args, int64_t first, int64_t end) {
    note_elements("convert", (end - first) * args.padded_columns);
}

void product(const ProductArgs& args, int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel) {
    note("product", cost_of(args, end_row - first_row, end_panel - first_panel));
    if (args.out_dtype != DType::kFloat32) return;
    const int64_t first = first_panel * kPanelRows, end = std::min(end_panel * kPanelRows, args.weight->rows);
    for (int64_t row = first_row; row < end_row; ++row) {
        float* out = static_cast<float*>(args.out) + row * args.out_stride;
        for (int64_t i = first; i < end; ++i) out[i] = noise();
    }
}

void gate_up(const GateUpArgs& args, int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel) {
    Cost cost = cost_of(args.gate, end_row - first_row, end_panel - first_panel);
    cost += cost_of(args.up, end_row - first_row, end_panel - first_panel);
    note("gate_up", cost);
}

void combine(const CombineArgs& args, int64_t first, int64_t end) {
    note_elements("combine", (end - first) * args.num_active * (args.end_column - args.first_column));
}

void expand(const Matrix&, int64_t, int64_t first, int64_t end, float* out) {
    note_elements("expand", (end - first) * kPanelRows);
    std::memset(out, 0, static_cast<size_t>((end - first) * kPanelRows) * sizeof(float));
}

void rms_norm(const RmsNormArgs& args, int64_t first, int64_t end) {
    note_elements("norm", (end - first) * args.hidden);
}

void rotate(const RotateArgs& args, int64_t first, int64_t end) {
    note_elements("rotate", (end - first) * args.heads * args.head_dim);
}

void swiglu(const SwigluArgs&, int64_t first, int64_t end) { note_elements("swiglu", end - first); }

void layer_norm(const LayerNormArgs& args, int64_t first, int64_t end) {
    note_elements("norm", (end - first) * args.hidden);
}

void elementwise(const ElementwiseArgs&, int64_t first, int64_t end) { note_elements("elementwise", end - first); }

void scale_rows(const ScaleRowsArgs& args, int64_t first, int64_t end) {
    note_elements("elementwise", (end - first) * args.width);
}

void boltzmann(const BoltzmannArgs& args, double*) { note_elements("draw", args.count); }

int64_t scratch_floats(const AttentionArgs&, const AttentionItem&) { return 1; }

void attend(const AttentionArgs& args, const AttentionItem& item, const AttentionItem*, bool, float*) {
    Recording* recording = Recording::current();
    if (recording == nullptr) return;
    // The threads take attention's items themselves: each is one of its own here, too.
    if (recording->phases.back().items.back().bytes > 0) recording->begin_item();
    const int64_t keys = item.end_key - item.first_key, row_bytes = args.keys.dim * dtype_bytes(args.keys.dtype) +
                                                                    args.values.dim * dtype_bytes(args.values.dtype);
    Cost cost;
    cost.bytes = static_cast<double>(keys * item.num_kv_heads * row_bytes);
    (args.query_dtype == DType::kFloat32 ? cost.float32_operations : cost.bfloat16_operations) =
        2.0 * static_cast<double>(keys * item_rows(args, item) * (args.keys.dim + args.values.dim));
    note("attend", cost);
}

void merge(const AttentionArgs& args, const AttentionItem& item, int64_t num_ranges, int64_t, float*) {
    note_elements("merge", num_ranges * item_rows(args, item) * args.values.dim);
}

void convolve(const ConvolveArgs& args, const StateSequence& sequence, int64_t first, int64_t end, float*) {
    note_elements("convolve", sequence.num_tokens * args.taps * (end - first));
}

int64_t delta_scratch(const DeltaArgs&) { return 1; }

void delta_rule(const DeltaArgs& args, const StateSequence& sequence, int64_t, int64_t first, int64_t end, float*) {
    const auto state = static_cast<double>(args.key_dim * (end - first));
    Cost cost;
    cost.bytes = state * sizeof(float) * 2;  // read and written
    cost.float32_operations = state * static_cast<double>(7 * sequence.num_tokens);
    note("delta_rule", cost);
}

void gate(const GateArgs& args, int64_t first, int64_t end) {
    note_elements("elementwise", (end - first) * args.width);
}

}  // namespace

const Kernels kCountingKernels = {"counting",  one_panel,  nullptr,   convert, product, gate_up,
                                  combine,     expand,     rms_norm,  rotate,  swiglu,  layer_norm,
                                  elementwise, scale_rows, boltzmann, nullptr, nullptr};
const AttentionKernels kCountingAttention = {"counting", scratch_floats, attend, merge, nullptr};
const GatedKernels kCountingGated = {"counting", convolve, delta_rule, delta_scratch, gate};

}  // namespace amalgam
