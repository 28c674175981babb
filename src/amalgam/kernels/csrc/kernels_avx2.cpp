#include "rms_norm.h"

namespace amalgam {

const Kernels kAvx2Kernels = {"avx2", rms_norm};

}  // namespace amalgam
