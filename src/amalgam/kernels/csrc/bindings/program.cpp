// A step in one call: the memory of a model, programs, and how they are run.
#include "bindings/program.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/memory.h"
#include "bindings/tensor.h"
#include "runtime/pool.h"

namespace nb = nanobind;

namespace amalgam {
namespace {

// Slots: where the state before the step is, if there is one; where the one after it goes; and others after so many
// tokens.
using StateSlotsTuple = std::tuple<std::optional<int64_t>, int64_t, std::vector<std::pair<int64_t, int64_t>>>;
// Token ids, first position, block ids, how many of the last tokens' logits are wanted, slots of states.
using SequenceTuple =
    std::tuple<std::vector<int64_t>, int64_t, std::vector<int64_t>, int64_t, std::optional<StateSlotsTuple>>;

// Buffers start at these bytes of `arena`. expert_ids and gate_weights: [routes, tokens, k].
void run(const ProgramBuilder& self, size_t first, size_t end, const Kernels& kernels,
         const AttentionKernels& attention, const GatedKernels& gated, const Memory& memory,
         const std::vector<SequenceTuple>& sequences, DType dtype, const Tensor& arena,
         const std::vector<int64_t>& starts, const Tensor& expert_ids, const Tensor& gate_weights, const Tensor& logits,
         const AttentionPlan* chosen, int threads) {
    require(first <= end && end <= self.num_instructions() && starts.size() == self.widths.size(),
            "instructions or buffers that there are not");
    self.check_memory(memory);
    StepArgs args{{}, dtype, {}, nullptr, nullptr, nullptr, 0};
    int64_t tokens = 0;
    for (const auto& [token_ids, position, block_ids, wanted, state] : sequences) {
        args.sequences.push_back({token_ids, position, block_ids, wanted, {}});
        if (state) {
            const auto& [source, target, saves] = *state;
            require(source.value_or(0) >= 0, "a state in slot " + std::to_string(source.value_or(0)));
            args.sequences.back().state = StateSlots{source.value_or(-1), target, saves};
        }
        tokens += static_cast<int64_t>(token_ids.size());
    }
    arena.dense("arena", kUint8, {kAny});
    for (size_t i = 0; i < starts.size(); ++i) {
        const int64_t item = self.program.is_wide[i] || dtype == DType::kFloat32 ? 4 : 2;
        char* buffer = arena.data<char>() + starts[i];
        require(starts[i] >= 0 && starts[i] + tokens * self.widths[i] * item <= arena.size() &&
                    reinterpret_cast<uintptr_t>(buffer) % kLineBytes == 0,
                "a buffer that the arena does not hold");
        args.buffers.push_back(buffer);
    }
    const int64_t k = self.program.num_active;
    expert_ids.dense("expert_ids", kInt64, {kAny, tokens, k});
    gate_weights.dense("gate_weights", kFloat32, {expert_ids.shape(0), tokens, k});
    require(expert_ids.shape(0) >= self.num_routes,
            "expert_ids is " + expert_ids.describe() + "; needed: " + std::to_string(self.num_routes) + " routes");
    logits.dense("logits", kFloat32, {kAny, self.vocabulary > 0 ? self.vocabulary : kAny});
    args.expert_ids = expert_ids.data<int64_t>();
    args.gate_weights = gate_weights.data<float>();
    args.logits = logits.data<float>();
    args.num_logits = logits.shape(0);
    args.chosen = chosen;
    bind_caller();
    run_step(kernels, attention, gated, self.program, memory.step, args, first, end, threads);
}

}  // namespace

void bind_program(nb::module_& module) {
    nb::enum_<Scoring>(module, "Scoring")
        .value("softmax", Scoring::kSoftmax)
        .value("sigmoid", Scoring::kSigmoid)
        .value("chosen", Scoring::kChosen)
        .value("apart", Scoring::kApart)
        .value("mixer", Scoring::kMixer);
    nb::enum_<ElementwiseKind>(module, "Elementwise")
        .value("add", ElementwiseKind::kAdd)
        .value("clamp", ElementwiseKind::kClamp)
        .value("gelu", ElementwiseKind::kGelu)
        .value("scale", ElementwiseKind::kScale)
        .value("softcap", ElementwiseKind::kSoftcap);
    using Buffers = std::vector<std::tuple<int64_t, bool>>;
    using Caches = std::vector<std::pair<CacheTuple, CacheTuple>>;
    using Ropes = std::vector<std::pair<Tensor, Tensor>>;
    using States = std::vector<std::optional<StateTuple>>;
    using Indexes = std::vector<std::optional<CacheTuple>>;
    nb::class_<Memory>(module, "StepMemory")
        .def(nb::init<const Caches&, int64_t, const Ropes&, int64_t, const States&, const Indexes&>());
    nb::class_<ProgramBuilder>(module, "Program")
        .def(nb::init<const Buffers&, int64_t>())
        .def_prop_ro("num_instructions", &ProgramBuilder::num_instructions)
        .def("add_embed", &ProgramBuilder::add_embed, optional(), optional(), nb::arg(), nb::arg(), nb::arg())
        .def("add_normalize", &ProgramBuilder::add_normalize, nb::arg(), nb::arg(), optional(), optional(), nb::arg(),
             nb::arg(), nb::arg())
        .def("add_project", &ProgramBuilder::add_project)
        .def("add_attend", &ProgramBuilder::add_attend, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             optional(), optional(), nb::arg(), nb::arg(), optional(), optional(), nb::arg(), optional(), nb::arg(),
             nb::arg(), nb::arg(), optional())
        .def("add_attend_latent", &ProgramBuilder::add_attend_latent)
        .def("add_keep_index_key", &ProgramBuilder::add_keep_index_key)
        .def("add_route", &ProgramBuilder::add_route, nb::arg(), nb::arg(), optional(), optional(), nb::arg(),
             nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), optional() = nb::none())
        .def("add_mix", &ProgramBuilder::add_mix, nb::keep_alive<1, 3>())
        .def("add_weigh_input", &ProgramBuilder::add_weigh_input)
        .def("add_swiglu", &ProgramBuilder::add_swiglu)
        .def("add_elementwise", &ProgramBuilder::add_elementwise, nb::arg(), nb::arg(), optional(), nb::arg())
        .def("add_scale", &ProgramBuilder::add_scale)
        .def("add_scale_heads", &ProgramBuilder::add_scale_heads)
        .def("add_scale_by_position", &ProgramBuilder::add_scale_by_position)
        .def("add_gate", &ProgramBuilder::add_gate)
        .def("add_split", &ProgramBuilder::add_split)
        .def("add_convolve", &ProgramBuilder::add_convolve, nb::arg(), nb::arg(), optional(), optional(), optional(),
             nb::arg(), nb::arg(), nb::arg())
        .def("add_delta_rule", &ProgramBuilder::add_delta_rule)
        .def("add_state_space", &ProgramBuilder::add_state_space)
        .def("add_head", &ProgramBuilder::add_head, nb::arg(), nb::arg(), optional(), nb::arg(), optional())
        .def("run", &run, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(),
             nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), optional(), nb::arg(), Unlocked());
}

}  // namespace amalgam
