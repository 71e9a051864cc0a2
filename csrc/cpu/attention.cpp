#include "cpu/attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace encoder_fast::cpu {

namespace {

// Tasks a thread, so that all are done at about the same time. A sequence is cut for them, but into
// no more parts than have some 50 queries each, for each task copies the keys.
constexpr int kTasksPerThread = 4;
constexpr int kSmallestChunk = 96;
static_assert(kSmallestChunk % kRows == 0 && kQueryChunk % kSmallestChunk == 0);

using Bounds = std::vector<int32_t>;

std::vector<AttentionTask> tasks_of(const AttentionArguments& args, const Bounds& bounds,
                                    int chunk) {
    std::vector<AttentionTask> tasks;
    for (int b = 0; b < args.batch; ++b) {
        const int64_t start = bounds[b];
        const int length = static_cast<int>(bounds[b + 1] - start);
        const int parts = (length + chunk - 1) / chunk;
        // In equal parts, but for kRows queries that go together, the same ones however it is cut.
        const int rows = parts == 0 ? 0 : (length + parts - 1) / parts;
        const int size = (rows + kRows - 1) / kRows * kRows;
        for (int first = 0; first < length; first += size) {
            const int last = std::min(first + size, length);
            for (int head = 0; head < args.heads; ++head)
                tasks.push_back({start, length, head, first, last});
        }
    }
    return tasks;
}

bool fits(const AttentionArguments& args, const Bounds& bounds) {
    bool fits = bounds.front() == 0 && bounds.back() <= args.total;
    for (int b = 0; b < args.batch; ++b) {
        const int64_t length = int64_t{bounds[b + 1]} - bounds[b];
        fits = fits && length >= 0 && length <= args.max_seqlen;
    }
    return fits;
}

void clear_rows_behind(const AttentionArguments& args, int64_t used) {
    if (used == args.total) return;
    const int64_t size = args.dtype == DType::kFloat32 ? 4 : 2;
    const int64_t row = int64_t{args.heads} * args.head_size * size;
    std::memset(static_cast<char*>(args.out) + used * row, 0, (args.total - used) * row);
}

}  // namespace

int64_t attention_workspace(int head_size) {
    const int64_t size = head_size;
    const int64_t floats =
        2 * kKeyBlock * size + kRows * (kKeyBlock + size) + kQueryChunk * (2 + size);
    return (floats + 15) / 16 * 16;
}

bool attention(const AttentionArguments& args, int isa, int threads) {
    if (args.batch < 0) return false;
    // Read once: another thread of Python's may write it meanwhile.
    const Bounds bounds(args.cu_seqlens, args.cu_seqlens + args.batch + 1);
    if (!fits(args, bounds)) return false;
    clear_rows_behind(args, bounds.back());
    int chunk = kQueryChunk;
    std::vector<AttentionTask> tasks = tasks_of(args, bounds, chunk);
    while (chunk > kSmallestChunk && static_cast<int>(tasks.size()) < kTasksPerThread * threads) {
        chunk /= 2;
        tasks = tasks_of(args, bounds, chunk);
    }
    // The longest first: what comes last is short, and no thread waits long for another.
    std::stable_sort(tasks.begin(), tasks.end(), [](const auto& a, const auto& b) {
        return int64_t{a.length} * (a.last_query - a.first_query) >
               int64_t{b.length} * (b.last_query - b.first_query);
    });
    const Kernels& kernels = kernels_of(isa);
    const int64_t workspace = attention_workspace(args.head_size);
    parallel_for(static_cast<int64_t>(tasks.size()), threads, [&](int64_t i, int thread) {
        kernels.attend(args, tasks[i], args.workspace + thread * workspace);
    });
    return true;
}

}  // namespace encoder_fast::cpu
