// Every function of csrc/ptx.cuh by itself, for tests/test_ptx_wrappers.py: its host body runs in the
// emulation, and the PTX that nvcc makes of its device body in an interpreter. Both must leave the
// same words in `out`.
//
// A case is named by its function; behind two underscores stands what tells it from others of the
// same function. One block of 64 threads; `in` has 16 words a thread, `out` 8.

#include "ptx.cuh"

struct Case {
    uint32_t* in;
    uint32_t* out;
};

#ifdef ENCODER_FAST_HOST

#include <map>
#include <vector>

std::map<std::string, void (*)(Case)> cases;

#define CASE(name)                                             \
    void name(Case);                                           \
    const bool name##_is_listed = (cases[#name] = name, true); \
    void name(Case c)

#else

#define CASE(name) extern "C" __global__ void name(Case c)

#endif

using namespace encoder_fast;

namespace {

constexpr int kThreads = 64;
constexpr uint32_t kLowerLanes = 0xffffu, kUpperLanes = 0xffff0000u;

EF_DEVICE int me() { return static_cast<int>(threadIdx.x); }
EF_DEVICE uint32_t* mine(const Case& c) { return c.out + 8 * me(); }
EF_DEVICE uint32_t given(const Case& c, int i) { return c.in[16 * me() + i]; }
EF_DEVICE float given_float(const Case& c, int i) { return bits_to_float(given(c, i)); }
EF_DEVICE uint32_t half_of_warp() { return lane_id() < 16 ? kLowerLanes : kUpperLanes; }

// Shared memory that starts as `given`, four words a thread.
EF_DEVICE SharedAddress filled_shared(const Case& c) {
    const SharedAddress own = shared_memory() + 16 * me();
    for (int i = 0; i < 4; i++) store_shared(own + 4 * i, given(c, i));
    sync_threads();
    return own;
}

template <class Fragment, int kWords>
EF_DEVICE void keep(const Case& c, const Fragment (&fragment)[kWords]) {
    for (int i = 0; i < kWords; i++) mine(c)[i] = static_cast<uint32_t>(fragment[i]);
}

}  // namespace

CASE(to_float__float) { mine(c)[0] = float_to_bits(to_float(given_float(c, 0))); }

CASE(to_float__half) {
    mine(c)[0] = float_to_bits(to_float(Half{static_cast<uint16_t>(given(c, 0))}));
}

CASE(to_float__bfloat16) {
    mine(c)[0] = float_to_bits(to_float(BFloat16{static_cast<uint16_t>(given(c, 0))}));
}

CASE(bits_to_float) { mine(c)[0] = bits_to_float(given(c, 0)) < 0.0f; }

CASE(float_to_bits) { mine(c)[0] = float_to_bits(static_cast<float>(given(c, 0) % 1000)); }

CASE(unpack2__half) {
    const float2 pair = unpack2<Half>(given(c, 0));
    mine(c)[0] = float_to_bits(pair.x);
    mine(c)[1] = float_to_bits(pair.y);
}

CASE(unpack2__bfloat16) {
    const float2 pair = unpack2<BFloat16>(given(c, 0));
    mine(c)[0] = float_to_bits(pair.x);
    mine(c)[1] = float_to_bits(pair.y);
}

CASE(pack2__half) { mine(c)[0] = pack2<Half>(given_float(c, 0), given_float(c, 1)); }
CASE(pack2__bfloat16) { mine(c)[0] = pack2<BFloat16>(given_float(c, 0), given_float(c, 1)); }

CASE(from_float__half) { mine(c)[0] = from_float<Half>(given_float(c, 0)).bits; }
CASE(from_float__bfloat16) { mine(c)[0] = from_float<BFloat16>(given_float(c, 0)).bits; }
CASE(from_float__float) { mine(c)[0] = float_to_bits(from_float<float>(given_float(c, 0))); }

CASE(reciprocal_sqrt) { mine(c)[0] = float_to_bits(reciprocal_sqrt(given_float(c, 0))); }
CASE(exp2_approx) { mine(c)[0] = float_to_bits(exp2_approx(given_float(c, 0))); }
CASE(reciprocal_approx) { mine(c)[0] = float_to_bits(reciprocal_approx(given_float(c, 0))); }

CASE(lane_id) { mine(c)[0] = static_cast<uint32_t>(lane_id()); }
CASE(warp_id) { mine(c)[0] = static_cast<uint32_t>(warp_id()); }
CASE(opaque) { mine(c)[0] = static_cast<uint32_t>(opaque(me())); }

CASE(sync_threads) {
    const SharedAddress slots = shared_memory();
    store_shared(slots + 4 * me(), given(c, 0));
    sync_threads();
    mine(c)[0] = load_shared<uint32_t>(slots + 4 * (kThreads - 1 - me()));
}

CASE(sync_warp) {
    const SharedAddress slots = shared_memory();
    store_shared(slots + 4 * me(), given(c, 0));
    sync_warp();
    mine(c)[0] = load_shared<uint32_t>(slots + 4 * (me() ^ 31));
}

// The lower halves of the warps alone.
CASE(sync_warp__half) {
    const SharedAddress slots = shared_memory();
    if (lane_id() >= 16) return;
    store_shared(slots + 4 * me(), given(c, 0));
    sync_warp(kLowerLanes);
    mine(c)[0] = load_shared<uint32_t>(slots + 4 * (me() ^ 15));
}

// The first warp hands a word to the second by barrier 1, and has its place back by barrier 2.
EF_DEVICE void hand_over(const Case& c) {
    const SharedAddress slot = shared_memory() + 4 * lane_id();
    for (int round = 0; round < 3; round++) {
        if (warp_id() == 0) {
            if (round > 0) named_barrier_sync(2, kThreads);
            store_shared(slot, given(c, round));
            named_barrier_arrive(1, kThreads);
        } else {
            named_barrier_sync(1, kThreads);
            mine(c)[round] = load_shared<uint32_t>(slot);
            if (round < 2) named_barrier_arrive(2, kThreads);
        }
    }
}

CASE(named_barrier_sync) { hand_over(c); }
CASE(named_barrier_arrive) { hand_over(c); }

CASE(fence_device) {
    mine(c)[0] = given(c, 0);
    fence_device();
    mine(c)[1] = given(c, 1);
}

CASE(shuffle) {
    mine(c)[0] = shuffle(given(c, 0), 5);
    mine(c)[1] = float_to_bits(shuffle(given_float(c, 1), (lane_id() + 3) % 32));
    if (lane_id() < 16) mine(c)[2] = shuffle(given(c, 2), 2, kLowerLanes);
}

CASE(shuffle_xor) {
    mine(c)[0] = shuffle_xor(given(c, 0), 16);
    mine(c)[1] = float_to_bits(shuffle_xor(given_float(c, 1), 1));
    if (lane_id() >= 16) mine(c)[2] = shuffle_xor(given(c, 2), 8, kUpperLanes);
}

CASE(shuffle_up) {
    mine(c)[0] = shuffle_up(given(c, 0), 1);
    mine(c)[1] = shuffle_up(given(c, 1), 16);
    if (lane_id() < 16) mine(c)[2] = shuffle_up(given(c, 2), 3, kLowerLanes);
}

CASE(shuffle_down) {
    mine(c)[0] = shuffle_down(given(c, 0), 1);
    mine(c)[1] = shuffle_down(given(c, 1), 16);
    if (lane_id() >= 16) mine(c)[2] = shuffle_down(given(c, 2), 3, kUpperLanes);
}

CASE(vote) {
    mine(c)[0] = vote(given(c, 0) % 3 == 0);
    mine(c)[1] = vote(given(c, 1) % 3 == 0, half_of_warp());
}

CASE(any_lane) {
    mine(c)[0] = any_lane(me() == 40);
    mine(c)[1] = any_lane(lane_id() == 20, half_of_warp());
}

CASE(all_lanes) {
    mine(c)[0] = all_lanes(me() != 40);
    mine(c)[1] = all_lanes(lane_id() != 20, half_of_warp());
}

CASE(load_global__uint32) { mine(c)[0] = load_global(c.in + 16 * me() + 3); }

CASE(load_global__uint4) {
    const uint4 words = load_global(reinterpret_cast<const uint4*>(c.in) + 4 * me() + 1);
    keep(c, {words.x, words.y, words.z, words.w});
}

CASE(load_global__half) {
    mine(c)[0] = load_global(reinterpret_cast<const Half*>(c.in) + me()).bits;
}

CASE(load_global__bfloat16) {
    mine(c)[0] = load_global(reinterpret_cast<const BFloat16*>(c.in) + me()).bits;
}

CASE(load_global_coherent) {
    mine(c)[0] = load_global_coherent(c.in + 16 * me() + 3);
    const uint4 words = load_global_coherent(reinterpret_cast<const uint4*>(c.in) + 4 * me() + 1);
    mine(c)[1] = words.x ^ (words.y << 1) ^ (words.z << 2) ^ (words.w << 3);
}

CASE(store_global) {
    store_global(reinterpret_cast<uint4*>(mine(c)),
                 uint4{given(c, 0), given(c, 1), given(c, 2), given(c, 3)});
    store_global(mine(c) + 4, given(c, 4));
    store_global(reinterpret_cast<uint16_t*>(mine(c) + 5), static_cast<uint16_t>(given(c, 5)));
}

CASE(atomic_add_global) {
    mine(c)[0] = given(c, 0);
    mine(c)[1] = static_cast<uint32_t>(
        atomic_add_global(reinterpret_cast<int*>(mine(c)), static_cast<int>(given(c, 1))));
}

CASE(shared_memory) { mine(c)[0] = shared_memory() + 16 * me(); }

CASE(load_shared__4) { mine(c)[0] = load_shared<uint32_t>(filled_shared(c) + 4); }

CASE(load_shared__8) {
    const uint2 words = load_shared<uint2>(filled_shared(c) + 8);
    keep(c, {words.x, words.y});
}

CASE(load_shared__16) {
    const uint4 words = load_shared<uint4>(filled_shared(c));
    keep(c, {words.x, words.y, words.z, words.w});
}

CASE(store_shared__4) {
    const SharedAddress own = filled_shared(c);
    store_shared(own + 4, given(c, 5));
    const uint4 words = load_shared<uint4>(own);
    keep(c, {words.x, words.y, words.z, words.w});
}

CASE(store_shared__8) {
    const SharedAddress own = filled_shared(c);
    store_shared(own + 8, uint2{given(c, 5), given(c, 6)});
    for (int i = 0; i < 4; i++) mine(c)[i] = load_shared<uint32_t>(own + 4 * i);
}

CASE(store_shared__16) {
    const SharedAddress own = filled_shared(c);
    store_shared(own, uint4{given(c, 5), given(c, 6), given(c, 7), given(c, 8)});
    for (int i = 0; i < 4; i++) mine(c)[i] = load_shared<uint32_t>(own + 4 * i);
}

CASE(atomic_add_shared) {
    const SharedAddress own = filled_shared(c);
    mine(c)[0] = static_cast<uint32_t>(atomic_add_shared(own + 4, static_cast<int>(given(c, 5))));
    for (int i = 0; i < 4; i++) mine(c)[1 + i] = load_shared<uint32_t>(own + 4 * i);
}

template <int kBytes>
EF_DEVICE void copy_some(const Case& c) {
    const SharedAddress own = filled_shared(c);
    // All, a part and nothing of the bytes, by turns.
    const int source_bytes = me() % 3 * (kBytes / 2);
    cp_async<kBytes>(own, c.in + 16 * me() + 8, source_bytes);
    cp_async_commit();
    cp_async_wait<0>();
    for (int i = 0; i < 4; i++) mine(c)[i] = load_shared<uint32_t>(own + 4 * i);
}

CASE(cp_async__4) { copy_some<4>(c); }
CASE(cp_async__8) { copy_some<8>(c); }
CASE(cp_async__16) { copy_some<16>(c); }

// Two groups, of which the first is waited for, then both.
EF_DEVICE void copy_groups(const Case& c) {
    const SharedAddress own = filled_shared(c);
    cp_async<4>(own, c.in + 16 * me() + 8);
    cp_async<4>(own + 4, c.in + 16 * me() + 9);
    cp_async_commit();
    cp_async<8>(own + 8, c.in + 16 * me() + 10);
    cp_async_commit();
    cp_async_wait<1>();
    for (int i = 0; i < 2; i++) mine(c)[i] = load_shared<uint32_t>(own + 4 * i);
    cp_async_wait<0>();
    for (int i = 2; i < 4; i++) mine(c)[i] = load_shared<uint32_t>(own + 4 * i);
}

CASE(cp_async_commit) { copy_groups(c); }
CASE(cp_async_wait) { copy_groups(c); }

// Each warp reads 8 x 8 matrices out of its 32 rows of 16 bytes, from the last row on.
EF_DEVICE SharedAddress matrix_row(const Case& c) {
    filled_shared(c);
    return shared_memory() + 16 * (me() ^ 31);
}

CASE(ldmatrix_x4) {
    uint32_t fragment[4];
    ldmatrix_x4(fragment, matrix_row(c));
    keep(c, fragment);
}

CASE(ldmatrix_x4_trans) {
    uint32_t fragment[4];
    ldmatrix_x4_trans(fragment, matrix_row(c));
    keep(c, fragment);
}

CASE(ldmatrix_x2) {
    uint32_t fragment[2];
    ldmatrix_x2(fragment, matrix_row(c));
    keep(c, fragment);
}

CASE(ldmatrix_x2_trans) {
    uint32_t fragment[2];
    ldmatrix_x2_trans(fragment, matrix_row(c));
    keep(c, fragment);
}

CASE(ldmatrix_x1) {
    uint32_t fragment[1];
    ldmatrix_x1(fragment, matrix_row(c));
    keep(c, fragment);
}

CASE(ldmatrix_x1_trans) {
    uint32_t fragment[1];
    ldmatrix_x1_trans(fragment, matrix_row(c));
    keep(c, fragment);
}

template <class T>
EF_DEVICE void multiply(const Case& c) {
    const uint32_t a[4] = {given(c, 0), given(c, 1), given(c, 2), given(c, 3)};
    const uint32_t b[2] = {given(c, 4), given(c, 5)};
    float d[4];
    for (int i = 0; i < 4; i++) d[i] = static_cast<float>(given(c, 6 + i) % 1024);
    mma_m16n8k16<T>(d, a, b);
    for (int i = 0; i < 4; i++) mine(c)[i] = float_to_bits(d[i]);
}

CASE(mma_m16n8k16__half) { multiply<Half>(c); }
CASE(mma_m16n8k16__bfloat16) { multiply<BFloat16>(c); }

#ifdef ENCODER_FAST_HOST

std::vector<uint32_t> run_wrapper(const std::string& name, std::vector<uint32_t> in) {
    std::vector<uint32_t> out(8 * kThreads);
    emulation::forbid_all();
    emulation::allow(reinterpret_cast<uintptr_t>(in.data()), 1, 4 * in.size(), 0, false);
    emulation::allow(reinterpret_cast<uintptr_t>(out.data()), 1, 4 * out.size(), 0, true);
    const auto kernel = cases.at(name);
    emulation::run_grid(name, 1, kThreads, 16 * kThreads,
                        [&] { kernel(Case{in.data(), out.data()}); });
    emulation::forbid_all();
    return out;
}

#endif
