// The gated delta net, compiled for one instruction set.
#include "gated/item.h"
#include "isa/isa.h"

namespace amalgam {

extern const GatedKernels AMALGAM_OF_ISA(kGated);
const GatedKernels AMALGAM_OF_ISA(kGated) = {AMALGAM_ISA_NAME, convolve, delta_rule, delta_scratch, gate};

}  // namespace amalgam
