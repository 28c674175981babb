#include "stack.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "float_types.h"
#include "pool.h"

namespace amalgam {
namespace {

constexpr int64_t kElementsPerItem = 1 << 15;

void check(int64_t value, int64_t end, const char* what) {
    if (value >= 0 && value < end) return;
    throw std::out_of_range(what + (" " + std::to_string(value)) + " of " + std::to_string(end));
}

// A step's tokens, one sequence's after another's.
struct Rows {
    std::vector<int64_t> token_ids, positions, slot_ids;
    std::vector<int64_t> wanted;  // whose logits are
    std::vector<int64_t> starts = {0}, lengths, tables;
    int64_t num_blocks = 0;  // of a row of tables

    Rows(const std::vector<StackSequence>& sequences, const StackMemory& memory) {
        for (const StackSequence& sequence : sequences) {
            num_blocks = std::max(num_blocks, static_cast<int64_t>(sequence.block_ids.size()));
        }
        for (const StackSequence& sequence : sequences) add(sequence, memory);
    }

    AttentionPlan plan(int64_t block_size) const {
        const auto count = static_cast<int64_t>(lengths.size());
        return {starts.data(), lengths.data(), count, tables.data(), num_blocks, num_blocks, block_size};
    }

 private:
    void add(const StackSequence& sequence, const StackMemory& memory) {
        const auto tokens = static_cast<int64_t>(sequence.token_ids.size());
        const auto blocks = static_cast<int64_t>(sequence.block_ids.size());
        const int64_t first = sequence.first_position, end = first + tokens, size = memory.block_size;
        if (end > blocks * size) {
            throw std::invalid_argument(std::to_string(blocks) + " blocks for " + std::to_string(end) + " tokens");
        }
        token_ids.insert(token_ids.end(), sequence.token_ids.begin(), sequence.token_ids.end());
        for (int64_t position = first; position < end; ++position) {
            check(position, memory.num_positions, "position");
            const int64_t block = sequence.block_ids[static_cast<size_t>(position / size)];
            check(block, memory.num_slots, "block");
            const int64_t slot = block * size + position % size;
            check(slot, memory.num_slots, "slot");
            positions.push_back(position);
            slot_ids.push_back(slot);
        }
        const int64_t last = starts.back() + tokens;
        for (int64_t row = last - std::min(sequence.num_logits, tokens); row < last; ++row) wanted.push_back(row);
        starts.push_back(last);
        lengths.push_back(end);
        tables.insert(tables.end(), sequence.block_ids.begin(), sequence.block_ids.end());
        tables.resize(tables.size() + static_cast<size_t>(num_blocks - blocks));
    }
};

class Step {
 public:
    Step(const Kernels& kernels, const AttentionKernels& attention, const StackModel& model, const StackMemory& memory,
         const StackStep& args, const Rows& rows, const AttentionPlan& plan, int num_threads)
        : execution_{&kernels, num_threads},
          attention_(attention),
          model_(model),
          memory_(memory),
          args_(args),
          rows_(rows),
          plan_(plan),
          tokens_(plan.num_tokens()),
          item_bytes_(dtype_bytes(args.dtype)) {
        static thread_local std::vector<char> buffer;
        const int64_t elements = tokens_ * model.hidden;
        x_ = activations(buffer, 3 * elements);
        normed_ = x_ + elements * item_bytes_;
        delta_ = normed_ + elements * item_bytes_;
    }

    void run() {
        begin();
        int64_t mixtures = 0;
        for (size_t i = 0; i < model_.layers.size(); ++i) {
            const StackLayer& layer = model_.layers[i];
            attend(layer, i);
            add(layer.mlp_norm, layer.norm_eps);
            if (layer.router != nullptr) {
                mix(layer, mixtures++);
            } else {
                transform(layer);
            }
            add(layer.next_norm, layer.norm_eps);
        }
        end();
    }

 private:
    // token ids → x, its norm → normed
    void begin() {
        const Embedding& embedding_ = model_.embedding;
        if (args_.x != nullptr) {
            std::memcpy(x_, args_.x, static_cast<size_t>(tokens_ * model_.hidden * item_bytes_));
        } else if (embedding_.matrix != nullptr) {
            embedding(*execution_.kernels, embedding_.matrix->matrix(), rows_.token_ids.data(), tokens_, x_,
                      args_.dtype, execution_.num_threads);
        } else {
            parallel_for(tokens_, execution_.num_threads, [&](int64_t token) { look_up(embedding_, token); });
        }
        norm(model_.first_norm, model_.norm_eps, nullptr);
    }

    void look_up(const Embedding& embedding, int64_t token) {
        static thread_local std::vector<float> wide;
        const int64_t hidden = model_.hidden, id = rows_.token_ids[static_cast<size_t>(token)];
        const void* from = advance(embedding.rows, embedding.dtype, id * hidden);
        void* to = advance(static_cast<void*>(x_), args_.dtype, token * hidden);
        if (embedding.dtype == args_.dtype) {
            std::memcpy(to, from, static_cast<size_t>(hidden * item_bytes_));
        } else if (args_.dtype == DType::kFloat32) {
            widen_all(from, embedding.dtype, hidden, static_cast<float*>(to));
        } else {
            wide.resize(static_cast<size_t>(hidden));
            widen_all(from, embedding.dtype, hidden, wide.data());
            for (int64_t i = 0; i < hidden; ++i) narrow(wide[static_cast<size_t>(i)], static_cast<Bfloat16*>(to) + i);
        }
    }

    // normed → out
    void end() {
        const auto count = static_cast<int64_t>(rows_.wanted.size());
        if (count == 0) return;
        const bool has_head = model_.head.matrix != nullptr;
        char* wanted = has_head ? delta_ : static_cast<char*>(args_.out);
        const int64_t bytes = model_.hidden * item_bytes_;
        for (int64_t i = 0; i < count; ++i) {
            std::memcpy(wanted + i * bytes, normed_ + rows_.wanted[static_cast<size_t>(i)] * bytes,
                        static_cast<size_t>(bytes));
        }
        if (has_head) {
            linear(execution_, {wanted, args_.dtype, count, DType::kFloat32}, {projection(model_.head, args_.out)});
        }
    }

    // normed → delta
    void attend(const StackLayer& layer, size_t index) {
        static thread_local std::vector<char> buffer;
        const int64_t query_size = layer.heads * layer.head_dim, key_size = layer.kv_heads * layer.head_dim;
        char* query = activations(buffer, tokens_ * (2 * query_size + 2 * key_size));
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
            args.cos = memory_.cos[rope];
            args.sin = memory_.sin[rope];
            args.half = memory_.half[rope];
            args.positions = rows_.positions.data();
        }
        args.keys = memory_.keys[index];
        args.values = memory_.values[index];
        args.slot_ids = rows_.slot_ids.data();
        args.num_slots = memory_.num_slots;
        args.attention.keys = {args.keys, args_.dtype, key_size, layer.head_dim, layer.head_dim};
        args.attention.values = {args.values, args_.dtype, key_size, layer.head_dim, layer.head_dim};
        args.attention.out = attended;
        args.attention.heads = layer.heads;
        args.attention.kv_heads = layer.kv_heads;
        args.attention.scale = layer.scale;
        args.attention.window = layer.window;
        args.attention.sinks = layer.sinks;
        cached_attention(*execution_.kernels, attention_, plan_, args, execution_.num_threads);
        linear(execution_, {attended, args_.dtype, tokens_, args_.dtype}, {projection(layer.out, delta_)});
    }

    // normed → delta
    void mix(const StackLayer& layer, int64_t mixture) {
        static thread_local std::vector<int64_t> unasked_ids;
        static thread_local std::vector<float> unasked_weights;
        const int64_t k = layer.num_active, offset = mixture * tokens_ * k;
        int64_t* ids = args_.expert_ids == nullptr ? room(unasked_ids, tokens_ * k) : args_.expert_ids + offset;
        float* weights = args_.expert_ids == nullptr ? room(unasked_weights, tokens_ * k) : args_.gate_weights + offset;
        route(execution_, {input(), &layer.router->matrix(), k, layer.normalises, layer.sum_eps, ids, weights});
        moe(execution_, {layer.experts, normed_, args_.dtype, tokens_, ids, weights, k, layer.gating, delta_});
    }

    // normed → delta
    void transform(const StackLayer& layer) {
        static thread_local std::vector<char> buffer;
        const int64_t width = layer.gate.matrix->matrix().rows, elements = tokens_ * width;
        char* gate = activations(buffer, 3 * elements);
        char* up = gate + elements * item_bytes_;
        char* joined = up + elements * item_bytes_;
        linear(execution_, input(), {projection(layer.gate, gate), projection(layer.up, up)});
        const SwigluArgs args{gate, up, joined, args_.dtype};
        parallel_ranges(elements, kElementsPerItem, execution_.num_threads,
                        [&](int64_t first, int64_t end) { execution_.kernels->swiglu(args, first, end); });
        linear(execution_, {joined, args_.dtype, tokens_, args_.dtype}, {projection(layer.down, delta_)});
    }

    // x + delta → x, its norm → normed
    void add(const NormWeight& weight, float eps) { norm(weight, eps, delta_); }

    void norm(const NormWeight& weight, float eps, const void* delta) {
        const RmsNormArgs args{x_, delta, x_, weight.data, normed_, model_.hidden, eps, args_.dtype, weight.dtype};
        parallel_ranges(tokens_, std::max<int64_t>(1, kElementsPerItem / model_.hidden), execution_.num_threads,
                        [&](int64_t first, int64_t end) { execution_.kernels->rms_norm(args, first, end); });
    }

    template <class T>
    static T* room(std::vector<T>& buffer, int64_t count) {
        if (buffer.size() < static_cast<size_t>(count)) buffer.resize(static_cast<size_t>(count));
        return buffer.data();
    }

    // Activations.
    char* activations(std::vector<char>& buffer, int64_t elements) const {
        return room(buffer, elements * item_bytes_);
    }

    LinearArgs input() const { return {normed_, args_.dtype, tokens_, args_.dtype}; }

    static Projection projection(const Weight& weight, void* out) {
        return {&weight.matrix->matrix(), weight.bias, out};
    }

    Execution execution_;
    const AttentionKernels& attention_;
    const StackModel& model_;
    const StackMemory& memory_;
    const StackStep& args_;
    const Rows& rows_;
    const AttentionPlan& plan_;
    int64_t tokens_;
    int64_t item_bytes_;
    char *x_, *normed_, *delta_;  // [tokens, hidden]: the residual stream, its norm, what a block adds to it
};

}  // namespace

void run_stack(const Kernels& kernels, const AttentionKernels& attention, const StackModel& model,
               const StackMemory& memory, const StackStep& step, int num_threads) {
    const Rows rows(step.sequences, memory);
    if (static_cast<int64_t>(rows.wanted.size()) != step.num_logits) {
        throw std::invalid_argument(std::to_string(rows.wanted.size()) + " rows are wanted, " +
                                    std::to_string(step.num_logits) + " have a place");
    }
    if (step.x == nullptr) {
        const Embedding& embedding = model.embedding;
        const int64_t size = embedding.matrix != nullptr ? embedding.matrix->matrix().rows : embedding.num_rows;
        for (const int64_t token_id : rows.token_ids) check(token_id, size, "token");
    }
    const AttentionPlan plan = rows.plan(memory.block_size);
    check(plan.num_slots() - 1, memory.num_slots, "slot");
    Step(kernels, attention, model, memory, step, rows, plan, num_threads).run();
}

}  // namespace amalgam
