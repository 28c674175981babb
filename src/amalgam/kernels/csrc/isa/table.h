// The instruction sets that the extension was built for. CMakeLists.txt lists them.
#pragma once

#include <string>
#include <vector>

#include "attention/attention.h"
#include "gated/gated.h"
#include "product/kernels.h"

namespace amalgam {

struct InstructionSet {
    const Kernels* kernels;
    const AttentionKernels* attention;
    const GatedKernels* gated;
};

// Slowest first, those that this processor and operating system can run.
const std::vector<InstructionSet>& instruction_sets();

// Computes nothing and says what it would have cost (runtime/recording.h).
extern const Kernels kCountingKernels;
extern const AttentionKernels kCountingAttention;
extern const GatedKernels kCountingGated;

// One of these, or "counting". Throws std::invalid_argument where this processor cannot run it.
const InstructionSet& instruction_set(const std::string& name);

}  // namespace amalgam
