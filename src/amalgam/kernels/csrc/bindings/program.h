// A program under construction: what Python adds to it is checked here, once, and kept alive.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/experts.h"
#include "bindings/memory.h"
#include "bindings/tensor.h"
#include "step/step.h"

namespace amalgam {

using OptionalColumns = std::optional<std::tuple<int64_t, int64_t, int64_t, int64_t>>;
using ColumnsTuple = std::tuple<int64_t, int64_t, int64_t, int64_t>;      // buffer, stride, start, width
using ProjectionTuple = std::tuple<MatrixPointer, Tensor, ColumnsTuple>;  // weight, bias or None, out

struct ProgramBuilder {
    Program program;
    std::vector<int64_t> widths;  // of the buffers
    std::vector<nanobind::object> kept;
    int64_t num_routes = 0, vocabulary = 0;

    ProgramBuilder(const std::vector<std::tuple<int64_t, bool>>& buffers, int64_t num_active) {
        for (const auto& [width, is_wide] : buffers) {
            widths.push_back(width);
            program.is_wide.push_back(is_wide);
        }
        program.num_active = num_active;
    }

    size_t num_instructions() const { return program.instructions.size(); }

    // In panels, or else rows as they are.
    void add_embed(const MatrixPointer& matrix, const Tensor& rows, const ColumnsTuple& out, bool by_position,
                   bool adds) {
        Embed embed{matrix, nullptr, DType::kFloat32, 0, narrow(out), by_position, adds};
        int64_t width = 0;
        if (matrix != nullptr) {
            embed.num_rows = matrix->matrix().rows;
            width = matrix->matrix().columns;
        } else {
            rows.dense("rows", kFloats, {kAny, kAny});
            embed.rows = keep(rows);
            embed.dtype = rows.dtype();
            embed.num_rows = rows.shape(0);
            width = rows.shape(1);
        }
        require(width == embed.out.width, "an embedding of another width than its rows");
        program.instructions.emplace_back(std::move(embed));
    }

    void add_normalize(const ColumnsTuple& x, const Tensor& weight, const Tensor& bias, const OptionalColumns& delta,
                       const ColumnsTuple& out, float eps, bool rounds_last) {
        Normalize norm{narrow(x), {0, 0, 0, 0}, narrow(out), {}, nullptr, 0, eps, rounds_last};
        weight.dense("weight", kActivations, {kAny});
        norm.size = weight.size();
        require(norm.size > 0 && norm.x.width % norm.size == 0 && norm.x.width == norm.out.width,
                "a norm of another size than its rows");
        if (delta) {
            norm.delta = narrow(*delta);
            require(norm.delta.width == norm.x.width, "a sum of rows of different sizes");
        }
        norm.weight = {keep(weight), weight.dtype()};
        if (bias) norm.bias = keep(bias.like("bias", weight));
        program.instructions.emplace_back(norm);
    }

    void add_project(const ColumnsTuple& x, const std::vector<ProjectionTuple>& projections, bool widens) {
        Project project{whole(x), {}, {}, widens};
        require(!projections.empty(), "a product with nothing");
        for (const auto& [matrix, bias, out] : projections) {
            project.outs.push_back(whole(out));
            require(is_wide(project.outs.back()) == is_wide(project.outs.front()), "products of two types");
            project.weights.push_back(weight(matrix, bias, project.outs.back().width, project.x.width));
        }
        program.instructions.emplace_back(std::move(project));
    }

    // rows: query, key, value, out; rope: -1: none.
    void add_attend(const std::vector<ColumnsTuple>& rows, int64_t layer, int64_t heads, int64_t kv_heads,
                    int64_t head_dim, const Tensor& query_norm, const Tensor& key_norm, float head_norm_eps,
                    float scale, std::optional<int64_t> window, const Tensor& sinks, int64_t rope,
                    std::optional<float> softcap, bool rounds_last, bool is_interleaved, bool norms_last,
                    std::optional<int64_t> chunk) {
        Attend attend{};
        attend.query = columns(rows.at(0));
        attend.key = columns(rows.at(1));
        attend.value = columns(rows.at(2));
        attend.out = narrow(rows.at(3));
        require(kv_heads > 0 && head_dim > 0 && heads % kv_heads == 0 && window.value_or(1) >= 1 &&
                    chunk.value_or(1) >= 1 && layer >= 0,
                "attention of " + std::to_string(heads) + " heads over " + std::to_string(kv_heads));
        require(attend.query.width == heads * head_dim && attend.out.width == heads * head_dim &&
                    attend.key.width == kv_heads * head_dim && attend.value.width == kv_heads * head_dim,
                "attention over rows of other sizes than its heads");
        for (const Columns& part : {attend.query, attend.key, attend.value}) {
            require(!is_wide(part), "float32 rows where activations are needed");
        }
        require(static_cast<bool>(query_norm) == static_cast<bool>(key_norm), "a norm of queries or of keys alone");
        attend.layer = layer;
        attend.heads = heads;
        attend.kv_heads = kv_heads;
        attend.head_dim = head_dim;
        if (query_norm) {
            query_norm.dense("query_norm", kActivations, {head_dim});
            attend.query_norm = {keep(query_norm), query_norm.dtype()};
            attend.key_norm = {keep(key_norm.like("key_norm", query_norm)), key_norm.dtype()};
        }
        attend.head_norm_eps = head_norm_eps;
        attend.scale = scale;
        attend.window = window.value_or(0);
        attend.sinks = floats("sinks", sinks, heads);
        attend.rope = rope;
        attend.softcap = positive("softcap", softcap);
        attend.rounds_last = rounds_last;
        attend.is_interleaved = is_interleaved;
        attend.norms_last = norms_last;
        attend.chunk = chunk.value_or(0);
        program.instructions.emplace_back(attend);
    }

    // rows: query, compressed, out; matrices: by head, [latent, nope] and [value, latent]. Without a norm the latent
    // vectors are normed already; without dimensions that turn, rope is -1.
    void add_attend_latent(const std::vector<ColumnsTuple>& rows, int64_t layer,
                           const std::vector<MatrixPointer>& to_keys, const std::vector<MatrixPointer>& to_values,
                           const Tensor& norm, float eps, float scale, int64_t rope_dim, int64_t rope,
                           bool is_interleaved, bool is_indexed) {
        AttendLatent attend{narrow(rows.at(0)), narrow(rows.at(1)), narrow(rows.at(2)), layer, rope, is_indexed, {}};
        const auto heads = static_cast<int64_t>(to_keys.size());
        require(heads > 0 && to_values.size() == to_keys.size() && layer >= 0 && rope_dim % 2 == 0 &&
                    (rope >= 0) == (rope_dim > 0) && to_keys.front() && to_values.front(),
                "latent attention without heads");
        LatentHeads& found = attend.heads;
        found.nope = to_keys.front()->matrix().columns;
        found.latent = to_keys.front()->matrix().rows;
        found.value = to_values.front()->matrix().rows;
        found.rope = rope_dim;
        require(attend.query.width == heads * (found.nope + rope_dim) &&
                    attend.compressed.width == found.latent + rope_dim && attend.out.width == heads * found.value,
                "latent attention over rows of other sizes than its heads");
        for (const MatrixPointer& matrix : to_keys) {
            found.to_keys.push_back(weight(matrix, Tensor(), found.latent, found.nope).matrix);
        }
        for (const MatrixPointer& matrix : to_values) {
            found.to_values.push_back(weight(matrix, Tensor(), found.value, found.latent).matrix);
        }
        if (norm) {
            norm.dense("norm", kActivations, {found.latent});
            found.norm = {keep(norm), norm.dtype()};
        }
        found.eps = eps;
        found.scale = scale;
        found.is_interleaved = is_interleaved;
        program.instructions.emplace_back(std::move(attend));
    }

    // rope: -1: none.
    void add_keep_index_key(const ColumnsTuple& key, int64_t layer, int64_t rope, bool is_interleaved) {
        require(layer >= 0, "an index key without a layer");
        program.instructions.emplace_back(KeepIndexKey{narrow(key), layer, rope, is_interleaved});
    }

    void add_route(const ColumnsTuple& x, const MatrixPointer& matrix, const Tensor& bias, const Tensor& correction,
                   Scoring scoring, int64_t num_groups, int64_t num_kept, bool normalises, float sum_eps, float scaling,
                   float jitter, int64_t index, const Tensor& factors) {
        require(matrix != nullptr, "a weight is not in panels");
        const Columns rows = whole(x);
        const int64_t experts = matrix->matrix().rows, k = program.num_active;
        require(k >= 1 && k <= experts && num_kept >= 1 && num_kept <= num_groups && experts % num_groups == 0 &&
                    k <= num_kept * (experts / num_groups) && index >= 0,
                "routing to " + std::to_string(k) + " of " + std::to_string(experts) + " experts in " +
                    std::to_string(num_groups) + " groups");
        const Weight found = weight(matrix, bias, experts, rows.width);
        const ExpertChoice choice{
            scoring, k,      floats("correction", correction, experts), num_groups, num_kept, normalises, sum_eps,
            scaling, jitter, floats("factors", factors, experts)};
        program.instructions.emplace_back(Route{rows, found, choice, index});
        num_routes = std::max(num_routes, index + 1);
    }

    void add_mix(const ColumnsTuple& x, const Experts& experts, const ColumnsTuple& out, float alpha, float offset,
                 float limit, bool is_gelu, bool limits_last, int64_t route, bool weighs) {
        const Gating gating{alpha, offset, limit, is_gelu, limits_last};
        const Mix mix{narrow(x), narrow(out), &experts.experts, gating, route, weighs};
        require(!experts.experts.empty() && experts.experts.front().gate->matrix().columns == mix.x.width &&
                    mix.x.width == mix.out.width && route >= 0,
                "experts of another size than their rows");
        program.instructions.emplace_back(mix);
        num_routes = std::max(num_routes, route + 1);
    }

    void add_weigh_input(const ColumnsTuple& x, const ColumnsTuple& out, int64_t route) {
        const WeighInput weigh{narrow(x), narrow(out), route};
        require(weigh.x.width == weigh.out.width && program.num_active == 1 && route >= 0,
                "inputs are weighed for one expert");
        program.instructions.emplace_back(weigh);
        num_routes = std::max(num_routes, route + 1);
    }

    void add_swiglu(const ColumnsTuple& gate, const ColumnsTuple& up, const ColumnsTuple& out, float alpha,
                    float offset, float limit, bool is_gelu, bool limits_last) {
        const SwiGlu join{columns(gate), columns(up), narrow(out), {alpha, offset, limit, is_gelu, limits_last}};
        require(!is_wide(join.gate) && !is_wide(join.up), "float32 rows where activations are needed");
        require(join.gate.width == join.up.width && join.up.width == join.out.width, "rows of different sizes");
        program.instructions.emplace_back(join);
    }

    void add_elementwise(ElementwiseKind kind, const ColumnsTuple& x, const OptionalColumns& y, float number) {
        Elementwise work{narrow(x), {0, 0, 0, 0}, kind, number};
        require((kind == ElementwiseKind::kAdd) == y.has_value(), "a sum has two parts");
        if (y) {
            work.y = narrow(*y);
            require(work.x.width == work.y.width, "a sum of rows of different sizes");
        }
        program.instructions.emplace_back(work);
    }

    void add_scale_by_position(const ColumnsTuple& x, double beta, double length, double offset) {
        const ScaleByPosition scale{columns(x), beta, length, offset};
        require(!is_wide(scale.x), "float32 rows where activations are needed");
        require(length > 0.0 && offset >= 0.0, "a factor of positions below 0");
        program.instructions.emplace_back(scale);
    }

    void add_scale_heads(const ColumnsTuple& x, const Tensor& slopes, const Tensor& biases) {
        slopes.dense("slopes", kFloat32, {kAny});
        const int64_t heads = slopes.size();
        const ScaleHeads scale{columns(x), heads, floats("slopes", slopes, heads), floats("biases", biases, heads)};
        require(!is_wide(scale.x), "float32 rows where activations are needed");
        require(heads > 0 && scale.x.width % heads == 0 && biases, "a row is not cut into so many heads");
        program.instructions.emplace_back(scale);
    }

    void add_scale(const ColumnsTuple& x, const ColumnsTuple& gate) {
        const ScaleBySigmoid scale{narrow(x), whole(gate)};
        require(is_wide(scale.gate) && scale.gate.width == 1, "a factor is float32, and one per row");
        program.instructions.emplace_back(scale);
    }

    void add_gate(const ColumnsTuple& x, const ColumnsTuple& gate) {
        const Gate found{columns(x), columns(gate)};
        require(found.gate.width > 0 && found.x.width % found.gate.width == 0, "a gate of another width than its rows");
        program.instructions.emplace_back(found);
    }

    void add_split(const ColumnsTuple& x, int64_t groups, const std::vector<ColumnsTuple>& outs) {
        Split split{columns(x), groups, {}};
        int64_t width = 0;
        for (const ColumnsTuple& out : outs) {
            split.outs.push_back(columns(out));
            const Columns& part = split.outs.back();
            require(groups > 0 && part.width % groups == 0 && is_wide(part) == is_wide(split.x) &&
                        part.buffer != split.x.buffer,
                    "a part of other columns than its groups have");
            width += part.width;
        }
        require(width == split.x.width, "parts that are not all of the columns");
        program.instructions.emplace_back(std::move(split));
    }

    // weight: [taps, channels]; before, behind: what the rows are multiplied by.
    void add_convolve(const ColumnsTuple& x, const Tensor& weight, const Tensor& bias, const OptionalColumns& before,
                      const OptionalColumns& behind, const ColumnsTuple& out, int64_t layer, bool activates) {
        weight.dense("weight", kFloat32, {kAny, kAny});
        Convolve convolve{columns(x), columns(out), {}, {}, layer, weight.shape(0), nullptr, nullptr, activates};
        const auto factor = [&](const OptionalColumns& rows, std::optional<Columns>& at) {
            if (!rows) return;
            at = columns(*rows);
            require(at->width == convolve.x.width && at->buffer != convolve.out.buffer,
                    "a factor of another width than its rows");
        };
        factor(before, convolve.before);
        factor(behind, convolve.behind);
        require(convolve.taps > 0 && weight.shape(1) == convolve.x.width && convolve.x.width == convolve.out.width,
                "weight is " + weight.describe() + " for " + std::to_string(convolve.x.width) +
                    " columns that become " + std::to_string(convolve.out.width));
        require(convolve.x.buffer != convolve.out.buffer && layer >= 0, "a convolution into the rows that it reads");
        convolve.weight = static_cast<const float*>(keep(weight));
        convolve.bias = floats("bias", bias, convolve.x.width);
        program.instructions.emplace_back(convolve);
    }

    // rows: query, key, value, decay, strength, out. bound: 0: none.
    void add_delta_rule(const std::vector<ColumnsTuple>& rows, int64_t layer, int64_t key_heads, int64_t value_heads,
                        const Tensor& log_rate, const Tensor& decay_bias, float bound) {
        add_recurrence(rows, layer, key_heads, value_heads, log_rate, decay_bias, bound, std::nullopt);
    }

    // rows: query, key, value, step, out.
    void add_state_space(const std::vector<ColumnsTuple>& rows, int64_t layer, int64_t groups, int64_t heads,
                         const Tensor& log_rate, const Tensor& step_bias, const Tensor& skip, float least, float most) {
        require(least <= most && skip, "a state space without steps or without what goes past it");
        const StateSpace space{least, most, floats("skip", skip, heads)};
        const auto& step = rows.at(3);
        add_recurrence({rows.at(0), rows.at(1), rows.at(2), step, step, rows.at(4)}, layer, groups, heads, log_rate,
                       step_bias, 0.0f, space);
    }

    void add_head(const ColumnsTuple& x, const MatrixPointer& matrix, const Tensor& bias, float scale,
                  std::optional<float> softcap) {
        require(matrix != nullptr, "a weight is not in panels");
        const Columns rows = narrow(x);
        vocabulary = matrix->matrix().rows;
        program.instructions.emplace_back(
            Head{rows, weight(matrix, bias, vocabulary, rows.width), scale, positive("softcap", softcap)});
    }

    // Throws unless every layer has caches and states of its shape and a rotary table of at most its size.
    void check_memory(const Memory& memory) const {
        for (const Instruction& instruction : program.instructions) {
            if (const auto* attend = std::get_if<Attend>(&instruction)) {
                check_caches(memory, attend->layer, {attend->kv_heads, attend->head_dim},
                             {attend->kv_heads, attend->head_dim});
                if (attend->rope >= 0) check_rope(memory, attend->layer, attend->rope, attend->head_dim);
            } else if (const auto* latent = std::get_if<AttendLatent>(&instruction)) {
                check_caches(memory, latent->layer, {1, latent->heads.latent + latent->heads.rope}, {1, 0});
                if (latent->rope >= 0) check_rope(memory, latent->layer, latent->rope, latent->heads.rope);
            } else if (const auto* keep = std::get_if<KeepIndexKey>(&instruction)) {
                const auto index = static_cast<size_t>(keep->layer);
                require(index < memory.index_shapes.size() && memory.index_shapes[index] == Shape(1, keep->key.width),
                        layer_name(keep->layer) + " has no index keys of " + std::to_string(keep->key.width) +
                            " dimensions");
                if (keep->rope >= 0) check_rope(memory, keep->layer, keep->rope, keep->key.width);
            } else if (const auto* convolve = std::get_if<Convolve>(&instruction)) {
                check_state(memory, convolve->layer, 0, {convolve->taps - 1, convolve->x.width});
            } else if (const auto* rule = std::get_if<DeltaRule>(&instruction)) {
                check_state(memory, rule->layer, 2, {rule->value_heads, rule->key_dim(), rule->value_dim()});
            }
        }
    }

 private:
    void add_recurrence(const std::vector<ColumnsTuple>& rows, int64_t layer, int64_t key_heads, int64_t value_heads,
                        const Tensor& log_rate, const Tensor& decay_bias, float bound,
                        const std::optional<StateSpace>& space) {
        DeltaRule rule{columns(rows.at(0)),
                       columns(rows.at(1)),
                       columns(rows.at(2)),
                       columns(rows.at(3)),
                       columns(rows.at(4)),
                       columns(rows.at(5)),
                       layer,
                       key_heads,
                       value_heads,
                       nullptr,
                       nullptr,
                       bound,
                       space};
        require(key_heads > 0 && value_heads > 0 && value_heads % key_heads == 0 && layer >= 0,
                "a delta rule of " + std::to_string(value_heads) + " heads for " + std::to_string(key_heads));
        require(rule.query.width == rule.key.width && rule.key.width % key_heads == 0 &&
                    rule.value.width == rule.out.width && rule.value.width % value_heads == 0 &&
                    (rule.decay.width == value_heads || (!space && rule.decay.width == value_heads * rule.key_dim())) &&
                    rule.strength.width == value_heads,
                "a delta rule over rows of other sizes than its heads");
        for (const Columns& part : {rule.query, rule.key, rule.value, rule.decay, rule.strength}) {
            require(part.buffer != rule.out.buffer, "a delta rule into the rows that it reads");
        }
        require(log_rate && decay_bias, "a delta rule without rates");
        rule.log_rate = floats("log_rate", log_rate, value_heads);
        rule.decay_bias = floats("decay_bias", decay_bias, rule.decay.width);
        program.instructions.emplace_back(rule);
    }

    using Shape = std::pair<int64_t, int64_t>;

    // 0 for none.
    static float positive(const char* name, std::optional<float> value) {
        const float found = value.value_or(0.0f);
        require(!value || found > 0.0f, name + (" is " + std::to_string(found)) + "; needed: above 0");
        return found;
    }

    static std::string layer_name(int64_t layer) { return "layer " + std::to_string(layer); }

    static void check_caches(const Memory& memory, int64_t layer, Shape keys, Shape values) {
        const auto index = static_cast<size_t>(layer);
        require(index < memory.key_shapes.size(), layer_name(layer) + " has no cache");
        const auto text = [](Shape shape) {
            return "(" + std::to_string(shape.first) + ", " + std::to_string(shape.second) + ")";
        };
        const Shape found_keys = memory.key_shapes[index], found_values = memory.value_shapes[index];
        require(found_keys == keys && found_values == values, layer_name(layer) + " has caches of " + text(found_keys) +
                                                                  " and " + text(found_values) +
                                                                  "; needed: " + text(keys) + " and " + text(values));
    }

    // Of a slot: `sizes` from the place `first` in its shapes on.
    static void check_state(const Memory& memory, int64_t layer, size_t first, const std::vector<int64_t>& sizes) {
        const auto index = static_cast<size_t>(layer);
        require(index < memory.state_shapes.size() && !memory.state_shapes[index].empty(),
                layer_name(layer) + " has no state");
        const std::vector<int64_t>& shape = memory.state_shapes[index];
        if (std::equal(sizes.begin(), sizes.end(), shape.begin() + static_cast<std::ptrdiff_t>(first))) return;
        std::string found, needed;
        for (size_t i = 0; i < sizes.size(); ++i) {
            found += (i > 0 ? ", " : "") + std::to_string(shape[first + i]);
            needed += (i > 0 ? ", " : "") + std::to_string(sizes[i]);
        }
        require(false, layer_name(layer) + " has a state of (" + found + "); needed: (" + needed + ")");
    }

    static void check_rope(const Memory& memory, int64_t layer, int64_t rope, int64_t dim) {
        const auto index = static_cast<size_t>(rope);
        require(index < memory.step.half.size() && memory.step.half[index] > 0 && 2 * memory.step.half[index] <= dim,
                layer_name(layer) + " has no rotary table of at most " + std::to_string(dim / 2) + " columns");
    }

    Columns columns(const ColumnsTuple& tuple) const {
        const auto& [buffer, stride, start, width] = tuple;
        require(buffer >= 0 && buffer < static_cast<int64_t>(widths.size()), "a buffer that there is not");
        require(start >= 0 && width > 0 && start + width <= stride && stride <= widths[static_cast<size_t>(buffer)],
                "columns beyond their buffer");
        return {buffer, stride, start, width};
    }

    // Rows without a gap between them.
    Columns whole(const ColumnsTuple& tuple) const {
        const Columns found = columns(tuple);
        require(found.width == found.stride, "columns where whole rows are needed");
        return found;
    }

    Columns narrow(const ColumnsTuple& tuple) const {
        require(!is_wide(whole(tuple)), "float32 rows where activations are needed");
        return whole(tuple);
    }

    bool is_wide(const Columns& columns) const { return program.is_wide[static_cast<size_t>(columns.buffer)]; }

    const void* keep(const Tensor& tensor) {
        kept.push_back(nanobind::borrow(tensor.object()));
        return tensor.data();
    }

    const float* floats(const char* name, const Tensor& tensor, int64_t size) {
        if (!tensor) return nullptr;
        return static_cast<const float*>(keep(tensor.dense(name, kFloat32, {size})));
    }

    Weight weight(const MatrixPointer& matrix, const Tensor& bias, int64_t rows, int64_t columns) {
        require(matrix != nullptr, "a weight is not in panels");
        require(matrix->matrix().rows == rows && matrix->matrix().columns == columns,
                "a weight of " + std::to_string(matrix->matrix().rows) + " x " +
                    std::to_string(matrix->matrix().columns) + " where " + std::to_string(rows) + " x " +
                    std::to_string(columns) + " is needed");
        if (!bias) return {matrix, {nullptr, DType::kFloat32}};
        bias.dense("bias", kActivations, {rows});
        return {matrix, {keep(bias), bias.dtype()}};
    }
};

}  // namespace amalgam
