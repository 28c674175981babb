// Choosing tokens.
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/tensor.h"
#include "step/selection.h"

namespace nb = nanobind;

namespace amalgam {
namespace {

// top_k (0: no limit), temperature, top_p, min_p; seed; place.
using DrawTuple = std::tuple<std::tuple<int64_t, double, double, double>, uint64_t, uint64_t>;

std::vector<int64_t> draw_tokens(const Kernels& kernels, const Tensor& logits, const std::vector<DrawTuple>& rows,
                                 int threads) {
    logits.dense("logits", kFloat32, {static_cast<int64_t>(rows.size()), kAny});
    const int64_t vocabulary = logits.shape(1);
    require(vocabulary > 0, "logits is " + logits.describe() + "; needed: a vocabulary");
    std::vector<DrawParams> params;
    for (const auto& [how, seed, index] : rows) {
        const auto& [top_k, temperature, top_p, min_p] = how;
        require(top_k >= 0, "top_k is " + std::to_string(top_k) + "; needed: at least 0");
        const int64_t limit = top_k == 0 ? vocabulary : std::min(top_k, vocabulary);
        params.push_back({limit, temperature, top_p, min_p, seed, index});
    }
    std::vector<int64_t> tokens(rows.size());
    draw(kernels, logits.data<const float>(), vocabulary, params, tokens.data(), threads);
    return tokens;
}

}  // namespace

void bind_sampling(nb::module_& module) { module.def("draw", &draw_tokens, Unlocked()); }

}  // namespace amalgam
