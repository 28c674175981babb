// A loop whose index is a constant in each round.
#pragma once

#include <utility>

namespace amalgam {
namespace {

// function(0), function(1), ... as constants.
template <class Function, int... kIndices>
inline void each(std::integer_sequence<int, kIndices...>, Function&& function) {
    (function(std::integral_constant<int, kIndices>{}), ...);
}
template <int kCount, class Function>
inline void each(Function&& function) {
    each(std::make_integer_sequence<int, kCount>{}, std::forward<Function>(function));
}

}  // namespace
}  // namespace amalgam
