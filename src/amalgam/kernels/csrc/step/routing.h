// Routers: which experts a token goes to.
#pragma once

#include "product/linear.h"
#include "step/selection.h"

namespace amalgam {

// The scores of x in float32, then `choose_experts` (selection.h) over them.
struct RouteArgs {
    LinearArgs x;
    const Matrix* weight;  // [experts, columns]
    Bias bias;
    ExpertChoice choice;
    int64_t* ids;    // [rows, k]
    float* weights;  // [rows, k]
};

void route(const Execution& execution, const RouteArgs& args);

}  // namespace amalgam
