// Attention, compiled for one instruction set.
#include "attention/item.h"
#include "isa/isa.h"

namespace amalgam {

extern const AttentionKernels AMALGAM_OF_ISA(kAttention);
const AttentionKernels AMALGAM_OF_ISA(kAttention) = {AMALGAM_ISA_NAME, attention_scratch, attend, merge_attention,
                                                     score};

}  // namespace amalgam
