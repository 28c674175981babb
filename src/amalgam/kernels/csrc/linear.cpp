#include "linear.h"

#include <algorithm>

#include "operands.h"

namespace amalgam {
namespace {

constexpr int64_t kRowsPerItem = 128;   // their activations stay in the second-level cache
constexpr int64_t kItemsPerThread = 8;  // so that a thread that was held up does not hold up the others

}  // namespace

void linear(const Execution& execution, const LinearArgs& args) {
    const Matrix& weight = *args.weight;
    Workspace workspace;
    const Operand kind = operand_for(weight, args.x_dtype);
    Activations x{kind, accumulation_chunk(weight, kind), weight.columns, args.x, nullptr, nullptr, nullptr};
    if (!is_operand(weight, kind, args.x_dtype, args.rows)) {
        std::vector<Conversion> conversion(1);
        x = plan_conversion(weight, kind, args.x, args.x_dtype, nullptr, args.rows, workspace, conversion.data());
        run_conversions(execution, conversion);
    }
    const ProductArgs product{&weight, x, args.bias, args.out, args.x_dtype, weight.rows};
    const int64_t panels = weight.num_panels();
    const int64_t row_blocks = (args.rows + kRowsPerItem - 1) / kRowsPerItem;
    const int64_t wanted = std::max<int64_t>(1, execution.num_threads * kItemsPerThread / row_blocks);
    const int64_t step = (panels + wanted - 1) / wanted;
    const int64_t panel_blocks = (panels + step - 1) / step;
    parallel_for(row_blocks * panel_blocks, execution.num_threads, [&](int64_t item) {
        const int64_t row = item / panel_blocks * kRowsPerItem, panel = item % panel_blocks * step;
        execution.kernels->product(product, row, std::min(row + kRowsPerItem, args.rows), panel,
                                   std::min(panel + step, panels));
    });
}

}  // namespace amalgam
