// One mixture-of-experts layer per call:
//
//     sort (token, expert) pairs by expert ─ make operands ─ gate, up, SwiGLU ─ make operands ─ down ─ weighted sum
//
// A pair's place in the sorted order is its slot. Every projection of every expert brings its own format. Where the
// experts of a layer lie on several devices, each device does all but the sum for its own, and one of them adds.
#include <cstring>
#include <stdexcept>
#include <string>

#include "product/linear.h"
#include "product/operands.h"
#include "runtime/placement.h"

namespace amalgam {
namespace {

constexpr int64_t kItemsPerThread = 12;
constexpr int64_t kElementsPerSum = 1 << 13, kMinColumns = 256;  // of one item of the weighted sum
constexpr int64_t kElementsPerCopy = 1 << 14;
constexpr int64_t kNoExpert = -1;         // an id: no choice, or an expert that lies elsewhere
constexpr int64_t kRowsPerPanelRead = 8;  // rows whose arithmetic takes about as long as reading the panel

struct Active {
    const ExpertWeights* weights;
    int64_t first_slot;
    int64_t rows;
};

struct Routing {
    std::vector<Active> active;
    int32_t* tokens;  // [slots]
    int32_t* slots;   // [tokens, k]; -1 where there is no expert
    int64_t num_slots = 0;
};

Routing sort_by_expert(const ExpertsArgs& args, Workspace& workspace) {
    const int64_t pairs = args.tokens * args.num_active, num_experts = static_cast<int64_t>(args.experts->size());
    Routing routing{{}, workspace.take<int32_t>(pairs), workspace.take<int32_t>(pairs)};
    std::vector<int64_t> next(static_cast<size_t>(num_experts) + 1, 0);
    for (int64_t i = 0; i < pairs; ++i) {
        const int64_t expert = args.expert_ids[i];
        if (expert == kNoExpert) continue;
        if (expert < 0 || expert >= num_experts) {
            throw std::out_of_range("expert " + std::to_string(expert) + " of " + std::to_string(num_experts));
        }
        next[static_cast<size_t>(expert) + 1]++;
    }
    for (size_t e = 0; e < static_cast<size_t>(num_experts); ++e) {
        if (next[e + 1] > 0) routing.active.push_back({&(*args.experts)[e], next[e], next[e + 1]});
        next[e + 1] += next[e];
    }
    routing.num_slots = next.back();
    for (int64_t i = 0; i < pairs; ++i) {
        if (args.expert_ids[i] == kNoExpert) {
            routing.slots[i] = -1;
            continue;
        }
        const int64_t slot = next[static_cast<size_t>(args.expert_ids[i])]++;
        routing.tokens[slot] = static_cast<int32_t>(i / args.num_active);
        routing.slots[i] = static_cast<int32_t>(slot);
    }
    return routing;
}

// Activations of the tokens, made once for all experts that read the same form.
class TokenOperands {
 public:
    TokenOperands(const ExpertsArgs& args, const Routing& routing, Workspace& workspace)
        : args_(args), routing_(routing), workspace_(workspace) {}

    Activations get(const Matrix& weight, Operand kind, const Active& expert) {
        const int32_t* tokens = routing_.tokens + expert.first_slot;
        if (gather_order(weight, kind) != nullptr) {  // an order of its own: only its tokens, already gathered
            return add(weight, kind, tokens, expert.rows);
        }
        Activations x{kind, accumulation_chunk(weight, kind), weight.columns, args_.x, nullptr, nullptr, tokens};
        if (is_operand(weight, kind, args_.x_dtype, args_.tokens)) return x;
        for (const Activations& known : shared_) {
            if (is_shared(known, weight, kind)) {
                x = known;
                x.index = tokens;
                return x;
            }
        }
        shared_.push_back(add(weight, kind, nullptr, args_.tokens));
        x = shared_.back();
        x.index = tokens;
        return x;
    }

    const std::vector<Conversion>& conversions() const { return conversions_; }

 private:
    Activations add(const Matrix& weight, Operand kind, const int32_t* index, int64_t rows) {
        conversions_.emplace_back();
        return plan_conversion(weight, kind, args_.x, args_.x_dtype, index, rows, workspace_, &conversions_.back());
    }

    const ExpertsArgs& args_;
    const Routing& routing_;
    Workspace& workspace_;
    std::vector<Activations> shared_;
    std::vector<Conversion> conversions_;
};

struct Item {
    size_t expert;  // in the list of active ones
    int64_t first_panel, end_panel;
};

// Cuts every active expert's panels into items of about equal cost, many enough to keep all threads busy, and many
// rows' in steps of as many panels as are multiplied at once, if that leaves no thread without an item. First come the
// panels of the first node, so that the shares that threads begin with are those of their nodes.
template <class PanelsAtOnce>
std::vector<Item> cut(const std::vector<Active>& active, int64_t panels, PanelsAtOnce&& panels_at_once,
                      int num_threads) {
    const int parts = num_node_parts();
    int64_t total = 0;
    for (const Active& expert : active) total += kRowsPerPanelRead + expert.rows;
    std::vector<Item> items;
    for (int part = 0; part < parts; ++part) {
        const int64_t first = part_start(panels, part, parts), size = part_start(panels, part + 1, parts) - first;
        for (size_t e = 0; e < active.size() && size > 0; ++e) {
            const int64_t at_once = active[e].rows > kRowsPerPanelRead ? panels_at_once(e) : 1;
            const int64_t most_items = panels * static_cast<int64_t>(active.size());
            const int64_t unit = most_items >= at_once * num_threads ? at_once : 1, steps = (size + unit - 1) / unit;
            const int64_t cost = kRowsPerPanelRead + active[e].rows;
            const int64_t share = (cost * num_threads * kItemsPerThread + total * parts - 1) / (total * parts);
            const int64_t count = std::clamp<int64_t>(share, 1, steps);
            const auto bound = [&](int64_t i) { return first + std::min(steps * i / count * unit, size); };
            for (int64_t i = 0; i < count; ++i) items.push_back({e, bound(i), bound(i + 1)});
        }
    }
    return items;
}

const ProductArgs& product_of(const ProductArgs& args) { return args; }
const ProductArgs& product_of(const GateUpArgs& args) { return args.gate; }

template <class Args, class Kernel>
void run_items(const Execution& execution, const Routing& routing, int64_t panels, const std::vector<Args>& args,
               Kernel kernel) {
    const auto panels_at_once = [&](size_t e) { return execution.kernels->panels_at_once(product_of(args[e])); };
    const std::vector<Item> items = cut(routing.active, panels, panels_at_once, execution.num_threads);
    parallel_for(static_cast<int64_t>(items.size()), execution.num_threads, [&](int64_t i) {
        const Item& item = items[static_cast<size_t>(i)];
        kernel(args[item.expert], 0, routing.active[item.expert].rows, item.first_panel, item.end_panel);
    });
}

// What every expert makes of its tokens, before gate weights: [slots, hidden] in the workspace. There is some expert.
const float* outputs_of(const Execution& execution, const ExpertsArgs& args, const Routing& routing,
                        Workspace& workspace) {
    const Kernels& kernels = *execution.kernels;
    const Matrix& first = routing.active.front().weights->gate->matrix();
    const int64_t hidden = first.columns, width = first.rows, slots = routing.num_slots;

    // The result of gate and up: float32 [slots, width].
    auto* inner = workspace.take<float>(slots * width);
    TokenOperands operands(args, routing, workspace);
    std::vector<GateUpArgs> gate_up;
    for (const Active& expert : routing.active) {
        const auto side = [&](const PackedMatrix& weight, const Bias& bias) {
            const Matrix& matrix = weight.matrix();
            const Operand kind = operand_for(matrix, args.x_dtype);
            return ProductArgs{
                &matrix, operands.get(matrix, kind, expert), bias, inner + expert.first_slot * width, DType::kFloat32,
                width};
        };
        gate_up.push_back({side(*expert.weights->gate, expert.weights->gate_bias),
                           side(*expert.weights->up, expert.weights->up_bias), args.gating});
    }
    run_conversions(execution, operands.conversions());
    run_items(execution, routing, first.num_panels(), gate_up, kernels.gate_up);

    auto* parts = workspace.take<float>(slots * hidden);
    std::vector<ProductArgs> down;
    std::vector<Conversion> conversions;
    for (const Active& expert : routing.active) {
        const Matrix& matrix = expert.weights->down->matrix();
        const Operand kind = operand_for(matrix, args.x_dtype);
        const float* x = inner + expert.first_slot * width;
        Activations operand{kind, accumulation_chunk(matrix, kind), width, x, nullptr, nullptr, nullptr};
        if (!is_operand(matrix, kind, DType::kFloat32, expert.rows)) {
            conversions.emplace_back();
            operand =
                plan_conversion(matrix, kind, x, DType::kFloat32, nullptr, expert.rows, workspace, &conversions.back());
        }
        down.push_back(
            {&matrix, operand, expert.weights->down_bias, parts + expert.first_slot * hidden, DType::kFloat32, hidden});
    }
    run_conversions(execution, conversions);
    run_items(execution, routing, routing.active.front().weights->down->matrix().num_panels(), down, kernels.product);

    return parts;
}

// By tokens and, where a token's row is long, by columns.
void add_up(const Execution& execution, const CombineArgs& args, int64_t tokens) {
    const int64_t columns = std::min(args.hidden, std::max<int64_t>(kMinColumns, kElementsPerSum / args.num_active));
    const int64_t ranges = (args.hidden + columns - 1) / columns;
    parallel_for(tokens * ranges, execution.num_threads, [&](int64_t item) {
        const int64_t token = item / ranges;
        CombineArgs part = args;
        part.first_column = item % ranges * columns;
        part.end_column = std::min(part.first_column + columns, args.hidden);
        execution.kernels->combine(part, token, token + 1);
    });
}

}  // namespace

void moe(const Execution& execution, const MoeArgs& args) {
    Workspace workspace;
    const Routing routing = sort_by_expert(args, workspace);
    const float* parts = routing.active.empty() ? nullptr : outputs_of(execution, args, routing, workspace);
    const int64_t hidden = args.experts->front().gate->matrix().columns;
    add_up(execution, {parts, routing.slots, args.gate_weights, args.num_active, hidden, args.out, args.x_dtype, 0, 0},
           args.tokens);
}

void expert_outputs(const Execution& execution, const ExpertsArgs& args, float* out) {
    Workspace workspace;
    const Routing routing = sort_by_expert(args, workspace);
    if (routing.active.empty()) return;
    const float* parts = outputs_of(execution, args, routing, workspace);
    const int64_t hidden = args.experts->front().gate->matrix().columns, pairs = args.tokens * args.num_active;
    parallel_ranges(
        pairs, std::max<int64_t>(1, kElementsPerCopy / hidden), execution.num_threads, [&](int64_t begin, int64_t end) {
            for (int64_t pair = begin; pair < end; ++pair) {
                const int64_t slot = routing.slots[pair];
                if (slot < 0) continue;
                std::memcpy(out + pair * hidden, parts + slot * hidden, static_cast<size_t>(hidden) * sizeof(float));
            }
        });
}

void weighted_sum(const Execution& execution, const float* outputs, const int64_t* expert_ids,
                  const float* gate_weights, int64_t tokens, int64_t num_active, int64_t hidden, void* out,
                  DType out_dtype) {
    Workspace workspace;
    auto* slots = workspace.take<int32_t>(tokens * num_active);
    for (int64_t i = 0; i < tokens * num_active; ++i) {
        slots[i] = expert_ids[i] == kNoExpert ? -1 : static_cast<int32_t>(i);
    }
    add_up(execution, {outputs, slots, gate_weights, num_active, hidden, out, out_dtype, 0, 0}, tokens);
}

}  // namespace amalgam
