// What the items of a step cost, for a simulation of machines that are not at hand (benchmarks/scaling.py).
//
// A step that runs with the kernels of product/counting.cpp computes nothing. The drivers cut it into the items that
// they would cut it into, and each kernel says what it would have read and computed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace amalgam {

struct Cost {
    double bytes = 0;  // of weights, keys and values
    double int8_operations = 0, bfloat16_operations = 0, float32_operations = 0;
    double elements = 0;  // of activations that are converted, normed, added, ...

    Cost& operator+=(const Cost& other) {
        bytes += other.bytes;
        int8_operations += other.int8_operations;
        bfloat16_operations += other.bfloat16_operations;
        float32_operations += other.float32_operations;
        elements += other.elements;
        return *this;
    }
};

// One call of run_parallel.
struct Phase {
    std::string kernel;  // the first that was called
    std::vector<Cost> items;
};

// While there is one, this thread's run_parallel does all items by itself and notes what they cost.
class Recording {
 public:
    Recording() { current() = this; }
    ~Recording() { current() = nullptr; }
    Recording(const Recording&) = delete;
    Recording& operator=(const Recording&) = delete;

    static Recording*& current() {
        static thread_local Recording* found = nullptr;
        return found;
    }

    void begin_phase() { phases.emplace_back(); }
    void begin_item() { phases.back().items.emplace_back(); }
    // of the current item; outside of all phases, of one of its own
    void add(const char* kernel, const Cost& cost) {
        if (phases.empty()) begin_phase();
        Phase& phase = phases.back();
        if (phase.items.empty()) begin_item();
        if (phase.kernel.empty()) phase.kernel = kernel;
        phase.items.back() += cost;
    }

    std::vector<Phase> phases;
};

}  // namespace amalgam
