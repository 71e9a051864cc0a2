#include "cpu/same_bytes.h"

#include <cstring>

namespace encoder_fast::cpu {

bool same_bytes(const Run* runs, int64_t count, const void* expected) {
    const char* next = static_cast<const char*>(expected);
    for (int64_t i = 0; i < count; ++i) {
        if (std::memcmp(reinterpret_cast<const void*>(runs[i].address), next, runs[i].bytes) != 0)
            return false;
        next += runs[i].bytes;
    }
    return true;
}

}  // namespace encoder_fast::cpu
