// On which memory nodes weights lie.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace amalgam {

enum class Placement {
    kAnywhere,     // where whoever packs them happens to run
    kInterleaved,  // page by page on all nodes in turn
    kLocal,        // each node has a part of every weight, and its threads take the items that read that part
};

struct Node {
    int id;
    std::vector<int> processors;  // that this process may use
};

// For weights that are allocated from now on. Throws std::system_error, and changes nothing, where the system refuses.
void place_weights(Placement placement, const std::vector<Node>& nodes);

// Parts that weights are cut into: nodes where each has its own, else 1.
int num_node_parts();

// Gives the system what it must know of new memory before its pages are touched. `bytes` are whole pages.
void place_region(uint8_t* data, size_t bytes);

// Whether pages that are free again should go back to the system, because their next owner has others touch them.
bool is_placed_by_touch();

// Touches the pages of `count` rows of equal size, a panel's each, on the nodes whose parts they are.
void touch_by_node(uint8_t* data, int64_t count, int64_t row_bytes);

// Where part `part` of `count` rows begins.
inline int64_t part_start(int64_t count, int part, int num_parts) { return count * part / num_parts; }

}  // namespace amalgam
