// The kernels of some of the formats, compiled for one instruction set; the build defines AMALGAM_PART.
#include "product/format_kernels.h"
#include "product/tiles.h"

namespace amalgam {
namespace {

template <class F>
constexpr FormatKernels kKernels = format_kernels<F>();

template <class F, int kPart>
constexpr const FormatKernels* kernels_here() {
    if constexpr (static_cast<int>(kFormat<F>) % kFormatParts == kPart) {
        return &kKernels<F>;
    } else {
        return nullptr;
    }
}

template <int kPart, class... F>
const FormatKernels* kernels_here(Format format, FormatList<F...>) {
    static constexpr const FormatKernels* kByFormat[] = {kernels_here<F, kPart>()...};
    return kByFormat[static_cast<int>(format)];
}

}  // namespace

inline namespace AMALGAM_ISA {

template <int kPart>
const FormatKernels* kernels_in_part(Format format) {
    return kernels_here<kPart>(format, Formats{});
}

template const FormatKernels* kernels_in_part<AMALGAM_PART>(Format format);

}  // namespace AMALGAM_ISA
}  // namespace amalgam
