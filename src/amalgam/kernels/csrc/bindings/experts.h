// The experts of one layer as Python holds them.
#pragma once

#include <vector>

#include "product/linear.h"

namespace amalgam {

struct Experts {
    std::vector<ExpertWeights> experts;
};

}  // namespace amalgam
