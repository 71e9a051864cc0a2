// Work shared among threads.
//
// The threads are those of the OpenMP library that PyTorch has loaded: this extension links none, so
// that its threads and PyTorch's are the same and never compete. Of OpenMP's run time it needs one
// function, GOMP_parallel, which GNU's, LLVM's and Intel's libraries have.

#pragma once

#include <atomic>
#include <cstdint>

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
    std::atomic<int64_t> next{0};
    std::atomic<int> arrived{0};
#pragma omp parallel num_threads(threads)
    {
        const int thread = arrived++;
        for (int64_t i = next++; i < count; i = next++) work(i, thread);
    }
}

}  // namespace encoder_fast::cpu
