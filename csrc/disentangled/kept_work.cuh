// A block's work, kept in shared memory: the loop needs all registers for its products.

#pragma once

#include "attention/tile_list.cuh"
#include "ptx.cuh"

namespace encoder_fast {

class KeptWork {
  public:
    static constexpr int kBytes = sizeof(uint4);

    // Called by all threads. A barrier must follow before the work is read.
    EF_DEVICE KeptWork(SharedAddress place, const Work& work) : place_(place) {
        if (threadIdx.x > 0) return;
        store_shared(place_, uint4{static_cast<uint32_t>(work.begin),
                                   static_cast<uint32_t>(work.n_keys),
                                   static_cast<uint32_t>(work.first_row),
                                   static_cast<uint32_t>(work.head)});
    }

    EF_DEVICE Work read() const {
        const uint4 kept = load_shared<uint4>(place_);
        return {static_cast<int>(kept.x), static_cast<int>(kept.y), static_cast<int>(kept.z),
                static_cast<int>(kept.w)};
    }

    EF_DEVICE int n_keys() const { return load_shared<int>(place_ + 4); }

  private:
    SharedAddress place_;
};

}  // namespace encoder_fast
