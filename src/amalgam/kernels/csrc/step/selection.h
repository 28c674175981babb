// Choosing: the experts of a token, and the next token of a request.
#pragma once

#include <cstdint>
#include <vector>

#include "product/kernels.h"

namespace amalgam {

// How scores become experts; amalgam/kernels/program/ says what each does.
enum class Scoring { kSoftmax, kSigmoid, kChosen, kApart, kMixer };

struct ExpertChoice {
    Scoring scoring;
    int64_t k;                // at most as many as there are experts
    const float* correction;  // [experts], takes part in the choice only; or null
    int64_t num_groups;       // a divisor of the number of experts
    int64_t num_kept;         // groups that are taken
    bool normalises;
    float sum_eps, scaling, jitter;
    const float* factors;  // [experts], multiply the weights at the end; or null
};

// The experts of every row of scores, the first choice first (equal ones: smaller index first). Any input gives
// distinct ids within the row.
struct TopExpertsArgs {
    const float* scores;  // [tokens, experts]
    int64_t experts;
    ExpertChoice choice;
    int64_t* ids;    // [tokens, k]
    float* weights;  // [tokens, k]
};

void choose_experts(const TopExpertsArgs& args, int64_t tokens, int threads);

// How a row's next token is chosen: what amalgam/engine/sampler.py says, in the same order and in double precision.
struct DrawParams {
    int64_t top_k;       // 1 to the size of the vocabulary
    double temperature;  // above 0; 0: the first of the largest logits
    double top_p;        // above 0 to 1
    double min_p;        // 0 to 1
    uint64_t seed;
    uint64_t index;  // place of the token in its answer
};

// tokens[row] is -1 where a logit is not finite. logits: [rows, vocabulary].
void draw(const Kernels& kernels, const float* logits, int64_t vocabulary, const std::vector<DrawParams>& rows,
          int64_t* tokens, int threads);

// The number in [0, 1) that Philox 4x64-10 (Salmon et al. 2011) gives for a key, as numpy's generator does.
double uniform(uint64_t seed, uint64_t index);

}  // namespace amalgam
