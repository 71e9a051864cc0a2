// Whether places in memory still hold what they held: the look that every call takes at its weights.

#pragma once

#include <cstdint>

namespace encoder_fast::cpu {

struct Run {
    int64_t address;
    int64_t bytes;
};

// `expected` holds the bytes of all runs, one after another.
bool same_bytes(const Run* runs, int64_t count, const void* expected);

}  // namespace encoder_fast::cpu
