#include "isa/table.h"

#include <stdexcept>

namespace amalgam {

// isas.inc, which CMakeLists.txt makes: ISA(name, what a processor must have for it), slowest first.
#define ISA(name, is_supported)           \
    extern const Kernels kKernels_##name; \
    extern const AttentionKernels kAttention_##name;
#include "isas.inc"
#undef ISA

const std::vector<InstructionSet>& instruction_sets() {
    static const std::vector<InstructionSet> supported = [] {
        std::vector<InstructionSet> sets;
#define ISA(name, is_supported) \
    if (is_supported) sets.push_back({&kKernels_##name, &kAttention_##name});
#define HAS(feature) __builtin_cpu_supports(#feature)
#include "isas.inc"
#undef HAS
#undef ISA
        return sets;
    }();
    return supported;
}

const InstructionSet& instruction_set(const std::string& name) {
    for (const InstructionSet& set : instruction_sets()) {
        if (name == set.kernels->isa) return set;
    }
    throw std::invalid_argument("this processor does not support " + name);
}

}  // namespace amalgam
