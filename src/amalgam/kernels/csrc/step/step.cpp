#include "step/step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "isa/float_types.h"
#include "runtime/pool.h"

namespace amalgam {
namespace {

constexpr int64_t kElementsPerItem = 1 << 13;

void check(int64_t value, int64_t end, const char* what) {
    if (value >= 0 && value < end) return;
    throw std::out_of_range(what + (" " + std::to_string(value)) + " of " + std::to_string(end));
}

// A step's tokens, one sequence's after another's.
struct TokenRows {
    std::vector<int64_t> token_ids, positions, slot_ids;
    std::vector<int64_t> wanted;  // whose logits are
    std::vector<int64_t> starts = {0}, lengths, tables;
    std::vector<StateSequence> states;  // of those that have one
    int64_t num_blocks = 0;             // of a row of tables

    TokenRows(const std::vector<StepSequence>& sequences, const StepMemory& memory) {
        for (const StepSequence& sequence : sequences) {
            num_blocks = std::max(num_blocks, static_cast<int64_t>(sequence.block_ids.size()));
        }
        for (const StepSequence& sequence : sequences) add(sequence, memory);
    }

    AttentionPlan plan(int64_t block_size) const {
        const auto count = static_cast<int64_t>(lengths.size());
        return {starts.data(), lengths.data(), count, tables.data(), num_blocks, num_blocks, block_size};
    }

 private:
    void add(const StepSequence& sequence, const StepMemory& memory) {
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
        if (sequence.state && tokens > 0 && memory.num_states > 0) {  // whoever has no layer with states ignores them
            check_slots(*sequence.state, tokens, memory.num_states);
            states.push_back({starts.back(), tokens, *sequence.state});
        }
        const int64_t last = starts.back() + tokens;
        for (int64_t row = last - std::min(sequence.num_logits, tokens); row < last; ++row) wanted.push_back(row);
        starts.push_back(last);
        lengths.push_back(end);
        tables.insert(tables.end(), sequence.block_ids.begin(), sequence.block_ids.end());
        tables.resize(tables.size() + static_cast<size_t>(num_blocks - blocks));
    }

    static void check_slots(const StateSlots& slots, int64_t tokens, int64_t num_states) {
        if (slots.source != -1) check(slots.source, num_states, "state");
        check(slots.target, num_states, "state");
        int64_t last = 0;
        for (const auto& [count, slot] : slots.saves) {
            check(slot, num_states, "state");
            if (count <= last || count > tokens) {
                throw std::invalid_argument("a state saved after " + std::to_string(count) + " of " +
                                            std::to_string(tokens) + " tokens, behind one after " +
                                            std::to_string(last));
            }
            last = count;
        }
    }
};

// Memory of the calling thread, kept for its next call.
template <class T>
T* room(std::vector<T>& buffer, int64_t count) {
    if (buffer.size() < static_cast<size_t>(count)) buffer.resize(static_cast<size_t>(count));
    return buffer.data();
}

// Runs one instruction after the other.
class Step {
 public:
    Step(const Kernels& kernels, const AttentionKernels& attention, const GatedKernels& gated, const Program& program,
         const StepMemory& memory, const StepArgs& args, const TokenRows& rows, const AttentionPlan& plan,
         int num_threads)
        : execution_{&kernels, num_threads},
          attention_(attention),
          gated_(gated),
          program_(program),
          memory_(memory),
          args_(args),
          rows_(rows),
          plan_(plan),
          tokens_(plan.num_tokens()),
          item_bytes_(dtype_bytes(args.dtype)) {}

    void operator()(const Embed& embed) {
        static thread_local std::vector<char> added;
        const int64_t elements = tokens_ * embed.out.width;
        char* out = embed.adds ? room(added, elements * item_bytes_) : at(embed.out);
        const std::vector<int64_t>& ids = embed.by_position ? rows_.positions : rows_.token_ids;
        if (embed.matrix != nullptr) {
            embedding(*execution_.kernels, embed.matrix->matrix(), ids.data(), tokens_, out, args_.dtype,
                      execution_.num_threads);
        } else {
            parallel_for(tokens_, execution_.num_threads, [&](int64_t token) {
                look_up(embed, ids[static_cast<size_t>(token)],
                        advance(static_cast<void*>(out), args_.dtype, token * embed.out.width));
            });
        }
        if (embed.adds) apply({ElementwiseKind::kAdd, at(embed.out), out, 0.0f, args_.dtype}, elements);
    }

    void operator()(const Normalize& norm) {
        const bool has_delta = norm.delta.width > 0;
        void* x = at(norm.x);
        const void* delta = has_delta ? at(norm.delta) : nullptr;
        const int64_t count = tokens_ * (norm.x.width / norm.size);
        const int64_t step = std::max<int64_t>(1, kElementsPerItem / norm.size);
        const Kernels& kernels = *execution_.kernels;
        if (norm.bias != nullptr) {
            const LayerNormArgs args{x,         delta,    x,           norm.weight.data, norm.bias, at(norm.out),
                                     norm.size, norm.eps, args_.dtype, norm.weight.dtype};
            parallel_ranges(count, step, execution_.num_threads,
                            [&](int64_t first, int64_t end) { kernels.layer_norm(args, first, end); });
            return;
        }
        const RmsNormArgs args{x,         delta,    x,           norm.weight.data,  at(norm.out),
                               norm.size, norm.eps, args_.dtype, norm.weight.dtype, norm.rounds_last};
        parallel_ranges(count, step, execution_.num_threads,
                        [&](int64_t first, int64_t end) { kernels.rms_norm(args, first, end); });
    }

    void operator()(const Project& project) {
        LinearArgs x{at(project.x), dtype(project.x), tokens_, dtype(project.outs.front())};
        if (project.widens) {
            x.x = widened(execution_, x.x, x.x_dtype, tokens_ * project.x.width);
            x.x_dtype = DType::kFloat32;
        }
        std::vector<Projection> projections;
        for (size_t i = 0; i < project.weights.size(); ++i) {
            projections.push_back(projection(project.weights[i], at(project.outs[i])));
        }
        linear(execution_, x, projections);
    }

    void operator()(const Attend& attend) {
        const auto layer = static_cast<size_t>(attend.layer);
        CachedAttentionArgs args{};
        args.query = at(attend.query);
        args.key = at(attend.key);
        args.value = at(attend.value);
        args.dtype = args_.dtype;
        args.query_stride = attend.query.stride;
        args.key_stride = attend.key.stride;
        args.value_stride = attend.value.stride;
        args.query_norm = attend.query_norm.data;
        args.key_norm = attend.key_norm.data;
        args.norm_dtype = attend.query_norm.dtype;
        args.eps = attend.head_norm_eps;
        args.rounds_last = attend.rounds_last;
        args.is_interleaved = attend.is_interleaved;
        args.norms_last = attend.norms_last;
        place(args, attend.rope);
        args.attention.keys = memory_.keys[layer];
        args.attention.values = memory_.values[layer];
        args.attention.out = at(attend.out);
        args.attention.heads = attend.heads;
        args.attention.kv_heads = attend.kv_heads;
        args.attention.scale = attend.scale;
        args.attention.window = attend.window;
        args.attention.chunk = attend.chunk;
        args.attention.sinks = attend.sinks;
        args.attention.softcap = attend.softcap;
        cached_attention(*execution_.kernels, attention_, plan_, args, execution_.num_threads);
    }

    void operator()(const AttendLatent& attend) {
        const bool turns = attend.rope >= 0;
        const auto rope = static_cast<size_t>(turns ? attend.rope : 0);
        const bool is_chosen = attend.is_indexed && args_.chosen != nullptr;
        latent_attention(
            execution_, attention_, is_chosen ? *args_.chosen : plan_,
            {&attend.heads, at(attend.query), at(attend.compressed), at(attend.out), args_.dtype,
             turns ? memory_.cos[rope] : nullptr, turns ? memory_.sin[rope] : nullptr, rows_.positions.data(),
             memory_.keys[static_cast<size_t>(attend.layer)], rows_.slot_ids.data(), memory_.num_slots});
    }

    void operator()(const KeepIndexKey& keep) {
        CachedAttentionArgs args{};
        args.key = at(keep.key);
        args.dtype = args_.dtype;
        args.key_stride = keep.key.stride;
        args.is_interleaved = keep.is_interleaved;
        place(args, keep.rope);
        args.attention.keys = memory_.index_keys[static_cast<size_t>(keep.layer)];
        args.attention.kv_heads = 1;
        write_keys(*execution_.kernels, args, tokens_, execution_.num_threads);
    }

    void operator()(const Route& how) {
        const LinearArgs x{at(how.x), dtype(how.x), tokens_, DType::kFloat32};
        route(execution_,
              {x, &how.weight.matrix->matrix(), how.weight.bias, how.choice, ids(how.index), gate_weights(how.index)});
    }

    void operator()(const Mix& mix) {
        static thread_local std::vector<float> ones;
        const int64_t k = program_.num_active;
        if (!mix.weighs) ones.assign(static_cast<size_t>(tokens_ * k), 1.0f);
        const float* weights = mix.weighs ? gate_weights(mix.route) : ones.data();
        moe(execution_,
            {{mix.experts, at(mix.x), args_.dtype, tokens_, ids(mix.route), k, mix.gating}, weights, at(mix.out)});
    }

    void operator()(const WeighInput& weigh) {
        const int64_t bytes = weigh.x.width * item_bytes_;
        const float* weights = gate_weights(weigh.route);
        parallel_for_columns(weigh.x.width, [&](int64_t token, int64_t first, int64_t end) {
            char* out = at(weigh.out) + token * bytes;
            std::memcpy(out + first * item_bytes_, at(weigh.x) + token * bytes + first * item_bytes_,
                        static_cast<size_t>((end - first) * item_bytes_));
            execution_.kernels->elementwise({ElementwiseKind::kScale, out, nullptr, weights[token], args_.dtype}, first,
                                            end);
        });
    }

    void operator()(const SwiGlu& join) {
        const SwigluArgs args{at(join.gate), at(join.up), at(join.out), args_.dtype, join.gating};
        const int64_t width = join.out.width;
        if (join.gate.stride == width && join.up.stride == width) {
            parallel_ranges(tokens_ * width, kElementsPerItem, execution_.num_threads,
                            [&](int64_t first, int64_t end) { execution_.kernels->swiglu(args, first, end); });
            return;
        }
        const auto row_at = [&](const Columns& columns, int64_t token) {
            return at(columns) + token * columns.stride * item_bytes_;
        };
        parallel_for_columns(width, [&](int64_t token, int64_t first, int64_t end) {
            const SwigluArgs row{row_at(join.gate, token), row_at(join.up, token), row_at(join.out, token), args_.dtype,
                                 join.gating};
            execution_.kernels->swiglu(row, first, end);
        });
    }

    void operator()(const Elementwise& work) {
        const void* y = work.kind == ElementwiseKind::kAdd ? at(work.y) : nullptr;
        apply({work.kind, at(work.x), y, work.number, args_.dtype}, tokens_ * work.x.width);
    }

    void operator()(const ScaleByPosition& scale) {
        const int64_t bytes = scale.x.stride * item_bytes_;
        parallel_for_columns(scale.x.width, [&](int64_t token, int64_t first, int64_t end) {
            const auto position = static_cast<double>(rows_.positions[static_cast<size_t>(token)]);
            const double turns = std::floor((position + scale.offset) / scale.length);
            const auto factor = static_cast<float>(1.0 + scale.beta * std::log1p(turns));
            if (factor == 1.0f) return;
            execution_.kernels->elementwise(
                {ElementwiseKind::kScale, at(scale.x) + token * bytes, nullptr, factor, args_.dtype}, first, end);
        });
    }

    void operator()(const ScaleHeads& scale) {
        const int64_t dim = scale.x.width / scale.heads;
        parallel_ranges(tokens_, std::max<int64_t>(1, kElementsPerItem / scale.x.width), execution_.num_threads,
                        [&](int64_t token, int64_t end) {
                            for (; token < end; ++token) {
                                char* row = at(scale.x) + token * scale.x.stride * item_bytes_;
                                const auto position = static_cast<double>(rows_.positions[static_cast<size_t>(token)]);
                                const auto logarithm = static_cast<float>(std::log1p(position));
                                for (int64_t head = 0; head < scale.heads; ++head) {
                                    const float factor = scale.slopes[head] * logarithm + scale.biases[head];
                                    execution_.kernels->elementwise(
                                        {ElementwiseKind::kScale, row, nullptr, factor, args_.dtype}, head * dim,
                                        (head + 1) * dim);
                                }
                            }
                        });
    }

    void operator()(const ScaleBySigmoid& scale) {
        const int64_t width = scale.x.width;
        const ScaleRowsArgs args{at(scale.x), reinterpret_cast<const float*>(at(scale.gate)), width, args_.dtype};
        parallel_ranges(tokens_, std::max<int64_t>(1, kElementsPerItem / width), execution_.num_threads,
                        [&](int64_t first, int64_t end) { execution_.kernels->scale_rows(args, first, end); });
    }

    void operator()(const Gate& gate) {
        amalgam::gate(gated_, {rows(gate.x), rows(gate.gate), gate.x.width, gate.x.width / gate.gate.width}, tokens_,
                      execution_.num_threads);
    }

    void operator()(const Split& split) {
        const int64_t bytes = dtype_bytes(dtype(split.x));
        parallel_ranges(tokens_, std::max<int64_t>(1, kElementsPerItem / split.x.width), execution_.num_threads,
                        [&](int64_t first, int64_t end) {
                            for (int64_t token = first; token < end; ++token) {
                                const char* from = at(split.x) + token * split.x.stride * bytes;
                                for (int64_t group = 0; group < split.groups; ++group) {
                                    for (const Columns& out : split.outs) {
                                        const int64_t part = out.width / split.groups * bytes;
                                        char* to = at(out) + token * out.stride * bytes + group * part;
                                        std::memcpy(to, from, static_cast<size_t>(part));
                                        from += part;
                                    }
                                }
                            }
                        });
    }

    void operator()(const Convolve& how) {
        convolve(gated_, rows_.states,
                 {rows(how.x), rows(how.out), factor(how.before), factor(how.behind), how.weight, how.bias,
                  how.activates, how.taps, how.x.width, memory_.states[static_cast<size_t>(how.layer)].convolution},
                 execution_.num_threads);
    }

    void operator()(const DeltaRule& how) {
        delta_rule(gated_, rows_.states,
                   {rows(how.query), rows(how.key), rows(how.value), rows(how.out), rows(how.decay), rows(how.strength),
                    how.log_rate, how.decay_bias, how.key_heads, how.value_heads, how.key_dim(), how.value_dim(),
                    how.decay.width != how.value_heads, how.bound, how.state_space ? &*how.state_space : nullptr,
                    memory_.states[static_cast<size_t>(how.layer)].recurrent},
                   execution_.num_threads);
    }

    void operator()(const Head& head) {
        static thread_local std::vector<char> wanted;
        const auto count = static_cast<int64_t>(rows_.wanted.size());
        if (count == 0) return;
        const int64_t bytes = head.x.width * item_bytes_;
        const char* x = at(head.x);
        char* rows = room(wanted, count * bytes);
        for (int64_t i = 0; i < count; ++i) {
            std::memcpy(rows + i * bytes, x + rows_.wanted[static_cast<size_t>(i)] * bytes, static_cast<size_t>(bytes));
        }
        linear(execution_, {rows, args_.dtype, count, DType::kFloat32}, {projection(head.weight, args_.logits)});
        const int64_t elements = count * head.weight.matrix->matrix().rows;
        const auto change = [&](ElementwiseKind kind, float number) {
            apply({kind, args_.logits, nullptr, number, DType::kFloat32}, elements);
        };
        if (head.scale != 1.0f) change(ElementwiseKind::kScale, head.scale);
        if (head.softcap > 0.0f) change(ElementwiseKind::kSoftcap, head.softcap);
    }

 private:
    DType dtype(const Columns& columns) const {
        return program_.is_wide[static_cast<size_t>(columns.buffer)] ? DType::kFloat32 : args_.dtype;
    }

    // Where heads are rotated to and keys are kept; rope -1: no rotation.
    void place(CachedAttentionArgs& args, int64_t rope) const {
        if (rope >= 0) {
            args.cos = memory_.cos[static_cast<size_t>(rope)];
            args.sin = memory_.sin[static_cast<size_t>(rope)];
            args.half = memory_.half[static_cast<size_t>(rope)];
            args.positions = rows_.positions.data();
        }
        args.slot_ids = rows_.slot_ids.data();
        args.num_slots = memory_.num_slots;
    }

    char* at(const Columns& columns) const {
        return args_.buffers[static_cast<size_t>(columns.buffer)] + columns.start * dtype_bytes(dtype(columns));
    }

    ActivationRows rows(const Columns& columns) const { return {at(columns), dtype(columns), columns.stride}; }

    ActivationRows factor(const std::optional<Columns>& columns) const {
        return columns ? rows(*columns) : ActivationRows{nullptr, args_.dtype, 0};
    }

    int64_t* ids(int64_t route) const { return args_.expert_ids + route * tokens_ * program_.num_active; }

    float* gate_weights(int64_t route) const { return args_.gate_weights + route * tokens_ * program_.num_active; }

    static Projection projection(const Weight& weight, void* out) {
        return {&weight.matrix->matrix(), weight.bias, out};
    }

    // function(token, first, end) for some columns of each token.
    template <class Function>
    void parallel_for_columns(int64_t width, Function&& function) const {
        const int64_t pieces = (width + kElementsPerItem - 1) / kElementsPerItem;
        const int64_t rows = std::max<int64_t>(1, kElementsPerItem / width);
        parallel_ranges(tokens_ * pieces, pieces > 1 ? 1 : rows, execution_.num_threads, [&](int64_t i, int64_t end) {
            for (; i < end; ++i) {
                const int64_t first = i % pieces * kElementsPerItem;
                function(i / pieces, first, std::min(first + kElementsPerItem, width));
            }
        });
    }

    void apply(const ElementwiseArgs& args, int64_t elements) const {
        parallel_ranges(elements, kElementsPerItem, execution_.num_threads,
                        [&](int64_t first, int64_t end) { execution_.kernels->elementwise(args, first, end); });
    }

    void look_up(const Embed& embed, int64_t id, void* to) const {
        static thread_local std::vector<float> wide;
        const int64_t width = embed.out.width;
        const void* from = advance(embed.rows, embed.dtype, id * width);
        if (embed.dtype == args_.dtype) {
            std::memcpy(to, from, static_cast<size_t>(width * item_bytes_));
        } else if (args_.dtype == DType::kFloat32) {
            widen_all(from, embed.dtype, width, static_cast<float*>(to));
        } else {
            float* values = room(wide, width);
            widen_all(from, embed.dtype, width, values);
            for (int64_t i = 0; i < width; ++i) narrow(values[i], static_cast<Bfloat16*>(to) + i);
        }
    }

    Execution execution_;
    const AttentionKernels& attention_;
    const GatedKernels& gated_;
    const Program& program_;
    const StepMemory& memory_;
    const StepArgs& args_;
    const TokenRows& rows_;
    const AttentionPlan& plan_;
    int64_t tokens_;
    int64_t item_bytes_;
};

}  // namespace

void run_step(const Kernels& kernels, const AttentionKernels& attention, const GatedKernels& gated,
              const Program& program, const StepMemory& memory, const StepArgs& args, size_t first, size_t end,
              int num_threads) {
    const TokenRows rows(args.sequences, memory);
    if (static_cast<int64_t>(rows.wanted.size()) != args.num_logits) {
        throw std::invalid_argument(std::to_string(rows.wanted.size()) + " rows are wanted, " +
                                    std::to_string(args.num_logits) + " have a place");
    }
    const auto has_state = [](const StepSequence& sequence) { return sequence.state.has_value(); };
    const bool all_have_states = std::all_of(args.sequences.begin(), args.sequences.end(), has_state);
    for (size_t i = first; i < end; ++i) {
        const Instruction& instruction = program.instructions[i];
        if (std::holds_alternative<Convolve>(instruction) || std::holds_alternative<DeltaRule>(instruction)) {
            if (!all_have_states || memory.num_states == 0) {
                throw std::invalid_argument("a sequence without a state, and a layer that has one");
            }
        }
    }
    for (size_t i = first; i < end; ++i) {
        const auto* embed = std::get_if<Embed>(&program.instructions[i]);
        if (embed == nullptr) continue;
        for (const int64_t id : embed->by_position ? rows.positions : rows.token_ids) {
            check(id, embed->num_rows, embed->by_position ? "position" : "token");
        }
    }
    const AttentionPlan plan = rows.plan(memory.block_size);
    check(plan.num_slots() - 1, memory.num_slots, "slot");
    if (args.chosen != nullptr) {
        if (args.chosen->num_tokens() != plan.num_tokens()) {
            throw std::invalid_argument("positions are chosen for " + std::to_string(args.chosen->num_tokens()) +
                                        " tokens of " + std::to_string(plan.num_tokens()));
        }
        check(args.chosen->num_slots() - 1, memory.num_slots, "slot");
    }
    Step step(kernels, attention, gated, program, memory, args, rows, plan, num_threads);
    for (size_t i = first; i < end; ++i) std::visit(step, program.instructions[i]);
}

}  // namespace amalgam
