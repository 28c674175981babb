#include "step/selection.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "product/exponential.h"
#include "runtime/pool.h"

namespace amalgam {
namespace {

constexpr int64_t kTokensPerItem = 4;
constexpr int64_t kLane = 64;  // values that are looked at together before one by one

constexpr float kNone = -std::numeric_limits<float>::infinity();

// What is kept from token to token.
struct RoutingScratch {
    std::vector<float> values, choice, keys, groups;
};

float largest_of(const float* values, int64_t count) {
    float largest = values[0];
    for (int64_t i = 1; i < count; ++i) largest = values[i] > largest ? values[i] : largest;
    return largest;
}

// e^(x - the largest), divided by their sum.
void softmax(float* values, int64_t count) {
    const float largest = largest_of(values, count);
    for (int64_t i = 0; i < count; ++i) values[i] = exponential(values[i] - largest);
    const float total = std::accumulate(values, values + count, 0.0f);
    for (int64_t i = 0; i < count; ++i) values[i] /= total;
}

void sigmoids(float* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) values[i] = 1.0f / (1.0f + exponential(-values[i]));
}

// Indices of the k largest values in descending order; `keys` is room for k.
void top(const float* values, int64_t count, int64_t k, int64_t* ids, float* keys) {
    int64_t found = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (found == k && !(values[i] > keys[found - 1])) continue;
        int64_t at = found < k ? found++ : found - 1;
        for (; at > 0 && values[i] > keys[at - 1]; --at) {
            keys[at] = keys[at - 1];
            ids[at] = ids[at - 1];
        }
        keys[at] = values[i];
        ids[at] = i;
    }
}

// Sets the choice of experts outside the best groups to `fill`. A group counts as its largest value, or as the sum of
// its two largest.
void keep_best_groups(const ExpertChoice& how, int64_t experts, float fill, RoutingScratch& scratch) {
    const int64_t count = how.num_groups, size = experts / count;
    scratch.groups.resize(static_cast<size_t>(count));
    int64_t kept[2];
    float keys[2];
    for (int64_t g = 0; g < count; ++g) {
        const int64_t best = how.scoring == Scoring::kSigmoid ? std::min<int64_t>(2, size) : 1;
        top(scratch.choice.data() + g * size, size, best, kept, keys);
        scratch.groups[static_cast<size_t>(g)] = best == 2 ? keys[0] + keys[1] : keys[0];
    }
    std::vector<int64_t> taken(static_cast<size_t>(how.num_kept));
    std::vector<float> room(static_cast<size_t>(how.num_kept));
    top(scratch.groups.data(), count, how.num_kept, taken.data(), room.data());
    for (int64_t g = 0; g < count; ++g) {
        if (std::find(taken.begin(), taken.end(), g) != taken.end()) continue;
        std::fill_n(scratch.choice.data() + g * size, size, fill);
    }
}

// Two choices one after the other, each weighted among the candidates near it.
void mix_choices(const ExpertChoice& how, const float* scores, int64_t experts, int64_t* ids, float* weights,
                 RoutingScratch& scratch) {
    std::vector<float>& candidates = scratch.choice;
    candidates.assign(scores, scores + experts);
    for (int64_t n = 0; n < how.k; ++n) {
        float best;
        top(candidates.data(), experts, 1, &ids[n], &best);
        float total = 0.0f;
        for (int64_t i = 0; i < experts; ++i) {
            const float magnitude = std::fabs(scores[i]), distance = (best - scores[i]) / std::max(magnitude, best);
            if (candidates[i] == kNone || distance > 2 * how.jitter) continue;
            total += exponential(candidates[i] - best);
        }
        weights[n] = 1.0f / total;
        candidates[static_cast<size_t>(ids[n])] = kNone;
    }
}

void choose_for_token(const TopExpertsArgs& args, int64_t token, RoutingScratch& scratch) {
    const ExpertChoice& how = args.choice;
    const float* scores = args.scores + token * args.experts;
    int64_t* ids = args.ids + token * how.k;
    float* weights = args.weights + token * how.k;
    if (how.scoring == Scoring::kMixer) {
        mix_choices(how, scores, args.experts, ids, weights, scratch);
        return;
    }
    scratch.values.assign(scores, scores + args.experts);
    float* values = scratch.values.data();
    if (how.scoring == Scoring::kSoftmax) softmax(values, args.experts);
    if (how.scoring == Scoring::kSigmoid) sigmoids(values, args.experts);
    const float* choice = values;
    if (how.correction != nullptr || how.num_kept < how.num_groups) {
        scratch.choice.assign(values, values + args.experts);
        choice = scratch.choice.data();
        if (how.correction != nullptr) {
            for (int64_t i = 0; i < args.experts; ++i) scratch.choice[static_cast<size_t>(i)] += how.correction[i];
        }
        if (how.num_kept < how.num_groups) {
            keep_best_groups(how, args.experts, how.scoring == Scoring::kSoftmax ? 0.0f : kNone, scratch);
        }
    }
    scratch.keys.resize(static_cast<size_t>(how.k));
    top(choice, args.experts, how.k, ids, scratch.keys.data());
    for (int64_t i = 0; i < how.k; ++i) weights[i] = values[ids[i]];
    if (how.scoring == Scoring::kChosen) softmax(weights, how.k);
    if (how.scoring == Scoring::kApart) sigmoids(weights, how.k);
    if (how.normalises) {
        const float sum = std::accumulate(weights, weights + how.k, 0.0f) + how.sum_eps;
        for (int64_t i = 0; i < how.k; ++i) weights[i] /= sum;
    }
    if (how.scaling != 1.0f) {
        for (int64_t i = 0; i < how.k; ++i) weights[i] *= how.scaling;
    }
    if (how.factors != nullptr) {
        for (int64_t i = 0; i < how.k; ++i) weights[i] *= how.factors[ids[i]];
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
        static thread_local RoutingScratch scratch;
        for (int64_t token = first; token < end; ++token) choose_for_token(args, token, scratch);
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
