#include "isa/table.h"

#include <stdexcept>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace amalgam {
namespace {

// Whether this process may use AMX's tiles. Linux keeps their 8 KB of state only for processes that ask for it, before
// their threads use them (Documentation/arch/x86/xstate.rst), and refuses where a signal stack is too small for it.
[[maybe_unused]] bool may_use_tiles() {
#if defined(__linux__) && defined(__x86_64__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

}  // namespace

// isas.inc, which CMakeLists.txt makes: ISA(name, the one whose gated delta net it has, what it needs), slowest first.
#define ISA(name, gated, is_supported)               \
    extern const Kernels kKernels_##name;            \
    extern const AttentionKernels kAttention_##name; \
    extern const GatedKernels kGated_##gated;
#include "isas.inc"
#undef ISA

const std::vector<InstructionSet>& instruction_sets() {
    static const std::vector<InstructionSet> supported = [] {
        std::vector<InstructionSet> sets;
#define ISA(name, gated, is_supported) \
    if (is_supported) sets.push_back({&kKernels_##name, &kAttention_##name, &kGated_##gated});
#define HAS(feature) __builtin_cpu_supports(#feature)
#include "isas.inc"
#undef HAS
#undef ISA
        return sets;
    }();
    return supported;
}

const InstructionSet& instruction_set(const std::string& name) {
    static const InstructionSet counting{&kCountingKernels, &kCountingAttention, &kCountingGated};
    if (name == counting.kernels->isa) return counting;
    for (const InstructionSet& set : instruction_sets()) {
        if (name == set.kernels->isa) return set;
    }
    throw std::invalid_argument("this processor does not support " + name);
}

}  // namespace amalgam
