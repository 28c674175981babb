// AVX-512 with VNNI and BF16: AMD's Zen 4 and later, and Intel's servers whose matrix unit may not be used.
#pragma once

#include "isa/avx512_bf16.h"

namespace amalgam {
namespace {

// Zen 4 stores lines, which codes become first, at half the speed of Intel's processors, and multiplies half as many.
constexpr int64_t kMinWideRows = 24, kMinWidePartsRows = 24;

}  // namespace
}  // namespace amalgam
