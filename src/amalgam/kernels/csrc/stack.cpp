#include "stack.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "pool.h"

namespace amalgam {
namespace {

constexpr int64_t kElementsPerItem = 1 << 15;

class Step {
 public:
    Step(const Kernels& kernels, const AttentionKernels& attention, const AttentionPlan& plan, const StackArgs& args,
         int num_threads)
        : execution_{&kernels, num_threads},
          attention_(attention),
          plan_(plan),
          args_(args),
          tokens_(plan.num_tokens()),
          item_bytes_(args.dtype == DType::kFloat32 ? 4 : 2) {}

    // normed → delta
    void attend(const StackLayer& layer, size_t index, void* delta) {
        static thread_local std::vector<char> buffer;
        const int64_t query_size = layer.heads * layer.head_dim, key_size = layer.kv_heads * layer.head_dim;
        char* query = room(buffer, tokens_ * (2 * query_size + 2 * key_size));
        char* key = query + tokens_ * query_size * item_bytes_;
        char* value = key + tokens_ * key_size * item_bytes_;
        char* attended = value + tokens_ * key_size * item_bytes_;
        linear(execution_, input(),
               {projection(layer.query, query), projection(layer.key, key), projection(layer.value, value)});
        CachedAttentionArgs args{};
        args.query = query;
        args.key = key;
        args.value = value;
        args.dtype = args_.dtype;
        args.query_stride = query_size;
        args.key_stride = args.value_stride = key_size;
        args.query_norm = layer.query_norm.data;
        args.key_norm = layer.key_norm.data;
        args.norm_dtype = layer.query_norm.dtype;
        args.eps = layer.head_norm_eps;
        if (layer.rope >= 0) {
            const size_t rope = static_cast<size_t>(layer.rope);
            args.cos = args_.cos[rope];
            args.sin = args_.sin[rope];
            args.half = args_.half[rope];
            args.positions = args_.positions;
        }
        args.keys = args_.keys[index];
        args.values = args_.values[index];
        args.slot_ids = args_.slot_ids;
        args.num_slots = args_.num_slots;
        args.attention.keys = {args.keys, args_.dtype, key_size, layer.head_dim, layer.head_dim};
        args.attention.values = {args.values, args_.dtype, key_size, layer.head_dim, layer.head_dim};
        args.attention.out = attended;
        args.attention.heads = layer.heads;
        args.attention.kv_heads = layer.kv_heads;
        args.attention.scale = layer.scale;
        args.attention.window = layer.window;
        args.attention.sinks = layer.sinks;
        cached_attention(*execution_.kernels, attention_, plan_, args, execution_.num_threads);
        linear(execution_, {attended, args_.dtype, tokens_, args_.dtype}, {projection(layer.out, delta)});
    }

    // normed → delta
    void mix(const StackLayer& layer, int64_t mixture, void* delta) {
        const int64_t offset = mixture * tokens_ * layer.num_active;
        int64_t* ids = args_.expert_ids + offset;
        float* weights = args_.gate_weights + offset;
        const int64_t k = layer.num_active;
        route(execution_, {input(), &layer.router->matrix(), k, layer.normalises, layer.sum_eps, ids, weights});
        moe(execution_, {layer.experts, args_.normed, args_.dtype, tokens_, ids, weights, k, layer.gating, delta});
    }

    // normed → delta
    void transform(const StackLayer& layer, void* delta) {
        static thread_local std::vector<char> buffer;
        const int64_t width = layer.gate.matrix->matrix().rows, elements = tokens_ * width;
        char* gate = room(buffer, 3 * elements);
        char* up = gate + elements * item_bytes_;
        char* joined = up + elements * item_bytes_;
        linear(execution_, input(), {projection(layer.gate, gate), projection(layer.up, up)});
        const SwigluArgs args{gate, up, joined, args_.dtype};
        parallel_ranges(elements, kElementsPerItem, execution_.num_threads,
                        [&](int64_t first, int64_t end) { execution_.kernels->swiglu(args, first, end); });
        linear(execution_, {joined, args_.dtype, tokens_, args_.dtype}, {projection(layer.down, delta)});
    }

    // x + delta → x, its norm → normed
    void add(const void* delta, const NormWeight& norm, float eps) {
        const RmsNormArgs args{args_.x,      delta, args_.x,     norm.data, args_.normed,
                               args_.hidden, eps,   args_.dtype, norm.dtype};
        parallel_ranges(tokens_, std::max<int64_t>(1, kElementsPerItem / args_.hidden), execution_.num_threads,
                        [&](int64_t first, int64_t end) { execution_.kernels->rms_norm(args, first, end); });
    }

    char* room(std::vector<char>& buffer, int64_t elements) const {
        const size_t bytes = static_cast<size_t>(elements * item_bytes_);
        if (buffer.size() < bytes) buffer.resize(bytes);
        return buffer.data();
    }

 private:
    LinearArgs input() const { return {args_.normed, args_.dtype, tokens_, args_.dtype}; }

    static Projection projection(const Weight& weight, void* out) {
        return {&weight.matrix->matrix(), weight.bias, out};
    }

    Execution execution_;
    const AttentionKernels& attention_;
    const AttentionPlan& plan_;
    const StackArgs& args_;
    int64_t tokens_;
    int64_t item_bytes_;
};

}  // namespace

void run_stack(const Kernels& kernels, const AttentionKernels& attention, const AttentionPlan& plan,
               const std::vector<StackLayer>& layers, const StackArgs& args, int num_threads) {
    for (int64_t token = 0; token < plan.num_tokens(); ++token) {
        const int64_t position = args.positions[token];
        if (position < 0 || position >= args.num_positions) {
            throw std::out_of_range("position " + std::to_string(position) + " of " +
                                    std::to_string(args.num_positions));
        }
    }
    static thread_local std::vector<char> buffer;
    Step step(kernels, attention, plan, args, num_threads);
    char* delta = step.room(buffer, plan.num_tokens() * args.hidden);
    int64_t mixtures = 0;
    for (size_t i = 0; i < layers.size(); ++i) {
        const StackLayer& layer = layers[i];
        step.attend(layer, i, delta);
        step.add(delta, layer.mlp_norm, layer.norm_eps);
        if (layer.router != nullptr) {
            step.mix(layer, mixtures++, delta);
        } else {
            step.transform(layer, delta);
        }
        step.add(delta, layer.next_norm, layer.norm_eps);
    }
}

}  // namespace amalgam
