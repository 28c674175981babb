#include "product/linear.h"

#include <algorithm>

#include "isa/float_types.h"
#include "product/operands.h"
#include "runtime/placement.h"

namespace amalgam {
namespace {

constexpr int64_t kRowsPerItem = 128;  // their activations stay in the second-level cache
constexpr int64_t kElementsPerItem = 1 << 13;
constexpr int64_t kFewRows = 8;         // whose arithmetic takes about as long as reading the panel
constexpr int64_t kItemsPerThread = 8;  // so that a thread that was held up does not hold up the others

struct Item {
    const ProductArgs* product;
    int64_t first_row, first_panel, end_panel;
};

// Cuts all products into items of about as many panels, a few for each thread. First come the panels of the first
// node, so that the shares that threads begin with are those of their nodes.
std::vector<Item> cut(const Execution& execution, const std::vector<ProductArgs>& products, int64_t rows) {
    const int parts = num_node_parts();
    int64_t most_at_once = 1;  // a few rows wait for memory, not for products
    for (const ProductArgs& product : products) {
        if (rows > kFewRows) most_at_once = std::max(most_at_once, execution.kernels->panels_at_once(product));
    }
    const int64_t row_blocks = (rows + kRowsPerItem - 1) / kRowsPerItem;
    std::vector<Item> items;
    for (int part = 0; part < parts; ++part) {
        const auto bound = [&](const ProductArgs& product, int which) {
            return part_start(product.weight->num_panels(), which, parts);
        };
        int64_t total = 0;
        for (const ProductArgs& product : products) total += bound(product, part + 1) - bound(product, part);
        // Rather slower items than threads without one.
        const int64_t at_once = total * row_blocks * parts >= most_at_once * execution.num_threads ? most_at_once : 1;
        // Items of equal size, since each thread has as many: rather twice as many as wanted than some of twice the
        // size.
        const int64_t wanted = std::max<int64_t>(1, execution.num_threads * kItemsPerThread / row_blocks / parts);
        const int64_t step = (std::max<int64_t>(1, total / wanted) + at_once - 1) / at_once * at_once;
        for (int64_t row = 0; row < rows; row += kRowsPerItem) {
            int64_t at = 0;  // panels so far
            for (const ProductArgs& product : products) {
                const int64_t end = bound(product, part + 1);
                for (int64_t panel = bound(product, part); panel < end;) {
                    const int64_t stop = std::min(end, panel + step - at % step);
                    items.push_back({&product, row, panel, stop});
                    at += stop - panel;
                    panel = stop;
                }
            }
        }
    }
    return items;
}

void run_products(const Execution& execution, const std::vector<ProductArgs>& products, int64_t rows) {
    const std::vector<Item> items = cut(execution, products, rows);
    parallel_for(static_cast<int64_t>(items.size()), execution.num_threads, [&](int64_t i) {
        const Item& item = items[static_cast<size_t>(i)];
        execution.kernels->product(*item.product, item.first_row, std::min(item.first_row + kRowsPerItem, rows),
                                   item.first_panel, item.end_panel);
    });
}

}  // namespace

void linear(const Execution& execution, const LinearArgs& args, const std::vector<Projection>& projections) {
    Workspace workspace;
    std::vector<ProductArgs> products;
    std::vector<Conversion> conversions;
    for (const Projection& projection : projections) {
        const Matrix& weight = *projection.weight;
        const Operand kind = operand_for(weight, args.x_dtype);
        Activations x{kind, accumulation_chunk(weight, kind), weight.columns, args.x, nullptr, nullptr, nullptr};
        if (!is_operand(weight, kind, args.x_dtype, args.rows)) {
            const bool is_gathered = gather_order(weight, kind) != nullptr;
            const auto known = std::find_if(products.begin(), products.end(), [&](const ProductArgs& other) {
                return !is_gathered && gather_order(*other.weight, kind) == nullptr && other.x.values != args.x &&
                       is_shared(other.x, weight, kind);
            });
            if (known != products.end()) {
                x = known->x;
            } else {
                conversions.emplace_back();
                x = plan_conversion(weight, kind, args.x, args.x_dtype, nullptr, args.rows, workspace,
                                    &conversions.back());
            }
        }
        products.push_back({&weight, x, projection.bias, projection.out, args.out_dtype, weight.rows});
    }
    run_conversions(execution, conversions);

    run_products(execution, products, args.rows);
}

void linear_by_head(const Execution& execution, const std::vector<HeadProduct>& heads, const HeadRows& rows) {
    Workspace workspace;
    std::vector<ProductArgs> products;
    std::vector<Conversion> conversions;
    for (const HeadProduct& head : heads) {
        const Matrix& weight = *head.weight;
        const Operand kind = operand_for(weight, rows.dtype);
        Activations x{kind, accumulation_chunk(weight, kind), rows.x_stride, head.x, nullptr, nullptr, nullptr};
        if (!is_operand(weight, kind, rows.dtype, rows.rows)) {
            conversions.emplace_back();
            x = plan_conversion(weight, kind, head.x, rows.dtype, nullptr, rows.rows, workspace, &conversions.back());
            conversions.back().args.x_stride = rows.x_stride;
        }
        products.push_back({&weight, x, {nullptr, DType::kFloat32}, head.out, rows.dtype, rows.out_stride});
    }
    run_conversions(execution, conversions);
    run_products(execution, products, rows.rows);
}

const float* widened(const Execution& execution, const void* x, DType dtype, int64_t elements) {
    // Not from the workspace, which belongs to the product.
    static thread_local std::vector<float> wide;
    if (dtype == DType::kFloat32) return static_cast<const float*>(x);
    if (wide.size() < static_cast<size_t>(elements)) wide.resize(static_cast<size_t>(elements));
    float* out = wide.data();
    parallel_ranges(elements, kElementsPerItem, execution.num_threads, [&](int64_t first, int64_t end) {
        widen_all(advance(x, dtype, first), dtype, end - first, out + first);
    });
    return out;
}

}  // namespace amalgam
