// Software prefetch on x86. In assembly, because GCC takes a function that does nothing but prefetch for one without
// effect, and drops every call of it that it has not inlined.
#pragma once

#include <cstdint>

namespace amalgam {
namespace {

inline void prefetch(const uint8_t* p) { asm volatile("prefetcht0 %a0" ::"p"(p)); }      // into L1
inline void prefetch_far(const uint8_t* p) { asm volatile("prefetcht1 %a0" ::"p"(p)); }  // into L2

}  // namespace
}  // namespace amalgam
