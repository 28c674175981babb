// The table of native kernels: one instance per instruction set, chosen at run time.
//
// A kernel knows pointers, sizes and element types; it never knows PyTorch, layers or requests, nor threads: the
// drivers (linear.cpp, moe.cpp, ...) cut the work into items. Its order of accumulation per output element depends
// only on the sizes of that element's inputs, never on the number of rows.
#pragma once

#include <cstdint>
#include <limits>

#include "product/matrix.h"

namespace amalgam {

// Rows of activations as a product reads them (see activations.h).
struct Activations {
    Operand kind;
    int64_t chunk;         // kInt8: inputs that share a scale; the chunk of `accumulation_chunk`
    int64_t stride;        // elements from one row to the next
    const void* values;    // int8, bfloat16 or float [rows, padded columns]; the padding is zero
    const float* scale;    // kInt8: [rows, chunks]
    const int32_t* sum;    // kInt8: [rows, chunks], the sum of a chunk's values
    const int32_t* index;  // local row → row of `values`; null: the same
    int64_t padded_columns = 0;
    int64_t part = 0;                    // kInt8: inputs of a part whose sum is wanted, too; 0: none
    const int16_t* part_sums = nullptr;  // [rows, parts]

    int64_t row(int64_t local) const { return index != nullptr ? index[local] : local; }  // of `values`
};

// Rows → Activations. `index` and `order` gather: destination row r and packed input p read x[index[r], order[p]].
struct ConvertArgs {
    const void* x;
    DType x_dtype;
    int64_t x_stride;
    const int32_t* index;
    const int32_t* order;
    int64_t columns;
    int64_t padded_columns;
    Operand kind;
    int64_t chunk;
    int64_t stride;
    void* values;
    float* scale;
    int32_t* sum;
    int64_t part;
    int16_t* part_sums;
};

struct Bias {
    const void* data;  // null: none
    DType dtype;
};

// out[r, n] = sum over k of x[r, k] weight[n, k] + bias[n], for local rows [0, rows) and some panels of the weight.
struct ProductArgs {
    const Matrix* weight;
    Activations x;
    Bias bias;
    void* out;
    DType out_dtype;
    int64_t out_stride;
};

// How gate and up meet: with g = min(gate, limit), g * sigmoid(alpha * g) * (up within +-limit, + offset). SwiGLU has
// alpha 1, offset 0 and an infinite limit. is_gelu: gelu(g), the tanh approximation, is the first factor instead.
// limits_last: the limit is of the first factor instead of g.
struct Gating {
    Gating(float alpha, float offset, float limit, bool is_gelu, bool limits_last)
        : alpha(alpha),
          offset(offset),
          limit(limit),
          gate_limit(limits_last ? kNone : limit),
          factor_limit(limits_last ? limit : kNone),
          is_gelu(is_gelu) {}

    float alpha, offset;
    float limit, gate_limit, factor_limit;  // of up, of gate and of the first factor
    bool is_gelu;

    bool is_plain() const { return alpha == 1.0f && offset == 0.0f && limit == kNone; }

 private:
    static constexpr float kNone = std::numeric_limits<float>::infinity();
};

// out[r, n] = gate and up joined, the two products that read the same tokens; out is float32.
struct GateUpArgs {
    ProductArgs gate;  // its out is the result; up's is not used
    ProductArgs up;
    Gating gating;
};

// out[t] = sum over k of gate_weights[t, k] * parts[slots[t, k]], in the order of k.
struct CombineArgs {
    const float* parts;         // [slots, hidden]
    const int32_t* slots;       // [tokens, k]; -1: adds nothing
    const float* gate_weights;  // [tokens, k]
    int64_t num_active;
    int64_t hidden;
    void* out;  // [tokens, hidden]
    DType out_dtype;
    int64_t first_column, end_column;  // of out and parts; others are left alone
};

// out[r, i] = cast(x[r, i] / sqrt(mean(x[r]^2) + eps)) * weight[i], where cast goes from float32 to the type of x, and
// weight is cast to it too. All arrays are dense and row-major; out has the type of x and may be x itself. With a
// delta, x is first replaced by cast(x + delta), which goes to `sum`.
struct RmsNormArgs {
    const void* x;       // [rows, hidden]
    const void* delta;   // [rows, hidden] of the type of x, or null
    void* sum;           // [rows, hidden] where there is a delta
    const void* weight;  // [hidden]
    void* out;           // [rows, hidden]
    int64_t hidden;
    float eps;
    DType x_dtype;
    DType weight_dtype;
    bool rounds_last = false;  // cast(x / sqrt(..) * weight) instead, in float32 up to there
};

// out[r, i] = cast((x[r, i] - mean) / sqrt(variance + eps) * weight[i] + bias[i]) in float32 (Ba et al. 2016), with a
// delta as in RmsNormArgs. bias has the weight's type.
struct LayerNormArgs {
    const void* x;
    const void* delta;
    void* sum;
    const void* weight;
    const void* bias;
    void* out;
    int64_t hidden;
    float eps;
    DType x_dtype;
    DType weight_dtype;
};

// A norm's weight, where there may be none.
struct NormWeight {
    const void* data;  // null: no norm
    DType dtype;
};

// Rotary embedding on the first 2 * half dimensions of each head; the others are copied.
struct RotateArgs {
    const void* x;     // [tokens, heads, head_dim], token_stride elements between tokens
    const float* cos;  // [tokens, half]
    const float* sin;
    void* out;  // [tokens, heads, head_dim], dense
    int64_t token_stride;
    int64_t heads;
    int64_t head_dim;
    int64_t half;
    DType dtype;
};

// out = cast(silu(gate)) * up over flat arrays of one type; cast goes from float32 to that type. A gating that is not
// plain is computed in float32 up to one rounding.
struct SwigluArgs {
    const void* gate;
    const void* up;
    void* out;
    DType dtype;
    Gating gating;
};

// Over flat arrays of one type, in place; float32 up to one rounding.
enum class ElementwiseKind {
    kAdd,      // x + y
    kClamp,    // x within +-number
    kGelu,     // the tanh approximation (Hendrycks and Gimpel 2016)
    kScale,    // x * number
    kSoftcap,  // number * tanh(x / number)
};

struct ElementwiseArgs {
    ElementwiseKind kind;
    void* x;
    const void* y;
    float number;
    DType dtype;
};

// x[r] *= sigmoid(gate[r]), in place.
struct ScaleRowsArgs {
    void* x;            // [rows, width]
    const float* gate;  // [rows]
    int64_t width;
    DType dtype;
};

// weights[i] = e^((logits[i] - largest) / temperature), each finite and at most 1.
struct BoltzmannArgs {
    const float* logits;
    int64_t count;
    float largest;
    double temperature;
};

// What a matrix unit has besides products. Benchmarks and tests set its choices, while nothing runs.
struct UnitKernels {
    // From how many rows on int8 operands are multiplied on it, but of formats with parts; the results are the same
    // bits.
    int64_t* int8_rows;
    // Whether a weight with bfloat16 operands and scales for groups is expanded with its scales, rounded to bfloat16,
    // so that the sums of all groups stay in the unit. Otherwise each group's sum is scaled, without rounding.
    bool* scales_weights;
    // Products of tiles that are not loaded or stored; 4 in each round.
    void (*run_rounds)(Operand, int64_t rounds);
    int64_t (*operations_per_round)(Operand);
};

struct Kernels {
    const char* isa;
    // Panels that a product of many rows multiplies at once; an item of fewer is slower.
    int64_t (*panels_at_once)(const ProductArgs&);
    const UnitKernels* unit;  // null: there is none
    void (*convert)(const ConvertArgs&, int64_t first_row, int64_t end_row);
    void (*product)(const ProductArgs&, int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel);
    void (*gate_up)(const GateUpArgs&, int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel);
    void (*combine)(const CombineArgs&, int64_t first_token, int64_t end_token);
    // Inputs [first, end) of a panel as floats [end - first, 16]: the weight's exact values.
    void (*expand)(const Matrix&, int64_t panel, int64_t first, int64_t end, float* out);
    void (*rms_norm)(const RmsNormArgs&, int64_t first_row, int64_t end_row);
    void (*rotate)(const RotateArgs&, int64_t first_token, int64_t end_token);
    void (*swiglu)(const SwigluArgs&, int64_t first, int64_t end);
    void (*layer_norm)(const LayerNormArgs&, int64_t first_row, int64_t end_row);
    void (*elementwise)(const ElementwiseArgs&, int64_t first, int64_t end);
    void (*scale_rows)(const ScaleRowsArgs&, int64_t first_row, int64_t end_row);
    void (*boltzmann)(const BoltzmannArgs&, double* weights);
    // bfloat16 → the lines of a coded panel (isa/portable.h).
    int (*code_rows)(const uint16_t* const* rows, int64_t count, int window, uint8_t* lines);
    int64_t (*count_exceptions)(const uint16_t* values, int64_t count, int window);
};

}  // namespace amalgam
