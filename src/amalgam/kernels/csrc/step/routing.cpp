#include "step/routing.h"

#include <vector>

namespace amalgam {

void route(const Execution& execution, const RouteArgs& args) {
    static thread_local std::vector<float> scores;
    LinearArgs x = args.x;
    x.x = widened(execution, x.x, x.x_dtype, x.rows * args.weight->columns);
    x.x_dtype = x.out_dtype = DType::kFloat32;
    const size_t count = static_cast<size_t>(x.rows * args.weight->rows);
    if (scores.size() < count) scores.resize(count);
    linear(execution, x, {{args.weight, args.bias, scores.data()}});
    choose_experts({scores.data(), args.weight->rows, args.choice, args.ids, args.weights}, x.rows,
                   execution.num_threads);
}

}  // namespace amalgam
