// Kernels that ask the emulation, one question each, for tests/test_cuda_emulation.py. Right and
// wrong ones: `mistake` runs those that must be caught.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <vector>

#include "attention/tile_list.cuh"
#include "bind_emulation.h"
#include "launch.cuh"

// In wrappers.cu.
std::vector<uint32_t> run_wrapper(const std::string& name, std::vector<uint32_t> in);

namespace encoder_fast {
namespace {

using Words = std::vector<uint32_t>;

struct Probe {
    uint32_t* in;
    uint32_t* out;
    int variant;
};

// Runs a kernel of `threads` threads over `in`, and returns `n_out` words.
Words run(void (*kernel)(Probe), Words in, int n_out, int threads, size_t shared_bytes,
          int variant = 0, int blocks = 1) {
    Words out(n_out, 0);
    emulation::forbid_all();
    emulation::allow(reinterpret_cast<uintptr_t>(in.data()), 1, 4 * in.size(), 0, false);
    emulation::allow(reinterpret_cast<uintptr_t>(out.data()), 1, 4 * out.size(), 0, true);
    launch(kernel, LaunchShape{blocks, threads, shared_bytes}, Probe{in.data(), out.data(), variant},
           nullptr, "probe");
    emulation::forbid_all();
    return out;
}

// in: 32 words a lane address, 8 rows of 4 words each for 4 matrices. out: 4 words a lane.
template <int kMatrices, bool kTransposed>
__global__ void ldmatrix_kernel(Probe p) {
    const int lane = lane_id();
    for (int i = 0; i < 4; i++) {
        store_shared(shared_memory() + 16 * lane + 4 * i, load_global(p.in + 4 * lane + i));
    }
    sync_threads();
    uint32_t fragment[kMatrices];
    const SharedAddress row = shared_memory() + 16 * lane;
    if constexpr (kMatrices == 1) {
        kTransposed ? ldmatrix_x1_trans(fragment, row) : ldmatrix_x1(fragment, row);
    } else if constexpr (kMatrices == 2) {
        kTransposed ? ldmatrix_x2_trans(fragment, row) : ldmatrix_x2(fragment, row);
    } else {
        kTransposed ? ldmatrix_x4_trans(fragment, row) : ldmatrix_x4(fragment, row);
    }
    for (int i = 0; i < kMatrices; i++) store_global(p.out + kMatrices * lane + i, fragment[i]);
}

// in: the fragments of each lane, a (4 words), b (2), d (4 floats). out: d.
template <class T>
__global__ void mma_kernel(Probe p) {
    const int lane = lane_id();
    uint32_t a[4], b[2];
    float d[4];
    for (int i = 0; i < 4; i++) a[i] = load_global(p.in + 10 * lane + i);
    for (int i = 0; i < 2; i++) b[i] = load_global(p.in + 10 * lane + 4 + i);
    for (int i = 0; i < 4; i++) {
        d[i] = load_global(reinterpret_cast<const float*>(p.in) + 10 * lane + 6 + i);
    }
    mma_m16n8k16<T>(d, a, b);
    for (int i = 0; i < 4; i++) store_global(reinterpret_cast<float*>(p.out) + 4 * lane + i, d[i]);
}

__global__ void shuffle_kernel(Probe p) {
    const int lane = lane_id();
    const int results[] = {shuffle(lane, 5), shuffle_xor(lane, 16), shuffle_up(lane, 1),
                           shuffle_down(lane, 1), static_cast<int>(vote(lane % 3 == 0))};
    for (int i = 0; i < 5; i++) {
        store_global(p.out + 5 * lane + i, static_cast<uint32_t>(results[i]));
    }
}

// The two halves of a warp, each by itself.
__global__ void half_warps_kernel(Probe p) {
    const int lane = lane_id();
    const uint32_t half = lane < 16 ? 0xffffu : 0xffff0000u;
    int sum = lane;
    for (int step = 8; step > 0; step /= 2) sum += shuffle_xor(sum, step, half);
    if (lane < 16) sum = shuffle(sum, 0, half);
    store_global(p.out + lane, static_cast<uint32_t>(sum));
}

// Rows of 16, 8 and 4 bytes, of which only some come from memory.
__global__ void copy_kernel(Probe p) {
    const SharedAddress to = shared_memory();
    if (threadIdx.x == 0) {
        cp_async<16>(to, p.in);
        cp_async_commit();
        cp_async<16>(to + 16, p.in + 4, 8);
        cp_async<8>(to + 32, p.in, 0);
        cp_async<4>(to + 40, p.in + 3);
        cp_async_commit();
        cp_async_wait<0>();
    }
    sync_threads();
    if (threadIdx.x < 11) {
        store_global(p.out + threadIdx.x, load_shared<uint32_t>(to + 4 * threadIdx.x));
    }
}

// A producer warp and a consumer warp that hand a word over and back, by two named barriers.
__global__ void hand_over_kernel(Probe p) {
    const SharedAddress slot = shared_memory() + 4 * lane_id();
    for (uint32_t round = 0; round < 3; round++) {
        if (warp_id() == 0) {
            if (round > 0) named_barrier_sync(2, 64);
            store_shared(slot, 100 * round + lane_id());
            named_barrier_arrive(1, 64);
        } else {
            named_barrier_sync(1, 64);
            store_global(p.out + 32 * round + lane_id(), load_shared<uint32_t>(slot));
            if (round < 2) named_barrier_arrive(2, 64);
        }
    }
}

__global__ void indices_kernel(Probe p) {
    const unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
    store_global(p.out + at, 1000000 * gridDim.x + 1000 * blockIdx.x + threadIdx.x);
}

enum Counting { kAtomic, kNotAtomic };

// Each thread takes a number, and leaves a mark there. `variant` is how it counts.
__global__ void count_kernel(Probe p) {
    int* const counter = reinterpret_cast<int*>(p.out);
    int mine;
    if (p.variant == kAtomic) {
        mine = atomic_add_global(counter, 1);
    } else {
        mine = load_global_coherent(counter);
        store_global(counter, mine + 1);
    }
    store_global(p.out + 1 + mine, blockIdx.x);
}

// What two blocks, or two threads of one, must not do to out[0].
enum Conflict {
    kNoConflict,
    kBothWrite,
    kWriteThenRead,
    kReadThenWrite,
    kWriteThenCopy,
    kWriteThenAdd,
    kWriteThenReadOnly,
    kReadOnlyThenWrite,
    kThreadsWithoutBarrier,
};

// The halves of a word, threads with a barrier between them, and atomics.
EF_DEVICE void share(const Probe& p) {
    const uint16_t half = static_cast<uint16_t>(blockIdx.x + 1);
    store_global(reinterpret_cast<uint16_t*>(p.out + threadIdx.x) + blockIdx.x, half);
    if (threadIdx.x == 0) store_global(p.out + 64 + blockIdx.x, 5u);
    sync_threads();
    if (threadIdx.x != 63) return;
    const int seen = static_cast<int>(load_global_coherent(p.out + 64 + blockIdx.x));
    atomic_add_global(reinterpret_cast<int*>(p.out + 66), seen);
}

__global__ void conflict_kernel(Probe p) {
    const bool first = blockIdx.x == 0;
    int* const counter = reinterpret_cast<int*>(p.out);
    if (p.variant == kNoConflict) share(p);
    if (p.variant == kThreadsWithoutBarrier && first) {
        if (threadIdx.x % 32 == 0) store_global(p.out, threadIdx.x);
    }
    if (threadIdx.x != 0) return;
    switch (p.variant) {
        case kBothWrite:
            store_global(p.out, blockIdx.x);
            break;
        case kWriteThenRead:
            first ? store_global(p.out, 1u) : void(load_global_coherent(p.out));
            break;
        case kReadThenWrite:
            first ? void(load_global_coherent(p.out)) : store_global(p.out, 1u);
            break;
        case kWriteThenCopy:
            first ? store_global(p.out, 1u) : cp_async<4>(shared_memory(), p.out);
            break;
        case kWriteThenAdd:
            first ? store_global(p.out, 1u) : void(atomic_add_global(counter, 1));
            break;
        case kWriteThenReadOnly:
            store_global(p.out + blockIdx.x, 1u);
            load_global(p.out + blockIdx.x);
            break;
        case kReadOnlyThenWrite:
            load_global(p.out + blockIdx.x);
            store_global(p.out + blockIdx.x, 1u);
            break;
    }
}

const std::map<std::string, int> kConflicts = {
    {"both write", kBothWrite},
    {"write, then read", kWriteThenRead},
    {"read, then write", kReadThenWrite},
    {"write, then copy", kWriteThenCopy},
    {"write, then add", kWriteThenAdd},
    {"write, then read only", kWriteThenReadOnly},
    {"read only, then write", kReadOnlyThenWrite},
    {"threads without a barrier", kThreadsWithoutBarrier},
    {"none", kNoConflict},
};

// Marks the items of a list that blocks come to: out[begin] is the block that took the item. The
// second block's slot is spoiled after each of its items.
struct ItemsLaunch : AttentionLaunch {
    bool spoils;
    int spoiled;
};

__global__ void items_kernel(ItemsLaunch p) {
    const SharedAddress slot = shared_memory();
    int visits = 0;
    for_each_item(p, count_items(p), slot, [&](const Work& work, auto begun) {
        if (++visits > 1000) throw emulation::Error("a block runs for ever");
        sync_threads();
        begun();
        if (threadIdx.x != 0) return;
        store_global(static_cast<uint32_t*>(p.out) + work.begin, blockIdx.x);
        if (p.spoils && blockIdx.x == 1) store_shared(slot, p.spoiled);
    });
}

// `list` is as csrc/attention/tile_list.cuh lays it out, with one head.
Words items(Words list, int blocks, int total, bool spoils, int spoiled) {
    Words out(total, 0xdeadbeef);
    ItemsLaunch p{};
    p.workspace = list.data();
    p.out = out.data();
    p.total = total;
    p.batch = 0;
    p.heads = p.tile_rows = 1;
    p.listed = true;
    p.spoils = spoils;
    p.spoiled = spoiled;
    emulation::forbid_all();
    emulation::allow(reinterpret_cast<uintptr_t>(list.data()), 1, 4 * list.size(), 0, true);
    emulation::allow(reinterpret_cast<uintptr_t>(out.data()), 1, 4 * out.size(), 0, true);
    launch(items_kernel, LaunchShape{blocks, 64, 16}, p, nullptr, "items");
    emulation::forbid_all();
    return out;
}

enum Mistake {
    kNone,
    kNoBarrierBeforeRead,
    kNoBarrierBeforeReuse,
    kNoSyncWarp,
    kNoWait,
    kOneGroupTooMany,
    kWaitWithoutBarrier,
    kWriteUnderCopy,
    kThreadSkipsBarrier,
    kLaneSkipsShuffle,
    kLaneNotNamed,
    kLanesDisagree,
    kShuffleFromAbsentLane,
    kSharedOverrun,
    kSharedMisaligned,
    kGlobalOverrun,
    kGlobalUnderrun,
    kGlobalMisaligned,
    kStoreToInput,
    kCopyOverrun,
    kBarrierCounts,
};

// 64 threads, 256 words of shared memory, 64 words of input and of output.
__global__ void mistake_kernel(Probe p) {
    const unsigned me = threadIdx.x, other = me ^ 32;
    const int mistake = p.variant;
    const SharedAddress base = shared_memory(), own = base + 4 * me;

    store_shared(own, load_global(p.in + me));
    if (mistake != kNoBarrierBeforeRead) sync_threads();
    uint32_t seen = load_shared<uint32_t>(base + 4 * other);
    if (mistake != kNoBarrierBeforeReuse) sync_threads();
    store_shared(own, seen);

    store_shared(own + 256, seen);
    if (mistake != kNoSyncWarp) sync_warp();
    seen += load_shared<uint32_t>(base + 256 + 4 * (me ^ 1));

    cp_async<4>(own + 512, p.in + me);
    cp_async_commit();
    if (mistake == kWriteUnderCopy) store_shared(own + 512, seen);
    if (mistake == kOneGroupTooMany) cp_async_wait<1>();
    if (mistake != kNoWait && mistake != kOneGroupTooMany) cp_async_wait<0>();
    if (mistake != kWaitWithoutBarrier) sync_threads();
    seen += load_shared<uint32_t>(base + 512 + 4 * other);

    if (mistake != kThreadSkipsBarrier || me != 7) sync_threads();
    if (mistake != kLaneSkipsShuffle || me != 40) seen += shuffle_xor(seen, 1);
    if (mistake == kLaneNotNamed) seen += shuffle_xor(seen, 1, 0xfffffffeu);
    if (mistake == kLanesDisagree) me % 2 ? sync_warp() : static_cast<void>(vote(true));
    if (mistake == kShuffleFromAbsentLane && me < 16) seen += shuffle(seen, 20, 0xffffu);
    if (mistake == kSharedOverrun) store_shared(own + 1024 - 128, seen);
    if (mistake == kSharedMisaligned) seen += load_shared<uint4>(base + 8).x;
    if (mistake == kGlobalOverrun) seen += load_global(p.in + me + 1);
    if (mistake == kGlobalUnderrun) store_global(p.out + me - 1, seen);
    if (mistake == kGlobalMisaligned) seen += load_global(reinterpret_cast<uint4*>(p.in + 1)).x;
    if (mistake == kStoreToInput) store_global(p.in + me, seen);
    if (mistake == kCopyOverrun) cp_async<16>(base + 16 * (me % 16), p.in + 64, 4);
    if (mistake == kBarrierCounts) named_barrier_sync(3, me < 32 ? 64 : 32);
    store_global(p.out + me, seen);
}

Words mistake(int which) {
    Words in(64);
    for (uint32_t i = 0; i < in.size(); i++) in[i] = i;
    return run(mistake_kernel, in, 64, 64, 1024, which);
}

const std::map<std::string, int> kMistakes = {
    {"no barrier before a read", kNoBarrierBeforeRead},
    {"no barrier before reuse", kNoBarrierBeforeReuse},
    {"no sync_warp", kNoSyncWarp},
    {"no wait", kNoWait},
    {"one group too many", kOneGroupTooMany},
    {"wait without barrier", kWaitWithoutBarrier},
    {"write under a copy", kWriteUnderCopy},
    {"a thread skips a barrier", kThreadSkipsBarrier},
    {"a lane skips a shuffle", kLaneSkipsShuffle},
    {"a lane that is not named", kLaneNotNamed},
    {"lanes at different operations", kLanesDisagree},
    {"shuffle from an absent lane", kShuffleFromAbsentLane},
    {"shared overrun", kSharedOverrun},
    {"shared misaligned", kSharedMisaligned},
    {"global overrun", kGlobalOverrun},
    {"global underrun", kGlobalUnderrun},
    {"global misaligned", kGlobalMisaligned},
    {"store to an input", kStoreToInput},
    {"copy overrun", kCopyOverrun},
    {"barrier counts differ", kBarrierCounts},
    {"none", kNone},
};

}  // namespace

PYBIND11_MODULE(_cuda_probe, m) {
    emulation::bind(m);
    m.def("ldmatrix", [](int matrices, bool transposed, const Words& in) {
        void (*kernels[2][5])(Probe) = {
            {nullptr, ldmatrix_kernel<1, false>, ldmatrix_kernel<2, false>, nullptr,
             ldmatrix_kernel<4, false>},
            {nullptr, ldmatrix_kernel<1, true>, ldmatrix_kernel<2, true>, nullptr,
             ldmatrix_kernel<4, true>}};
        return run(kernels[transposed][matrices], in, 32 * matrices, 32, 512);
    });
    m.def("mma", [](bool bfloat16, const Words& in) {
        return run(bfloat16 ? mma_kernel<BFloat16> : mma_kernel<Half>, in, 128, 32, 0);
    });
    m.def("shuffles", [] { return run(shuffle_kernel, {}, 160, 32, 0); });
    m.def("half_warps", [] { return run(half_warps_kernel, {}, 32, 32, 0); });
    m.def("copies", [](const Words& in) { return run(copy_kernel, in, 11, 32, 44); });
    m.def("hand_over", [] { return run(hand_over_kernel, {}, 96, 64, 128); });
    m.def("indices", [] { return run(indices_kernel, {}, 192, 64, 0, 0, 3); });
    m.def("count", [](bool atomic, int blocks) {
        const int n = 64 * blocks;
        return run(count_kernel, {}, 1 + n, 64, 0, atomic ? kAtomic : kNotAtomic, blocks);
    });
    m.def("conflict", [](const std::string& name) {
        return run(conflict_kernel, {}, 67, 64, 16, kConflicts.at(name), 2);
    });
    m.def("conflicts", [] {
        std::vector<std::string> names;
        for (const auto& item : kConflicts) names.push_back(item.first);
        return names;
    });
    m.def("items", items);
    m.def("mistake", [](const std::string& name) { return mistake(kMistakes.at(name)); });
    m.def("mistakes", [] {
        std::vector<std::string> names;
        for (const auto& item : kMistakes) names.push_back(item.first);
        return names;
    });
    m.def("run_wrapper", run_wrapper);
    m.def("half_to_float", emulation::half_to_float);
    m.def("float_to_half", emulation::float_to_half);
    m.def("bfloat16_to_float", emulation::bfloat16_to_float);
    m.def("float_to_bfloat16", emulation::float_to_bfloat16);
}

}  // namespace encoder_fast
