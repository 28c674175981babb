// Exposes a step in one call to Python; called by module.cpp. What instructions read comes as arrays, whose types and
// shapes are checked here, once, and which the program keeps alive; what a step reads and writes comes as addresses,
// because looking at an array takes time. amalgam/kernels/backends/cpu/program.py makes and checks those.
#include "step/step.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "bindings/experts.h"

namespace nb = nanobind;

namespace amalgam {
namespace {

using Array = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using OptionalArray = std::optional<Array>;
using ColumnsTuple = std::tuple<int64_t, int64_t, int64_t, int64_t>;  // buffer, stride, start, width
using MatrixPointer = std::shared_ptr<PackedMatrix>;
using ProjectionTuple = std::tuple<MatrixPointer, OptionalArray, ColumnsTuple>;  // weight, bias, out
using CacheTuple = std::tuple<uintptr_t, uintptr_t>;                             // keys and values of a layer
using RopeTuple = std::tuple<uintptr_t, uintptr_t, int64_t>;                     // cos, sin and half
// Token ids, first position, block ids, how many of the last tokens' logits are wanted.
using SequenceTuple = std::tuple<std::vector<int64_t>, int64_t, std::vector<int64_t>, int64_t>;

void require(bool is_met, const std::string& what) {
    if (!is_met) throw std::invalid_argument(what);
}

DType dtype_of(const Array& array, bool takes_float16 = false) {
    const nb::dlpack::dtype type = array.dtype();
    if (type == nb::dtype<float>()) return DType::kFloat32;
    const bool is_half = type.bits == 16 && type.lanes == 1;
    if (is_half && type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat)) return DType::kBfloat16;
    const bool is_float16 = is_half && type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float);
    require(is_float16 && takes_float16, "an array is neither float32 nor bfloat16");
    return DType::kFloat16;
}

// A program under construction: its instructions, and the arrays that they point to.
struct ProgramBuilder {
    Program program;
    std::vector<int64_t> widths;  // of the buffers
    std::vector<Array> arrays;

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

    const void* keep(const Array& array) {
        arrays.push_back(array);
        return array.data();
    }

    const void* vector(const Array& array, int64_t size) {
        require(array.ndim() == 1 && static_cast<int64_t>(array.shape(0)) == size,
                "a vector of another size than " + std::to_string(size));
        return keep(array);
    }

    const float* floats(const OptionalArray& array, int64_t size) {
        if (!array) return nullptr;
        require(dtype_of(*array) == DType::kFloat32, "a vector that is not float32");
        return static_cast<const float*>(vector(*array, size));
    }

    NormWeight norm(const OptionalArray& array, int64_t size) {
        if (!array) return {nullptr, DType::kFloat32};
        return {vector(*array, size), dtype_of(*array)};
    }

    Weight weight(const MatrixPointer& matrix, const OptionalArray& bias, int64_t rows, int64_t columns) {
        require(matrix != nullptr, "a weight is not in panels");
        require(matrix->matrix().rows == rows && matrix->matrix().columns == columns,
                "a weight of " + std::to_string(matrix->matrix().rows) + " x " +
                    std::to_string(matrix->matrix().columns) + " where " + std::to_string(rows) + " x " +
                    std::to_string(columns) + " is needed");
        const NormWeight found = norm(bias, rows);
        return {matrix, {found.data, found.dtype}};
    }
};

void make_program(ProgramBuilder* self, const std::vector<std::tuple<int64_t, bool>>& buffers, int64_t num_active) {
    new (self) ProgramBuilder{};
    for (const auto& [width, is_wide] : buffers) {
        self->widths.push_back(width);
        self->program.is_wide.push_back(is_wide);
    }
    self->program.num_active = num_active;
}

// In panels, or else rows as they are.
void add_embed(ProgramBuilder& self, const MatrixPointer& matrix, const OptionalArray& rows, const ColumnsTuple& out,
               bool by_position, bool adds) {
    Embed embed{matrix, nullptr, DType::kFloat32, 0, self.narrow(out), by_position, adds};
    int64_t width = 0;
    if (matrix != nullptr) {
        embed.num_rows = matrix->matrix().rows;
        width = matrix->matrix().columns;
    } else {
        require(rows && rows->ndim() == 2, "an embedding needs a matrix");
        embed.rows = self.keep(*rows);
        embed.dtype = dtype_of(*rows, true);
        embed.num_rows = static_cast<int64_t>(rows->shape(0));
        width = static_cast<int64_t>(rows->shape(1));
    }
    require(width == embed.out.width, "an embedding of another width than its rows");
    self.program.instructions.emplace_back(std::move(embed));
}

void add_normalize(ProgramBuilder& self, const ColumnsTuple& x, const Array& weight, const OptionalArray& bias,
                   const std::optional<ColumnsTuple>& delta, const ColumnsTuple& out, float eps, bool rounds_last) {
    Normalize norm{self.narrow(x), {0, 0, 0, 0}, self.narrow(out), {}, nullptr, 0, eps, rounds_last};
    norm.size = static_cast<int64_t>(weight.size());
    require(norm.size > 0 && norm.x.width % norm.size == 0 && norm.x.width == norm.out.width,
            "a norm of another size than its rows");
    if (delta) {
        norm.delta = self.narrow(*delta);
        require(norm.delta.width == norm.x.width, "a sum of rows of different sizes");
    }
    norm.weight = self.norm(weight, norm.size);
    if (bias) {
        require(dtype_of(*bias) == norm.weight.dtype, "a norm's bias of another type than its weight");
        norm.bias = self.vector(*bias, norm.size);
    }
    self.program.instructions.emplace_back(norm);
}

void add_project(ProgramBuilder& self, const ColumnsTuple& x, const std::vector<ProjectionTuple>& projections,
                 bool widens) {
    Project project{self.whole(x), {}, {}, widens};
    require(!projections.empty(), "a product with nothing");
    for (const auto& [matrix, bias, out] : projections) {
        project.outs.push_back(self.whole(out));
        require(self.is_wide(project.outs.back()) == self.is_wide(project.outs.front()), "products of two types");
        project.weights.push_back(self.weight(matrix, bias, project.outs.back().width, project.x.width));
    }
    self.program.instructions.emplace_back(std::move(project));
}

// rows: query, key, value, out.
void add_attend(ProgramBuilder& self, const std::vector<ColumnsTuple>& rows, int64_t layer, int64_t heads,
                int64_t kv_heads, int64_t head_dim, const OptionalArray& query_norm, const OptionalArray& key_norm,
                float head_norm_eps, float scale, int64_t window, const OptionalArray& sinks, int64_t rope) {
    Attend attend{};
    attend.query = self.columns(rows.at(0));
    attend.key = self.columns(rows.at(1));
    attend.value = self.columns(rows.at(2));
    attend.out = self.narrow(rows.at(3));
    require(kv_heads > 0 && head_dim > 0 && heads % kv_heads == 0 && window >= 0 && layer >= 0,
            "attention of " + std::to_string(heads) + " heads over " + std::to_string(kv_heads));
    require(attend.query.width == heads * head_dim && attend.out.width == heads * head_dim &&
                attend.key.width == kv_heads * head_dim && attend.value.width == kv_heads * head_dim,
            "attention over rows of other sizes than its heads");
    for (const Columns& part : {attend.query, attend.key, attend.value}) {
        require(!self.is_wide(part), "float32 rows where activations are needed");
    }
    attend.layer = layer;
    attend.heads = heads;
    attend.kv_heads = kv_heads;
    attend.head_dim = head_dim;
    attend.query_norm = self.norm(query_norm, head_dim);
    attend.key_norm = self.norm(key_norm, head_dim);
    require((attend.query_norm.data == nullptr) == (attend.key_norm.data == nullptr) &&
                attend.query_norm.dtype == attend.key_norm.dtype,
            "norms of queries and keys that differ in type");
    attend.head_norm_eps = head_norm_eps;
    attend.scale = scale;
    attend.window = window;
    attend.sinks = self.floats(sinks, heads);
    attend.rope = rope;
    self.program.instructions.emplace_back(attend);
}

// rows: query, compressed, out; matrices: by head, [latent, nope] and [value, latent].
void add_attend_latent(ProgramBuilder& self, const std::vector<ColumnsTuple>& rows, int64_t layer,
                       const std::vector<MatrixPointer>& to_keys, const std::vector<MatrixPointer>& to_values,
                       const Array& norm, float eps, float scale, int64_t rope_dim, int64_t rope, bool is_interleaved) {
    AttendLatent attend{self.narrow(rows.at(0)), self.narrow(rows.at(1)), self.narrow(rows.at(2)), layer, rope, {}};
    const auto heads = static_cast<int64_t>(to_keys.size());
    require(heads > 0 && to_values.size() == to_keys.size() && layer >= 0 && rope >= 0 && rope_dim % 2 == 0 &&
                to_keys.front() && to_values.front(),
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
        found.to_keys.push_back(self.weight(matrix, std::nullopt, found.latent, found.nope).matrix);
    }
    for (const MatrixPointer& matrix : to_values) {
        found.to_values.push_back(self.weight(matrix, std::nullopt, found.value, found.latent).matrix);
    }
    found.norm = self.norm(norm, found.latent);
    found.eps = eps;
    found.scale = scale;
    found.is_interleaved = is_interleaved;
    self.program.instructions.emplace_back(std::move(attend));
}

void add_route(ProgramBuilder& self, const ColumnsTuple& x, const MatrixPointer& matrix, const OptionalArray& bias,
               const OptionalArray& correction, Scoring scoring, int64_t num_groups, int64_t num_kept, bool normalises,
               float sum_eps, float scaling, float jitter, int64_t index) {
    require(matrix != nullptr, "a weight is not in panels");
    const Columns rows = self.whole(x);
    const int64_t experts = matrix->matrix().rows, k = self.program.num_active;
    require(k >= 1 && k <= experts && num_kept >= 1 && num_kept <= num_groups && experts % num_groups == 0 &&
                k <= num_kept * (experts / num_groups) && index >= 0,
            "routing to " + std::to_string(k) + " of " + std::to_string(experts) + " experts in " +
                std::to_string(num_groups) + " groups");
    const Weight weight = self.weight(matrix, bias, experts, rows.width);
    const ExpertChoice choice{
        scoring, k, self.floats(correction, experts), num_groups, num_kept, normalises, sum_eps, scaling, jitter};
    self.program.instructions.emplace_back(Route{rows, weight, choice, index});
}

void add_mix(ProgramBuilder& self, const ColumnsTuple& x, const Experts& experts, const ColumnsTuple& out, float alpha,
             float offset, float limit, int64_t route) {
    const Mix mix{self.narrow(x), self.narrow(out), &experts.experts, {alpha, offset, limit}, route};
    require(!experts.experts.empty() && experts.experts.front().gate->matrix().columns == mix.x.width &&
                mix.x.width == mix.out.width && route >= 0,
            "experts of another size than their rows");
    self.program.instructions.emplace_back(mix);
}

void add_swiglu(ProgramBuilder& self, const ColumnsTuple& gate, const ColumnsTuple& up, const ColumnsTuple& out) {
    const SwiGlu join{self.narrow(gate), self.narrow(up), self.narrow(out)};
    require(join.gate.width == join.up.width && join.up.width == join.out.width, "rows of different sizes");
    self.program.instructions.emplace_back(join);
}

void add_elementwise(ProgramBuilder& self, ElementwiseKind kind, const ColumnsTuple& x,
                     const std::optional<ColumnsTuple>& y, float limit) {
    Elementwise work{self.narrow(x), {0, 0, 0, 0}, kind, limit};
    require((kind == ElementwiseKind::kAdd) == y.has_value(), "a sum has two parts");
    if (y) {
        work.y = self.narrow(*y);
        require(work.x.width == work.y.width, "a sum of rows of different sizes");
    }
    self.program.instructions.emplace_back(work);
}

void add_scale(ProgramBuilder& self, const ColumnsTuple& x, const ColumnsTuple& gate) {
    const ScaleBySigmoid scale{self.narrow(x), self.whole(gate)};
    require(self.is_wide(scale.gate) && scale.gate.width == 1, "a factor is float32, and one per row");
    self.program.instructions.emplace_back(scale);
}

void add_head(ProgramBuilder& self, const ColumnsTuple& x, const MatrixPointer& matrix, const OptionalArray& bias) {
    require(matrix != nullptr, "a weight is not in panels");
    const Columns rows = self.narrow(x);
    self.program.instructions.emplace_back(Head{rows, self.weight(matrix, bias, matrix->matrix().rows, rows.width)});
}

void make_memory(StepMemory* self, const std::vector<CacheTuple>& caches, int64_t num_slots, int64_t block_size,
                 const std::vector<RopeTuple>& ropes, int64_t num_positions) {
    new (self) StepMemory{};
    for (const auto& [keys, values] : caches) {
        self->keys.push_back(reinterpret_cast<void*>(keys));
        self->values.push_back(reinterpret_cast<void*>(values));
    }
    self->num_slots = num_slots;
    self->block_size = block_size;
    for (const auto& [cos, sin, half] : ropes) {
        self->cos.push_back(reinterpret_cast<const float*>(cos));
        self->sin.push_back(reinterpret_cast<const float*>(sin));
        self->half.push_back(half);
    }
    self->num_positions = num_positions;
}

void run(const ProgramBuilder& self, size_t first, size_t end, const Kernels& kernels,
         const AttentionKernels& attention, const StepMemory& memory, const std::vector<SequenceTuple>& sequences,
         DType dtype, const std::vector<uintptr_t>& buffers, uintptr_t expert_ids, uintptr_t gate_weights,
         uintptr_t logits, int64_t num_logits, int threads) {
    require(first <= end && end <= self.program.instructions.size() && buffers.size() == self.widths.size(),
            "instructions or buffers that there are not");
    StepArgs args{{},
                  dtype,
                  {},
                  reinterpret_cast<int64_t*>(expert_ids),
                  reinterpret_cast<float*>(gate_weights),
                  reinterpret_cast<float*>(logits),
                  num_logits};
    for (const uintptr_t buffer : buffers) args.buffers.push_back(reinterpret_cast<char*>(buffer));
    for (const auto& [token_ids, position, block_ids, wanted] : sequences) {
        args.sequences.push_back({token_ids, position, block_ids, wanted});
    }
    run_step(kernels, attention, self.program, memory, args, first, end, threads);
}

}  // namespace

// Arguments are positional: matching names costs time.
void bind_step(nb::module_& module) {
    nb::enum_<Scoring>(module, "Scoring")
        .value("softmax", Scoring::kSoftmax)
        .value("sigmoid", Scoring::kSigmoid)
        .value("chosen", Scoring::kChosen)
        .value("mixer", Scoring::kMixer);
    nb::enum_<ElementwiseKind>(module, "Elementwise")
        .value("add", ElementwiseKind::kAdd)
        .value("clamp", ElementwiseKind::kClamp)
        .value("gelu", ElementwiseKind::kGelu);
    nb::class_<StepMemory>(module, "StepMemory").def("__init__", &make_memory);
    nb::class_<ProgramBuilder>(module, "Program")
        .def("__init__", &make_program)
        .def_prop_ro("num_instructions",
                     [](const ProgramBuilder& builder) { return builder.program.instructions.size(); })
        .def("add_embed", &add_embed, nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg())
        .def("add_normalize", &add_normalize, nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg(),
             nb::arg(), nb::arg())
        .def("add_project", &add_project)
        .def("add_attend", &add_attend, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(),
             nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg())
        .def("add_attend_latent", &add_attend_latent)
        .def("add_route", &add_route, nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(),
             nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg())
        .def("add_mix", &add_mix, nb::keep_alive<1, 3>())
        .def("add_swiglu", &add_swiglu)
        .def("add_elementwise", &add_elementwise, nb::arg(), nb::arg(), nb::arg().none(), nb::arg())
        .def("add_scale", &add_scale)
        .def("add_head", &add_head, nb::arg(), nb::arg(), nb::arg().none())
        .def("run", &run, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace amalgam
