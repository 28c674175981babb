// What products of a block of rows with one panel add up to.
#pragma once

#include "product/matrix.h"

namespace amalgam {
namespace {

constexpr int kMaxRows = 128;       // rows whose sums are kept at once
constexpr int64_t kMaxSharers = 4;  // tiles that prefetch what the next ones read

struct Sums {
    alignas(64) float row[kMaxRows][kPanelRows];
};

}  // namespace
}  // namespace amalgam
