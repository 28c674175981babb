// The memory of a model as Python holds it: caches, states and rotary tables, checked once, and kept alive.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings/tensor.h"
#include "step/step.h"

namespace amalgam {

using CacheTuple = std::tuple<Tensor, Tensor>;  // [slots, kv_heads, dim], and of codes [slots, kv_heads], else None

// Throws unless the tensors are a cache with scales where it has codes. The last `num_dense` dimensions have no gaps.
inline CacheView cache_view(const char* name, const CacheTuple& tuple, int num_dense = 3) {
    const auto& [cache, scales] = tuple;
    cache.rows(name, kCaches, {kAny, kAny, kAny}, num_dense);
    const bool has_codes = (cache.kind() & (kInt8 | kFp8)) != 0;
    require(has_codes == static_cast<bool>(scales),
            std::string(name) + " is " + cache.describe() + (has_codes ? " without" : " with") + " scales");
    const int64_t heads = cache.shape(2) > 0 ? cache.shape(1) : 0;
    float* data = scales ? scales.dense("scales", kFloat32, {cache.shape(0), heads}).data<float>() : nullptr;
    return {cache.data(), cache.dtype(), cache.stride(0), cache.stride(1), cache.shape(2), data};
}

// A layer's states of sequences: [slots, taps - 1, channels] and [slots, value heads, key dim, value dim].
using StateTuple = std::tuple<Tensor, Tensor>;

// Caches, states and rotary tables of all layers, and what keeps them alive.
struct Memory {
    StepMemory step{};
    std::vector<std::pair<int64_t, int64_t>> key_shapes, value_shapes, index_shapes;  // heads and dim
    std::vector<std::vector<int64_t>> state_shapes;                                   // of a slot, or empty
    std::vector<nanobind::object> tensors;

    // caches, states, indexes: of each layer.
    Memory(const std::vector<std::pair<CacheTuple, CacheTuple>>& caches, int64_t block_size,
           const std::vector<std::pair<Tensor, Tensor>>& ropes, int64_t num_positions,
           const std::vector<std::optional<StateTuple>>& states,
           const std::vector<std::optional<CacheTuple>>& indexes) {
        require(!caches.empty() && block_size >= 1, "a cache without layers or with empty blocks");
        const Tensor& first = std::get<0>(caches.front().first);
        cache_view("keys", caches.front().first);
        step.num_slots = first.shape(0);
        step.block_size = block_size;
        step.num_positions = num_positions;
        const auto cache = [&](const char* name, const CacheTuple& tuple, auto& views, auto& shapes) {
            const auto& [tensor, scales] = tuple;
            tensor.dense(name, first.kind(), {step.num_slots, kAny, kAny});
            views.push_back(cache_view(name, tuple));
            shapes.emplace_back(tensor.shape(1), tensor.shape(2));
            for (const Tensor& part : {tensor, scales}) tensors.push_back(nanobind::borrow(part.object()));
        };
        for (const auto& [keys, values] : caches) {
            cache("keys", keys, step.keys, key_shapes);
            cache("values", values, step.values, value_shapes);
        }
        for (const auto& [cos, sin] : ropes) {
            cos.dense("cos", kFloat32, {kAny, kAny});
            sin.like("sin", cos);
            require(cos.shape(0) >= num_positions,
                    "cos is " + cos.describe() + "; needed: " + std::to_string(num_positions) + " rows");
            step.cos.push_back(cos.data<const float>());
            step.sin.push_back(sin.data<const float>());
            step.half.push_back(cos.shape(1));
            tensors.push_back(nanobind::borrow(cos.object()));
            tensors.push_back(nanobind::borrow(sin.object()));
        }
        for (const std::optional<StateTuple>& state : states) add(state);
        for (const std::optional<CacheTuple>& index : indexes) {
            if (index) {
                cache("index keys", *index, step.index_keys, index_shapes);
            } else {
                step.index_keys.push_back({});
                index_shapes.emplace_back(0, 0);
            }
        }
    }

 private:
    void add(const std::optional<StateTuple>& state) {
        step.states.push_back({nullptr, nullptr});
        state_shapes.emplace_back();
        if (!state) return;
        const auto& [convolution, recurrent] = *state;
        const int64_t slots = has_states_ ? step.num_states : kAny;
        convolution.dense("convolution", kFloat32, {slots, kAny, kAny});
        step.num_states = convolution.shape(0);
        recurrent.dense("recurrent", kFloat32, {step.num_states, kAny, kAny, kAny});
        step.states.back() = {convolution.data<float>(), recurrent.data<float>()};
        state_shapes.back() = {convolution.shape(1), convolution.shape(2), recurrent.shape(1), recurrent.shape(2),
                               recurrent.shape(3)};
        for (const Tensor& part : {convolution, recurrent}) tensors.push_back(nanobind::borrow(part.object()));
        has_states_ = true;
    }

    bool has_states_ = false;
};

}  // namespace amalgam
