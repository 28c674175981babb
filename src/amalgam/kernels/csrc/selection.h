// Choosing: the experts of a token, and the next token of a request.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace amalgam {

// softmax over each row of scores, its k largest probabilities in descending order (equal ones: smaller index first),
// perhaps divided by their sum + sum_eps. Any input gives distinct ids within the row.
struct TopExpertsArgs {
    const float* scores;  // [tokens, experts]
    int64_t experts;
    int64_t k;  // at most experts
    bool normalises;
    float sum_eps;
    int64_t* ids;    // [tokens, k]
    float* weights;  // [tokens, k]
};

void choose_experts(const TopExpertsArgs& args, int64_t tokens, int threads);

// The next token of each row: what amalgam/engine/sampler.py says, in the same order and in double precision.
struct DrawArgs {
    const float* logits;  // [rows, vocabulary]
    int64_t vocabulary;
    const int64_t* top_k;       // [rows], 1 to vocabulary
    const double* temperature;  // [rows], above 0; 0: the first of the largest logits
    const double* top_p;        // [rows], above 0 to 1
    const double* min_p;        // [rows], 0 to 1
    const uint64_t* seed;       // [rows]
    const uint64_t* index;      // [rows], place of the token in its answer
    int64_t* tokens;            // [rows]; -1 where a logit is not finite
};

void draw(const Kernels& kernels, const DrawArgs& args, int64_t rows, int threads);

// The number in [0, 1) that Philox 4x64-10 (Salmon et al. 2011) gives for a key, as numpy's generator does.
double uniform(uint64_t seed, uint64_t index);

}  // namespace amalgam
