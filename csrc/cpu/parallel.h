// Work shared among threads.
//
// The threads are those of the OpenMP library that PyTorch has loaded: this extension links none,
// so that its threads and PyTorch's are the same and never compete. It needs one function, which
// GNU's, LLVM's and Intel's libraries have, and calls it by name: what `#pragma omp` becomes is up
// to the compiler.

#pragma once

#include <atomic>
#include <cstdint>

// Runs `function(data)` on each of `threads` threads, the caller's among them.
extern "C" void GOMP_parallel(void (*function)(void*), void* data, unsigned threads,
                              unsigned flags);

namespace encoder_fast::cpu {

// Calls `work(i, thread)` for each i below `count`, each as soon as a thread is free. `thread` is
// below `threads` and is used by one call at a time.
template <class Work>
void parallel_for(int64_t count, int threads, const Work& work) {
    if (threads > count) threads = static_cast<int>(count);
    if (threads <= 1) {
        for (int64_t i = 0; i < count; ++i) work(i, 0);
        return;
    }
    struct Share {
        const Work& work;
        const int64_t count;
        std::atomic<int64_t> next{0};
        std::atomic<int> arrived{0};

        static void run(void* data) {
            Share& share = *static_cast<Share*>(data);
            const int thread = share.arrived++;
            for (int64_t i = share.next++; i < share.count; i = share.next++) share.work(i, thread);
        }
    } share{work, count};
    GOMP_parallel(Share::run, &share, static_cast<unsigned>(threads), 0);
}

}  // namespace encoder_fast::cpu
