#include "selection.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "exponential.h"
#include "pool.h"

namespace amalgam {
namespace {

constexpr int64_t kTokensPerItem = 64;
constexpr int64_t kLane = 64;  // values that are looked at together before one by one

void choose_for_token(const TopExpertsArgs& args, int64_t token, std::vector<float>& probabilities) {
    const float* scores = args.scores + token * args.experts;
    float largest = scores[0];
    for (int64_t i = 1; i < args.experts; ++i) largest = scores[i] > largest ? scores[i] : largest;
    float* p = probabilities.data();
    for (int64_t i = 0; i < args.experts; ++i) p[i] = exponential(scores[i] - largest);
    const float total = std::accumulate(p, p + args.experts, 0.0f);
    for (int64_t i = 0; i < args.experts; ++i) p[i] /= total;

    int64_t* ids = args.ids + token * args.k;
    float* weights = args.weights + token * args.k;
    int64_t count = 0;
    for (int64_t i = 0; i < args.experts; ++i) {
        if (count == args.k && !(p[i] > weights[count - 1])) continue;
        int64_t at = count < args.k ? count++ : count - 1;
        for (; at > 0 && p[i] > weights[at - 1]; --at) {
            weights[at] = weights[at - 1];
            ids[at] = ids[at - 1];
        }
        weights[at] = p[i];
        ids[at] = i;
    }
    if (args.normalises) {
        const float sum = std::accumulate(weights, weights + args.k, 0.0f) + args.sum_eps;
        for (int64_t i = 0; i < args.k; ++i) weights[i] /= sum;
    }
}

// Not NaN, not infinite: 0 times anything else is 0.
bool all_finite(const float* values, int64_t count) {
    float sums[16] = {};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        for (int lane = 0; lane < 16; ++lane) sums[lane] += values[i + lane] * 0.0f;
    }
    for (; i < count; ++i) sums[0] += values[i] * 0.0f;
    float total = 0;
    for (const float sum : sums) total += sum;
    return total == 0.0f;
}

float maximum(const float* values, int64_t count) {
    float largest[16];
    std::fill(largest, largest + 16, values[0]);
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        for (int lane = 0; lane < 16; ++lane) {
            largest[lane] = values[i + lane] > largest[lane] ? values[i + lane] : largest[lane];
        }
    }
    for (; i < count; ++i) largest[0] = values[i] > largest[0] ? values[i] : largest[0];
    return *std::max_element(largest, largest + 16);
}

// Calls function(index) for every value of at least `limit`, which the function may raise.
template <class Function>
void for_each_at_least(const float* values, int64_t count, const float& limit, Function&& function) {
    for (int64_t start = 0; start < count; start += kLane) {
        const int64_t size = std::min(kLane, count - start);
        if (maximum(values + start, size) < limit) continue;
        for (int64_t i = start; i < start + size; ++i) {
            if (values[i] >= limit) function(i);
        }
    }
}

// The k-th largest value, k from 1 to count. Keeps the best seen so far in a buffer that is cut back to k when full.
float kth_largest(const float* values, int64_t count, int64_t k, std::vector<float>& best) {
    best.clear();
    float limit = -std::numeric_limits<float>::infinity();
    const auto cut = [&] {
        std::nth_element(best.begin(), best.begin() + (k - 1), best.end(), std::greater<>());
        best.resize(static_cast<size_t>(k));
        limit = best.back();
    };
    const size_t room = static_cast<size_t>(k) + std::max<size_t>(64, static_cast<size_t>(k));
    for_each_at_least(values, count, limit, [&](int64_t i) {
        best.push_back(values[i]);
        if (best.size() >= room) cut();
    });
    cut();
    return limit;
}

// What is kept from row to row, so that nothing is allocated.
struct Scratch {
    std::vector<float> best;
    std::vector<int64_t> candidates, others;
    std::vector<double> weights, sums;
};

// Sets the weights of the least likely candidates, which together hold at most `share`, to 0; never all of them.
void cut_tail(double share, double* weights, int64_t count, std::vector<int64_t>& others) {
    const double limit = share * std::accumulate(weights, weights + count, 0.0);
    others.resize(static_cast<size_t>(count));
    std::iota(others.begin(), others.end(), 0);
    // What is at most the n-th part of the room left for n candidates fits in without being sorted.
    double tail = 0.0;
    for (size_t size = 0; size != others.size() && tail < limit;) {
        size = others.size();
        const double negligible = (limit - tail) / static_cast<double>(size);
        size_t kept = 0;
        for (const int64_t i : others) {
            const bool is_kept = weights[i] > negligible || weights[i] == 1.0;  // the likeliest, whatever is rounded
            tail += is_kept ? 0.0 : weights[i];
            weights[i] = is_kept ? weights[i] : 0.0;
            others[kept] = i;
            kept += is_kept;
        }
        others.resize(kept);
    }
    std::stable_sort(others.begin(), others.end(), [&](int64_t a, int64_t b) { return weights[a] < weights[b]; });
    for (size_t i = 0; i + 1 < others.size(); ++i) {
        double& weight = weights[others[i]];
        if ((tail += weight) > limit) break;
        weight = 0.0;
    }
}

// Index of the first weight up to which the sum exceeds u of the total. Weights are summed in blocks: one long chain of
// additions would wait for itself.
int64_t at_quantile(const double* weights, int64_t count, double u, std::vector<double>& sums) {
    sums.clear();
    for (int64_t start = 0; start < count; start += kLane) {
        double lanes[8] = {};
        const double* block = weights + start;
        const int64_t size = std::min(kLane, count - start);
        int64_t i = 0;
        for (; i + 8 <= size; i += 8) {
            for (int lane = 0; lane < 8; ++lane) lanes[lane] += block[i + lane];
        }
        for (; i < size; ++i) lanes[0] += block[i];
        sums.push_back(std::accumulate(lanes, lanes + 8, 0.0));
    }
    double left = u * std::accumulate(sums.begin(), sums.end(), 0.0);
    size_t block = 0, last = sums.size() - 1;  // the last one that holds anything, where rounding leads beyond
    while (sums[last] == 0.0) --last;
    while (block < last && left >= sums[block]) left -= sums[block++];
    const int64_t start = static_cast<int64_t>(block) * kLane;
    int64_t chosen = start;
    for (int64_t i = start; i < std::min(start + kLane, count); ++i) {
        if (weights[i] == 0.0) continue;
        chosen = i;
        if ((left -= weights[i]) < 0.0) break;
    }
    return chosen;
}

int64_t draw_row(const Kernels& kernels, const float* logits, int64_t vocabulary, const DrawParams& params,
                 Scratch& scratch) {
    if (!all_finite(logits, vocabulary)) return -1;
    const float largest = maximum(logits, vocabulary);
    if (params.temperature == 0.0) return std::find(logits, logits + vocabulary, largest) - logits;

    const bool takes_all = params.top_k == vocabulary;
    std::vector<int64_t>& candidates = scratch.candidates;
    candidates.clear();
    if (!takes_all) {
        const float threshold = kth_largest(logits, vocabulary, params.top_k, scratch.best);
        scratch.best.clear();  // from here on the candidates' logits
        for_each_at_least(logits, vocabulary, threshold, [&](int64_t i) {
            candidates.push_back(i);
            scratch.best.push_back(logits[i]);
        });
    }
    const int64_t count = takes_all ? vocabulary : static_cast<int64_t>(candidates.size());
    if (static_cast<int64_t>(scratch.weights.size()) < count) scratch.weights.resize(static_cast<size_t>(count));
    double* weights = scratch.weights.data();
    kernels.boltzmann({takes_all ? logits : scratch.best.data(), count, largest, params.temperature}, weights);
    if (params.top_p < 1.0) cut_tail(1.0 - params.top_p, weights, count, scratch.others);
    if (params.min_p > 0.0) {
        for (int64_t i = 0; i < count; ++i) weights[i] = weights[i] < params.min_p ? 0.0 : weights[i];  // best: 1
    }
    const int64_t chosen = at_quantile(weights, count, uniform(params.seed, params.index), scratch.sums);
    return takes_all ? chosen : candidates[static_cast<size_t>(chosen)];
}

struct Product {
    uint64_t high, low;
};

Product multiply(uint64_t a, uint64_t b) {
    const uint64_t a0 = a & 0xffffffff, a1 = a >> 32, b0 = b & 0xffffffff, b1 = b >> 32;
    const uint64_t middle = a1 * b0 + (a0 * b0 >> 32);
    const uint64_t carry = (middle & 0xffffffff) + a0 * b1;
    return {a1 * b1 + (middle >> 32) + (carry >> 32), a * b};
}

}  // namespace

void choose_experts(const TopExpertsArgs& args, int64_t tokens, int threads) {
    parallel_ranges(tokens, kTokensPerItem, threads, [&](int64_t first, int64_t end) {
        std::vector<float> probabilities(static_cast<size_t>(args.experts));
        for (int64_t token = first; token < end; ++token) choose_for_token(args, token, probabilities);
    });
}

void draw(const Kernels& kernels, const float* logits, int64_t vocabulary, const std::vector<DrawParams>& rows,
          int64_t* tokens, int threads) {
    parallel_for(static_cast<int64_t>(rows.size()), threads, [&](int64_t row) {
        thread_local Scratch scratch;
        tokens[row] = draw_row(kernels, logits + row * vocabulary, vocabulary, rows[static_cast<size_t>(row)], scratch);
    });
}

double uniform(uint64_t seed, uint64_t index) {
    uint64_t counter[4] = {1, 0, 0, 0}, key[2] = {seed, index};
    for (int round = 0; round < 10; ++round) {
        const Product even = multiply(0xd2e7470ee14c6c93, counter[0]), odd = multiply(0xca5a826395121157, counter[2]);
        counter[0] = odd.high ^ counter[1] ^ key[0];
        counter[1] = odd.low;
        counter[2] = even.high ^ counter[3] ^ key[1];
        counter[3] = even.low;
        key[0] += 0x9e3779b97f4a7c15;
        key[1] += 0xbb67ae8584caa73b;
    }
    return static_cast<double>(counter[0] >> 11) * 0x1p-53;
}

}  // namespace amalgam
