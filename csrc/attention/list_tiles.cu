// The list of query tiles, the longest sequences first: a counting sort by length in one block.

#include "attention/tile_list.cuh"

namespace encoder_fast {
namespace {

constexpr int kListThreads = 512;
// A bucket is a length in steps of kBucketKeys, the longest first; the first holds all beyond.
constexpr int kBuckets = 256;
constexpr int kBucketKeys = 64;
constexpr int kListSharedBytes = kBuckets * 4;

EF_DEVICE int bucket_of(int length) {
    const int steps = (length + kBucketKeys - 1) / kBucketKeys;
    return kBuckets - (steps < kBuckets ? steps : kBuckets);
}

// Turns the buckets' counts into where each begins, by one warp. Returns the sum.
EF_DEVICE int begin_buckets(SharedAddress buckets) {
    constexpr int kOfLane = kBuckets / kWarpSize;
    const SharedAddress own = buckets + lane_id() * kOfLane * 4;
    int counts[kOfLane], sum = 0;
#pragma unroll
    for (int i = 0; i < kOfLane; i++) {
        counts[i] = load_shared<int>(own + 4 * i);
        sum += counts[i];
    }
    int end = sum;
#pragma unroll
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
        const int below = shuffle_up(end, distance);
        end += lane_id() >= distance ? below : 0;
    }
    int begin = end - sum;
#pragma unroll
    for (int i = 0; i < kOfLane; i++) {
        store_shared(own + 4 * i, begin);
        begin += counts[i];
    }
    return shuffle(end, kWarpSize - 1);
}

// Begin, length and number of tiles of a sequence.
struct Tiles {
    int begin, length, n;

    EF_DEVICE Tiles(const AttentionLaunch& p, int sequence)
        : begin(load_global(p.cu_seqlens + sequence)),
          length(load_global(p.cu_seqlens + sequence + 1) - begin) {
        keep_within(p, begin, length);
        n = length > 0 ? (length + p.tile_rows - 1) / p.tile_rows : 0;
    }
};

// One block. The order within a bucket is left to chance; no result depends on it.
__global__ void __launch_bounds__(kListThreads, 1)
list_tiles_kernel(const __grid_constant__ AttentionLaunch p) {
    const SharedAddress buckets = shared_memory();
    const int thread = static_cast<int>(threadIdx.x);
    uint4* const list = static_cast<uint4*>(p.workspace);
    const int most = most_tiles(p);

    for (int i = thread; i < kBuckets; i += kListThreads) store_shared(buckets + 4 * i, 0);
    sync_threads();
    for (int b = thread; b < p.batch; b += kListThreads) {
        const Tiles tiles(p, b);
        if (tiles.n > 0) atomic_add_shared(buckets + 4 * bucket_of(tiles.length), tiles.n);
    }
    sync_threads();
    if (thread < kWarpSize) {
        const uint32_t tiles = static_cast<uint32_t>(begin_buckets(buckets));
        if (thread == 0) store_global(list, uint4{tiles, 0, 0, 0});
    }
    sync_threads();
    for (int b = thread; b < p.batch; b += kListThreads) {
        const Tiles tiles(p, b);
        if (tiles.n == 0) continue;
        const int first = atomic_add_shared(buckets + 4 * bucket_of(tiles.length), tiles.n);
        for (int i = 0; i < tiles.n; i++) {
            // There are more only where sequences overlap, which they never should.
            if (first + i >= most) break;
            const uint32_t row = static_cast<uint32_t>(i * p.tile_rows);
            store_global(list + 1 + first + i, uint4{static_cast<uint32_t>(tiles.begin),
                                                     static_cast<uint32_t>(tiles.length), row, 0});
        }
    }
}

}  // namespace

void list_tiles(const AttentionLaunch& p, Stream stream) {
    launch(list_tiles_kernel, {1, kListThreads, kListSharedBytes}, p, stream,
           "list of tiles for " + describe(p));
}

}  // namespace encoder_fast
