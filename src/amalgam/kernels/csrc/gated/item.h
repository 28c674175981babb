// What one thread does of blocks with a state per sequence, compiled for one instruction set.
//
// The delta rule goes over a head's state in slices of up to 32 columns, all tokens of a block in one slice before the
// next: a slice stays in the first-level cache. For each token,
//
//   known = decay * (S^T k),  change = strength * (value - known),  out = decay * (S^T q) + (k . q) * change
//   S = decay * S + k change^T
//
// so that both sums are over the state as it was, and one pass over it updates it for a token and sums for the next.
// With a decay for each row, the sums are with rows of k and q that are decayed already. A state space has no `known`.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "gated/gated.h"
#include "isa/float_types.h"
#include "isa/isa.h"
#include "product/exponential.h"

// For a loop that needs all registers for itself.
#if defined(__GNUC__)
#define AMALGAM_APART __attribute__((noinline))
#else
#define AMALGAM_APART
#endif

namespace amalgam {
namespace {

constexpr int64_t kBlockTokens = 32;  // whose keys and queries are kept beside a slice
constexpr int kSliceBlocks = 2;
constexpr int64_t kSliceColumns = kSliceBlocks * kLanes;

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

inline const void* row_of(const ActivationRows& rows, int64_t row, int64_t column) {
    return advance(static_cast<const void*>(rows.data), rows.dtype, row * rows.stride + column);
}

inline void store_row(const float* values, int64_t count, const ActivationRows& rows, int64_t row, int64_t column) {
    void* to = advance(rows.data, rows.dtype, row * rows.stride + column);
    if (rows.dtype == DType::kFloat32) {
        std::memcpy(to, values, static_cast<size_t>(count) * sizeof(float));
    } else {
        for (int64_t i = 0; i < count; ++i) narrow(values[i], static_cast<Bfloat16*>(to) + i);
    }
}

inline void copy_floats(const float* from, int64_t from_stride, float* to, int64_t to_stride, int64_t rows,
                        int64_t columns) {
    for (int64_t row = 0; row < rows; ++row) {
        std::memcpy(to + row * to_stride, from + row * from_stride, static_cast<size_t>(columns) * sizeof(float));
    }
}

// --- Convolution ---

void convolve(const ConvolveArgs& args, const StateSequence& sequence, int64_t first_channel, int64_t end_channel,
              float* scratch) {
    constexpr int64_t kColumns = kConvolvedChannels, kRows = kConvolvedRows;
    const int64_t before = args.taps - 1, state_size = before * args.channels;
    float* seen = scratch;  // the rows before, and behind them rows of x, widened
    alignas(64) float total[kColumns], factor[kColumns];
    const auto multiply = [&](const ActivationRows& by, int64_t token, int64_t column, int64_t width, float* values) {
        if (by.data == nullptr) return;
        widen_all(row_of(by, token, column), by.dtype, width, factor);
        for (int64_t i = 0; i < width; ++i) values[i] *= factor[i];
    };
    for (int64_t column = first_channel; column < end_channel; column += kColumns) {
        const int64_t width = std::min(kColumns, end_channel - column);
        const StateSlots& slots = sequence.slots;
        if (slots.source < 0) {
            std::fill(seen, seen + before * kColumns, 0.0f);
        } else {
            copy_floats(args.states + slots.source * state_size + column, args.channels, seen, kColumns, before, width);
        }
        auto save = slots.saves.begin();
        for (int64_t first = 0; first < sequence.num_tokens; first += kRows) {
            const int64_t rows = std::min(kRows, sequence.num_tokens - first);
            for (int64_t row = 0; row < rows; ++row) {
                const int64_t token = sequence.first_token + first + row;
                widen_all(row_of(args.x, token, column), args.x.dtype, width, seen + (before + row) * kColumns);
                multiply(args.before, token, column, width, seen + (before + row) * kColumns);
                const float* from = seen + row * kColumns;
                for (int64_t i = 0; i < width; ++i) total[i] = from[i] * args.weight[column + i];
                for (int64_t tap = 1; tap < args.taps; ++tap) {
                    from += kColumns;
                    const float* weight = args.weight + tap * args.channels + column;
                    for (int64_t i = 0; i < width; ++i) total[i] += from[i] * weight[i];
                }
                if (args.bias != nullptr) {
                    for (int64_t i = 0; i < width; ++i) total[i] += args.bias[column + i];
                }
                if (args.activates) {
                    for (int64_t i = 0; i < width; ++i) total[i] /= 1.0f + exponential(-total[i]);
                }
                multiply(args.behind, token, column, width, total);
                store_row(total, width, args.out, token, column);
            }
            for (; save != slots.saves.end() && save->first <= first + rows; ++save) {
                copy_floats(seen + (save->first - first) * kColumns, kColumns,
                            args.states + save->second * state_size + column, args.channels, before, width);
            }
            std::memmove(seen, seen + rows * kColumns, static_cast<size_t>(before * kColumns) * sizeof(float));
        }
        copy_floats(seen, kColumns, args.states + slots.target * state_size + column, args.channels, before, width);
    }
}

// --- Delta rule and state space ---

// What a block's tokens bring to one head, whatever the column.
struct HeadTokens {
    int64_t first, count;  // rows
    float* keys;           // [tokens, key_dim]
    float* queries;        // likewise
    float* decays;         // likewise, where each row has its own
    float *decayed_keys, *decayed_queries;
    float decay[kBlockTokens], strength[kBlockTokens];
    float product[kBlockTokens];  // of key and query
};

// Columns of a state.
struct Slice {
    float* data;  // [key_dim, columns]
    int64_t stride;
};

// In an order that depends on the size only.
inline float dot(const float* a, const float* b, int64_t size) {
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += a[i + lane] * b[i + lane];
    }
    for (int lane = 0; i + lane < size; ++lane) lanes[lane] += a[i + lane] * b[i + lane];
    for (int width = kLanes / 2; width > 0; width /= 2) {
        for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    }
    return lanes[0];
}

inline void load_unit(const ActivationRows& rows, int64_t token, int64_t column, int64_t size, float length,
                      float* out) {
    widen_all(row_of(rows, token, column), rows.dtype, size, out);
    const float factor = length / std::sqrt(dot(out, out, size) + 1e-6f);
    for (int64_t i = 0; i < size; ++i) out[i] *= factor;
}

inline float load_one(const ActivationRows& rows, int64_t token, int64_t column) {
    float value;
    widen_all(row_of(rows, token, column), rows.dtype, 1, &value);
    return value;
}

inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// A factor for each row of the state, and key and query with them.
void load_decays(const DeltaArgs& args, int64_t head, int64_t token, float rate, const float* key, const float* query,
                 float* decays, float* decayed_keys, float* decayed_queries) {
    const int64_t size = args.key_dim, first = head * size;
    const float* bias = args.decay_bias + first;
    widen_all(row_of(args.decay, token, first), args.decay.dtype, size, decays);
    if (args.bound != 0.0f) {
        for (int64_t i = 0; i < size; ++i) decays[i] = exponential(args.bound * sigmoid(rate * (decays[i] + bias[i])));
    } else {
        for (int64_t i = 0; i < size; ++i) decays[i] = std::exp(-rate * softplus(decays[i] + bias[i]));
    }
    for (int64_t i = 0; i < size; ++i) {
        decayed_keys[i] = decays[i] * key[i];
        decayed_queries[i] = decays[i] * query[i];
    }
}

void load_tokens(const DeltaArgs& args, int64_t head, HeadTokens& tokens) {
    const int64_t size = args.key_dim, column = head / (args.value_heads / args.key_heads) * size;
    const float rate = std::exp(args.log_rate[head]), length = 1.0f / std::sqrt(static_cast<float>(size));
    for (int64_t t = 0; t < tokens.count; ++t) {
        const int64_t token = tokens.first + t, at = t * size;
        float *key = tokens.keys + at, *query = tokens.queries + at;
        if (args.state_space != nullptr) {
            widen_all(row_of(args.key, token, column), args.key.dtype, size, key);
            widen_all(row_of(args.query, token, column), args.query.dtype, size, query);
        } else {
            load_unit(args.key, token, column, size, 1.0f, key);
            load_unit(args.query, token, column, size, length, query);
        }
        tokens.product[t] = dot(key, query, size);
        if (args.has_row_decays) {
            load_decays(args, head, token, rate, key, query, tokens.decays + at, tokens.decayed_keys + at,
                        tokens.decayed_queries + at);
            tokens.decay[t] = 1.0f;
        } else {
            const float x = load_one(args.decay, token, head) + args.decay_bias[head];
            float step = softplus(x);
            if (args.state_space != nullptr) {
                step = std::min(std::max(step, args.state_space->least), args.state_space->most);
                tokens.strength[t] = step;
            }
            tokens.decay[t] = std::exp(args.bound != 0.0f ? args.bound * sigmoid(rate * x) : -rate * step);
        }
        if (args.state_space == nullptr) tokens.strength[t] = sigmoid(load_one(args.strength, token, head));
    }
}

struct Update {
    const float* key;
    float decay;
    const float* decays;  // of each row, where they have their own
    const float* change;  // [columns]
};

struct Sums {
    const float *key, *query;
    float *with_key, *with_query;  // [columns]
};

// One pass over a slice: target = decay * source + key change^T, and the sums of that, or of the source, with the key
// and the query of the next token.
template <int N, bool kUpdates, bool kSums, bool kRowDecays>
AMALGAM_APART void sweep(Slice source, Slice target, int64_t rows, int64_t ahead, Update update, Sums sums) {
    Floats decay = zero_floats(), change[N], with_key[N], with_query[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
        with_key[n] = with_query[n] = zero_floats();
        if constexpr (kUpdates) change[n] = load_floats(update.change + n * kLanes);
    }
    if constexpr (kUpdates && !kRowDecays) decay = broadcast(update.decay);
    const float* from = source.data;
    float* to = target.data;
    for (int64_t row = 0; row < rows; ++row, from += source.stride, to += target.stride) {
        Floats state[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            state[n] = load_floats(from + n * kLanes);
            if constexpr (!kUpdates) prefetch_far(reinterpret_cast<const uint8_t*>(from + ahead + n * kLanes));
            if constexpr (kUpdates) {
                if constexpr (kRowDecays) decay = broadcast_float(update.decays + row);
                state[n] = fused(broadcast_float(update.key + row), change[n], mul(state[n], decay));
                store_floats(to + n * kLanes, state[n]);
            }
            if constexpr (kSums) {
                with_key[n] = fused(state[n], broadcast_float(sums.key + row), with_key[n]);
                with_query[n] = fused(state[n], broadcast_float(sums.query + row), with_query[n]);
            }
        }
    }
    if constexpr (kSums) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            store_floats(sums.with_key + n * kLanes, with_key[n]);
            store_floats(sums.with_query + n * kLanes, with_query[n]);
        }
    }
}

// A block's tokens through N * 16 columns of a head, of which `width` count, from source to target by way of `kept`.
template <int N, bool kRowDecays>
void run_tokens(const DeltaArgs& args, const HeadTokens& tokens, int64_t head, int64_t column, int64_t width,
                Slice source, Slice target, Slice kept) {
    alignas(64) float value[N * kLanes] = {}, with_key[N * kLanes], with_query[N * kLanes], change[N * kLanes];
    const int64_t size = args.key_dim, value_column = head * args.value_dim + column;
    // The next head, which this thread will probably compute next.
    const int64_t ahead = size * args.value_dim;
    const bool is_delta = args.state_space == nullptr;
    const float skip = is_delta ? 0.0f : args.state_space->skip[head];
    const float* keys = kRowDecays ? tokens.decayed_keys : tokens.keys;
    const float* queries = kRowDecays ? tokens.decayed_queries : tokens.queries;
    sweep<N, false, true, kRowDecays>(source, kept, size, ahead, {}, {keys, queries, with_key, with_query});
    for (int64_t t = 0; t < tokens.count; ++t) {
        const int64_t token = tokens.first + t;
        const float decay = tokens.decay[t], strength = tokens.strength[t], product = tokens.product[t];
        widen_all(row_of(args.value, token, value_column), args.value.dtype, width, value);
        for (int i = 0; i < N * kLanes; ++i) {
            change[i] = strength * (is_delta ? value[i] - decay * with_key[i] : value[i]);
            with_query[i] = decay * with_query[i] + product * change[i];
            if (!is_delta) with_query[i] += skip * value[i];
        }
        store_row(with_query, width, args.out, token, value_column);
        const Slice from = t == 0 ? source : kept;
        const Update update{tokens.keys + t * size, decay, tokens.decays + t * size, change};
        if (t + 1 == tokens.count) {
            sweep<N, true, false, kRowDecays>(from, target, size, 0, update, {});
        } else {
            const int64_t next = (t + 1) * size;
            sweep<N, true, true, kRowDecays>(from, kept, size, 0, update,
                                             {keys + next, queries + next, with_key, with_query});
        }
    }
}

int64_t delta_scratch(const DeltaArgs& args) {
    return ((args.has_row_decays ? 5 : 2) * kBlockTokens + kSliceColumns) * args.key_dim;
}

void delta_rule(const DeltaArgs& args, const StateSequence& sequence, int64_t head, int64_t first_column,
                int64_t end_column, float* scratch) {
    const int64_t size = args.key_dim;
    const Slice kept{scratch, kSliceColumns};
    HeadTokens tokens;
    tokens.keys = scratch + size * kSliceColumns;
    tokens.queries = tokens.keys + kBlockTokens * size;
    // Where there are none, they are not read.
    const int64_t more = args.has_row_decays ? kBlockTokens * size : 0;
    tokens.decays = tokens.queries + more;
    tokens.decayed_keys = tokens.decays + more;
    tokens.decayed_queries = tokens.decayed_keys + more;
    const auto run = [&](int64_t head, int64_t column, int64_t width, Slice from, Slice to) {
        const bool is_narrow = width <= kLanes;
        const auto through = args.has_row_decays ? (is_narrow ? run_tokens<1, true> : run_tokens<kSliceBlocks, true>)
                                                 : (is_narrow ? run_tokens<1, false> : run_tokens<kSliceBlocks, false>);
        through(args, tokens, head, column, width, from, to, kept);
    };
    const auto at = [&](int64_t slot, int64_t column) {
        return Slice{args.states + ((slot * args.value_heads + head) * size) * args.value_dim + column, args.value_dim};
    };
    int64_t source = sequence.slots.source;
    auto save = sequence.slots.saves.begin();
    for (int64_t first = 0, end; first < sequence.num_tokens; first = end) {
        end = std::min(first + kBlockTokens, sequence.num_tokens);
        const bool saves = save != sequence.slots.saves.end() && save->first <= end;
        if (saves) end = save->first;
        const int64_t target = saves && end < sequence.num_tokens ? save->second : sequence.slots.target;
        tokens.first = sequence.first_token + first;
        tokens.count = end - first;
        load_tokens(args, head, tokens);
        for (int64_t column = first_column; column < end_column; column += kSliceColumns) {
            const int64_t width = std::min(kSliceColumns, end_column - column);
            const bool is_whole = width % kLanes == 0;
            Slice from = source < 0 ? kept : at(source, column), to = at(target, column);
            if (source < 0 || !is_whole) std::fill(scratch, scratch + size * kSliceColumns, 0.0f);
            if (!is_whole) {
                if (source >= 0) copy_floats(from.data, from.stride, kept.data, kept.stride, size, width);
                from = to = kept;
            }
            run(head, column, width, from, to);
            const Slice last = at(target, column);
            if (!is_whole) copy_floats(kept.data, kept.stride, last.data, last.stride, size, width);
            if (saves && target != save->second) {
                const Slice saved = at(save->second, column);
                copy_floats(last.data, last.stride, saved.data, saved.stride, size, width);
            }
        }
        if (saves) ++save;
        source = target;
    }
}

// --- Gate ---

template <class X, class G>
void gate_range(const GateArgs& args, int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
        X* x = static_cast<X*>(args.x.data) + row * args.x.stride;
        const G* by = static_cast<const G*>(args.gate.data) + row * args.gate.stride;
        if (args.share == 1) {
            for (int64_t i = 0; i < args.width; ++i) narrow(sigmoid(widen(by[i])) * widen(x[i]), &x[i]);
            continue;
        }
        for (int64_t start = 0; start < args.width; start += args.share) {
            const float factor = sigmoid(widen(*by++));
            for (int64_t i = start; i < start + args.share; ++i) narrow(factor * widen(x[i]), &x[i]);
        }
    }
}

void gate(const GateArgs& args, int64_t first, int64_t end) {
    const bool is_wide = args.gate.dtype == DType::kFloat32;
    if (args.x.dtype == DType::kFloat32) {
        is_wide ? gate_range<float, float>(args, first, end) : gate_range<float, Bfloat16>(args, first, end);
    } else {
        is_wide ? gate_range<Bfloat16, float>(args, first, end) : gate_range<Bfloat16, Bfloat16>(args, first, end);
    }
}

}  // namespace
}  // namespace amalgam
