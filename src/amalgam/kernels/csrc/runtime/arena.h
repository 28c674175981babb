// Memory for weights: 64-byte aligned slices of large regions that the system may back with huge pages.
//
// One expert's projection is often smaller than a huge page, so that an allocation of its own would never get one.
#pragma once

#include <cstddef>
#include <cstdint>

namespace amalgam {

uint8_t* allocate_weight(size_t bytes);  // throws std::bad_alloc
void free_weight(uint8_t* data);

}  // namespace amalgam
