#include "rms_norm.h"

namespace amalgam {

const Kernels kPortableKernels = {"portable", rms_norm};

}  // namespace amalgam
